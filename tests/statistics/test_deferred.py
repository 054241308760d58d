"""Statistics that are measured where they are used."""

import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import natgrad_jax as ng

model = nn.Sequential([nn.Dense(5), nn.tanh, nn.Dense(3)])
X, Y = jax.random.normal(jax.random.key(0), (12, 4)), jnp.arange(12) % 3
PARAMS = model.init(jax.random.key(1), X)["params"]
KEY = jax.random.key(2)


def loss_fn(params: Any, x: jax.Array, y: jax.Array) -> ng.Loss:
    return ng.Categorical(model.apply({"params": params}, x)).nll(y)


LAYERS = ng.find_layers(loss_fn, PARAMS, X, Y)
grad_fn = ng.value_and_grad(loss_fn, LAYERS)


def branches(tx: Any, use: Any) -> int:
    """How many branches ``use(statistics)`` puts into the program."""
    state = tx.init(PARAMS)
    measured = lambda state: use(grad_fn(PARAMS, X, Y, rng=KEY, opt_state=state)[2])
    return str(jax.make_jaxpr(measured)(state)).count("cond[")


def test_whoever_reads_them_finds_the_same() -> None:
    """Inside the jit of the update before it and after it, and outside."""
    tx = ng.kfac(0.1, LAYERS, statistics_period=10)
    state = tx.init(PARAMS)

    @jax.jit
    def step(state: Any) -> Any:
        _, grads, statistics = grad_fn(PARAMS, X, Y, rng=KEY, opt_state=state)
        before = statistics.layers
        _, state = tx.update(grads, state, PARAMS, statistics=statistics)
        return before, statistics, state

    before, found, now = step(state)
    alone = jax.jit(lambda s: grad_fn(PARAMS, X, Y, rng=KEY, opt_state=s)[2])(state)
    at_once = grad_fn(PARAMS, X, Y, rng=KEY)[2]
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    for sums in (found.layers, alone.layers, at_once.layers):
        jax.tree.map(close, before, sums)
    assert float(found.examples) == 12
    _, idle, _ = step(now)  # the next step measures nothing
    assert float(idle.examples) == 0 and not any(x.any() for x in jax.tree.leaves(idle))


@pytest.mark.parametrize(("period", "expected"), [(1, 0), (10, 1)])
def test_a_branch_only_where_one_is_needed(period: int, expected: int) -> None:
    tx = ng.kfac(0.1, LAYERS, statistics_period=period)
    assert branches(tx, lambda statistics: statistics.ready()) == expected
    assert branches(tx, lambda statistics: statistics.examples) == 0


def test_the_branch_keeps_nothing_of_the_training_pass() -> None:
    """What it needed of it would be written and kept on every step."""
    tx = ng.kfac(0.1, LAYERS)

    def step(state: Any, x: jax.Array, y: jax.Array) -> Any:
        _, grads, statistics = grad_fn(PARAMS, x, y, rng=KEY, opt_state=state)
        return tx.update(grads, state, PARAMS, statistics=statistics)

    jaxpr = jax.make_jaxpr(step)(tx.init(PARAMS), X, Y).jaxpr
    branches = [e for e in jaxpr.eqns if e.primitive.name == "cond"]
    of_examples = [v for e in branches for v in e.invars if v.aval.shape[:1] == (len(X),)]
    assert of_examples and set(of_examples) <= {*jaxpr.invars[-2:]}


DEEP = nn.Sequential([*[nn.Dense(16), nn.tanh] * 8, nn.Dense(3)])
MANY = jnp.tile(X, (500, 4))
TARGETS = jnp.arange(len(MANY)) % 3


def deep_loss(params: Any, x: jax.Array) -> ng.Loss:
    """Of a network whose activations outweigh its parameters."""
    return ng.Categorical(DEEP.apply({"params": params}, x)).nll(TARGETS)


DEEP_PARAMS = DEEP.init(KEY, MANY)["params"]
DEEP_LAYERS = ng.find_layers(deep_loss, DEEP_PARAMS, MANY)
deep_tx = ng.kfac(0.1, DEEP_LAYERS)


@jax.jit
def deep_step(state: Any, x: jax.Array) -> Any:
    grad_fn = ng.value_and_grad(deep_loss, DEEP_LAYERS)
    _, grads, statistics = grad_fn(DEEP_PARAMS, x, rng=KEY, opt_state=state)
    updates, state = deep_tx.update(grads, state, DEEP_PARAMS, statistics=statistics)
    return updates, state, statistics.examples


