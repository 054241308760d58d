"""Predictive distributions and the losses that come from them.

A loss is a negative log-likelihood of a distribution that the model predicts: that distribution
is what the Fisher samples labels from. Losses keep every distribution they came from.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from natgrad_jax.losses.loss import Loss, Term, example_weights, value_range
from natgrad_jax.utils.hyperparams import is_concrete
from natgrad_jax.utils.precision import at_least_float32


@dataclass(frozen=True)
class Distribution:
    """A predictive distribution over targets, one for each example.

    Its first field is the natural output of the network (logits or mean), of shape
    ``(*examples, *event)``: the last ``event_axes`` axes are one example, all others are examples.
    """

    natural_name: ClassVar[str]

    @property
    def natural(self) -> jax.Array:
        """The natural output of the network, ``(*examples, *event)``."""
        return getattr(self, self.natural_name)

    def with_natural(self, natural: jax.Array) -> "Distribution":
        """The same distribution around another natural output."""
        return replace(self, **{self.natural_name: natural})

    @property
    def event_axes(self) -> int:
        """How many trailing axes of the natural output are one example."""
        return 1

    @property
    def examples(self) -> tuple[int, ...]:
        """The shape of the examples: all axes before the event's."""
        return self.natural.shape[: self.natural.ndim - self.event_axes]

    @property
    def event(self) -> tuple[int, ...]:
        """The shape of one example."""
        return self.natural.shape[self.natural.ndim - self.event_axes :]

    @property
    def columns(self) -> int:
        """Columns of the square root of one example's output Hessian."""
        return math.prod(self.event)

    def beside_event(self, x: jax.Array) -> jax.Array:
        """``x``, a number for each example, with unit axes for the event: to weigh outputs by."""
        return jnp.expand_dims(x, tuple(range(-self.event_axes, 0)))

    def over_event(self, x: jax.Array, keepdims: bool = False) -> jax.Array:
        """The sum of ``x``, of the natural output's shape, over each example's own axes."""
        return jnp.sum(x, axis=tuple(range(-self.event_axes, 0)), keepdims=keepdims)

    def nll_per_example(self, targets: jax.Array) -> jax.Array:
        """``−log p(target)`` of each example: ``(*examples,)``, without additive constants."""
        raise NotImplementedError

    def sample(self, key: jax.Array) -> jax.Array:
        """Targets drawn from the distribution."""
        raise NotImplementedError

    def root_column(self, column: jax.Array | int) -> jax.Array:
        """One column of a square root R of each output Hessian ``R Rᵀ``, in the output's shape."""
        raise NotImplementedError

    def check(self, targets: Any) -> None:
        """Raise where concrete targets cannot be targets of this distribution."""

    def nll(self, targets: Any, where: Any = None, weights: Any = None) -> "Loss":
        """The mean negative log-likelihood over examples, as a :class:`Loss`.

        ``Σ w (−log p) / Σ w`` over all axes of examples, with ``w = where · weights`` (one each
        where absent; constants: no gradient flows into them). Masked examples add nothing to the
        loss, to the output factors and to the example count; what layers see of them still enters
        the input factors, as a mean over all rows that a layer was run on.

        Negative multiples of a loss have a gradient and no curvature.

        Args:
          targets: what was observed; for :class:`Categorical` class numbers ``(*examples,)`` or
            probabilities ``(*examples, C)``, otherwise an array of the natural output's shape.
          where: optional mask, broadcastable to ``(*examples,)``.
          weights: optional nonnegative weights, broadcastable to ``(*examples,)``. Under ``jit``,
            where nothing can raise, negative ones make loss and gradients NaN.

        Raises:
          ValueError: targets of another shape, or targets or weights out of range where they are
            concrete.
        """
        targets = jnp.asarray(targets)
        weight = example_weights(self, where, weights)
        if weight is not None and targets.shape[: len(self.examples)] == self.examples:
            # what masked examples hold (−1, NaN) must not get anywhere
            counts = weight > 0
            if targets.ndim > counts.ndim:
                counts = self.beside_event(counts)
            targets = jnp.where(counts, targets, jnp.zeros((), targets.dtype))
        self.check(targets)
        if not math.prod(self.natural.shape):
            raise ValueError(
                f"{type(self).__name__}.nll got an empty batch: its {self.natural_name} have "
                f"shape {self.natural.shape}. Skip empty batches before the loss."
            )
        return Loss((Term(self, targets, weight),))


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


