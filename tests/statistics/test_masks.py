"""What is masked out enters nothing: a batch gives what it gives without its masked examples."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import natgrad_jax as ng

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("float64")]

KEPT = np.array([0, 2, 3, 5])


class Sequences(nn.Module):
    """Tokens, attention, and a head on flattened tokens."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = nn.LayerNorm(param_dtype=float)(nn.Dense(6, param_dtype=float)(x))
        h = h + nn.MultiHeadDotProductAttention(2, param_dtype=float)(h)
        head = nn.Dense(3, param_dtype=float)(h.reshape(-1, 6))
        return head.reshape(*x.shape[:-1], 3)


class Images(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = nn.tanh(nn.Conv(4, (3, 3), strides=(2, 2), param_dtype=float)(x))
        h = nn.Conv(4, (3, 3), feature_group_count=2, param_dtype=float)(h)
        return nn.Dense(3, param_dtype=float)(h.reshape(len(x), -1))


class Words(nn.Module):
    """A lookup, and a product with the same table."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        embed = nn.Embed(5, 4, param_dtype=float, dtype=float)
        return embed.attend(jnp.tanh(embed(x)))


def batch(net: nn.Module) -> tuple[Any, Any]:
    random = np.random.default_rng(0)
    if isinstance(net, Words):
        return random.integers(5, size=(6, 3)), random.integers(5, size=(6, 3))
    shape = (6, 5, 4) if isinstance(net, Sequences) else (6, 6, 6, 2)
    targets = (6, 5) if isinstance(net, Sequences) else (6,)
    return random.normal(size=shape), random.integers(3, size=targets)


def measured(make: Any, layers: ng.Layers, loss_fn: Any, params: Any, *args: Any) -> Any:
    grad_fn = ng.value_and_grad(loss_fn, layers, fisher="exact")
    tx = make(layers, decay=0.0, statistics_period=1, refresh_period=1)

    @jax.jit
    def step(params: Any, state: Any, *args: Any) -> Any:
        _, grads, statistics = grad_fn(params, *args, opt_state=state)
        return grads, *tx.update(grads, state, params, statistics=statistics)

    state = jax.jit(tx.init)(params)
    for _ in range(2):
        grads, updates, state = step(params, state, *args)
    return grads, updates, ng.factors(state), getattr(state, "moments", None)


def close(ours: Any, wanted: Any) -> None:
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)


WAYS = [{}, {"weight_sharing": "reduce"}, {"convolution": "sua"}, {"group_size": 2}]


@pytest.mark.parametrize("how", WAYS, ids=str)
@pytest.mark.parametrize("net", [Sequences(), Images(), Words()], ids=lambda n: type(n).__name__)
def test_masked_examples_are_as_if_they_were_not_there(net: nn.Module, how: Any) -> None:
    x, y = batch(net)
    mask = np.zeros(y.shape, bool)
    mask[KEPT] = True
    params = jax.jit(net.init)(jax.random.key(0), x)["params"]

    def loss_fn(params: Any, x: Any, y: Any, where: Any = None) -> ng.Loss:
        return ng.Categorical(net.apply({"params": params}, x)).nll(y, where=where)

    layers = ng.find_layers(loss_fn, params, x, y, mask)
    form = ng.Approximation(**how)
    kfac = lambda layers, **kw: ng.scale_by_kfac(layers, approximation=form, **kw)
    ekfac = lambda layers, **kw: ng.scale_by_ekfac(layers, basis="eigh", approximation=form, **kw)
    # eigenvectors of a factor of low rank are any; moments of a layer called twice are estimates
    for make in [kfac] if how.get("weight_sharing") or isinstance(net, Words) else [kfac, ekfac]:
        found = [
            measured(make, layers, loss_fn, params, *args)
            for args in ((x, y, mask), (x[KEPT], y[KEPT]))
        ]
        close(*found)


def test_masked_tokens_are_as_if_they_were_not_there() -> None:
    """In layers whose rows are tokens, before anything mixes them."""
    random = np.random.default_rng(0)
    x, y = random.normal(size=(4, 3, 4)), random.integers(3, size=(4, 3))
    mask = np.arange(12).reshape(4, 3) % 3 != 1
    net = nn.Sequential([nn.Dense(5, param_dtype=float), jnp.tanh, nn.Dense(3, param_dtype=float)])
    params = jax.jit(net.init)(jax.random.key(0), x)["params"]

    def loss_fn(params: Any, x: Any, y: Any, where: Any = None) -> ng.Loss:
        return ng.Categorical(net.apply({"params": params}, x)).nll(y, where=where)

    found = []
    for args in ((x, y, mask), (x[mask], y[mask])):
        layers = ng.find_layers(loss_fn, params, *args)
        found.append(measured(ng.scale_by_kfac, layers, loss_fn, params, *args))
    close(*found)


def test_weights_count_as_so_many_examples() -> None:
    x, y = batch(Images())
    net, weights = Images(), np.array([1.0, 0.0, 2.0, 1.0, 3.0, 0.0])
    params = jax.jit(net.init)(jax.random.key(0), x)["params"]

    def loss_fn(params: Any, x: Any, y: Any, weights: Any = None) -> ng.Loss:
        return ng.Categorical(net.apply({"params": params}, x)).nll(y, weights=weights)

    layers = ng.find_layers(loss_fn, params, x, y, weights)
    repeated = np.repeat(np.arange(6), weights.astype(int))
    found = [
        measured(ng.scale_by_kfac, layers, loss_fn, params, *args)
        for args in ((x, y, weights), (x[repeated], y[repeated]))
    ]
    close(*found)
