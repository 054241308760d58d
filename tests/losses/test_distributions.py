"""Distributions against optax's losses and against their own Hessians."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

import natgrad_jax as ng

random = np.random.default_rng(0)
LOGITS = jnp.asarray(random.normal(size=(4, 3, 5)), jnp.float32)
LABELS = jnp.asarray(random.integers(5, size=(4, 3)))
REAL = jnp.asarray(random.random((4, 3, 5)), jnp.float32)
MASK = jnp.asarray(random.random((4, 3)) < 0.6)
WEIGHTS = jnp.asarray(random.random((4, 3)), jnp.float32)
ROOT = random.normal(size=(5, 5))
COVARIANCE = np.asarray(ROOT @ ROOT.T + np.eye(5), np.float32)
VARIANCES = np.asarray([0.5, 1.0, 2.0, 3.0, 0.1], np.float32)


def gaussian_nll(y: Any) -> Any:
    from jax.scipy.stats import multivariate_normal

    return -multivariate_normal.logpdf(y, LOGITS, COVARIANCE) - 2.5 * jnp.log(2 * jnp.pi)


CASES = {
    "categorical": (
        ng.Categorical(LOGITS),
        LABELS,
        optax.softmax_cross_entropy_with_integer_labels(LOGITS, LABELS),
    ),
    "categorical, probabilities": (
        ng.Categorical(LOGITS),
        jax.nn.softmax(REAL),
        optax.softmax_cross_entropy(LOGITS, jax.nn.softmax(REAL)),
    ),
    "bernoulli": (
        ng.Bernoulli(LOGITS),
        REAL,
        optax.sigmoid_binary_cross_entropy(LOGITS, REAL).sum(-1),
    ),
    "gaussian": (ng.Gaussian(LOGITS), REAL, optax.l2_loss(LOGITS, REAL).sum(-1)),
    "gaussian, variances": (
        ng.Gaussian(LOGITS, VARIANCES),
        REAL,
        (0.5 * (LOGITS - REAL) ** 2 / VARIANCES + 0.5 * jnp.log(VARIANCES)).sum(-1),
    ),
    "gaussian, covariance": (ng.Gaussian(LOGITS, covariance=COVARIANCE), REAL, gaussian_nll(REAL)),
}
each_case = pytest.mark.parametrize("case", CASES)


@each_case
def test_nll_is_the_weighted_mean_of_optax_losses(case: str) -> None:
    distribution, targets, losses = CASES[case]
    np.testing.assert_allclose(distribution.nll(targets).value, losses.mean(), rtol=1e-5)
    masked = distribution.nll(targets, where=MASK)
    np.testing.assert_allclose(masked.value, losses.mean(where=MASK), rtol=1e-5)
    weighted = distribution.nll(targets, where=MASK, weights=WEIGHTS)
    expected = jnp.average(losses, weights=WEIGHTS * MASK)
    np.testing.assert_allclose(weighted.value, expected, rtol=1e-5)
    assert float(masked.terms[0].count) == float(MASK.sum())


@each_case
def test_masked_examples_may_hold_anything(case: str) -> None:
    distribution, targets, losses = CASES[case]
    inner = MASK.reshape(MASK.shape + (1,) * (targets.ndim - 2))
    nothing = -1 if targets.dtype.kind == "i" else jnp.nan
    targets = jnp.where(inner, targets, nothing)
    value, gradient = jax.value_and_grad(
        lambda z: distribution.with_outputs({distribution.first: z}).nll(targets, where=MASK).value
    )(LOGITS)
    np.testing.assert_allclose(value, losses.mean(where=MASK), rtol=1e-5)
    assert np.isfinite(gradient).all() and not np.asarray(gradient)[~np.asarray(MASK)].any()
    assert float(distribution.nll(targets, where=jnp.zeros_like(MASK)).value) == 0


@each_case
def test_root_columns_are_a_root_of_the_hessian(case: str) -> None:
    distribution = CASES[case][0].nll(CASES[case][1]).terms[0].distribution
    columns = range(distribution.columns)
    R = np.stack([*(distribution.root_column(c)[distribution.first] for c in columns)], -1)
    columns = oracle.seed_columns(distribution)
    H = np.einsum("ncd,nce->nde", columns, columns).reshape(4, 3, 5, 5)
    np.testing.assert_allclose(R @ np.swapaxes(R, -1, -2), H, atol=2e-6)


def test_a_negative_variance_has_no_fisher_that_looks_like_one() -> None:
    root = ng.Gaussian(LOGITS, -jnp.ones(5)).root_column(0)["mean"]
    assert np.isnan(np.asarray(root)).any()


@pytest.mark.parametrize(
    "case", ["categorical", "bernoulli", "gaussian, variances", "gaussian, covariance"]
)
def test_samples_have_the_fisher_of_the_distribution(case: str) -> None:
    """Mean zero and covariance H of the sampled gradient: what the "mc" Fisher rests on."""
    distribution, *_ = CASES[case]

    def gradient(key: Any) -> Any:
        y = distribution.sample(key)
        total = lambda z: distribution.with_outputs({distribution.first: z}).nll_per_example(y)
        return jax.grad(lambda z: total(z).sum())(LOGITS)

    g = np.asarray(jax.jit(jax.vmap(gradient))(jax.random.split(jax.random.key(0), 20_000)))
    columns = oracle.seed_columns(distribution).reshape(4, 3, 5, 5)
    H = np.einsum("btcd,btce->btde", columns, columns)
    scale = np.sqrt(np.einsum("btdd->btd", H))
    assert np.all(np.abs(g.mean(0)) < 5 * scale / np.sqrt(len(g)))
    bound = 12 * scale[..., :, None] * scale[..., None, :] / np.sqrt(len(g))
    assert np.all(np.abs(np.einsum("sbtd,sbte->btde", g, g) / len(g) - H) < bound)


def test_losses_add_and_scale() -> None:
    a, b = ng.Categorical(LOGITS).nll(LABELS), ng.Gaussian(LOGITS).nll(REAL)
    loss = sum([2.0 * a, b / 4, 1.5], start=a * 0.0)
    assert len(loss.terms) == 3
    np.testing.assert_allclose(loss.value, 2 * a.value + b.value / 4 + 1.5, rtol=1e-6)


def test_losses_are_pytrees() -> None:
    """Out of jit, vmap, scan and cond they have the value that they went in with."""
    make = lambda z: 2.0 * ng.Gaussian(z).nll(REAL) - ng.Categorical(z).nll(LABELS) / 4 + 1.5
    wanted = make(LOGITS).value
    one = lambda loss: jax.tree.map(lambda x: x[0], loss)
    carry, stacked = jax.lax.scan(lambda _, z: (make(z), make(z)), make(0 * LOGITS), LOGITS[None])
    losses = {
        "jit": jax.jit(make)(LOGITS),
        "vmap": one(jax.vmap(make)(LOGITS[None])),
        "scan": one(stacked),
        "carry": carry,
        "cond": jax.lax.cond(wanted > 0, make, lambda z: make(2 * z), LOGITS),
    }
    for name, loss in losses.items():
        np.testing.assert_allclose(loss.value, wanted, rtol=1e-6, err_msg=name)


def test_a_term_scaled_by_zero_is_told() -> None:
    """Where the zero is known; it has no Fisher, and no gradient either."""
    params = {"w": jnp.ones((5, 5))}
    part = lambda p: ng.Gaussian(LOGITS @ p["w"]).nll(REAL)
    whole = lambda p, beta: ng.Categorical(LOGITS @ p["w"]).nll(LABELS) + beta * part(p)
    with pytest.warns(ng.UncoveredWarning, match=r"scaled by 0.*: 1 \(Gaussian\)\. Leave"):
        ng.find_layers(lambda p: whole(p, 0.0), params)
    with pytest.warns(ng.UncoveredWarning, match=r": 1 \(Gaussian\)"):
        ng.find_layers(lambda p: 2 * whole(p, np.zeros(())), params)
    ng.find_layers(whole, params, jnp.zeros(()))  # traced: it may be another one later


def test_half_precision_logits_are_summed_in_single() -> None:
    loss = ng.Categorical(LOGITS.astype(jnp.bfloat16)).nll(LABELS)
    assert loss.value.dtype == jnp.float32


@each_case
def test_negative_weights_under_jit_are_nan(case: str) -> None:
    """Nothing can raise there, and the value must not look like a loss; zero is no weight."""
    distribution, targets, _ = CASES[case]

    def loss(z: Any, weights: Any) -> Any:
        return (
            distribution.with_outputs({distribution.first: z}).nll(targets, weights=weights).value
        )

    step = jax.jit(jax.value_and_grad(loss))
    value, gradient = step(LOGITS, WEIGHTS.at[0].set(-0.1))
    assert np.isnan(value) and np.isnan(gradient).all()
    value, gradient = step(LOGITS, WEIGHTS.at[0].set(0))
    assert np.isfinite(value) and np.isfinite(gradient).all() and not gradient[0].any()
