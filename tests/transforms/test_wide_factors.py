"""Factors of at most a size: beyond it a sketch, a diagonal, or a convolution's channels."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import natgrad_jax as ng
from natgrad_jax.layers.limits import MAX_FACTOR, MAX_SKETCH
from natgrad_jax.linalg.cholesky import damped_inverse
from natgrad_jax.linalg.nystrom import signs

pytestmark = pytest.mark.once

# Each with a rate at which it trains the network below.
MAKERS: dict[str, Any] = {
    "kfac": (ng.kfac, 0.05),
    "ekfac": (ng.ekfac, 0.05),
    "ngd": (ng.ngd, 0.1),
    "prong": (ng.prong, 0.01),
}


class Net(nn.Module):
    """Inputs and outputs on either side of a limit of 6 rows."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.tanh(nn.Conv(3, (3,), padding="SAME", name="patches")(x))
        x = nn.tanh(nn.Dense(8, name="wide")(x.mean(1)))
        return nn.Dense(4, name="narrow")(nn.tanh(nn.Dense(5, name="from_wide")(x)))


def setting() -> tuple[Any, Any, Any]:
    random = np.random.default_rng(0)
    batch = (jnp.asarray(random.normal(size=(16, 4, 2))), jnp.asarray(random.integers(4, size=16)))
    params = Net().init(jax.random.key(0), batch[0])["params"]
    params = jax.tree.map(lambda x: x.astype(batch[0].dtype), params)
    loss_fn = lambda p, x, y: ng.Categorical(Net().apply({"params": p}, x)).nll(y)
    return loss_fn, params, batch


def after_a_step(size: int | None, beyond: Any = "sketch") -> tuple[Any, ...]:
    """In float64: layers, the state, gradients and updates."""
    with jax.enable_x64(True):
        loss_fn, params, batch = setting()
        layers = ng.find_layers(loss_fn, params, *batch)
        tx = ng.scale_by_kfac(
            layers,
            0.1,
            inverse="cholesky",
            approximation=ng.Approximation(max_size=size, beyond=beyond),
        )
        state = tx.init(params)
        grad_fn = ng.value_and_grad(loss_fn, layers, fisher="exact")
        _, grads, statistics = grad_fn(params, *batch, opt_state=state)
        updates, state = tx.update(grads, state, params, statistics=statistics)
        return layers, state, grads, updates


def factors_of(*how: Any) -> tuple[Any, Any]:
    """After that step, and what it applied."""
    _, state, *applied = after_a_step(*how)
    return ng.factors(state), applied


def sketch(x: Any) -> np.ndarray:
    """With the diagonal as many columns as the other side has rows: four and five."""
    x = np.asarray(x)
    test = np.asarray(signs(len(x), {8: 3, 9: 4}[len(x)], np.dtype("float32")))
    return np.concatenate([x @ test, np.diagonal(x)[:, None]], axis=1)


@pytest.mark.parametrize("beyond, cut", [("sketch", sketch), ("diagonal", np.diagonal)])
def test_what_is_too_wide_is_cut_out_of_the_whole_factor(beyond: str, cut: Any) -> None:
    whole, limited = factors_of(None)[0], factors_of(6, beyond)[0]
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-15)
    close(limited[("wide",)].G, cut(whole[("wide",)].G))
    close(limited[("wide",)].A, whole[("wide",)].A)
    close(limited[("from_wide",)].A, cut(whole[("from_wide",)].A))
    close(limited[("from_wide",)].G, whole[("from_wide",)].G)
    close(limited[("narrow",)].A, whole[("narrow",)].A)
    assert limited[("patches",)].A.shape == (2, 2) and whole[("patches",)].A.shape == (7, 7)


def test_a_diagonal_is_inverted_as_a_matrix_would_be() -> None:
    factors, (grads, updates) = factors_of(6, "diagonal")
    with jax.enable_x64(True):
        A, G = factors[("from_wide",)]
        pi = jnp.sqrt((A.sum() / A.size) / (jnp.trace(G) / len(G)))
        own = grads["from_wide"]
        gradient = jnp.concatenate([own["kernel"], own["bias"][None]])
        on_a, on_g = pi * jnp.sqrt(0.1), jnp.sqrt(0.1) / pi
        wanted = (gradient / (A + on_a)[:, None]) @ damped_inverse(G, on_g)
        found = jnp.concatenate(
            [updates["from_wide"]["kernel"], updates["from_wide"]["bias"][None]]
        )
        np.testing.assert_allclose(found, wanted, rtol=1e-10)


def approximated(F: Any, product: Any, columns: int) -> Any:
    """The Nyström approximation from ``F Ω``, and the mean of what it leaves out of the trace in
    all other directions."""
    test = signs(len(F), columns, F.dtype)
    near = product @ jnp.linalg.solve(test.T @ product, product.T)
    Q = jnp.linalg.qr(product)[0]
    rest = (jnp.trace(F) - jnp.trace(near)) / (len(F) - columns)
    return near + rest * (jnp.eye(len(F)) - Q @ Q.T)


