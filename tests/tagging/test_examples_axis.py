"""Which axis of the outputs counts examples: found in the loss, if there is one."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import natgrad_jax as ng

pytestmark = pytest.mark.usefixtures("float64")

B, T, FEATURES, CLASSES = 5, 3, 4, 2


class Mix(nn.Module):
    """A running mean over time between two dense layers."""

    time: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = jnp.cumsum(nn.tanh(nn.Dense(3, name="a")(x)), self.time)
        return nn.Dense(CLASSES, name="b")(nn.LayerNorm(name="norm")(h))


class Normed(nn.Module):
    """Batch normalization between two dense layers."""

    train: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = nn.BatchNorm(use_running_average=not self.train, name="norm")(nn.Dense(3, name="a")(x))
        return nn.Dense(CLASSES, name="b")(nn.tanh(h))


class Attention(nn.Module):
    """Learned positions, attention and a recurrent cell over tokens."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = nn.Dense(4, name="embed")(x) + nn.Embed(T, 4, name="position")(jnp.arange(T))
        h = h + nn.MultiHeadDotProductAttention(2, name="attention")(h)
        return nn.Dense(CLASSES, name="head")(
            nn.RNN(nn.OptimizedLSTMCell(4, param_dtype=float), name="rnn")(h)
        )


class Pictures(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.max_pool(nn.relu(nn.Conv(4, (3, 3), name="conv")(x)), (2, 2), (2, 2))
        x = nn.Dropout(0.5, deterministic=False)(nn.GroupNorm(2, name="norm")(x))
        return nn.Dense(CLASSES, name="head")(x.reshape(len(x), -1))


class Case(NamedTuple):
    """``examples``: the axis of the outputs; ``rows``: for some layers, which of their row axes."""

    make: Callable[[], tuple[Any, Any, tuple[Any, ...]]]
    examples: int | None
    rows: dict[str, int]


def noise(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape))


def case(net: nn.Module, x: jax.Array, run: Any = None, classes: int = CLASSES) -> Any:
    run = run or (lambda params, x: net.apply({"params": params}, x))
    rngs = {name: jax.random.key(0) for name in ("params", "dropout")}
    variables = net.init(rngs, x)
    params = jax.tree.map(lambda a: jnp.asarray(a, float) + 0.1, variables["params"])
    rest = {k: v for k, v in variables.items() if k != "params"}

    def loss_fn(params: Any, rest: Any, x: jax.Array) -> ng.Loss:
        logits = run({"params": params, **rest} if rest else params, x)
        labels = jnp.arange(logits[..., 0].size).reshape(logits.shape[:-1]) % classes
        return ng.Categorical(logits).nll(labels)

    return loss_fn, params, (rest, x)


def contrastive(params: Any, x: jax.Array) -> jax.Array:
    """Each example is told from all others."""
    one, other = (nn.Dense(3, name="a").apply({"params": params["a"]}, y) for y in (x, 1.1 * x**2))
    return one @ other.T


def with_state(net: nn.Module) -> Any:
    rngs = {"dropout": jax.random.key(1)}
    return lambda variables, x: net.apply(variables, x, mutable=["batch_stats"], rngs=rngs)[0]


def dense_alone(classes: int) -> nn.Module:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.Dense(classes, name="a")(x)

    return Net()


def dropped() -> Any:
    net, x = Pictures(), noise(B, 6, 6, 3)
    run = lambda params, x: net.apply({"params": params}, x, rngs={"dropout": jax.random.key(1)})
    return case(net, x, run)


def ensemble() -> Any:
    """Three models of the same examples: they are apart too, and are no examples."""
    many = nn.vmap(Mix, in_axes=None, out_axes=0, axis_size=3, variable_axes={"params": 0},
                   split_rngs={"params": True})  # fmt: skip
    return case(many(1), noise(B, T, FEATURES))


def both_ways(params: Any, x: jax.Array) -> jax.Array:
    """One layer on (time, examples), and on examples alone."""
    dense = lambda x: nn.Dense(CLASSES).apply({"params": params["a"]}, x)
    h = jnp.cumsum(jnp.pad(dense(x), [(0, 0), (0, 0), (0, FEATURES - CLASSES)]), 0)
    return dense(h.reshape(-1, FEATURES)).reshape(*x.shape[:2], CLASSES)[-1]


