"""Predictive distributions and the losses that come from them.

A loss is a negative log-likelihood of a distribution that the model predicts: that distribution
is what the Fisher samples labels from. Losses keep every distribution they came from.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from natgrad_jax.losses import Loss, Term, example_weights, is_concrete, value_range


@dataclass(frozen=True)
class Distribution:
    """A predictive distribution over targets, one for each example.

    Its first field is the natural output of the network (logits or mean), of shape
    ``(*examples, D)``; all leading axes are examples.
    """

    natural_name: ClassVar[str]

    @property
    def natural(self) -> jax.Array:
        """The natural output of the network, ``(*examples, D)``."""
        return getattr(self, self.natural_name)

    def with_natural(self, natural: jax.Array) -> "Distribution":
        """The same distribution around another natural output."""
        return replace(self, **{self.natural_name: natural})

    @property
    def examples(self) -> tuple[int, ...]:
        """The shape of the examples: all axes but the last."""
        return self.natural.shape[:-1]

    @property
    def columns(self) -> int:
        """Columns of the square root of one example's output Hessian."""
        return self.natural.shape[-1]

    def nll_per_example(self, targets: jax.Array) -> jax.Array:
        """``−log p(target)`` of each example: ``(*examples,)``, without additive constants."""
        raise NotImplementedError

    def sample(self, key: jax.Array) -> jax.Array:
        """Targets drawn from the distribution."""
        raise NotImplementedError

    def root_column(self, column: jax.Array | int) -> jax.Array:
        """One column of a square root R of each output Hessian ``R Rᵀ``: ``(*examples, D)``."""
        raise NotImplementedError

    def check(self, targets: Any) -> None:
        """Raise where concrete targets cannot be targets of this distribution."""

    def nll(self, targets: Any, where: Any = None, weights: Any = None) -> "Loss":
        """The mean negative log-likelihood over examples, as a :class:`Loss`.

        ``Σ w (−log p) / Σ w`` over all leading axes, with ``w = where · weights`` (one each where
        absent; constants: no gradient flows into them). Masked examples add nothing to the loss,
        to the output factors and to the example count; what layers see of them still enters
        the input factors, as a mean over all rows that a layer was run on.

        Negative multiples of a loss have a gradient and no curvature.

        Args:
          targets: what was observed; for :class:`Categorical` class numbers ``(*examples,)`` or
            probabilities ``(*examples, C)``, otherwise an array of the natural output's shape.
          where: optional mask, broadcastable to ``(*examples,)``.
          weights: optional nonnegative weights, broadcastable to ``(*examples,)``.

        Raises:
          ValueError: targets of another shape, or out of range where they are concrete.
        """
        targets = jnp.asarray(targets)
        weight = example_weights(self.examples, where, weights)
        if weight is not None and targets.shape[: len(self.examples)] == self.examples:
            # what masked examples hold (−1, NaN) must not get anywhere
            counts = weight > 0 if targets.ndim == len(self.examples) else (weight > 0)[..., None]
            targets = jnp.where(counts, targets, jnp.zeros((), targets.dtype))
        self.check(targets)
        if not math.prod(self.natural.shape):
            raise ValueError(
                f"{type(self).__name__}.nll got an empty batch: its {self.natural_name} have "
                f"shape {self.natural.shape}. Skip empty batches before the loss."
            )
        return Loss((Term(self, targets, weight, jnp.asarray(1.0)),))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Categorical(Distribution):
    """A categorical distribution over C classes, from logits.

    ``−log p(c) = logsumexp(z) − z_c``; equals ``optax.softmax_cross_entropy``.

    Args:
      logits: ``(*examples, C)``.

    >>> import jax.numpy as jnp
    >>> float(Categorical(jnp.zeros((2, 4))).nll(jnp.array([0, 3])).value)  # log 4
    1.3862...
    """

    logits: jax.Array
    natural_name: ClassVar[str] = "logits"

    def nll_per_example(self, targets: jax.Array) -> jax.Array:
        logits = _wide(self.logits)
        if jnp.issubdtype(targets.dtype, jnp.integer):
            return optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return optax.softmax_cross_entropy(logits, targets)

    def sample(self, key: jax.Array) -> jax.Array:
        return jax.random.categorical(key, _wide(self.logits))

    def root_column(self, column: jax.Array | int) -> jax.Array:
        p = jax.nn.softmax(_wide(self.logits))
        one_hot = jax.nn.one_hot(column, p.shape[-1], dtype=p.dtype)
        return jnp.sqrt(jnp.take(p, column, axis=-1))[..., None] * (one_hot - p)

    def check(self, targets: Any) -> None:
        integer = jnp.issubdtype(targets.dtype, jnp.integer)
        wanted = self.examples if integer else self.natural.shape
        if targets.shape != wanted:
            raise ValueError(
                f"Categorical.nll: logits of shape {self.natural.shape} take integer targets of "
                f"shape {self.examples} or probabilities of shape {self.natural.shape}; got "
                f"{targets.dtype} targets of shape {targets.shape}."
            )
        classes = self.natural.shape[-1]
        if integer and is_concrete(targets) and targets.size:
            low, high = value_range(targets)
            if low < 0 or high >= classes:
                raise ValueError(
                    f"Categorical.nll: labels must lie in 0..{classes - 1} for logits of shape "
                    f"{self.natural.shape}; got labels from {low} to {high}. Mask examples "
                    "without a label with where=, and give them label 0."
                )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Bernoulli(Distribution):
    """Independent Bernoulli variables, from logits; the last axis belongs to one example.

    ``−log p(y) = Σ_d softplus(z_d) − y_d z_d``; equals ``optax.sigmoid_binary_cross_entropy``
    summed over the last axis.

    Args:
      logits: ``(*examples, D)``.

    >>> import jax.numpy as jnp
    >>> float(Bernoulli(jnp.zeros((2, 3))).nll(jnp.ones((2, 3))).value)  # 3 log 2
    2.0794...
    """

    logits: jax.Array
    natural_name: ClassVar[str] = "logits"

    def nll_per_example(self, targets: jax.Array) -> jax.Array:
        logits = _wide(self.logits)
        losses = optax.sigmoid_binary_cross_entropy(logits, targets.astype(logits.dtype))
        return losses.sum(-1)

    def sample(self, key: jax.Array) -> jax.Array:
        p = jax.nn.sigmoid(_wide(self.logits))
        return jax.random.bernoulli(key, p).astype(p.dtype)

    def root_column(self, column: jax.Array | int) -> jax.Array:
        p = jax.nn.sigmoid(_wide(self.logits))
        return jnp.sqrt(p * (1 - p)) * jax.nn.one_hot(column, p.shape[-1], dtype=p.dtype)

    def check(self, targets: Any) -> None:
        _same_shape(self, targets)
        if is_concrete(targets) and targets.size:
            low, high = value_range(targets)
            if not (low >= 0 and high <= 1):
                raise ValueError(
                    f"Bernoulli.nll: targets must lie in [0, 1]; got values from {low:g} to "
                    f"{high:g}. Scale images by 1/255, or use Gaussian for unbounded targets."
                )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Gaussian(Distribution):
    """A Gaussian around a predicted mean; the last axis belongs to one example.

    ``−log p(y) = ½ (y − μ)ᵀ Σ⁻¹ (y − μ) + ½ log |Σ|``, the constant ``½ D log 2π`` left out; with
    the default variance it equals ``optax.l2_loss`` summed over the last axis.

    Args:
      mean: ``(*examples, D)``.
      variance: a scalar, ``(D,)`` for each dimension, or a covariance ``(D, D)``; in units of the
        target squared. Its curvature is not part of the Fisher.

    >>> import jax.numpy as jnp
    >>> float(Gaussian(jnp.zeros((2, 3)), variance=1.0).nll(jnp.ones((2, 3))).value)
    1.5
    """

    mean: jax.Array
    variance: jax.Array | float = 1.0
    natural_name: ClassVar[str] = "mean"

    def _root(self) -> jax.Array:
        """L with ``L Lᵀ = Σ``: standard deviations, or the Cholesky factor."""
        variance = _wide(jnp.asarray(self.variance, _wide(self.mean).dtype))
        d = self.natural.shape[-1]
        if variance.shape not in ((), (d,), (d, d)):
            raise ValueError(
                f"Gaussian: for a mean of shape {self.natural.shape} the variance is a scalar, "
                f"({d},) or a covariance ({d}, {d}); got shape {variance.shape}."
            )
        if variance.ndim == 2:
            return jnp.linalg.cholesky(variance)
        return jnp.broadcast_to(jnp.sqrt(variance), (d,))

    def _solve(self, x: jax.Array, transpose: bool = False) -> jax.Array:
        root = self._root()
        if root.ndim == 1:
            return x / root
        flat = x.reshape(-1, x.shape[-1]).T
        solved = jax.scipy.linalg.solve_triangular(root, flat, lower=True, trans=int(transpose))
        return solved.T.reshape(x.shape)

    def nll_per_example(self, targets: jax.Array) -> jax.Array:
        mean, root = _wide(self.mean), self._root()
        white = self._solve(targets.astype(mean.dtype) - mean)
        diagonal = jnp.diagonal(root) if root.ndim == 2 else root
        return 0.5 * jnp.sum(white**2, axis=-1) + jnp.sum(jnp.log(diagonal))

    def sample(self, key: jax.Array) -> jax.Array:
        mean, root = _wide(self.mean), self._root()
        noise = jax.random.normal(key, mean.shape, mean.dtype)
        return mean + (noise * root if root.ndim == 1 else noise @ root.T)

    def root_column(self, column: jax.Array | int) -> jax.Array:
        d = self.natural.shape[-1]
        unit = jax.nn.one_hot(column, d, dtype=_wide(self.mean).dtype)
        return jnp.broadcast_to(self._solve(unit[None], transpose=True)[0], self.natural.shape)

    def check(self, targets: Any) -> None:
        _same_shape(self, targets)


def _same_shape(distribution: Distribution, targets: jax.Array) -> None:
    if targets.shape != distribution.natural.shape:
        name = type(distribution).__name__
        raise ValueError(
            f"{name}.nll: targets must have the shape of {distribution.natural_name}, "
            f"{distribution.natural.shape}; got {targets.shape}."
        )


def _wide(x: jax.Array) -> jax.Array:
    """At least float32: likelihoods are not summed in half precision."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
