"""Ways to invert and to store factors, as K-FAC and EKFAC take them."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from regression import MLP, problem

import natgrad_jax as ng

pytestmark = pytest.mark.once

model = nn.Sequential([nn.Dense(24), nn.tanh, nn.Dense(5)])
x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 16)), jnp.float32)
y = jnp.arange(64) % 5
params = model.init(jax.random.key(0), x)["params"]


def loss_fn(params: Any, x: jax.Array, y: jax.Array) -> ng.Loss:
    return ng.Categorical(model.apply({"params": params}, x)).nll(y)


layers = ng.find_layers(loss_fn, params, x, y)
grad_fn = ng.value_and_grad(loss_fn, layers)


def updates_of(make: Any, steps: int = 3, **keywords: Any) -> tuple[Any, Any]:
    """The last update where parameters stay, and the state."""
    tx = make(layers, 0.01, statistics_period=1, refresh_period=1, **keywords)
    state = tx.init(params)

    @jax.jit
    def step(state: Any, key: Any) -> Any:
        _, grads, statistics = grad_fn(params, x, y, rng=key, opt_state=state)
        return tx.update(grads, state, params, statistics=statistics)

    for i in range(steps):
        updates, state = step(state, jax.random.key(i))
    return updates, state


def close(found: Any, expected: Any, tolerance: float) -> None:
    def of_leaf(a: jax.Array, b: jax.Array) -> None:
        np.testing.assert_allclose(a, b, atol=tolerance * float(jnp.abs(b).max()))

    jax.tree.map(of_leaf, found, expected)


@pytest.mark.parametrize("inverse", ["eigh", "newton_schulz"])
def test_exact_inverses_agree(inverse: str) -> None:
    expected, _ = updates_of(ng.scale_by_kfac)
    found, state = updates_of(ng.scale_by_kfac, inverse=inverse)
    close(found, expected, 1e-4)
    assert state.rejected == 0


@pytest.mark.parametrize("make", [ng.scale_by_kfac, ng.scale_by_ekfac])
def test_stored_in_half_precision(make: Any) -> None:
    """Half the memory; averaged and inverted in float32, and so near to it."""
    expected, whole = updates_of(make)
    found, state = updates_of(make, factor_dtype=jnp.bfloat16)
    size = lambda s: sum(v.nbytes for v in jax.tree.leaves(ng.factors(s)))
    assert {v.dtype for v in jax.tree.leaves(ng.factors(state))} == {jnp.dtype(jnp.bfloat16)}
    assert 2 * size(state) == size(whole)
    assert {v.dtype for v in jax.tree.leaves(ng.bases(state))} == {jnp.dtype(jnp.float32)}
    close(found, expected, 0.05)


def test_storage_is_floating() -> None:
    with pytest.raises(ValueError, match="floating dtype, such as"):
        ng.scale_by_kfac(layers, factor_dtype=jnp.int8)


def test_rank_that_neglects_nothing_that_matters() -> None:
    """At the rank found no neglected eigenvalue exceeds its damping, at one less some does."""
    _, state = updates_of(ng.scale_by_kfac)
    k = ng.rank_for(state, layers, damping=1e-3)
    roots = []
    for A, G in ng.factors(state).values():
        pi = np.sqrt((np.trace(A) / len(A)) / (np.trace(G) / len(G)))
        spectra = zip((A, G), (pi, 1 / pi), strict=True)
        roots += [np.linalg.eigvalsh(F)[::-1] / (np.sqrt(1e-3) * share) for F, share in spectra]
    left = lambda k: max(values[k] for values in roots if len(values) > k)
    assert left(k) <= 1 < left(k - 1)
    assert ng.rank_for(state, layers, damping=1e6) == 1


def test_rank_needs_measured_factors() -> None:
    with pytest.raises(ValueError, match="take a few steps first"):
        ng.rank_for(ng.scale_by_kfac(layers).init(params), layers)


def test_failed_inverses_are_counted() -> None:
    """A factor that is indefinite in float32 takes more damping, and says so."""
    tx = partial(ng.scale_by_kfac, damping=1e-30, refresh_period=1, statistics_period=1)(layers)
    doubled = jnp.concatenate([x, x], axis=1)[:, :16].at[:, 8:].set(x[:, :8] * 1e3)
    _, grads, statistics = grad_fn(params, doubled, y, rng=jax.random.key(0))
    updates, state = tx.update(grads, tx.init(params), params, statistics=statistics)
    assert state.rejected > 0
    assert all(np.isfinite(v).all() for v in jax.tree.leaves((updates, state.bases)))


@pytest.mark.parametrize("how", [{"inverse": "eigh"}, {"inverse": ng.LowRank(6)},
                                 {"inverse": ng.LowRank(2)}])  # fmt: skip
def test_other_inverses_agree_where_they_are_exact(how: Any, float64: None) -> None:
    own = problem(MLP(), 5, 4)
    grad_fn = ng.value_and_grad(own.loss_fn, own.layers)
    _, grads, statistics = grad_fn(own.params, own.batch, rng=jax.random.key(0))
    found = []
    for kwargs in ({}, how):
        tx = ng.scale_by_kfac(own.layers, **kwargs)
        updates, _ = tx.update(grads, tx.init(own.params), statistics=statistics)
        found.append(ravel_pytree(updates)[0])
    if how["inverse"] == ng.LowRank(2):  # the leading eigenpairs: near, and not the same
        assert 1e-6 < np.linalg.norm(found[1] - found[0]) / np.linalg.norm(found[0]) < 1
    else:
        np.testing.assert_allclose(found[1], found[0], rtol=1e-7)


def test_woodbury_follows_every_batch(float64: None) -> None:
    """Between refreshes the inverse is that of the factors with the damping of the refresh, which
    fades by the decay."""
    own = problem(MLP(), 5, 4, examples=3)
    grad_fn = ng.value_and_grad(own.loss_fn, own.layers)
    tx = ng.scale_by_kfac(
        own.layers, 0.1, inverse=ng.Woodbury(3), decay=0.9, refresh_period=100,
        statistics_period=1,
    )  # fmt: skip
    state = tx.init(own.params)
    path = ("Dense_0",)
    expected = None

    @jax.jit
    def step(state: Any, batch: Any, key: Any) -> Any:
        _, grads, statistics = grad_fn(own.params, batch, rng=key, opt_state=state)
        return tx.update(grads, state, statistics=statistics)[1], statistics

    for i in range(4):
        batch = jax.tree.map(lambda x, i=i: x * (1 + i), own.batch)
        state, statistics = step(state, batch, jax.random.key(i))
        A = statistics.layers[path].A / 3
        if expected is None:
            expected, weight = np.linalg.inv(ng.bases(state)[path].A), 0.1
            continue
        weight = 0.9 * weight + 0.1
        expected = expected + 0.1 / weight * (A - expected)
        np.testing.assert_allclose(np.linalg.inv(ng.bases(state)[path].A), expected, rtol=1e-6)
