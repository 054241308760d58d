"""Parts that another transformation updates, or none: nothing is measured and kept for them."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import natgrad_jax as ng
from natgrad_jax.state.walk import states

HEAD = ("head",)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.LayerNorm(name="norm")(nn.tanh(nn.Dense(6, name="trunk")(x)))
        wide = self.param("wide", nn.initializers.ones, (300, 6))  # left over
        return nn.Dense(3, name="head")(x * wide.mean(0))


NET, X, Y = Net(), jnp.linspace(-1, 1, 32).reshape(8, 4), jnp.arange(8) % 3
PARAMS = NET.init(jax.random.key(0), X)["params"]
LABELS = jax.tree_util.tree_map_with_path(
    lambda path, _: "own" if path[0].key == "head" else "rest", PARAMS
)
MASK = jax.tree.map(lambda label: label == "own", LABELS)


def loss_fn(params: Any) -> ng.Loss:
    return ng.Categorical(NET.apply({"params": params}, X)).nll(Y)


def find_layers(**kwargs: Any) -> ng.Layers:
    with pytest.warns(ng.UncoveredWarning, match="wide"):
        return ng.find_layers(loss_fn, PARAMS, **kwargs)


MAKE = {
    "kfac": lambda layers: ng.kfac(0.1, layers),
    "ekfac": lambda layers: ng.ekfac(0.1, layers),
    "ngd": lambda layers: ng.ngd(0.1, layers),
    "prong": lambda layers: ng.prong(0.1, layers),
    "both sides": lambda layers: ng.in_coordinates(optax.sgd(0.1), layers, "both_sides"),
}
WAYS = {
    "partition": lambda tx: optax.partition({"own": tx, "rest": optax.adamw(1e-3)}, LABELS),
    "multi_transform": lambda tx: optax.multi_transform(
        {"own": tx, "rest": optax.set_to_zero()}, LABELS
    ),
    "masked": lambda tx: optax.chain(
        optax.masked(tx, MASK),
        optax.masked(optax.set_to_zero(), jax.tree.map(lambda own: not own, MASK)),
    ),
}


def shapes(tx: Any, layers: ng.Layers) -> Any:
    """What the state and the statistics hold after a step."""

    def step() -> Any:
        state = tx.init(PARAMS)
        grad_fn = ng.value_and_grad(loss_fn, layers)
        _, grads, statistics = grad_fn(PARAMS, rng=jax.random.key(0), opt_state=state)
        return tx.update(grads, state, PARAMS, statistics=statistics)[1], statistics

    return jax.eval_shape(step)


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_only_what_is_updated_is_kept_and_measured(make: Any, way: Any) -> None:
    layers = find_layers()
    state, statistics = shapes(way(make(layers)), layers)
    assert set(ng.factors(state)) == set(ng.bases(state)) == {HEAD}
    assert set(statistics.layers) == {HEAD} and not statistics.leftover
    assert not any(getattr(s, "diagonal", {}) for s in states(state))


@pytest.mark.parametrize("way", ["multi_transform", "masked"])
def test_the_rest_trains_as_beside_frozen_blocks(way: str) -> None:
    layers = find_layers()
    frozen = layers.replace(lambda path, _: path[:1] != HEAD, "frozen")
    found = []
    for own, tx in ((layers, WAYS[way](ng.kfac(0.1, layers))), (frozen, ng.kfac(0.1, frozen))):
        grad_fn, params, state = ng.value_and_grad(loss_fn, own), PARAMS, tx.init(PARAMS)
        for i in range(3):
            _, grads, statistics = grad_fn(params, rng=jax.random.key(i), opt_state=state)
            updates, state = tx.update(grads, state, params, statistics=statistics)
            params = optax.apply_updates(params, updates)
        found.append(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), *found)
    assert np.any(found[0]["head"]["kernel"] != PARAMS["head"]["kernel"])


class Adapted(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.trunk, self.head = nnx.Linear(4, 5, rngs=rngs), nnx.LoRALinear(
            5, 3, lora_rank=2, rngs=rngs)  # fmt: skip

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(nnx.tanh(self.trunk(x)))


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_an_nnx_optimizer_of_some_variables_keeps_those(make: Any) -> None:
    model = Adapted()
    loss_fn = lambda model: ng.Categorical(model(X)).nll(Y)
    layers = ng.find_layers(loss_fn, model)
    optimizer = nnx.Optimizer(model, make(layers), wrt=nnx.LoRAParam)
    grad_fn = ng.value_and_grad(loss_fn, layers)
    before = nnx.as_pure(nnx.split(model, nnx.LoRAParam, ...)[2])
    for i in range(2):
        loss, grads, statistics = grad_fn(
            model, rng=jax.random.key(i), opt_state=optimizer.opt_state
        )
        optimizer.update(model, grads, statistics=statistics)
    assert {path[-1] for path in statistics.layers} == {"lora_a", "lora_b"}
    assert set(ng.factors(optimizer.opt_state)) == set(statistics.layers)
    after = nnx.as_pure(nnx.split(model, nnx.LoRAParam, ...)[2])
    jax.tree.map(np.testing.assert_array_equal, after, before)
    assert np.isfinite(loss)
