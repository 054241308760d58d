"""Powers, samples, log determinants and influence, against one dense matrix in float64."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from posterior_net import (
    N,
    as_matrix,
    assembled,
    error,
    loss_fn,
    places,
    random_like,
    setting,
)

import natgrad_jax as ng
from natgrad_jax.state.walk import states

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("float64")]

TAU, EXAMPLES, CLOSE = 0.3, 50.0, 1e-8
LAMBDA = TAU / EXAMPLES
OPTIMIZERS = {
    "kfac": lambda layers: ng.kfac(0.1, layers),
    "kfac, cholesky, sua": lambda layers: ng.kfac(
        0.1, layers, inverse="cholesky", approximation="sua"
    ),
    "ngd": lambda layers: ng.ngd(0.1, layers, damping=0.1),
    "ekfac": lambda layers: ng.ekfac(0.1, layers, basis="eigh", statistics_period=1),
    "ekfac, leading": lambda layers: ng.ekfac(
        0.1, layers, basis=ng.LowRank(1), statistics_period=1
    ),
    "ekfac, groups": lambda layers: ng.ekfac(
        0.1, layers, approximation=ng.Approximation(group_size=2), statistics_period=1
    ),
}


@functools.cache
def measured(name: str) -> Any:
    """Parameters, layers, the curvature, and the same from the state, dense."""
    params, batch, layers = setting()
    tx = OPTIMIZERS[name](layers)
    grad_fn = ng.value_and_grad(loss_fn, layers, fisher="exact")

    @jax.jit
    def step(state: Any, *batch: Any) -> Any:
        _, grads, statistics = grad_fn(params, *batch, opt_state=state)
        return tx.update(grads, state, params, statistics=statistics)[1]

    state = tx.init(params)
    for part in (slice(0, 7), slice(5, N)):
        state = step(state, *(x[part] for x in batch))
    (own,) = states(state)
    blocks = ng.diagnostics.matrices(layers, state) | own.diagonal
    assert len(blocks) == 7
    return (
        params,
        layers,
        ng.posterior.from_state(state, layers),
        *assembled(blocks, layers, params),
    )


def function(F: np.ndarray, has: np.ndarray, of: Any) -> np.ndarray:
    """A function of the symmetric F, zero where no block is."""
    values, vectors = np.linalg.eigh(F[np.ix_(has, has)])
    out = np.zeros_like(F)
    out[np.ix_(has, has)] = vectors * of(np.maximum(values, 0)) @ vectors.T
    return out


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_powers_are_those_of_the_dense_matrix(name: str) -> None:
    params, _, curvature, F, has = measured(name)
    for exponent in (1, -1, -0.5):
        found = as_matrix(lambda v, p=exponent: ng.posterior.power(curvature, v, p, LAMBDA), params)
        assert error(found, function(F, has, lambda d, p=exponent: (d + LAMBDA) ** p)) < CLOSE
    v = random_like(params)
    damped = (F + LAMBDA * np.eye(len(F)))[np.ix_(has, has)]
    solved = ravel_pytree(jax.jit(ng.posterior.solve)(curvature, v, LAMBDA))[0]
    assert error(solved[has], np.linalg.solve(damped, ravel_pytree(v)[0][has])) < CLOSE
    assert not solved[~has].any() and (~has).sum() == 4


def samples_matrix(monkeypatch: Any, curvature: Any, params: Any, **numbers: Any) -> np.ndarray:
    """What :func:`sample` adds to the parameters, as a linear function of its noise."""
    flat = ravel_pytree(params)[0]

    def moved(noise: jax.Array) -> jax.Array:
        rest = [noise]

        def normal(key: Any, shape: Any, dtype: Any) -> jax.Array:
            size = int(np.prod(shape))
            own, rest[0] = rest[0][:size], rest[0][size:]
            return own.reshape(shape).astype(dtype)

        monkeypatch.setattr(jax.random, "normal", normal)
        drawn = ng.posterior.sample(curvature, params, jax.random.key(0), **numbers)
        return ravel_pytree(drawn)[0] - flat

    found = np.asarray(jax.jit(jax.vmap(moved))(jnp.eye(flat.size))).T
    monkeypatch.undo()
    return found


@pytest.mark.parametrize("name", ["kfac", "ekfac, leading", "ekfac, groups"])
def test_samples_have_the_covariance_of_the_posterior(name: str, monkeypatch: Any) -> None:
    params, _, curvature, F, has = measured(name)
    numbers = {"examples": EXAMPLES, "prior_precision": TAU, "temperature": 0.7}
    M = samples_matrix(monkeypatch, curvature, params, **numbers)
    covariance = 0.7 * function(F, has, lambda d: 1 / (EXAMPLES * d + TAU))
    assert error(M @ M.T, covariance) < CLOSE
    assert error(M, M.T) < CLOSE


def test_draws_are_white_noise_that_depends_on_the_key() -> None:
    params, _, curvature, *_ = measured("kfac")
    draw = lambda key, **numbers: ng.posterior.sample(
        curvature, params, jax.random.key(key), examples=EXAMPLES, prior_precision=TAU, **numbers
    )
    drawn, again, other = (ravel_pytree(draw(key))[0] for key in (0, 0, 1))
    assert (drawn == again).all() and not np.allclose(drawn, other)
    assert (ravel_pytree(draw(0, temperature=0.0))[0] == ravel_pytree(params)[0]).all()
    assert (draw(0)["gain"] == params["gain"]).all()
    # whitened again, the noise has unit variance
    step = jax.tree.map(jnp.subtract, draw(0), params)
    white = ravel_pytree(ng.posterior.power(curvature, step, 0.5, LAMBDA))[0] * EXAMPLES**0.5
    covered = np.asarray(white)[np.asarray(white) != 0]
    assert abs(covered.mean()) < 4 / len(covered) ** 0.5
    assert abs(covered.std() - 1) < 4 / (2 * len(covered)) ** 0.5


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_log_determinant_is_that_of_the_dense_matrix(name: str) -> None:
    _, _, curvature, F, has = measured(name)
    found = jax.jit(
        lambda c, tau: ng.posterior.log_determinant(c, examples=EXAMPLES, prior_precision=tau)
    )(curvature, TAU)
    dense = (EXAMPLES * F + TAU * np.eye(len(F)))[np.ix_(has, has)]
    assert abs(float(found) - np.linalg.slogdet(dense)[1]) < CLOSE * abs(float(found))


@pytest.mark.parametrize("name", ["kfac", "ekfac"])
def test_influence_is_that_of_explicit_gradients(name: str) -> None:
    params, _, curvature, F, has = measured(name)
    _, (x, ids, y), _ = setting()
    train, query = (x, ids, y), (x[:2] + 1, ids[:2], y[:2])
    penalized = lambda p, *args: loss_fn(p, *args) + 0.5 * sum(map(jnp.sum, jax.tree.leaves(p)))
    flat, unravel = ravel_pytree(params)
    example = lambda t, n: loss_fn(unravel(t), *(a[n][None] for a in train)).value
    gradients = np.asarray(jax.jit(jax.vmap(jax.grad(example), (None, 0)))(flat, jnp.arange(N)))
    inverse = function(F, has, lambda d: 1 / (d + 0.05))
    margin = lambda p, x, ids, y: jnp.sin(p["head"]["bias"]).sum() * p["conv"]["kernel"].sum()
    for query_fn in (None, loss_fn, margin):
        of = lambda t, q=query_fn: (q or penalized)(unravel(t), *query)
        value = lambda t, of=of: getattr(of(t), "value", of(t))
        expected = -gradients @ inverse @ jax.jit(jax.grad(value))(flat)
        found = ng.posterior.influence(
            curvature, penalized, params, query, train, 0.05, query_fn=query_fn, chunk=5
        )
        assert error(found, expected) < CLOSE


@pytest.mark.parametrize("name", ["kfac", "ekfac, leading"])
def test_a_posterior_over_some_layers(name: str) -> None:
    params, layers, curvature, F, _ = measured(name)
    own = ng.posterior.select(curvature, "head", ("mid", "bias"), "blocks/*")
    assert set(own.bases) == {("head",), ("blocks", "dense")} and set(own.diagonal) == {
        ("mid", "bias")
    }
    at = places(layers, params)
    kept = np.zeros(len(F), bool)
    kept[np.concatenate([at["head",], at["mid", "bias"], at["blocks", "dense"]])] = True
    found = as_matrix(lambda v: ng.posterior.solve(own, v, LAMBDA), params)
    assert error(found, function(F, kept, lambda d: 1 / (d + LAMBDA))) < CLOSE
    drawn = ng.posterior.sample(
        own, params, jax.random.key(0), examples=EXAMPLES, prior_precision=TAU
    )
    changed = ravel_pytree(drawn)[0] != ravel_pytree(params)[0]
    assert (np.asarray(changed) == kept).all()
    alone = {"head": params["head"]}
    only = ng.posterior.select(curvature, "head")
    part = ng.posterior.solve(only, alone, LAMBDA)["head"]["kernel"]
    assert error(part, ng.posterior.solve(curvature, params, LAMBDA)["head"]["kernel"]) < CLOSE
    everything = ng.posterior.select(curvature, ".")
    assert everything.layers == curvature.layers
