"""Distributions of other libraries: numpyro's Gaussians and counts against this library's own."""

import warnings
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import natgrad_jax as ng

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from numpyro import distributions as dist

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("float64")]

N = D = 3  # as many examples as numbers: axes are not told apart by their lengths
random = np.random.default_rng(0)
X, Y, TRIALS = random.normal(size=(N, 4)), random.normal(size=(N, D)), np.array([3, 7, 9])
MASK, KEY = np.array([1, 0, 1], bool), jax.random.key(0)

Loc = lambda p: X @ p["w"]
independent = lambda loc, scale: dist.Normal(loc, scale).to_event(1)
ours = lambda p: ng.Gaussian(Loc(p), jnp.exp(2 * p["log_std"]))
with_covariance = lambda p: ng.Gaussian(Loc(p), covariance=jnp.diag(jnp.exp(2 * p["log_std"])))

# theirs, ours, targets, mask
CASES = {
    "event of the library": (
        lambda p: ng.from_distribution(independent, loc=Loc(p), scale=jnp.exp(p["log_std"])),
        ours, Y, MASK),
    "event of batch axes": (
        lambda p: ng.from_distribution(
            dist.Normal, loc=Loc(p), scale=jnp.exp(p["log_std"]), event_ndims=1),
        ours, Y, MASK),
    "one variance": (
        lambda p: ng.from_distribution(independent, loc=Loc(p), scale=jnp.exp(p["log_std"][0])),
        lambda p: ng.Gaussian(Loc(p), jnp.exp(2 * p["log_std"][0])), Y, None),
    "numbers": (
        lambda p: ng.from_distribution(dist.Normal, loc=Loc(p), scale=jnp.exp(p["log_std"])),
        lambda p: ng.Gaussian(Loc(p), jnp.exp(2 * p["log_std"]), event_ndims=0), Y, None),
    "covariance": (
        lambda p: ng.from_distribution(dist.MultivariateNormal, loc=Loc(p),
            covariance_matrix=jnp.diag(jnp.exp(2 * p["log_std"]))),
        with_covariance, Y, MASK),
    "counts": (
        lambda p: ng.from_distribution(dist.Poisson, rate=jnp.exp(Loc(p)[:, 0])),
        lambda p: ng.Poisson(Loc(p)[:, 0], event_ndims=0), TRIALS, MASK),
    "positive numbers, masked": (
        lambda p: ng.from_distribution(dist.LogNormal, loc=Loc(p)[:, 0], scale=0.7),
        lambda p: ng.Gaussian(Loc(p)[:, 0] - jnp.log(TRIALS), 0.7**2, event_ndims=0),
        TRIALS * 1.0, MASK),
}  # fmt: skip


def params() -> Any:
    r = np.random.default_rng(1)
    return {"w": jnp.asarray(r.normal(size=(4, D))), "log_std": jnp.asarray(0.2 * r.normal(size=D))}


@pytest.mark.parametrize("name", CASES)
def test_they_have_the_gradients_and_fisher_of_ours(name: str) -> None:
    theirs, own, y, mask = CASES[name]
    if mask is not None and y.dtype == float:
        y = np.where(mask.reshape(-1, *[1] * (y.ndim - 1)), y, np.nan)
    target = np.zeros(N) if name.startswith("positive") else y
    losses = [lambda p: theirs(p).nll(y, where=mask), lambda p: own(p).nll(target, where=mask)]
    p = params()
    found = []
    for loss_fn in losses:
        both = lambda p, f=loss_fn: (
            jax.grad(lambda p: f(p).value)(p),
            ng.fisher(f, p, fisher="empirical", rng=KEY),
        )
        found.append(jax.jit(both)(p))
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10)
    exact = jax.jit(lambda p: ng.fisher(losses[1], p))(p)
    sampled = jax.jit(lambda p: ng.fisher(losses[0], p, fisher="mc", samples=3000, rng=KEY))(p)
    assert np.linalg.norm(sampled - exact) < 0.1 * np.linalg.norm(exact)