def test_a_sketch_is_inverted_as_the_matrix_that_it_stands_for() -> None:
    whole = factors_of(None)[0][("from_wide",)]
    factors, (grads, updates) = factors_of(6)
    with jax.enable_x64(True):
        sketch, G = factors[("from_wide",)]
        assert sketch.shape == (9, 5)
        A = approximated(whole.A, sketch[:, :4], 4)
        pi = jnp.sqrt((jnp.trace(whole.A) / 9) / (jnp.trace(G) / len(G)))
        own = grads["from_wide"]
        gradient = jnp.concatenate([own["kernel"], own["bias"][None]])
        on_a, on_g = pi * jnp.sqrt(0.1), jnp.sqrt(0.1) / pi
        found = jnp.concatenate(
            [updates["from_wide"]["kernel"], updates["from_wide"]["bias"][None]]
        )
        wanted = damped_inverse(A, on_a) @ gradient @ damped_inverse(G, on_g)
        np.testing.assert_allclose(found, wanted, rtol=1e-9)


def test_readers_take_a_sketch_for_that_matrix() -> None:
    whole = factors_of(None)[0][("from_wide",)]
    layers, state, *_ = after_a_step(6)
    with jax.enable_x64(True):
        sketch, G = ng.factors(state)[("from_wide",)]
        A = approximated(whole.A, sketch[:, :4], 4)
        own = ng.diagnostics.matrices(layers, state)[("from_wide",)]
        np.testing.assert_allclose(own, jnp.kron(A, G), rtol=1e-6, atol=1e-9)
        v = {name: jax.tree.map(jnp.ones_like, x) for name, x in setting()[1].items()}
        curvature = ng.posterior.from_state(state, layers)
        found = ng.posterior.power(curvature, v, 1)["from_wide"]
        found = jnp.concatenate([found["kernel"], found["bias"][None]])
        np.testing.assert_allclose(found, A @ jnp.ones_like(found) @ G, rtol=1e-6, atol=1e-9)
        report = ng.diagnostics.report(layers, state).rows["kfac/from_wide"]
        assert report["drift_A"] < 1e-6 and report["drift_G"] < 1e-6
        assert 1 <= ng.rank_for(state, layers, damping=1e-3) <= 6


@pytest.mark.parametrize("name", MAKERS)
def test_every_transformation_trains_with_it(name: str) -> None:
    loss_fn, params, batch = setting()
    layers = ng.find_layers(loss_fn, params, *batch)
    make, rate = MAKERS[name]
    tx = make(rate, layers, approximation=ng.Approximation(max_size=6))
    state, losses = tx.init(params), []
    grad_fn = ng.value_and_grad(loss_fn, layers)

    @jax.jit
    def step(params: Any, state: Any, key: Any) -> Any:
        loss, grads, statistics = grad_fn(params, *batch, rng=key, opt_state=state)
        updates, state = tx.update(grads, state, params, statistics=statistics)
        return jax.tree.map(jnp.add, params, updates), state, loss

    for i in range(40):
        params, state, loss = step(params, state, jax.random.key(i))
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.3


def bytes_of(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("model", ["head", "bag of words"])
def test_a_vocabulary_fits_in_a_few_times_its_parameters(name: str, model: str) -> None:
    """GPT-2 small's untied head, and a bag of 60,000 words; state and statistics."""
    shapes = {"head": (768, 50_257), "bag of words": (60_000, 64)}
    inputs, outputs = shapes[model]
    net = nn.Dense(outputs)
    x = jax.ShapeDtypeStruct((8, inputs), jnp.float32)
    params = jax.eval_shape(net.init, jax.random.key(0), x)["params"]
    loss_fn = lambda p, x: ng.Categorical(net.apply({"params": p}, x)).nll(jnp.zeros(8, int))
    layers = ng.find_layers(loss_fn, params, x)
    columns = min(MAX_SKETCH, min(inputs + 1, outputs)) - 1
    assert f"sketch {max(inputs + 1, outputs)} × {columns}" in str(layers)
    tx = MAKERS[name][0](0.1, layers)
    state = jax.eval_shape(tx.init, params)
    grad_fn = ng.value_and_grad(loss_fn, layers)
    measured = lambda params, state, x, key: grad_fn(params, x, rng=key, opt_state=state)[2]
    statistics = jax.eval_shape(measured, params, state, x, jax.random.key(0))
    assert bytes_of((state, statistics)) < 5 * bytes_of(params)


def test_both_sides_of_the_usual_limit() -> None:
    def sides(n: int) -> Any:
        net = nn.Dense(n, use_bias=False)
        x = jax.ShapeDtypeStruct((2, n), jnp.float32)
        params = jax.eval_shape(net.init, jax.random.key(0), x)["params"]
        loss_fn = lambda p, x: ng.Gaussian(net.apply({"params": p}, x)).nll(x)
        layer = ng.find_layers(loss_fn, params, x)[()]
        return layer.input_factor_shape, layer.output_factor_shape

    assert sides(MAX_FACTOR) == ((MAX_FACTOR,) * 2,) * 2
    assert sides(MAX_FACTOR + 1) == ((MAX_FACTOR + 1, MAX_SKETCH),) * 2


def test_a_size_that_is_none() -> None:
    with pytest.raises(ValueError, match="max_size, the most rows of one factor"):
        ng.Approximation(max_size=0)
