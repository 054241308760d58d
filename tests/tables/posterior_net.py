"""A network with every kind of block, and its curvature as one dense matrix, for the posterior."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import natgrad_jax as ng
from natgrad_jax.utils.tree_paths import leaves

N = 12


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return x + nn.tanh(nn.Dense(4, name="dense")(x)), None


class Net(nn.Module):
    """A convolution, a norm (full block), an embedding, a scanned stack, dense layers; the bias of
    one is a diagonal, and a scale is frozen."""

    @nn.compact
    def __call__(self, x: jax.Array, ids: jax.Array) -> jax.Array:
        x = nn.tanh(nn.Conv(3, (2, 2), strides=2, name="conv")(x))
        x = nn.LayerNorm(name="norm")(x).reshape(len(x), -1)
        x = jnp.concatenate([x, nn.Embed(4, 2, name="embed")(ids)], axis=-1)
        x = nn.tanh(nn.Dense(4, name="mid")(x))
        scanned = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        x, _ = scanned(name="blocks")(x, None)
        x = x * self.param("gain", nn.initializers.ones, (4,))
        return nn.Dense(3, name="head")(x)


BLOCKS = {"mid/bias": "diagonal", "gain": "frozen"}


def loss_fn(params: Any, x: jax.Array, ids: jax.Array, y: jax.Array) -> ng.Loss:
    return ng.Categorical(Net().apply({"params": params}, x, ids)).nll(y)


def setting() -> tuple[Any, tuple[Any, ...], ng.Layers]:
    """Parameters, a batch, and the layers; call it with float64 on."""
    random = np.random.default_rng(0)
    batch = (jnp.asarray(random.normal(size=(N, 4, 4, 3))), jnp.asarray(random.integers(4, size=N)),
             jnp.arange(N) % 3)  # fmt: skip
    shapes = jax.eval_shape(Net().init, jax.random.key(0), *batch[:2])["params"]
    params = jax.tree.map(lambda s: jnp.asarray(random.normal(size=s.shape) / 2), shapes)
    return params, batch, ng.find_layers(loss_fn, params, *batch, blocks=BLOCKS)


def random_like(tree: Any, seed: int = 1) -> Any:
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape)), tree)


def places(layers: ng.Layers, tree: Any) -> dict[Any, np.ndarray]:
    """Where each block's parameters are in the raveled tree, by path of the layer or parameter."""
    size = ravel_pytree(tree)[0].size
    index = leaves(ravel_pytree(tree)[1](jnp.arange(size, dtype=float)))
    flat = lambda parameters: np.concatenate(
        [np.ravel(index[p.path]) for p in parameters if p.path in index]
    ).astype(int)
    found = {path: flat(layer.parameters) for path, layer in layers.items()}
    return found | {p.path: flat([p]) for p in layers.diagonals}


def assembled(blocks: dict[Any, Any], layers: ng.Layers, tree: Any) -> tuple[np.ndarray, Any]:
    """The dense F over the raveled tree, from its blocks; and which parameters have one."""
    at = places(layers, tree)
    size = ravel_pytree(tree)[0].size
    F, has = np.zeros((size, size)), np.zeros(size, bool)
    for path, block in blocks.items():
        block = np.asarray(block)
        block = block if block.ndim == 2 and len(block) == len(at[path]) else np.diag(block.ravel())
        F[np.ix_(at[path], at[path])] = block
        has[at[path]] = True
    return F, has


def as_matrix(linear: Any, tree: Any) -> np.ndarray:
    """A linear map of trees as a matrix over the raveled tree."""
    flat, unravel = ravel_pytree(tree)
    columns = jax.jit(jax.vmap(lambda v: ravel_pytree(linear(unravel(v)))[0]))(jnp.eye(flat.size))
    return np.asarray(columns).T


def error(a: Any, b: Any) -> float:
    """``max |a − b| / max |b|``."""
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape
    return float(np.abs(a - b).max() / np.abs(b).max())
