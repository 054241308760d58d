"""EKFAC beyond single layers: its scaling in time, its bases, random networks, and its errors."""

from functools import partial
from itertools import pairwise
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings, strategies as st
from transformations import Jitted

import natgrad_jax as ng
from natgrad_jax.curvature.eigenbases import everywhere, second_moments, transport
from natgrad_jax.curvature.inverses import operate
from natgrad_jax.linalg.orthogonal_iteration import off_diagonal
from natgrad_jax.statistics.spec import requests

pytestmark = pytest.mark.once


@pytest.fixture
def float64() -> Any:
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.tanh(nn.Conv(4, (3, 3), strides=2)(x))
        x = nn.LayerNorm()(x).reshape(len(x), -1)
        return nn.Dense(3)(x)


def loss_fn(params: Any, x: jax.Array, y: jax.Array) -> ng.Loss:
    return ng.Categorical(Net().apply({"params": params}, x)).nll(y)


def problem(dtype: Any = jnp.float32) -> Any:
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(16, 6, 6, 2)), dtype)
    shapes = jax.eval_shape(Net().init, jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda s: jnp.asarray(random.normal(size=s.shape) / 3, dtype), shapes)
    batch = (x, jnp.arange(16) % 3)
    return params, batch, ng.find_layers(loss_fn, params, *batch)


def history(tx: Any, steps: int, dtype: Any = jnp.float32) -> list[Any]:
    """Updates and states of some steps on one batch, the parameters staying where they are."""
    params, batch, layers = problem(dtype)
    grad_fn = ng.value_and_grad(loss_fn, layers)

    @Jitted
    def step(params: Any, state: Any, key: Any) -> Any:
        _, grads, statistics = grad_fn(params, *batch, rng=key, opt_state=state)
        updates, state = tx(layers).update(grads, state, params, statistics=statistics)
        return updates, state

    state, found = tx(layers).init(params), []
    for i in range(steps):
        updates, state = step(params, state, jax.random.key(i))
        found.append((updates, state))
    assert step.traces == 1
    return found


def norm(tree: Any) -> float:
    return float(np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(tree))))


@pytest.mark.parametrize("how", [{}, {"convolution": "sua"}, {"group_size": 2}])
def test_products_of_eigenvalues_are_kfac_with_undivided_damping(how: Any, float64: None) -> None:
    """The first step knows no other S: ``(A ⊗ G + λ I)⁻¹ ∇``."""
    tx = partial(ng.scale_by_ekfac, damping=0.05, **how)
    ((updates, state),) = history(tx, 1, jnp.float64)
    params, batch, layers = problem(jnp.float64)
    key = jax.random.key(0)
    _, grads, _ = ng.value_and_grad(loss_fn, layers)(params, *batch, rng=key)
    own = layers.approximate(requests(state)[0][0].approximation)
    for path, layer in own.items():
        if layer.block != "kronecker":
            continue
        factors = ng.factors(state)[path]
        F = ng.diagnostics.dense(layer, partial(operate, layer, factors))
        flat = lambda t, p=path: np.concatenate([np.ravel(t[p[0]][n]) for n in ("kernel", "bias")])
        expected = np.linalg.solve(F + 0.05 * np.eye(len(F)), flat(grads))
        np.testing.assert_allclose(flat(updates), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    "how", [{}, {"rank": 2}, {"moments": "running_average"}, {"basis": "qr"}], ids=str
)
def test_scaling_does_not_jump_at_a_refresh(how: Any) -> None:
    """The same gradient gives steps of nearly the same size before and after new bases."""
    tx = partial(
        ng.scale_by_ekfac, damping=1e-3, decay=0.9, statistics_period=1, refresh_period=4, **how
    )
    found = history(tx, 9)
    changes = np.array([abs(np.log(norm(b[0]) / norm(a[0]))) for a, b in pairwise(found)])
    refreshed = np.arange(1, 9) % 4 == 0
    assert changes[refreshed].max() < np.log(1.15)
    assert changes.max() < np.log(1.5)  # nor when the first measurements join S