def test_a_student_t_with_learned_everything() -> None:
    """Whose arguments numpyro keeps twice; numbers that count trials stay whole."""
    p, y = params() | {"df": jnp.asarray(1.5)}, Y[:, 0]
    make = lambda p: ng.from_distribution(
        dist.StudentT, df=jnp.exp(p["df"]), loc=Loc(p)[:, 0], scale=jnp.exp(p["log_std"][0])
    )
    loss_fn = lambda p: make(p).nll(y)
    theirs = lambda p: (
        -dist.StudentT(jnp.exp(p["df"]), Loc(p)[:, 0], jnp.exp(p["log_std"][0])).log_prob(y)
    )
    per_example = jax.tree.leaves(jax.jit(jax.jacrev(theirs))(p))
    v = np.concatenate([np.reshape(x, (N, -1)) for x in per_example], 1)
    F = jax.jit(lambda p: ng.fisher(loss_fn, p, fisher="empirical", rng=KEY))(p)
    np.testing.assert_allclose(F, v.T @ v / N, rtol=1e-10, atol=1e-12)
    layers = ng.find_layers(loss_fn, p)
    _, _, statistics = jax.jit(ng.value_and_grad(loss_fn, layers))(p, rng=KEY)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(statistics))


def test_integer_arguments_stay_whole() -> None:
    p = params()
    loss_fn = lambda p, n: ng.from_distribution(
        dist.BinomialLogits, logits=Loc(p)[:, 0], total_count=n
    ).nll(n - 1)
    trials = jnp.asarray(TRIALS)
    q = jax.nn.sigmoid(Loc(p)[:, 0])
    wanted = jnp.einsum("n,na,nb->ab", trials * q * (1 - q), X, X) / N
    sampled = lambda p, n: ng.fisher(loss_fn, p, n, fisher="mc", samples=2000, rng=KEY)
    F = jax.jit(sampled)(p, trials)
    at = D + np.arange(4 * D).reshape(4, D)[:, 0]
    assert np.linalg.norm(F[np.ix_(at, at)] - wanted) < 0.1 * np.linalg.norm(wanted)


def test_whole_numbers_of_the_batch_are_no_outputs() -> None:
    """Nothing is differentiated by them, under jit either, where they may depend on anything."""
    loss_fn = lambda p, n: ng.NegativeBinomial(Loc(p)[:, 0], n, event_ndims=0).nll(n - 1)
    p, trials = params(), jnp.asarray(TRIALS)

    def found(p: Any, n: Any) -> Any:
        product = ng.fisher_vector_product(loss_fn, p, n)(p)
        return ng.fisher(loss_fn, p, n), ng.fisher_diagonal(loss_fn, p, n), product

    rate = np.exp(Loc(p)[:, 0])
    F = np.zeros((4 * D + D,) * 2)
    at = D + np.arange(4 * D).reshape(4, D)[:, 0]
    F[np.ix_(at, at)] = (X.T * (TRIALS * rate / (TRIALS + rate))) @ X / N
    close = partial(np.testing.assert_allclose, rtol=1e-7, atol=1e-12)  # their logs are in float32
    for whole, diagonal, product in (found(p, trials), jax.jit(found)(p, trials)):
        flat = lambda tree: np.concatenate([np.ravel(tree[name]) for name in ("log_std", "w")])
        close(whole, F)
        close(flat(diagonal), np.diag(F))
        close(flat(product), F @ flat(p))


def test_labels_do_not_depend_on_how_the_batch_is_divided() -> None:
    p = params()
    loss_fn = lambda p, x: ng.from_distribution(dist.Normal, loc=x @ p["w"], scale=1.0).nll(
        x[:, :D]
    )
    x = jnp.asarray(np.concatenate([X, X[:1]]))
    layers = ng.find_layers(loss_fn, {"w": p["w"]}, x)
    whole = jax.jit(ng.value_and_grad(loss_fn, layers))({"w": p["w"]}, x, rng=KEY)
    parts = jax.jit(ng.accumulate(loss_fn, layers))({"w": p["w"]}, x.reshape(2, 2, 4), rng=KEY)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10)
