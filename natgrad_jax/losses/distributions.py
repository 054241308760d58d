"""The predictive distributions: Categorical, Bernoulli and Gaussian."""

from dataclasses import dataclass, field, replace
from typing import ClassVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, DTypeLike, Float, Int, PRNGKeyArray, Real, Shaped

from natgrad_jax.losses.distribution_base import Distribution
from natgrad_jax.losses.likelihood import Likelihood
from natgrad_jax.losses.loss import value_range
from natgrad_jax.utils.hyperparams import is_concrete
from natgrad_jax.utils.precision import at_least_float32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Categorical(Likelihood):
    """A categorical distribution over C classes, given by its logits.

    ``−log p(c) = logsumexp(z) − z_c`` for logits z, the same as ``optax.softmax_cross_entropy``.

    Args:
      logits: ``(*examples, C)``.

    >>> import jax.numpy as jnp
    >>> float(Categorical(jnp.zeros((2, 4))).nll(jnp.array([0, 3])).value)  # log 4
    1.3862...
    """

    logits: Float[Array, "*examples classes"]
    natural_name: ClassVar[str] = "logits"

    def nll_per_example(self, targets: Real[Array, "..."]) -> Float[Array, "*examples"]:
        logits = _wide(self.logits)
        if jnp.issubdtype(targets.dtype, jnp.integer):
            return optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return optax.softmax_cross_entropy(logits, targets)

    def sample(self, key: PRNGKeyArray) -> Int[Array, "*examples"]:
        return jax.random.categorical(key, _wide(self.logits))

    def root_column(self, column: Int[Array, ""] | int) -> Float[Array, "*examples classes"]:
        p = jax.nn.softmax(_wide(self.logits))
        one_hot = jax.nn.one_hot(column, p.shape[-1], dtype=p.dtype)
        return jnp.sqrt(jnp.take(p, column, axis=-1))[..., None] * (one_hot - p)

    def check(self, targets: Shaped[Array, "..."]) -> None:
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
                    f"{self.natural.shape}; got labels from {low} to {high}. Give examples "
                    "without a label the label 0, and mask them with where=."
                )