CASES = {
    "batch first": Case(lambda: case(Mix(1), noise(B, T, FEATURES)), 0, {"a": 0, "b": 0}),
    "time first": Case(
        lambda: case(Mix(0), noise(T, B, FEATURES)), 1, {"a": 1, "norm": 1, "b": 1}
    ),
    "vmap over examples": Case(
        lambda: case(Mix(1), noise(B, T, FEATURES), lambda params, x: jax.vmap(
            lambda x: Mix(0).apply({"params": params}, x))(x)), 0, {"a": 0, "norm": 0, "b": 0},
    ),
    "scan over examples": Case(
        lambda: case(Mix(1), noise(B, T, FEATURES), lambda params, x: jax.lax.map(
            lambda x: Mix(0).apply({"params": params}, x), x)), 0, {"a": -1, "b": -1},
    ),
    "transforms and matrices": Case(
        lambda: case(Mix(1), noise(B, T, FEATURES), lambda params, x: jnp.linalg.cholesky(
            (h := jnp.fft.rfft(Mix(1).apply({"params": params}, x), axis=1).real).mT @ h
            + jnp.eye(CLASSES))), 0, {"a": 0, "b": 0},
    ),
    "ensemble": Case(ensemble, 1, {"a": 0, "b": 0}),
    "a layer called on other axes too": Case(
        lambda: case(dense_alone(CLASSES), noise(T, B, FEATURES), both_ways), 0, {"a": 1}
    ),
    "stacked, tiled, scattered": Case(
        lambda: case(Mix(1), noise(B, T, FEATURES), lambda params, x: jnp.tile(jnp.stack(
            [h := Mix(1).apply({"params": params}, x), h.at[:, 1].multiply(2.0)], 1
        ), (1, 2, 1, 1)).reshape(B, -1, CLASSES)), 0, {"a": 0, "b": 0},
    ),
    "jit": Case(
        lambda: case(Mix(0), noise(T, B, FEATURES), lambda params, x: jax.jit(Mix(0).apply)(
            {"params": params}, x)), 1, {"a": 1, "b": 1},
    ),
    "attention, positions, scan": Case(
        lambda: case(Attention(), noise(B, T, FEATURES)), 0, {"embed": 0, "head": 0}
    ),
    "convolution, pooling, dropout": Case(dropped, 0, {"conv": 0, "norm": 0, "head": 0}),
    "batch statistics fixed": Case(
        lambda: case(Normed(False), noise(B, FEATURES), with_state(Normed(False))), 0, {"a": 0}
    ),
    "batch statistics": Case(
        lambda: case(Normed(True), noise(B, FEATURES), with_state(Normed(True))), None, {"a": 0}
    ),
    "contrastive": Case(
        lambda: case(dense_alone(3), noise(B, FEATURES), contrastive, B), None, {"a": 0}
    ),
    "tokens as examples": Case(
        lambda: case(Mix(1), noise(B, T, FEATURES), lambda params, x: Mix(1).apply(
            {"params": params}, x).reshape(-1, CLASSES)), None, {"a": 0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_axis_is_found(name: str) -> None:
    own = CASES[name]
    loss_fn, params, args = own.make()
    layers = ng.find_layers(loss_fn, params, *args)
    assert [term.examples for term in layers.terms] == [own.examples]
    assert {path: layers[path,].example_axis for path in own.rows} == own.rows


@pytest.mark.parametrize("name", [
    "batch first", "time first", "vmap over examples", "batch statistics", "contrastive",
    "tokens as examples",
])  # fmt: skip
def test_exact_is_exact(name: str) -> None:
    """Full blocks are the Fisher's, traces of S those of its blocks, whatever key is given."""
    loss_fn, params, args = CASES[name].make()
    layers = ng.find_layers(loss_fn, params, *args)
    right = jax.jit(lambda p, *args: ng.fisher(loss_fn, p, *args, layers=layers))(params, *args)
    every = {"statistics_period": 1, "refresh_period": 1, "decay": 0.0}
    tx = ng.scale_by_ekfac(layers, basis="eigh", **every)
    grad_fn = ng.value_and_grad(loss_fn, layers, fisher="exact")

    @jax.jit
    def step(state: Any, key: Any, *args: Any) -> Any:
        _, grads, statistics = grad_fn(params, *args, rng=key, opt_state=state)
        return tx.update(grads, state, params, statistics=statistics)[1]

    state = tx.init(params)
    for i in range(2):
        state = step(state, jax.random.key(i), *args)
    for path, layer in layers.items():
        if layer.block == "full":
            n = right[path].shape[0] // 2
            wanted = right[path].reshape(2, n, 2, n).transpose(1, 0, 3, 2).reshape(2 * n, 2 * n)
            np.testing.assert_allclose(ng.factors(state)[path].A, wanted, rtol=1e-9, atol=1e-12)
        elif layer.calls == 1:
            found = state.moments[path].sum()
            np.testing.assert_allclose(found, right[path].trace(), rtol=1e-9)


def test_time_first_is_batch_first() -> None:
    found = []
    for time in (1, 0):
        x = noise(B, T, FEATURES)
        loss_fn, params, args = case(Mix(time), x if time else x.swapaxes(0, 1))
        layers = ng.find_layers(loss_fn, params, *args)
        grad_fn = jax.jit(ng.value_and_grad(loss_fn, layers, fisher="exact"))
        for sharing in ("expand", "reduce"):
            tx = ng.scale_by_kfac(layers, approximation=ng.Approximation(weight_sharing=sharing))
            _, _, statistics = grad_fn(params, *args, opt_state=tx.init(params))
            sums = statistics.sums[sharing]
            found.append({path: (s.A, s.G) for path, s in sums.items() if path != ("norm",)})
    for a, b in zip(found[:2], found[2:], strict=True):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12), a, b)


def test_contrastive_factors_are_those_of_every_label_alone() -> None:
    loss_fn, params, args = CASES["contrastive"].make()
    layers, x = ng.find_layers(loss_fn, params, *args), args[1]
    one, other = (nn.Dense(3).apply({"params": params["a"]}, y) for y in (x, 1.1 * x**2))
    P = jax.nn.softmax(one @ other.T)
    roots = jnp.sqrt(P)[:, :, None] * (jnp.eye(B)[None] - P[:, None, :])  # (example, class, logit)
    right = 0
    for J in jax.jacrev(lambda a, b: a @ b.T, (0, 1))(one, other):
        g = jnp.einsum("ncd,ndmo->ncmo", roots, J)
        right = right + jnp.einsum("ncmo,ncmq->oq", g, g)
    for seed in range(2):
        _, _, s = ng.value_and_grad(loss_fn, layers, fisher="exact")(
            params, *args, rng=jax.random.key(seed)
        )
        np.testing.assert_allclose(s.layers["a",].G, right, rtol=1e-9)
