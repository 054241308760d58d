"""The predictive distributions of counts, shares, angles, and of several modes."""

from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import betaln, gammaln, i0e, i1e, polygamma
from jaxtyping import Array, Float, Int, PRNGKeyArray, Real, Shaped

from natgrad_jax.losses.likelihood import Distribution
from natgrad_jax.losses.output_fisher import Entries
from natgrad_jax.losses.terms import value_range
from natgrad_jax.utils.hyperparams import is_concrete


class Poisson(Distribution):
    """A Poisson distribution of counts, given by the logarithm of its rate.

    ``−log p(y) = exp(z) − y z`` for the log-rate z, without ``log y!``. The Fisher is ``exp(z)``.
    Under ``jit`` targets that are no counts make the loss NaN.

    Args:
      log_rate: ``(*examples, *event)``; the rate is the expected count of one example.
      event_ndims: as for :class:`Gaussian`.

    Raises:
      ValueError: (from ``nll``) targets that are not 0, 1, 2, …, if concrete.

    Source: McCullagh and Nelder 1989, chapter 6 (log-linear models).

    >>> import jax.numpy as jnp
    >>> float(Poisson(jnp.zeros((2, 3))).nll(jnp.array([[0, 1, 2], [3, 4, 5]])).value)
    3.0
    """

    log_rate: Float[Array, "*examples_and_event"]

    def log_prob(self, targets: Real[Array, "*outputs"]) -> Float[Array, "*outputs"]:
        return _counts(targets, self.log_rate) * self.log_rate - jnp.exp(self.log_rate)

    def sample(self, key: PRNGKeyArray) -> Int[Array, "*outputs"]:
        return _poisson(key, jnp.exp(self.log_rate))

    def fisher(self) -> Entries:
        return ((jnp.exp(self.log_rate),),)

    def check(self, targets: Shaped[Array, "..."]) -> None:
        super().check(targets)
        _check_counts("Poisson", targets)


class NegativeBinomial(Distribution):
    """A negative binomial distribution: counts that vary more than those of a Poisson.

    Its mean is ``m = exp(z)``, its variance ``m + m²/r`` for the dispersion r; r → ∞ is the
    Poisson. ``−log p(y) = log Γ(r) − log Γ(y + r) + r log(1 + m/r) + y log(1 + r/m)``, without
    ``log y!``. The Fisher over the log-mean is ``m r / (m + r)``, and zero between mean and
    dispersion. That of the dispersion has no closed formula: ``fisher="exact"`` needs one that
    depends on no parameter. Under ``jit`` targets that are no counts make the loss NaN.

    Args:
      log_mean: ``(*examples, *event)``.
      dispersion: positive; broadcasts to it. In units of counts.
      event_ndims: as for :class:`Gaussian`.

    Raises:
      ValueError: (from ``nll``) targets that are not 0, 1, 2, …, if concrete; (from
        ``fisher="exact"``) a dispersion that depends on parameters.

    Source: Lawless 1987 (regression for overdispersed counts; mean and dispersion are orthogonal).

    >>> import jax.numpy as jnp
    >>> float(NegativeBinomial(jnp.zeros((2, 1)), 1.0).nll(jnp.zeros((2, 1), int)).value)  # log 2
    0.6931...
    """

    log_mean: Float[Array, "*examples_and_event"]
    dispersion: Float[Array, "*dispersion"] | float

    def log_prob(self, targets: Real[Array, "*outputs"]) -> Float[Array, "*outputs"]:
        y, r = _counts(targets, self.log_mean), jnp.asarray(self.dispersion)
        above = self._above()
        gammas = gammaln(y + r) - gammaln(r)
        return gammas - r * jax.nn.softplus(above) - y * jax.nn.softplus(-above)

    def _above(self) -> Float[Array, "*outputs"]:
        """``log m/r``."""
        return self.log_mean - jnp.log(self.dispersion)

    def sample(self, key: PRNGKeyArray) -> Int[Array, "*outputs"]:
        of_rate, of_count = jax.random.split(key)
        shape, dtype = self.log_mean.shape, self.log_mean.dtype
        share = jax.random.gamma(of_rate, self.dispersion, shape, dtype) / self.dispersion
        return _poisson(of_count, jnp.exp(self.log_mean) * share)

    def fisher(self) -> Entries:
        return (jnp.exp(self.log_mean - jax.nn.softplus(self._above())), 0.0), (0.0, None)

    def check(self, targets: Shaped[Array, "..."]) -> None:
        super().check(targets)
        _check_counts("NegativeBinomial", targets)