@pytest.mark.parametrize("rank", [1, None])
def test_carried_moments_are_the_same_fisher_in_another_basis(rank: Any, float64: None) -> None:
    """Same trace; the diagonal of ``Q S Qᵀ`` in the new basis; nothing where the basis stays.

    Where the basis is partial, the others' part of that diagonal as its mean.
    """
    ((_, state),) = history(partial(ng.scale_by_ekfac, decay=0.0, rank=rank), 1, jnp.float64)
    *_, layers = problem(jnp.float64)
    for path, layer in layers.items():
        if layer.block != "kronecker":
            continue
        S, old = state.moments[path], state.bases[path]
        random = np.random.default_rng(1)
        turn = lambda Q, r=random: jnp.asarray(np.linalg.qr(r.normal(size=Q.shape))[0])
        new = type(old)(turn(old.A), turn(old.G))
        there = transport(layer, S, old, new)
        S_old, S_new = everywhere(layer, old, S), everywhere(layer, new, there)
        np.testing.assert_allclose(S_new.sum(), S_old.sum(), rtol=1e-12)
        Q, Q_new = (np.kron(*map(oracle.completed, pair)) for pair in (old, new))
        F = Q @ np.diag(np.ravel(S_old)) @ Q.T
        expected = np.diag(Q_new.T @ F @ Q_new).reshape(S_new.shape)
        for axis, basis in enumerate(new):
            leading, others = np.split(expected, [basis.shape[1]], axis)
            if others.size:
                others = np.broadcast_to(others.mean(axis, keepdims=True), others.shape)
            expected = np.concatenate([leading, others], axis)
        np.testing.assert_allclose(S_new, expected, atol=1e-12)
        flipped = type(old)(-old.A[:, ::-1], old.G)
        kept = np.array(S)
        kept[: old.A.shape[1]] = kept[: old.A.shape[1]][::-1]
        np.testing.assert_allclose(transport(layer, S, old, flipped), kept, atol=1e-12)


def test_qr_follows_the_eigenbasis_and_a_tolerance_keeps_the_last() -> None:
    tx = partial(ng.scale_by_ekfac, damping=1e-2, decay=0.5, statistics_period=1, refresh_period=1)
    exact, followed = history(tx, 12), history(partial(tx, basis="qr"), 12)
    off = lambda state, Q: float(off_diagonal(ng.factors(state)[path].A, Q))
    for path in (("Conv_0",), ("Dense_0",)):
        state = exact[-1][1]
        assert off(state, ng.bases(state)[path].A) < 1e-3
        state = followed[-1][1]
        Q = ng.bases(state)[path].A
        assert off(state, Q) < 0.1 < off(state, jnp.eye(len(Q)))
    kept = history(partial(tx, basis="eigh", basis_tolerance=1.0), 3)
    assert all(
        np.array_equal(a, b)
        for a, b in zip(*(jax.tree.leaves(kept[i][1].bases[("Conv_0",)]) for i in (0, 2)))
    )
    renewed = history(partial(tx, basis="eigh", basis_tolerance=1e-9), 3)
    assert not np.array_equal(
        renewed[0][1].bases[("Conv_0",)].G, renewed[2][1].bases[("Conv_0",)].G
    )


def test_running_average_is_of_squared_minibatch_gradients() -> None:
    tx = partial(ng.scale_by_ekfac, decay=0.5, refresh_period=100, moments="running_average")
    (_, first), (_, second) = history(tx, 2)
    params, batch, layers = problem()
    _, grads, _ = ng.value_and_grad(loss_fn, layers)(params, *batch, rng=jax.random.key(0))
    path = ("Dense_0",)
    layer = layers[path]
    x = layer.pack(layer.to_matrix(grads["Dense_0"]["kernel"], grads["Dense_0"]["bias"]))
    new = 16 * second_moments(layer, first.bases[path], x)
    # the first S counts as one measurement: weights ½ · ½ and ½, corrected
    expected = (first.moments[path] + 2 * new) / 3
    np.testing.assert_allclose(second.moments[path], expected, rtol=1e-4, atol=1e-7)


