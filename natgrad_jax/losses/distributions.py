"""The predictive distributions of most losses: Categorical, Bernoulli and Gaussian."""

import warnings
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, Real, Shaped

from natgrad_jax.losses.distribution_base import Outputs
from natgrad_jax.losses.likelihood import Distribution
from natgrad_jax.losses.output_fisher import Entries
from natgrad_jax.losses.terms import value_range
from natgrad_jax.utils.hyperparams import is_concrete


class Categorical(Distribution):
    """A categorical distribution over C classes, given by its logits.

    ``−log p(c) = logsumexp(z) − z_c`` for logits z, the same as ``optax.softmax_cross_entropy``.

    Args:
      logits: ``(*examples, C)``.
      event_ndims: the number of axes before the classes that belong to one example. By default 0:
        tokens are averaged over. 1 for an action that consists of several choices.

    >>> import jax.numpy as jnp
    >>> float(Categorical(jnp.zeros((2, 4))).nll(jnp.array([0, 3])).value)  # log 4
    1.3862...
    """

    logits: Float[Array, "*examples classes"]
    features: ClassVar[Mapping[str, int]] = {"logits": 1}
    usual_event_ndims: ClassVar[int] = 0

    def log_prob(self, targets: Real[Array, "..."]) -> Float[Array, "*examples"]:
        if jnp.issubdtype(targets.dtype, jnp.integer):
            return -optax.softmax_cross_entropy_with_integer_labels(self.logits, targets)
        return -optax.softmax_cross_entropy(self.logits, targets)

    def sample(self, key: PRNGKeyArray) -> Int[Array, "*examples"]:
        return jax.random.categorical(key, self.logits)

    @property
    def columns_of_number(self) -> int:
        return self.logits.shape[-1]

    def root_of_numbers(self, column: Int[Array, ""] | int) -> Outputs:
        p = jax.nn.softmax(self.logits)
        one_hot = jax.nn.one_hot(column, p.shape[-1], dtype=p.dtype)
        return {"logits": jnp.sqrt(jnp.take(p, column, axis=-1))[..., None] * (one_hot - p)}

    def coordinates(self, gradient: Outputs) -> Float[Array, "*examples columns"]:
        """``g / √p``, for a gradient whose sum over the classes is zero."""
        p = jax.nn.softmax(self.wide().logits)
        return (gradient["logits"] / jnp.sqrt(p)).reshape(*self.examples, self.columns)

    def check(self, targets: Shaped[Array, "..."]) -> None:
        integer = jnp.issubdtype(targets.dtype, jnp.integer)
        wanted = self.numbers if integer else self.logits.shape
        if targets.shape != wanted:
            raise ValueError(
                f"Categorical.nll: logits of shape {self.logits.shape} take integer targets of "
                f"shape {self.numbers} or probabilities of shape {self.logits.shape}; got "
                f"{targets.dtype} targets of shape {targets.shape}."
            )
        classes = self.logits.shape[-1]
        if integer and is_concrete(targets) and targets.size:
            low, high = value_range(targets)
            if low < 0 or high >= classes:
                raise ValueError(
                    f"Categorical.nll: labels must lie in 0..{classes - 1} for logits of shape "
                    f"{self.logits.shape}; got labels from {low} to {high}. Give examples "
                    "without a label the label 0, and mask them with where=."
                )


class Bernoulli(Distribution):
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

    def log_prob(self, targets: Real[Array, "*outputs"]) -> Float[Array, "*outputs"]:
        return -optax.sigmoid_binary_cross_entropy(self.logits, targets.astype(self.logits.dtype))

    def sample(self, key: PRNGKeyArray) -> Float[Array, "*outputs"]:
        p = jax.nn.sigmoid(self.logits)
        return jax.random.bernoulli(key, p).astype(p.dtype)

    def fisher(self) -> Entries:
        p = jax.nn.sigmoid(self.logits)
        return ((p * (1 - p),),)

    def check(self, targets: Shaped[Array, "..."]) -> None:
        super().check(targets)
        if is_concrete(targets) and targets.size:
            low, high = value_range(targets)
            if not (low >= 0 and high <= 1):
                raise ValueError(
                    f"Bernoulli.nll: targets must lie in [0, 1]; got values from {low:g} to "
                    f"{high:g}. Scale images by 1/255, or use Gaussian for unbounded targets."
                )