class Beta(Distribution):
    """A beta distribution, of numbers in (0, 1).

    ``−log p(y) = log B(α, β) − (α − 1) log y − (β − 1) log(1 − y)``. The Fisher is
    ``[[ψ₁(α) − t, −t], [−t, ψ₁(β) − t]]``, ψ₁ the trigamma function, ``t = ψ₁(α + β)``. Under
    ``jit`` targets outside (0, 1) make the loss NaN.

    Args:
      alpha, beta: positive, ``(*examples, *event)`` after broadcasting; no units.
      event_ndims: as for :class:`Gaussian`.

    Raises:
      ValueError: (from ``nll``) targets not inside (0, 1), if concrete.

    Source: Ferrari and Cribari-Neto 2004 (beta regression).

    >>> import jax.numpy as jnp
    >>> y = jnp.full((2, 1), 0.25)
    >>> float(Beta(jnp.full((2, 1), 2.0), 1.0).nll(y).value)  # p(y) = 2 y
    0.6931...
    """

    alpha: Float[Array, "*examples_and_event"]
    beta: Float[Array, "*examples_and_event"] | float

    def log_prob(self, targets: Real[Array, "*outputs"]) -> Float[Array, "*outputs"]:
        y = jnp.where((targets > 0) & (targets < 1), targets, jnp.nan)
        a, b = jnp.asarray(self.alpha), jnp.asarray(self.beta)
        return (a - 1) * jnp.log(y) + (b - 1) * jnp.log1p(-y) - betaln(a, b)

    def sample(self, key: PRNGKeyArray) -> Float[Array, "*outputs"]:
        dtype = jnp.result_type(self.alpha)
        y = jax.random.beta(key, self.alpha, self.beta, self.numbers, dtype)
        # rounded to 0 or 1 it would have no likelihood
        return jnp.clip(y, jnp.finfo(dtype).tiny, 1 - jnp.finfo(dtype).epsneg)

    def fisher(self) -> Entries:
        a, b = jnp.asarray(self.alpha), jnp.asarray(self.beta)
        t = polygamma(1, a + b)
        return (polygamma(1, a) - t, -t), (-t, polygamma(1, b) - t)

    def possible(self, targets: Shaped[Array, "..."]) -> Float[Array, ""]:
        return jnp.asarray(0.5, targets.dtype)

    def check(self, targets: Shaped[Array, "..."]) -> None:
        super().check(targets)
        if is_concrete(targets) and targets.size:
            low, high = value_range(targets)
            if not (low > 0 and high < 1):
                raise ValueError(
                    f"Beta.nll: targets must lie inside (0, 1); got values from {low:g} to "
                    f"{high:g}. Shares that can be 0 or 1 are moved inside, for example "
                    "(y * (n - 1) + 0.5) / n for n examples; or use Bernoulli."
                )


class VonMises(Distribution):
    """A von Mises distribution, of angles.

    ``−log p(y) = −κ cos(y − μ) + log I₀(κ)``, without ``log 2π``. The Fisher is ``κ A`` over the
    mean and ``A′ = 1 − A/κ − A²`` over the concentration, ``A = I₁(κ)/I₀(κ)``. There is no
    sampler: ``fisher="mc"`` multiplies the root of the Fisher by random signs.

    Args:
      mean: ``(*examples, *event)``, in radians.
      concentration: not negative; broadcasts to it. About ``1/variance``, in radians⁻², if large.
      event_ndims: as for :class:`Gaussian`.

    Raises:
      ValueError: (from ``nll``) targets of the wrong shape.

    Source: Mardia and Jupp 2000 (Directional Statistics).

    >>> import jax.numpy as jnp
    >>> float(VonMises(jnp.zeros((2, 1)), 1.0).nll(jnp.zeros((2, 1))).value)  # log I₀(1) − 1
    -0.7640...
    """

    mean: Float[Array, "*examples_and_event"]
    concentration: Float[Array, "*concentration"] | float

    def log_prob(self, targets: Real[Array, "*outputs"]) -> Float[Array, "*outputs"]:
        k = jnp.asarray(self.concentration, jnp.result_type(self.mean))
        # cos − 1, so that a large κ has nothing to cancel
        return -2 * k * jnp.sin((targets - self.mean) / 2) ** 2 - _log_i0e(k)

    def fisher(self) -> Entries:
        k = jnp.asarray(self.concentration, jnp.result_type(self.mean))
        missing, slope = jax.jvp(_one_minus_ratio, (k,), (jnp.ones_like(k),))
        return (k * (1 - missing), 0.0), (0.0, -slope)