def test_statistics_without_bases_are_refused_where_they_are_needed() -> None:
    params, batch, layers = problem()
    _, grads, statistics = ng.value_and_grad(loss_fn, layers)(params, *batch, rng=jax.random.key(0))
    tx = ng.scale_by_ekfac(layers)
    with pytest.raises(ValueError, match="opt_state=opt_state"):
        tx.update(grads, tx.init(params), params, statistics=statistics)
    running = ng.scale_by_ekfac(layers, moments="running_average")
    running.update(grads, running.init(params), params, statistics=statistics)
    with pytest.raises(ValueError, match="'intra_batch' or 'running_average'"):
        ng.scale_by_ekfac(layers, moments="both")
    with pytest.raises(ValueError, match="'eigh' or 'qr' or 'low_rank'"):
        ng.scale_by_ekfac(layers, basis="svd")
    with pytest.raises(ValueError, match="'low_rank' needs rank="):
        ng.scale_by_ekfac(layers, rank=0)
    with pytest.raises(ValueError, match='goes with basis="low_rank"'):
        ng.scale_by_ekfac(layers, basis="qr", rank=4)
    with pytest.raises(ValueError, match="whole bases"):
        ng.scale_by_ekfac(layers, basis_tolerance=0.1)


def test_moments_that_are_not_finite_are_dropped_and_counted() -> None:
    params, batch, layers = problem()
    tx = ng.scale_by_ekfac(layers, statistics_period=1, refresh_period=100)
    grad_fn = ng.value_and_grad(loss_fn, layers)
    state = tx.init(params)
    for i in range(2):
        _, grads, statistics = grad_fn(params, *batch, rng=jax.random.key(i), opt_state=state)
        if i:
            moments = {p: x.at[0, 0].set(jnp.nan) for p, x in statistics.moments.items()}
            statistics = statistics._replace(moments=moments)
        updates, later = tx.update(grads, state, params, statistics=statistics)
        state, before = later, state
    assert state.rejected == 2
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((updates, state)))
    for path in (("Conv_0",), ("Dense_0",)):
        np.testing.assert_array_equal(state.moments[path], before.moments[path])


networks = st.fixed_dictionaries(
    {
        "widths": st.lists(st.integers(1, 4), min_size=1, max_size=2),
        "examples": st.integers(1, 5),
        "positions": st.integers(1, 3),
        "fisher": st.sampled_from(["exact", "mc", "empirical"]),
        "bias": st.booleans(),
        "seed": st.integers(0, 2**16),
    }
)


@settings(max_examples=3, deadline=None, derandomize=True)
@given(networks)
def test_ekfac_is_never_further_than_kfac_for_random_networks(drawn: Any) -> None:
    jax.config.update("jax_enable_x64", True)
    try:
        random = np.random.default_rng(drawn["seed"])
        x = jnp.asarray(random.normal(size=(drawn["examples"], drawn["positions"], 3)))
        sizes = [3, *drawn["widths"]]
        params = {
            str(i): {
                "kernel": jnp.asarray(random.normal(size=sizes[i : i + 2])),
                **(
                    {"bias": jnp.asarray(random.normal(size=sizes[i + 1]))} if drawn["bias"] else {}
                ),
            }
            for i in range(len(sizes) - 1)
        }
        y = random.integers(2, size=drawn["examples"])
        readout = jnp.asarray(random.normal(size=(drawn["positions"] * sizes[-1], 2)))

        def loss(params: Any, x: jax.Array) -> ng.Loss:
            for i in range(len(params)):
                layer = nn.Dense(sizes[i + 1], use_bias=drawn["bias"])
                x = jnp.tanh(layer.apply({"params": params[str(i)]}, x))
            return ng.Categorical(x.reshape(len(x), -1) @ readout).nll(y)

        error = ng.diagnostics.approximation_error(
            loss, params, x, fisher=drawn["fisher"], rng=jax.random.key(drawn["seed"])
        )
        slack = 1e-10 * error["zero"]
        assert error["ekfac"] <= error["kfac"] + slack
        assert error["ekfac_reduce"] <= error["kfac_reduce"] + slack
    finally:
        jax.config.update("jax_enable_x64", False)
