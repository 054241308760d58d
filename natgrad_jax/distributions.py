"""Predictive distributions and the losses that come from them.

A loss is a negative log-likelihood of a distribution that the model predicts: that distribution
is what the Fisher samples labels from. Losses keep every distribution they came from.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from natgrad_jax.parallel import psum, vary


@dataclass(frozen=True)
class Distribution:
    """A predictive distribution over targets, one for each example.

    Its first field is the natural output of the network (logits or mean), of shape
    ``(*examples, D)``; all leading axes are examples.
    """

    natural_name: ClassVar[str]

    @property
    def natural(self) -> jax.Array:
        return getattr(self, self.natural_name)

    def with_natural(self, natural: jax.Array) -> "Distribution":
        """The same distribution around another natural output."""
        return replace(self, **{self.natural_name: natural})

    @property
    def examples(self) -> tuple[int, ...]:
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
        absent; constants: no gradient flows into them). Masked examples count for nothing: not
        for the mean, not for the curvature, not for the example count.

        Args:
          targets: what was observed; for :class:`Categorical` class numbers ``(*examples,)`` or
            probabilities ``(*examples, C)``, otherwise an array of the natural output's shape.
          where: optional mask, broadcastable to ``(*examples,)``.
          weights: optional nonnegative weights, broadcastable to ``(*examples,)``.

        Raises:
          ValueError: targets of another shape, or out of range where they are concrete.
        """
        targets = jnp.asarray(targets)
        self.check(targets)
        if not math.prod(self.natural.shape):
            raise ValueError(
                f"{type(self).__name__}.nll got an empty batch: its {self.natural_name} have "
                f"shape {self.natural.shape}. Skip empty batches before the loss."
            )
        weight = _weights(self.examples, where, weights)
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
        if integer and _concrete(targets) and targets.size:
            low, high = _range(targets)
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
        if _concrete(targets) and targets.size:
            low, high = _range(targets)
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


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Term:
    """One negative log-likelihood inside a loss: ``scale · Σ w (−log p) / Σ w``."""

    distribution: Any
    targets: jax.Array
    weight: jax.Array | None
    scale: jax.Array

    @property
    def count(self) -> jax.Array:
        """The number of examples, weighted."""
        if self.weight is None:
            return jnp.asarray(math.prod(self.distribution.examples), jnp.float32)
        return self.weight.sum()

    @property
    def total(self) -> jax.Array:
        """``scale · Σ w (−log p)``."""
        losses = self.distribution.nll_per_example(self.targets)
        if self.weight is not None:
            losses = jnp.where(self.weight > 0, losses * self.weight.astype(losses.dtype), 0)
        return jnp.asarray(self.scale, losses.dtype) * losses.sum()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Loss:
    """A scalar loss that remembers the distributions it came from; a pytree.

    Losses add to one another and to scalars, and scale by scalars. The scalar itself is
    ``loss.value``. Added scalars (weight decay, …) take part in the gradient, not in the Fisher.

    >>> import jax.numpy as jnp
    >>> loss = 2.0 * Gaussian(jnp.zeros((2, 3))).nll(jnp.ones((2, 3))) + 0.5
    >>> float(loss.value)
    3.5
    """

    terms: tuple[Term, ...]
    scalar: jax.Array | None = None

    @property
    def value(self) -> jax.Array:
        """The loss as a scalar array."""
        return self.contribution(())

    def contribution(self, axes: Sequence[str]) -> jax.Array:
        """What this device adds to the global loss: the sum over ``axes`` is the global value."""
        parts = [t.total / positive(global_count(t, axes)) for t in self.terms]
        if self.scalar is not None:
            parts.append(self.scalar / math.prod(jax.lax.axis_size(a) for a in axes))
        return functools.reduce(jnp.add, parts)

    def __add__(self, other: Any) -> "Loss":
        if not isinstance(other, Loss):
            other = Loss((), _scalar(other, "add to a Loss"))
        scalars = [s for s in (self.scalar, other.scalar) if s is not None]
        return Loss(
            self.terms + other.terms, functools.reduce(jnp.add, scalars) if scalars else None
        )

    __radd__ = __add__

    def __mul__(self, other: Any) -> "Loss":
        factor = _scalar(other, "multiply a Loss by")
        terms = tuple(replace(t, scale=t.scale * factor) for t in self.terms)
        return Loss(terms, None if self.scalar is None else self.scalar * factor)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> "Loss":
        return self * (1 / _scalar(other, "divide a Loss by"))


def _weights(examples: tuple[int, ...], where: Any, weights: Any) -> jax.Array | None:
    """The mask and the weights of ``nll`` as one array of the examples' shape, or None."""
    if where is None and weights is None:
        return None
    weight = jnp.ones((), jnp.float32)
    for name, value in (("where", where), ("weights", weights)):
        if value is None:
            continue
        value = jnp.asarray(value)
        lined_up = zip(reversed(value.shape), reversed(examples), strict=False)
        if value.ndim > len(examples) or any(n not in (1, m) for n, m in lined_up):
            raise ValueError(
                f"nll: {name} must broadcast to the examples' shape {examples}; got {value.shape}."
            )
        if name == "weights" and _concrete(value) and _range(value)[0] < 0:
            raise ValueError("nll: weights must not be negative; mask examples out with where=.")
        weight = weight * value
    return jax.lax.stop_gradient(jnp.broadcast_to(weight, examples))


def _scalar(value: Any, doing: str) -> jax.Array:
    if isinstance(value, Loss) or jnp.shape(value) != ():
        what = "a Loss" if isinstance(value, Loss) else f"an array of shape {jnp.shape(value)}"
        raise TypeError(f"Losses add, and scale by scalars: cannot {doing} {what}.")
    return jnp.asarray(value)


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


def global_count(term: Term, axes: Sequence[str]) -> jax.Array:
    """The term's example count over all devices of the named axes."""
    return psum(vary(term.count, axes), axes)


def positive(count: jax.Array) -> jax.Array:
    """``count`` made safe to divide by: nothing divided by no examples is nothing."""
    return jnp.where(count > 0, count, 1)


def _concrete(x: Any) -> bool:
    return not isinstance(x, jax.core.Tracer)


def _range(x: Any) -> tuple[Any, Any]:
    """Least and greatest value of a concrete array; NumPy's, since jit stages JAX's."""
    values = np.asarray(x)
    return values.min(), values.max()
