"""Properties of random models: shapes, dtypes, masks, blocks and transformations as they fall."""

import warnings
from itertools import pairwise
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings, strategies as st
from transformations import (
    TABLE,
    Batch,
    OwnNorm,
    Setting,
    assert_types_stay,
    layers_for,
    run_steps,
)

import natgrad_jax as ng
from natgrad_jax.state.walk import states

pytestmark = pytest.mark.once

LAYERED = [name for name, row in TABLE.items() if not row.whole]
few = lambda n: settings(max_examples=n, deadline=None, derandomize=True)


class Model(nn.Module):
    """Layers over positions, and a dense head on their mean."""

    layers: tuple[tuple[str, int, bool], ...]
    classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for kind, width, bias in self.layers:
            if kind == "dense":
                x = nn.tanh(nn.Dense(width, use_bias=bias)(x))
            elif kind == "conv":
                x = nn.tanh(nn.Conv(width, (2,), use_bias=bias, padding="SAME")(x))
            elif kind == "norm":
                x = nn.LayerNorm(use_bias=bias)(x)
            else:
                x = OwnNorm(use_bias=bias)(x)
        return nn.Dense(self.classes)(x.mean(1))


class Drawn(NamedTuple):
    """What one example of hypothesis is made of."""

    layers: list[tuple[str, int, bool]]
    examples: int
    positions: int
    channels: int
    classes: int
    counted: list[bool]
    seed: int

    def batch(self, dtype: Any = jnp.float32) -> Batch:
        random = np.random.default_rng(self.seed)
        x = jnp.asarray(random.normal(size=(self.examples, self.positions, self.channels)), dtype)
        y = np.eye(self.classes)[random.integers(self.classes, size=self.examples)]
        return Batch(x, jnp.asarray(y, jnp.float32), jnp.asarray(self.where))

    @property
    def where(self) -> list[bool]:
        return [True, *self.counted, *[True] * self.examples][: self.examples]

    def setting(self, dtype: Any = jnp.float32) -> Setting:
        model, own = Model(tuple(self.layers), self.classes), self.batch(dtype)

        def loss_fn(params: Any, own: Batch) -> ng.Loss:
            return ng.Categorical(model.apply({"params": params}, own.x)).nll(own.y, own.weights)

        shapes = jax.eval_shape(model.init, jax.random.key(0), own.x)["params"]
        random = np.random.default_rng(self.seed + 1)
        params = jax.tree.map(lambda s: jnp.asarray(random.normal(size=s.shape), dtype), shapes)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ng.UncoveredWarning)
            return Setting(params, ng.find_layers(loss_fn, params, own), loss_fn)


GRADIENTS_ALONE = ng.SOAPState, ng.ShampooState

kinds = st.sampled_from(["dense", "conv", "norm", "own"])
models = st.builds(
    Drawn,
    layers=st.lists(st.tuples(kinds, st.integers(1, 4), st.booleans()), max_size=2),
    examples=st.integers(1, 5),
    positions=st.integers(1, 3),
    channels=st.integers(1, 3),
    classes=st.integers(2, 4),
    counted=st.lists(st.booleans(), max_size=4),
    seed=st.integers(0, 2**16),
)
dtypes = st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16])


@few(10)
@given(models, dtypes, st.sampled_from(LAYERED))
def test_every_parameter_is_covered_once_and_types_stay(
    drawn: Drawn, dtype: Any, name: str
) -> None:
    s = drawn.setting(dtype)
    told = [p.path for layer in s.layers.values() for p in layer.parameters]
    told += [x.path for x in s.layers.leftover]
    given = {tuple(k.key for k in path) for path, _ in jax.tree.leaves_with_path(s.params)}
    assert len(told) == len(set(told)) and set(told) == given
    assert all(str(s.layers).count("/".join(path)) == 1 for path in given)
    assert_types_stay(TABLE[name].make(s), s, drawn.batch(dtype))


@few(6)
@given(models, dtypes, st.sampled_from(LAYERED), st.data())
def test_steps_are_finite_and_what_is_frozen_or_masked_stays(
    drawn: Drawn, dtype: Any, name: str, data: Any
) -> None:
    s = drawn.setting(dtype)
    modules = st.sampled_from(sorted(s.params))
    frozen, masked = data.draw(modules, "frozen"), data.draw(modules, "masked")
    s = s._replace(layers=s.layers.replace((frozen,), "frozen"))
    labels = {m: jax.tree.map(lambda _, m=m: "still" if m == masked else "own", own)
              for m, own in s.params.items()}  # fmt: skip
    tx = TABLE[name].make(s)
    # a table freezes for those that take it: not in sample space, nor by the gradients alone
    state = tx.init(s.params)
    takes_it = layers_for(state, s) and not any(
        isinstance(x, GRADIENTS_ALONE) for x in states(state)
    )
    still = {frozen} if takes_it else set()
    if len(s.params) > 1:  # else nothing would be left to it
        tx = optax.partition({"own": tx, "still": optax.set_to_zero()}, labels)
        still |= {masked}
    params, _, _ = run_steps(tx, s, [drawn.batch(dtype)] * 2)
    for module in still:
        pairs = zip(*map(jax.tree.leaves, (params[module], s.params[module])), strict=True)
        assert all(np.array_equal(a, b) for a, b in pairs), module


def measured(s: Setting, own: Batch) -> Any:
    grad_fn = ng.value_and_grad(s.loss_fn, s.layers, fisher="exact")
    return jax.device_get(jax.jit(grad_fn)(s.params, own))


def assert_near(a: Any, b: Any) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-11), a, b)


@few(4)
@given(models)
def test_masked_examples_are_as_if_absent(drawn: Drawn) -> None:
    """From the loss, the gradients, the output factors and the count."""
    jax.config.update("jax_enable_x64", True)
    try:
        s, own = drawn.setting(jnp.float64), drawn.batch(jnp.float64)
        whole, part = measured(s, own), measured(s, jax.tree.map(lambda x: x[own.weights], own))
    finally:
        jax.config.update("jax_enable_x64", False)
    assert_near(whole[:2], part[:2])
    assert float(whole[2].examples) == sum(drawn.where)
    outputs = lambda statistics: {p: x.G for p, x in statistics.layers.items()}
    assert_near(outputs(whole[2]), outputs(part[2]))


@few(4)
@given(models, st.integers(1, 4))
def test_statistics_of_two_parts_add_up(drawn: Drawn, cut: int) -> None:
    jax.config.update("jax_enable_x64", True)
    try:
        s, own = drawn.setting(jnp.float64), drawn.batch(jnp.float64)
        whole = measured(s, own)[2]
        cuts = sorted({0, min(cut, drawn.examples), drawn.examples})
        parts = [measured(s, jax.tree.map(lambda x, a=a, b=b: x[a:b], own))[2]
                 for a, b in pairwise(cuts)]  # fmt: skip
    finally:
        jax.config.update("jax_enable_x64", False)
    # the leftover diagonal is a random estimate
    exact = lambda statistics: statistics._replace(leftover=None)
    assert_near(exact(jax.tree.map(lambda *x: sum(x), *parts)), exact(whole))
