"""SOAP and Shampoo against their formulas, written out for single matrices in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import natgrad_jax as ng
from natgrad_jax.state.walk import states

TREE = {
    "a": (5, 4),
    "b": (5, 4),
    "bias": (4,),
    "conv": (3, 3, 2, 6),
    "scan": (2, 4, 3),
    "scalar": (),
    "row": (1, 7),
}
MAKERS: dict[str, Any] = {
    "soap": (ng.soap, {}),
    "soap, eigh": (ng.soap, {"basis": "eigh", "refresh": ng.every(3)}),
    "soap, low rank": (ng.soap, {"basis": ng.LowRank(2)}),
    "soap, one-sided": (ng.soap, {"max_size": 4}),
    "shampoo": (ng.shampoo, {}),
    "shampoo, low rank": (ng.shampoo, {"basis": ng.LowRank(2), "power": 0.5}),
    "shampoo, one-sided": (ng.shampoo, {"max_size": 4, "graft": optax.identity()}),
}


def gradients(steps: int, dtype: Any = np.float64) -> list[Any]:
    random = np.random.default_rng(0)
    return [
        {k: jnp.asarray(random.normal(size=shape), dtype) for k, shape in TREE.items()}
        for _ in range(steps)
    ]


def run(tx: Any, given: list[Any]) -> tuple[list[Any], Any]:
    state, found, update = tx.init(given[0]), [], jax.jit(tx.update)
    for g in given:
        updates, state = update(g, state, g)
        found.append(updates)
    return found, state


def root(M: Any, power: float) -> Any:
    d, Q = np.linalg.eigh(M)
    return (Q * d**-power) @ Q.T


def test_soap_is_adam_in_the_first_eigenbasis() -> None:
    """Bases are computed at the first step and kept; a kernel of four axes is 9 × 12."""
    with jax.enable_x64(True):
        given = gradients(4)
        found, state = run(ng.scale_by_soap(0.9, 0.8, 1e-8, refresh=ng.every(100)), given)
        for name, shape in (("a", (5, 4)), ("b", (5, 4)), ("conv", (9, 12)), ("scan", (8, 3))):
            G = [np.asarray(g[name]).reshape(shape) for g in given]
            U, V = (np.asarray(Q) for Q in ng.bases(state)[(name,)])
            for Q, M in ((U, G[0] @ G[0].T), (V, G[0].T @ G[0])):
                inside = Q.T @ M @ Q
                np.testing.assert_allclose(inside, np.diag(np.diag(inside)), atol=1e-10)
                np.testing.assert_allclose(Q.T @ Q, np.eye(len(Q)), atol=1e-10)
            m, S = 0, 0
            for t, own in enumerate(G, 1):
                m, S = 0.9 * m + 0.1 * own, 0.8 * S + 0.2 * (U.T @ own @ V) ** 2
                m_hat, S_hat = m / (1 - 0.9**t), S / (1 - 0.8**t)
                wanted = U @ ((U.T @ m_hat @ V) / (np.sqrt(S_hat) + 1e-8)) @ V.T
                got = np.asarray(found[t - 1][name]).reshape(shape)
                np.testing.assert_allclose(got, wanted, atol=1e-7)
        adam = run(optax.scale_by_adam(0.9, 0.8, 1e-8), given)[0]
        for name in ("bias", "scalar", "row"):
            got, wanted = found[-1][name], adam[-1][name]
            np.testing.assert_allclose(got, wanted, rtol=1e-10)


@pytest.mark.parametrize("power", [0.25, 0.5])
def test_shampoo_is_its_formula(power: float) -> None:
    with jax.enable_x64(True):
        given = gradients(8)
        tx = ng.scale_by_shampoo(
            0.9, epsilon=1e-13, power=power, graft=optax.identity(), refresh=ng.every(1)
        )
        found, state = run(tx, given)
        for name, shape in (("a", (5, 4)), ("b", (5, 4)), ("conv", (9, 12))):
            L, R = 0, 0
            for g in given:
                G = np.asarray(g[name]).reshape(shape)
                L, R = 0.9 * L + 0.1 * G @ G.T, 0.9 * R + 0.1 * G.T @ G
            assert np.linalg.matrix_rank(L) == min(shape[0], 8 * shape[1])
            L, R = (x / (1 - 0.9 ** len(given)) for x in (L, R))
            np.testing.assert_allclose(ng.factors(state)[(name,)].A, L, rtol=1e-10)
            D = root(L, power) @ G @ root(R, power)
            wanted = D * np.linalg.norm(G) / np.linalg.norm(D)
            got = np.asarray(found[-1][name]).reshape(shape)
            np.testing.assert_allclose(got, wanted, atol=1e-8)
        np.testing.assert_allclose(found[-1]["bias"], given[-1]["bias"])


@pytest.mark.parametrize("name", MAKERS)
def test_types_jit_and_numbers_that_are_not_finite(name: str) -> None:
    make, options = MAKERS[name]
    tx = make(0.01, **options)
    given = gradients(5, np.float32)
    tiny = lambda x: x * 1e-9  # as of an attention's bias of keys: fourth powers underflow
    given = [{**g, "a": g["a"].astype(jnp.bfloat16), "scan": tiny(g["scan"])} for g in given]
    state = tx.init(given[0])
    update = jax.jit(tx.update)
    for g in given:
        updates, state = update(g, state, g)
        assert jax.tree.all(jax.tree.map(lambda u, g: u.dtype == g.dtype, updates, g))
        assert jax.tree.all(jax.tree.map(lambda u: bool(jnp.isfinite(u).all()), updates))
    bad = {**given[0], "conv": given[0]["conv"].at[0, 0, 0, 0].set(jnp.nan)}
    before = ng.factors(state)
    updates, after = update(bad, state, bad)
    jax.tree.map(np.testing.assert_array_equal, before, ng.factors(after))
    assert jax.tree.all(jax.tree.map(lambda u: bool(jnp.isfinite(u).all()), updates))
    assert [int(x.rejected) for x in states(after)] == [1]
    assert set(before) == {("a",), ("b",), ("conv",), ("scan",)}


@pytest.mark.parametrize("name", MAKERS)
def test_they_train(name: str) -> None:
    """A linear network of equal and unequal layers to a tenth of its loss."""
    make, options = MAKERS[name]
    random = np.random.default_rng(1)
    x = jnp.asarray(random.normal(size=(64, 6)), jnp.float32)
    scales = 10.0 ** -np.arange(6)
    params = [jnp.asarray(random.normal(size=(6, 6)), jnp.float32) / 6**0.5 for _ in range(3)]
    target = x @ jnp.asarray(random.normal(size=(6, 6)) * scales, jnp.float32)

    def loss(params: Any) -> Any:
        return jnp.mean(jnp.square(x @ params[0] @ params[1] @ params[2] - target))

    rate = 0.02 if "identity" in str(options) else 0.01
    tx = make(rate, **options)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state = tx.init(params)
    start = float(loss(params))
    for _ in range(300):
        params, state, _ = step(params, state)
    assert float(loss(params)) < 0.1 * start


def test_a_loss_with_layers_measures_nothing_for_it() -> None:
    params, x = {"w": jnp.ones((3, 2))}, jnp.ones((4, 3))
    loss_fn = lambda p, x: ng.Gaussian(x @ p["w"]).nll(jnp.zeros((4, 2)))
    grad_fn = ng.value_and_grad(loss_fn, ng.find_layers(loss_fn, params, x))
    state = ng.soap(0.1).init(params)
    _, grads, statistics = grad_fn(params, x, rng=jax.random.key(0), opt_state=state)
    assert float(statistics.examples) == 0
    np.testing.assert_allclose(grads["w"], jax.grad(lambda p: loss_fn(p, x).value)(params)["w"])


def test_wrappers() -> None:
    params = {"own": {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}, "other": jnp.ones((4, 2))}
    labels = {"own": "soap", "other": "sgd"}
    tx = optax.partition({"soap": ng.soap(0.1), "sgd": optax.sgd(0.1)}, labels)
    updates, state = tx.update(params, tx.init(params), params)
    assert set(ng.factors(state)) == {("own", "w")}
    np.testing.assert_allclose(updates["other"], -0.1)
    scheduled = optax.inject_hyperparams(ng.shampoo, static_args="max_size")
    tx = scheduled(learning_rate=optax.linear_schedule(0.1, 0.0, 10))
    tx.update(params, tx.init(params), params)


@pytest.mark.parametrize("bad", [{"b1": 1.5}, {"b2": -0.1}, {"eps": 0.0}, {"basis": "none"}])
def test_bad_numbers(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"must be|got"):
        ng.scale_by_soap(**bad)