class GaussianMixture(Distribution):
    """A mixture of K Gaussians for every number, as in mixture density networks.

    ``−log p(y) = −log Σ_k softmax(z)_k N(y; μ_k, σ²_k)``, without ``½ log 2π``. Its Fisher has no
    closed formula: ``fisher="mc"`` samples it.

    Args:
      logits: ``(*examples, *event, K)``.
      means: of the logits' shape, or one that broadcasts to it with a last axis of K.
      variances: likewise; positive, in units of the target squared.
      event_ndims: the number of axes before K's that belong to one example, as for
        :class:`Gaussian`.

    Raises:
      ValueError: (from ``nll``) arguments that have another number of components; (from
        ``fisher="exact"``) always.

    Source: Bishop 1994 (mixture density networks).

    >>> import jax.numpy as jnp
    >>> components = jnp.zeros((4, 3, 2))  # for 4 examples of 3 numbers
    >>> mixture = GaussianMixture(components, components, jnp.ones(2))
    >>> float(mixture.nll(jnp.ones((4, 3))).value)
    1.5
    """

    logits: Float[Array, "*examples_and_event K"]
    means: Float[Array, "*examples_and_event K"]
    variances: Float[Array, "*examples_and_event K"]
    features: ClassVar[Mapping[str, int]] = {"logits": 1, "means": 1, "variances": 1}

    def log_prob(self, targets: Real[Array, "*outputs"]) -> Float[Array, "*outputs"]:
        squares = (targets[..., None] - self.means) ** 2 / self.variances
        each = jax.nn.log_softmax(self.logits) - 0.5 * (squares + jnp.log(self.variances))
        return jax.nn.logsumexp(each, axis=-1)

    def sample(self, key: PRNGKeyArray) -> Float[Array, "*outputs"]:
        of_component, of_noise = jax.random.split(key)
        k = jax.random.categorical(of_component, self.logits)
        one_hot = jax.nn.one_hot(k, self.logits.shape[-1], dtype=self.logits.dtype)
        chosen = lambda x: jnp.sum(one_hot * x, axis=-1)
        noise = jax.random.normal(of_noise, self.numbers, self.logits.dtype)
        return chosen(self.means) + noise * jnp.sqrt(chosen(self.variances))

    def broadcast(self) -> "GaussianMixture":
        shapes = {name: np.shape(x) for name, x in self.parametrized.items()}
        last = {shape[-1:] for shape in shapes.values()}
        if len(last) > 1 or () in last:
            raise ValueError(
                "GaussianMixture: logits, means and variances each have a last axis, of the K "
                f"components; got shapes {shapes}. For one variance: variance * jnp.ones(K)."
            )
        return super().broadcast()


def _counts(targets: Real[Array, "..."], like: Float[Array, "..."]) -> Float[Array, "..."]:
    """The targets; NaN where they are no counts."""
    y = targets.astype(jnp.result_type(like))
    return jnp.where((y >= 0) & (y == jnp.floor(y)), y, jnp.nan)


def _check_counts(name: str, targets: Shaped[Array, "..."]) -> None:
    if is_concrete(targets) and targets.size:
        low, high = value_range(targets)
        whole = (np.floor(targets) == targets).all()
        if not (low >= 0 and whole):
            came = f"values from {low:g} to {high:g}" + ", not all of them whole" * (not whole)
            raise ValueError(
                f"{name}.nll: targets must be counts, 0, 1, 2, …; got {came}. Give missing ones "
                "the count 0, and mask them with where=. Of rates, multiply by the exposure and "
                "add its logarithm to the network's output."
            )


def _poisson(key: PRNGKeyArray, rate: Float[Array, "..."]) -> Int[Array, "..."]:
    # jax.random.poisson takes no other keys
    key = jax.random.wrap_key_data(jax.random.bits(key, (2,), jnp.uint32), impl="threefry2x32")
    return jax.random.poisson(key, rate)


@jax.custom_jvp
def _log_i0e(k: Float[Array, "..."]) -> Float[Array, "..."]:
    """``log I₀(κ) − κ``."""
    return jnp.log(i0e(k))


_log_i0e.defjvps(lambda tangent, _, k: -_one_minus_ratio(k) * tangent)


def _one_minus_ratio(k: Float[Array, "..."]) -> Float[Array, "..."]:
    """``1 − I₁(κ)/I₀(κ)``; by its series at infinity where the difference would cancel."""
    large = 100 if k.dtype == jnp.float64 else 15
    x = 1 / jnp.maximum(k, large)
    series = jnp.polyval(jnp.asarray([103 / 32, 1073 / 1024, 13 / 32, 25 / 128, 1 / 8, 1 / 8, 1 / 2,
                                      0], k.dtype), x)  # fmt: skip
    return jnp.where(k > large, series, 1 - i1e(k) / i0e(k))
