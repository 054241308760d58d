"""Two layers, and a norm whose parameters are left over: the user chose the diagonal for them."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from transformations import Jitted

import natgrad_jax as ng

HIDDEN, HEAD = ("hidden",), ("head",)


class Net(nn.Module):
    """Two layers, and a norm."""

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.LayerNorm(name="norm")(nn.Dense(5, name="hidden")(x)))
        return nn.Dense(3, name="head")(x)


def loss_fn(params, x, y):
    return ng.Categorical(Net().apply({"params": params}, x)).nll(y)


def batch(seed=0, n=8):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(n, 4)), jnp.float32), jnp.asarray(rng.integers(3, size=n))


def find_layers(*args):
    return ng.find_layers(*args, blocks={"norm": "diagonal"})


class Setting(NamedTuple):
    params: Any
    layers: ng.Layers
    grad_fn: Any


@functools.cache
def setting(fisher="mc", dtype=jnp.float32):
    """Parameters, layers and the compiled ``grad_fn(params, x, y, rng=…, opt_state=…)``."""
    params = jax.jit(Net().init)(jax.random.key(0), batch()[0])["params"]
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    layers = find_layers(loss_fn, params, *batch())
    return Setting(params, layers, jax.jit(ng.value_and_grad(loss_fn, layers, fisher=fisher)))


def training_step(tx, grad_fn):
    """The step that users write."""

    @Jitted
    def step(params, opt_state, x, y, key):
        loss, grads, statistics = grad_fn(params, x, y, rng=key, opt_state=opt_state)
        updates, opt_state = tx.update(grads, opt_state, params, statistics=statistics)
        return optax.apply_updates(params, updates), opt_state, loss

    return step