def test_measuring_needs_no_memory_beside_that_of_the_training_pass() -> None:
    alone = jax.jit(jax.grad(lambda p, x: deep_loss(p, x).value))
    temporaries = lambda lowered: lowered.compile().memory_analysis().temp_size_in_bytes
    least = temporaries(alone.lower(DEEP_PARAMS, MANY))
    assert temporaries(deep_step.lower(deep_tx.init(DEEP_PARAMS), MANY)) < 1.3 * least


def test_nothing_is_measured_where_the_gradient_is_not_finite() -> None:
    state = deep_tx.init(DEEP_PARAMS)
    _, bad, examples = deep_step(state, MANY.at[0, 0].set(jnp.nan))
    assert examples == 0
    jax.tree.map(np.testing.assert_array_equal, ng.factors(bad), ng.factors(state))
    _, after, examples = deep_step(bad, MANY)  # it is due until it is measured
    assert examples == len(MANY) and jax.tree.all(jax.tree.map(jnp.any, ng.factors(after)))


def test_two_transformations_share_one_measurement() -> None:
    labels = {"layers_0": "one", "layers_2": "two"}
    tx = optax.partition({"one": ng.kfac(0.1, LAYERS), "two": ng.ekfac(0.1, LAYERS)}, labels)
    assert branches(tx, lambda statistics: (statistics.layers, statistics.leftover)) == 1


EVERY_WAY = {
    "kfac": lambda **how: ng.kfac(0.1, LAYERS, **how),
    "kfac, woodbury": lambda **how: ng.kfac(0.1, LAYERS, inverse=ng.Woodbury(8), **how),
    "ekfac": lambda **how: ng.ekfac(0.1, LAYERS, **how),
    "ekfac, running average": lambda **how: ng.ekfac(0.1, LAYERS, moments="running_average", **how),
    "ngd": lambda **how: ng.ngd(0.1, LAYERS, **how),
    "prong": lambda **how: ng.prong(0.1, LAYERS, **how),
}


@pytest.mark.parametrize("name", EVERY_WAY)
def test_measured_in_the_update_or_before_it_the_steps_are_the_same(name: str) -> None:
    tx = EVERY_WAY[name](statistics_period=2)

    def step(params: Any, state: Any, key: jax.Array, before: bool) -> Any:
        _, grads, statistics = grad_fn(params, X, Y, rng=key, opt_state=state)
        statistics = statistics.ready() if before else statistics
        updates, state = tx.update(grads, state, params, statistics=statistics)
        return optax.apply_updates(params, updates), state

    found = []
    for before in (False, True):
        run = jax.jit(lambda *args, before=before: step(*args, before))
        params, state = PARAMS, tx.init(PARAMS)
        for i in range(4):
            params, state = run(params, state, jax.random.key(i))
        found.append(params)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, *found)


@pytest.mark.parametrize("fisher", ["mc", "empirical", "exact"])
@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_convolutions_within_control_flow_have_the_usual_layout(fisher: str, layout: str) -> None:
    """Of another they are plain loops on CPU, the only backend of this test."""
    of = {
        "NHWC": ((2, 16, 16, 3), (3, 3, 3, 4), "HWIO"),
        "NCHW": ((2, 3, 16, 16), (4, 3, 3, 3), "OIHW"),
    }
    shape, kernel, order = of[layout]

    def loss_fn(params: Any, x: jax.Array) -> ng.Loss:
        for name in ("one", "two"):
            x = jax.lax.conv_general_dilated(
                jnp.tanh(x), params[name], (2, 2), "SAME", dimension_numbers=(layout, order, layout)
            )
        return ng.Gaussian(x.reshape(len(x), -1)).nll(jnp.zeros((len(x), 64)))

    second = list(kernel)
    second[order.index("I")] = second[order.index("O")]
    normal = lambda seed, shape: jax.random.normal(jax.random.key(seed), shape)
    params, x = {"one": normal(0, kernel), "two": normal(1, second)}, normal(2, shape)
    layers = ng.find_layers(loss_fn, params, x)
    tx, grad_fn = ng.kfac(0.1, layers), ng.value_and_grad(loss_fn, layers, fisher=fisher)
    state = tx.init(params)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        _, grads, statistics = grad_fn(params, x, rng=KEY, opt_state=state)
        return grads, statistics.ready(), tx.update(grads, state, params, statistics=statistics)

    def layouts(lowered: Any) -> set[str]:
        return set(re.findall(r"dim_labels=([\w>-]+)", lowered.compile().as_text()))

    accumulated = jax.jit(ng.accumulate(loss_fn, layers, fisher=fisher))
    many = accumulated.lower(params, jnp.stack([x, x]), rng=KEY)
    assert layouts(step.lower(params, state)) == layouts(many) == {"b01f_01io->b01f"}
    grads, found, _ = step(params, state)
    _, alone, at_once = grad_fn(params, x, rng=KEY)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, (grads, found.layers), (alone, at_once.layers))
