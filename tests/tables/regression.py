"""Small problems of least squares, linear and not, as large as a Fisher that is inverted whole."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import natgrad_jax as ng


class Linear(nn.Module):
    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width in self.widths:
            x = nn.Dense(width, use_bias=False)(x)
        return x


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(4)(nn.tanh(nn.Dense(6)(x)))


class Problem(NamedTuple):
    model: nn.Module
    params: Any
    batch: Any
    loss_fn: Any
    layers: ng.Layers


def problem(model: nn.Module, inputs: int, outputs: int, examples: int = 60) -> Problem:
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(examples, inputs)) * np.linspace(1, 3, inputs))
    y = jnp.asarray(random.normal(size=(examples, outputs)))
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    params = jax.tree.map(
        lambda s: jnp.asarray(random.normal(size=s.shape) / np.sqrt(s.shape[0])), shapes
    )

    def loss_fn(params: Any, batch: Any) -> ng.Loss:
        return ng.Gaussian(model.apply({"params": params}, batch[0])).nll(batch[1])

    batch = (x, y)
    return Problem(model, params, batch, loss_fn, ng.find_layers(loss_fn, params, batch))


def quadratic() -> Problem:
    """A loss that is its own quadratic model: one linear layer with Gaussian outputs."""
    return problem(Linear((4,)), 5, 4)