@dataclass(frozen=True)
class _WithEventAxes(Likelihood):
    """A distribution over arrays of numbers: ``event_ndims`` says which axes are one example."""

    event_ndims: int | None = field(default=None, kw_only=True, metadata={"static": True})

    def with_natural(self, natural: Float[Array, "*outputs"]) -> "Distribution":
        # under vmap over examples the event keeps its number of axes
        return replace(self, **{self.natural_name: natural}, event_ndims=self.event_axes)

    @property
    def event_axes(self) -> int:
        # not checked at construction: JAX rebuilds pytrees with leaves that are no arrays
        ndim, given = self.natural.ndim, self.event_ndims
        if given is None and ndim == 1:
            name, n = f"{type(self).__name__}({self.natural_name}", self.natural.shape[0]
            raise ValueError(
                f"{name}) with {self.natural_name} of shape ({n},) is ambiguous. Write "
                f"{name}, event_ndims=0) for {n} examples of one number each, or "
                f"{name}, event_ndims=1) for one example of {n} numbers, as inside vmap."
            )
        known = min(ndim, 1) if given is None else given
        if isinstance(known, bool) or not isinstance(known, int) or not 0 <= known <= ndim:
            raise ValueError(
                f"{type(self).__name__}: event_ndims is the number of trailing axes of "
                f"{self.natural_name} that are one example: 0 to {ndim} for shape "
                f"{self.natural.shape}; got {known!r}."
            )
        return known

    def _unit(self, column: Int[Array, ""] | int, dtype: DTypeLike) -> Float[Array, "*event"]:
        """The unit vector of one number of an example, in the shape of the event."""
        return jax.nn.one_hot(column, self.columns, dtype=dtype).reshape(self.event)

    def check(self, targets: Shaped[Array, "..."]) -> None:
        if targets.shape != self.natural.shape:
            shape, column = self.natural.shape, (*targets.shape, 1) == self.natural.shape
            raise ValueError(
                f"{type(self).__name__}.nll: targets must have the shape of {self.natural_name}, "
                f"{shape}; got {targets.shape}." + " Write targets[..., None]." * column
            )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Bernoulli(_WithEventAxes):
    """Independent Bernoulli variables, given by their logits.

    ``−log p(y) = Σ_d softplus(z_d) − y_d z_d`` for logits z: ``optax.sigmoid_binary_cross_entropy``
    summed over the numbers of one example.

    Args:
      logits: ``(*examples, *event)``.
      event_ndims: the number of trailing axes that are one example. By default 1. One-dimensional
        logits require it: 0 for N examples of one number each, 1 for one example of N numbers.

    Raises:
      ValueError: (from ``nll``) one-dimensional logits without ``event_ndims``.

    >>> import jax.numpy as jnp
    >>> float(Bernoulli(jnp.zeros((2, 3))).nll(jnp.ones((2, 3))).value)  # 3 log 2
    2.0794...
    >>> float(Bernoulli(jnp.zeros(6), event_ndims=0).nll(jnp.ones(6)).value)  # log 2
    0.6931...
    """

    logits: Float[Array, "*examples_and_event"]
    natural_name: ClassVar[str] = "logits"

    def nll_per_example(self, targets: Real[Array, "*outputs"]) -> Float[Array, "*examples"]:
        logits = _wide(self.logits)
        losses = optax.sigmoid_binary_cross_entropy(logits, targets.astype(logits.dtype))
        return self.over_event(losses)

    def sample(self, key: PRNGKeyArray) -> Float[Array, "*outputs"]:
        p = jax.nn.sigmoid(_wide(self.logits))
        return jax.random.bernoulli(key, p).astype(p.dtype)

    def root_column(self, column: Int[Array, ""] | int) -> Float[Array, "*outputs"]:
        p = jax.nn.sigmoid(_wide(self.logits))
        return jnp.sqrt(p * (1 - p)) * self._unit(column, p.dtype)

    def check(self, targets: Shaped[Array, "..."]) -> None:
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
class Gaussian(_WithEventAxes):
    """A Gaussian with a predicted mean and a given variance.

    ``−log p(y) = ½ (y − μ)ᵀ Σ⁻¹ (y − μ) + ½ log |Σ|`` over the D numbers of one example, without
    the constant ``½ D log 2π``. With the default variance it is ``optax.l2_loss`` summed over the
    numbers of one example.

    Args:
      mean: ``(*examples, *event)``.
      variance: a scalar; or, with one event axis, ``(D,)`` for each dimension or a covariance
        ``(D, D)``; in units of the target squared. The Fisher treats it as a constant.
      event_ndims: the number of trailing axes that are one example. By default 1 (0 for a scalar
        mean). A one-dimensional mean requires it: 0 for N examples of one number each, 1 for one
        example of N numbers. Use 3 for images ``(N, H, W, C)``.

    Raises:
      ValueError: (from ``nll``) a one-dimensional mean without ``event_ndims``, or a variance of
        another shape.

    >>> import jax.numpy as jnp
    >>> float(Gaussian(jnp.zeros((2, 3)), variance=1.0).nll(jnp.ones((2, 3))).value)
    1.5
    >>> float(Gaussian(jnp.zeros(6), event_ndims=0).nll(jnp.ones(6)).value)
    0.5
    """

    mean: Float[Array, "*examples_and_event"]
    variance: Float[Array, "*variance"] | float = 1.0
    natural_name: ClassVar[str] = "mean"

    def _root(self) -> tuple[Float[Array, "..."], bool]:
        """L with ``L Lᵀ = Σ``, and whether it is a Cholesky factor ``(D, D)``.

        Without correlations L holds the standard deviations, in the event's shape.
        """
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

    def _solve(self, x: Float[Array, "*shape"], transpose: bool = False) -> Float[Array, "*shape"]:
        """``L⁻¹ x``, or ``L⁻ᵀ x``."""
        root, correlated = self._root()
        if not correlated:
            return x / root
        flat = x.reshape(-1, x.shape[-1]).T
        solved = jax.scipy.linalg.solve_triangular(root, flat, lower=True, trans=int(transpose))
        return solved.T.reshape(x.shape)

    def nll_per_example(self, targets: Real[Array, "*outputs"]) -> Float[Array, "*examples"]:
        mean, (root, correlated) = _wide(self.mean), self._root()
        white = self._solve(targets.astype(mean.dtype) - mean)
        deviations = jnp.diagonal(root) if correlated else root
        return 0.5 * self.over_event(white**2) + jnp.sum(jnp.log(deviations))

    def sample(self, key: PRNGKeyArray) -> Float[Array, "*outputs"]:
        mean, (root, correlated) = _wide(self.mean), self._root()
        noise = jax.random.normal(key, mean.shape, mean.dtype)
        return mean + (noise @ root.T if correlated else noise * root)

    def root_column(self, column: Int[Array, ""] | int) -> Float[Array, "*outputs"]:
        zeros = jnp.zeros_like(_wide(self.mean))  # sharded like the mean
        return zeros + self._solve(self._unit(column, zeros.dtype), transpose=True)


def _wide(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """``x`` in at least float32: likelihoods are not summed in half precision."""
    return x.astype(at_least_float32(x.dtype))
