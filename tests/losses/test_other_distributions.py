"""Every distribution against numerical integration over its targets, of likelihoods by SciPy."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import natgrad_jax as ng
from natgrad_jax.losses.distribution_base import has_sampler

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("float64")]

Arrays = dict[str, np.ndarray]


class Laplace(ng.Distribution):
    """As users write their own."""

    location: jax.Array
    log_scale: jax.Array

    def log_prob(self, targets: Any) -> Any:
        return -jnp.abs(targets - self.location) * jnp.exp(-self.log_scale) - self.log_scale

    def fisher(self) -> Any:
        return (jnp.exp(-2 * self.log_scale), 0.0), (0.0, 1.0)


class Case(NamedTuple):
    """``outputs``: of each of several examples. ``log_p``: of targets at one example's outputs, by
    SciPy. ``nodes``: from these the points and weights of an integral over all targets.
    ``targets``: some of them. ``fixed``: what depends on no parameter."""

    make: Callable[..., ng.Distribution]
    outputs: Arrays
    log_p: Callable[..., Any]
    nodes: Callable[..., tuple[np.ndarray, np.ndarray]]
    targets: np.ndarray
    fixed: tuple[str, ...] = ()


def counts(**_: Any) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(1000)[:, None], np.ones(1000)


def line(low: float, high: float, points: int) -> tuple[np.ndarray, np.ndarray]:
    """The trapezoidal rule, exact for what falls off at both ends or is periodic."""
    y = np.linspace(low, high, points, endpoint=False)
    return y[:, None], np.full(points, (high - low) / points)


def shares(**_: Any) -> tuple[np.ndarray, np.ndarray]:
    t, w = line(-60, 34, 4000)
    y = 1 / (1 + np.exp(-t))
    return y, w * (y * (1 - y))[:, 0]


def around(mean: Any, variance: Any) -> tuple[np.ndarray, np.ndarray]:
    return line(mean[0] - 12 * variance[0] ** 0.5, mean[0] + 12 * variance[0] ** 0.5, 400)


def plane(mean: Any, covariance: Any) -> tuple[np.ndarray, np.ndarray]:
    t, w = line(-11, 11, 120)
    grid = np.stack(np.meshgrid(t[:, 0], t[:, 0]), -1).reshape(-1, 2)
    root = np.linalg.cholesky(covariance)
    return mean + grid @ root.T, np.outer(w, w).ravel() * np.linalg.det(root)


def two_sided(location: Any, log_scale: Any) -> tuple[np.ndarray, np.ndarray]:
    t, w = np.polynomial.laguerre.laggauss(20)
    t, w = np.concatenate([t, -t]), np.concatenate([w, w]) * np.exp(np.concatenate([t, t]))
    return location + t[:, None] * np.exp(log_scale), w * np.exp(log_scale[0])


def mixture(y: Any, logits: Any, means: Any, variances: Any) -> Any:
    p = scipy.stats.norm.pdf(y[..., None], means, variances**0.5)
    return np.log((p * np.exp(logits)).sum(-1) / np.exp(logits).sum(-1))


def binomial(y: Any, log_mean: Any, dispersion: Any) -> Any:
    return scipy.stats.nbinom.logpmf(y, dispersion, dispersion / (dispersion + np.exp(log_mean)))


column = lambda *x: np.array(x)[:, None]
REAL, COUNTS = np.array([-2.0, 0.3, 1.1]), np.array([0, 1, 7])
COVARIANCE = np.array([[[0.5, 0.2], [0.2, 1.0]], [[2.0, -0.3], [-0.3, 0.1]]])
MEANS, DISPERSION = column(-2.0, 0.5, 2.0), column(1.7, 0.6, 30.0)

CASES = {
    "poisson": Case(ng.Poisson, {"log_rate": MEANS},
        lambda y, log_rate: scipy.stats.poisson.logpmf(y, np.exp(log_rate)), counts, COUNTS),
    "negative binomial": Case(ng.NegativeBinomial, {"log_mean": MEANS, "dispersion": DISPERSION},
        binomial, counts, COUNTS, fixed=("dispersion",)),
    "negative binomial, dispersion": Case(ng.NegativeBinomial,
        {"log_mean": MEANS, "dispersion": DISPERSION}, binomial, counts, COUNTS),
    "beta": Case(ng.Beta, {"alpha": column(2.3, 0.7, 5.0), "beta": column(0.9, 3.0, 5.0)},
        lambda y, alpha, beta: scipy.stats.beta.logpdf(y, alpha, beta), shares,
        np.array([0.01, 0.4, 0.98])),
    "von mises": Case(ng.VonMises,
        {"mean": column(0.3, -2.0, 9.0, 1.0), "concentration": column(1e-3, 1.5, 99.0, 400.0)},
        lambda y, mean, concentration: scipy.stats.vonmises.logpdf(y, concentration, mean),
        lambda **_: line(-np.pi, np.pi, 4000), REAL),
    "gaussian mixture": Case(ng.GaussianMixture, {
        "logits": np.array([[[0.3, -0.5]], [[2.0, 1.0]]]),
        "means": np.array([[[-1.0, 1.0]], [[0.0, 0.1]]]),
        "variances": np.array([[[0.5, 0.2]], [[1.0, 2.0]]])},
        mixture, lambda **_: line(-20, 20, 2000), REAL),
    "gaussian": Case(ng.Gaussian, {"mean": column(-1.0, 4.0), "variance": column(0.3, 2.0)},
        lambda y, mean, variance: scipy.stats.norm.logpdf(y, mean, variance**0.5), around, REAL),
    "gaussian, covariance": Case(ng.Gaussian,
        {"mean": np.array([[0.0, 1.0], [2.0, -1.0]]), "covariance": COVARIANCE},
        lambda y, mean, covariance: scipy.stats.multivariate_normal.logpdf(
            y, mean, covariance)[..., None], plane, np.array([[0.0, 1.0], [2.0, 3.0]])),
    "own": Case(Laplace, {"location": column(0.0, 2.0), "log_scale": column(-0.5, 0.7)},
        lambda y, location, log_scale: scipy.stats.laplace.logpdf(y, location, np.exp(log_scale)),
        two_sided, REAL),
}  # fmt: skip
each_case = pytest.mark.parametrize("case", CASES)
EXACT = [c for c in CASES if c not in ("negative binomial, dispersion", "gaussian mixture")]


def examples(case: str) -> list[tuple[ng.Distribution, Arrays]]:
    make, outputs, *_, fixed = CASES[case]
    each = [{k: x[i] for k, x in outputs.items()} for i in range(len(next(iter(outputs.values()))))]
    return [
        (make(**jax.tree.map(jnp.asarray, own), event_ndims=1, fixed=fixed), own) for own in each
    ]


def flat(outputs: Any) -> np.ndarray:
    """``(n, outputs)`` from n sets of outputs; of a covariance only its symmetric part counts."""
    symmetric = lambda name, x: (x + x.mT) / 2 if name == "covariance" else x
    outputs = {name: symmetric(name, x) for name, x in outputs.items()}
    return np.concatenate([np.reshape(x, (len(x), -1)) for x in outputs.values()], axis=1)


def scores(d: ng.Distribution, targets: Any) -> np.ndarray:
    one = lambda y: jax.grad(lambda o: d.with_outputs(o).nll_per_example(y))(d.outputs)
    return flat(jax.jit(jax.vmap(one))(targets))


def integrated(case: str, d: ng.Distribution, own: Arrays) -> np.ndarray:
    """``E[s sᵀ]`` of the scores s, by integration over the targets."""
    y, w = CASES[case].nodes(**own)
    p = np.exp(CASES[case].log_p(y, **own)).prod(-1) * w
    np.testing.assert_allclose(p.sum(), 1, rtol=1e-9)
    s = np.where(p[:, None] > 0, scores(d, jnp.asarray(y)), 0)
    assert np.abs(p @ s).max() < 1e-8 * (1 + np.abs(s[p > 0]).max())
    return s.T @ (p[:, None] * s)


@each_case
def test_nll_is_scipys(case: str) -> None:
    """But for what depends on the targets alone."""
    found = []
    for d, own in examples(case):
        for y in CASES[case].targets:
            y = np.broadcast_to(y, d.numbers)
            log_p = CASES[case].log_p(y, **own).sum()
            found.append(float(d.nll_per_example(jnp.asarray(y))) + log_p)
    constants = np.reshape(found, (-1, len(CASES[case].targets)))
    np.testing.assert_allclose(constants, constants[:1].repeat(len(constants), 0), atol=1e-11)


@pytest.mark.parametrize("case", EXACT)
def test_the_root_is_one_of_the_integrated_fisher(case: str) -> None:
    for d, own in examples(case):
        R = flat(jax.vmap(d.root_column)(jnp.arange(d.columns)))
        F = integrated(case, d, own)
        scale = np.sqrt(np.outer(np.diag(F), np.diag(F)))
        assert np.abs(R.T @ R - F).max() <= 1e-8 * scale.max(), (own, R.T @ R, F)


@pytest.mark.parametrize("case", [c for c in CASES if has_sampler(examples(c)[0][0])])
@pytest.mark.parametrize("key", [jax.random.key(0), jax.random.key(0, impl="rbg")],
                         ids=["threefry", "rbg"])  # fmt: skip
def test_samples_have_the_scores_of_the_distribution(case: str, key: Any) -> None:
    """Mean zero, and the Fisher as their covariance."""
    for d, own in examples(case):
        s = scores(d, jax.vmap(d.sample)(jax.random.split(key, 20_000)))
        F = integrated(case, d, own)
        scale = np.sqrt(np.diag(F))
        assert np.all(np.abs(s.mean(0)) < 5 * scale / np.sqrt(len(s)))
        spread = np.sqrt(((s[:, :, None] * s[:, None, :]) ** 2).mean(0) / len(s))
        assert np.all(np.abs(s.T @ s / len(s) - F) < 6 * spread + 1e-12)


@pytest.mark.parametrize(
    "concentration, slope", [(0.0, 0.5), (14.9, None), (15.1, None), (1e6, 0.5e-12)]
)
def test_von_mises_in_single_precision(concentration: float, slope: float | None) -> None:
    """From the uniform distribution to the narrowest: no difference loses its digits."""
    d = ng.VonMises(jnp.zeros(1, jnp.float32), jnp.full(1, concentration, jnp.float32),
                    event_ndims=1)  # fmt: skip
    found = d.fisher()[1][1]
    if slope is None:
        wide = ng.VonMises(jnp.zeros(1), jnp.full(1, concentration), event_ndims=1)
        slope = float(wide.fisher()[1][1][0])
    np.testing.assert_allclose(found, slope, rtol=1e-3)
    gradient = jax.grad(lambda k: d.with_outputs({"concentration": k}).nll_per_example(d.mean))
    ratio = 1 - 1 / (2 * concentration) - 1 / (8 * concentration**2) if concentration > 20 else None
    if ratio is not None:
        np.testing.assert_allclose(gradient(d.concentration), ratio - 1, rtol=1e-5)
    elif concentration == 0:
        np.testing.assert_allclose(gradient(d.concentration), -1, rtol=1e-5)


NONSENSE = {
    "poisson": (-1.0, 0.5), "negative binomial": (-1.0, 2.5), "beta": (0.0, 1.0, 3.0),
    "von mises": (np.inf,), "gaussian mixture": (np.nan,),
}  # fmt: skip


@pytest.mark.parametrize("case", NONSENSE)
def test_targets_that_cannot_be_are_nan_under_jit_unless_masked(case: str) -> None:
    make, outputs, *_ = CASES[case]
    outputs = jax.tree.map(jnp.asarray, outputs)
    first, n = next(iter(outputs)), len(next(iter(outputs.values())))

    def loss(z: Any, y: Any, where: Any = None) -> Any:
        return make(**{**outputs, first: z}).nll(y, where=where).value

    good = np.full((n, 1), CASES[case].targets[1], float)
    step = jax.jit(jax.value_and_grad(loss))
    for bad in NONSENSE[case]:
        y = np.concatenate([[[bad]], good[1:]])
        value, gradient = step(outputs[first], y)
        assert np.isnan(value) and np.isnan(gradient[0]).any(), bad
        value, gradient = step(outputs[first], y, np.arange(n) > 0)
        assert np.isfinite(value) and np.isfinite(gradient).all() and not gradient[0].any()