@dataclass(frozen=True)
class _OfNumbers(Distribution):
    """A distribution over numbers, where shapes alone do not tell what one example is."""

    event_ndims: int | None = field(default=None, kw_only=True, metadata={"static": True})

    def with_natural(self, natural: jax.Array) -> "Distribution":
        # mapped over examples, each has as many axes of its own as before
        return replace(self, **{self.natural_name: natural}, event_ndims=self.event_axes)

    @property
    def event_axes(self) -> int:
        # not checked when constructed: JAX constructs pytrees around anything, also inside vmap
        ndim, given = self.natural.ndim, self.event_ndims
        if given is None and ndim == 1:
            name, n = f"{type(self).__name__}({self.natural_name}", self.natural.shape[0]
            raise ValueError(
                f"{name}) with {self.natural_name} of shape ({n},) can be two things; say which: "
                f"{name}, event_ndims=0) is {n} examples of one number each, and "
                f"{name}, event_ndims=1) one example of {n} numbers, as inside vmap."
            )
        known = min(ndim, 1) if given is None else given
        if isinstance(known, bool) or not isinstance(known, int) or not 0 <= known <= ndim:
            raise ValueError(
                f"{type(self).__name__}: event_ndims says how many trailing axes of "
                f"{self.natural_name} are one example: 0 to {ndim} for shape {self.natural.shape}; "
                f"got {known!r}."
            )
        return known

    def _unit(self, column: jax.Array | int, dtype: Any) -> jax.Array:
        """One number of an example: 1 there and 0 elsewhere, in the shape of one example."""
        return jax.nn.one_hot(column, self.columns, dtype=dtype).reshape(self.event)

    def check(self, targets: Any) -> None:
        if targets.shape != self.natural.shape:
            shape, column = self.natural.shape, (*targets.shape, 1) == self.natural.shape
            raise ValueError(
                f"{type(self).__name__}.nll: targets must have the shape of {self.natural_name}, "
                f"{shape}; got {targets.shape}." + " Write targets[..., None]." * column
            )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Bernoulli(_OfNumbers):
    """Independent Bernoulli variables, from logits.

    ``−log p(y) = Σ_d softplus(z_d) − y_d z_d``; equals ``optax.sigmoid_binary_cross_entropy``
    summed over the axes of one example.

    Args:
      logits: ``(*examples, *event)``.
      event_ndims: how many trailing axes are one example; the others are examples. 1 where logits
        have at least two axes; one axis alone needs it said: 0 for N examples of one number each,
        1 for one example of N numbers.

    Raises:
      ValueError: (from ``nll``) one-dimensional logits without ``event_ndims``.

    >>> import jax.numpy as jnp
    >>> float(Bernoulli(jnp.zeros((2, 3))).nll(jnp.ones((2, 3))).value)  # 3 log 2
    2.0794...
    >>> float(Bernoulli(jnp.zeros(6), event_ndims=0).nll(jnp.ones(6)).value)  # log 2
    0.6931...
    """

    logits: jax.Array
    natural_name: ClassVar[str] = "logits"

    def nll_per_example(self, targets: jax.Array) -> jax.Array:
        logits = _wide(self.logits)
        losses = optax.sigmoid_binary_cross_entropy(logits, targets.astype(logits.dtype))
        return self.over_event(losses)

    def sample(self, key: jax.Array) -> jax.Array:
        p = jax.nn.sigmoid(_wide(self.logits))
        return jax.random.bernoulli(key, p).astype(p.dtype)

    def root_column(self, column: jax.Array | int) -> jax.Array:
        p = jax.nn.sigmoid(_wide(self.logits))
        return jnp.sqrt(p * (1 - p)) * self._unit(column, p.dtype)

    def check(self, targets: Any) -> None:
        super().check(targets)
        if is_concrete(targets) and targets.size:
            low, high = value_range(targets)
            if not (low >= 0 and high <= 1):
                raise ValueError(
                    f"Bernoulli.nll: targets must lie in [0, 1]; got values from {low:g} to "
                    f"{high:g}. Scale images by 1/255, or use Gaussian for unbounded targets."
                )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Gaussian(_OfNumbers):
    """A Gaussian around a predicted mean.

    ``−log p(y) = ½ (y − μ)ᵀ Σ⁻¹ (y − μ) + ½ log |Σ|``, the constant ``½ D log 2π`` left out, of the
    D numbers of one example; with the default variance it equals ``optax.l2_loss`` summed over
    them.

    Args:
      mean: ``(*examples, *event)``.
      variance: a scalar, or with one event axis ``(D,)`` for each dimension or a covariance
        ``(D, D)``; in units of the target squared. Its curvature is not part of the Fisher.
      event_ndims: how many trailing axes are one example; the others are examples. 1 where the mean
        has at least two axes (0 where it has none); one axis alone needs it said: 0 for N examples
        of one number each, 1 for one example of N numbers. 3 for images ``(N, H, W, C)``, each
        one example.

    Raises:
      ValueError: (from ``nll``) a one-dimensional mean without ``event_ndims``, or a variance of
        another shape.

    >>> import jax.numpy as jnp
    >>> float(Gaussian(jnp.zeros((2, 3)), variance=1.0).nll(jnp.ones((2, 3))).value)
    1.5
    >>> float(Gaussian(jnp.zeros(6), event_ndims=0).nll(jnp.ones(6)).value)
    0.5
    """

    mean: jax.Array
    variance: jax.Array | float = 1.0
    natural_name: ClassVar[str] = "mean"

    def _root(self) -> tuple[jax.Array, bool]:
        """L with ``L Lᵀ = Σ``: the Cholesky factor, or standard deviations in the event's shape;
        and whether it is a Cholesky factor."""
        variance = _wide(jnp.asarray(self.variance, _wide(self.mean).dtype))
        d, vector = self.columns, self.event_axes == 1
        if variance.shape not in ((), *((d,), (d, d)) * vector):
            also = f", ({d},) or a covariance ({d}, {d})" if vector else ""
            raise ValueError(
                f"Gaussian: for a mean of shape {self.natural.shape} with event_ndims="
                f"{self.event_axes} the variance is a scalar{also}; got shape {variance.shape}."
            )
        if variance.ndim == 2:
            return jnp.linalg.cholesky(variance), True
        return jnp.broadcast_to(jnp.sqrt(variance), self.event), False

    def _solve(self, x: jax.Array, transpose: bool = False) -> jax.Array:
        root, correlated = self._root()
        if not correlated:
            return x / root
        flat = x.reshape(-1, x.shape[-1]).T
        solved = jax.scipy.linalg.solve_triangular(root, flat, lower=True, trans=int(transpose))
        return solved.T.reshape(x.shape)

    def nll_per_example(self, targets: jax.Array) -> jax.Array:
        mean, (root, correlated) = _wide(self.mean), self._root()
        white = self._solve(targets.astype(mean.dtype) - mean)
        deviations = jnp.diagonal(root) if correlated else root
        return 0.5 * self.over_event(white**2) + jnp.sum(jnp.log(deviations))

    def sample(self, key: jax.Array) -> jax.Array:
        mean, (root, correlated) = _wide(self.mean), self._root()
        noise = jax.random.normal(key, mean.shape, mean.dtype)
        return mean + (noise @ root.T if correlated else noise * root)

    def root_column(self, column: jax.Array | int) -> jax.Array:
        nothing = jnp.zeros_like(_wide(self.mean))  # sharded as the mean is
        return nothing + self._solve(self._unit(column, nothing.dtype), transpose=True)


def _wide(x: jax.Array) -> jax.Array:
    """At least float32: likelihoods are not summed in half precision."""
    return x.astype(at_least_float32(x.dtype))