class Gaussian(Distribution):
    """A Gaussian with a predicted mean, and a given or predicted variance.

    ``−log p(y) = ½ (y − μ)ᵀ Σ⁻¹ (y − μ) + ½ log |Σ|`` over the D numbers of one example, without
    the constant ``½ D log 2π``. With the default variance it is ``optax.l2_loss`` summed over the
    numbers of one example. The Fisher is ``1/σ²`` over a mean and ``1/(2σ⁴)`` over a variance;
    ``tr(Σ⁻¹ dΣ Σ⁻¹ dΣ)/2`` over a covariance.

    Args:
      mean: ``(*examples, *event)``.
      variance: broadcasts to the mean: a number, ``(D,)`` for each dimension, or of the mean's
        shape; in units of the target squared. If it depends on parameters (``jnp.exp(log_var)``),
        so does the Fisher. Instead of it
      covariance: ``(D, D)`` or ``(*examples, D, D)``, for a mean with one event axis.
      event_ndims: the number of trailing axes that are one example. By default 1 (0 for a scalar
        mean). A one-dimensional mean requires it: 0 for N examples of one number each, 1 for one
        example of N numbers. Use 3 for images ``(N, H, W, C)``.

    Raises:
      ValueError: (from ``nll``) a one-dimensional mean without ``event_ndims``, a variance or
        covariance of another shape, or both.

    >>> import jax.numpy as jnp
    >>> float(Gaussian(jnp.zeros((2, 3)), variance=1.0).nll(jnp.ones((2, 3))).value)
    1.5
    >>> float(Gaussian(jnp.zeros(6), event_ndims=0).nll(jnp.ones(6)).value)
    0.5
    """

    mean: Float[Array, "*examples_and_event"]
    variance: Float[Array, "*variance"] | float | None = None
    covariance: Float[Array, "*examples D D"] | None = None
    features: ClassVar[Mapping[str, int]] = {"covariance": 1}

    @property
    def numbers(self) -> tuple[int, ...]:
        mean = np.shape(self.mean)
        for name in ("variance", "covariance"):
            features = self.features.get(name, 0)
            x = np.shape(getattr(self, name))
            fits = len(x) - features <= len(mean) and all(
                n in (1, m) for n, m in zip(x[::-1][features:], mean[::-1], strict=False)
            )
            square = not features or x[-1:] == mean[-1:] == x[-2:-1]
            if getattr(self, name) is not None and not (fits and square):
                raise ValueError(_wrong_shape(name, x, mean))
        return mean

    def broadcast(self) -> "Gaussian":
        mean, variance = np.shape(self.mean), np.shape(self.parametrized.get("variance", 0.0))
        if self.variance is not None and self.covariance is not None:
            raise ValueError("Gaussian: give variance= or covariance=, not both.")
        if self.covariance is not None and self.event_axes != 1:
            raise ValueError(
                f"Gaussian: covariance= is for one event axis; got event_ndims={self.event_axes}. "
                "Write event_ndims=1, or variance=."
            )
        if len(variance) == 2 and variance == mean and mean[0] == mean[1] > 1:
            warnings.warn(
                f"Gaussian: a variance of shape {variance}, the mean's shape, is the variance of "
                "each number. If it is a covariance matrix, write covariance=.",
                stacklevel=3,
            )
        return super().broadcast()

    def _deviation(self) -> Float[Array, "..."] | float:
        """The standard deviations."""
        return jnp.sqrt(jnp.asarray(1.0 if self.variance is None else self.variance))

    def _whitened(self, targets: Float[Array, "*outputs"]) -> Float[Array, "*outputs"]:
        if self.covariance is None:
            return (targets - self.mean) / self._deviation()
        root, x = self._cholesky(), targets - self.mean
        return jax.scipy.linalg.solve_triangular(root, x[..., None], lower=True)[..., 0]

    def _cholesky(self) -> Float[Array, "*examples D D"]:
        return jnp.linalg.cholesky(self.covariance)

    def log_prob(self, targets: Real[Array, "*outputs"]) -> Float[Array, "*outputs"]:
        if self.covariance is None:
            deviations = self._deviation()
        else:
            deviations = jnp.diagonal(self._cholesky(), axis1=-2, axis2=-1)
        return -0.5 * self._whitened(targets) ** 2 - jnp.log(deviations)

    def sample(self, key: PRNGKeyArray) -> Float[Array, "*outputs"]:
        noise = jax.random.normal(key, self.mean.shape, self.mean.dtype)
        if self.covariance is None:
            return self.mean + noise * self._deviation()
        return self.mean + jnp.einsum("...ij,...j->...i", self._cholesky(), noise)

    def fisher(self) -> Entries:
        v = jnp.asarray(1.0 if self.variance is None else self.variance)
        return (1 / v, 0.0), (0.0, 0.5 / v**2)

    @property
    def columns(self) -> int:
        if self.covariance is None:
            return super().columns
        d = self.event[0]
        return d + ("covariance" not in self.fixed) * d * d

    def root_column(self, column: Int[Array, ""] | int) -> Outputs:
        """With a covariance ``L Lᵀ``: columns ``L⁻ᵀ e_a`` of the mean, ``L⁻ᵀ e_a e_bᵀ L⁻¹ / √2``
        of the covariance."""
        if self.covariance is None:
            return super().root_column(column)
        wide, d = self.wide(), self.event[0]
        root = wide._cholesky()
        unit = jnp.broadcast_to(jnp.eye(d, dtype=root.dtype), root.shape)
        inverse = jax.scipy.linalg.solve_triangular(root, unit, lower=True)
        row = lambda i: jnp.take(inverse, i, axis=-2)
        column = jnp.asarray(column)
        of_mean, at = column < d, jnp.maximum(column - d, 0)
        found = {"mean": jnp.zeros_like(wide.mean) + jnp.where(of_mean, row(column % d), 0)}
        if "covariance" not in self.fixed:
            outer = row(at // d)[..., :, None] * row(at % d)[..., None, :] / jnp.sqrt(2.0)
            found["covariance"] = jnp.where(of_mean, 0, outer)
        return found

    def coordinates(self, gradient: Outputs) -> Float[Array, "*examples columns"]:
        """``Lᵀ g`` of the mean, ``√2 Lᵀ G L`` of the covariance."""
        if self.covariance is None:
            return self.coordinates_of_numbers(gradient)
        root = self.wide()._cholesky()
        found = [jnp.einsum("...ij,...i->...j", root, gradient["mean"])]
        if "covariance" not in self.fixed:
            inside = root.mT @ gradient["covariance"] @ root * jnp.sqrt(2.0)
            found.append(inside.reshape(*self.examples, -1))
        return jnp.concatenate(found, -1)


def _wrong_shape(name: str, shape: tuple[int, ...], mean: tuple[int, ...]) -> str:
    d = mean[-1:] or (1,)
    if name == "covariance":
        return (
            f"Gaussian: for a mean of shape {mean} a covariance has shape {d * 2} or "
            f"{(*mean, *d)}; got {shape}."
        )
    matrix = shape == d * 2
    return (
        f"Gaussian: for a mean of shape {mean} the variance is a number or has shape {d} or "
        f"{mean}; got shape {shape}." + " Write covariance= for a matrix." * matrix
    )
