"""VGG11 on images of CIFAR-10's shape, and one convolution alone: what ``approximations.py`` times.

The images are noise and the labels are drawn: what they show does not change the time.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

import natgrad_jax as ng

CLASSES = 10
POOL = "pool"
WIDTHS = (64, POOL, 128, POOL, 256, 256, POOL, 512, 512, POOL, 512, 512, POOL)


def widths(divisor: int = 1) -> list[int]:
    """Channels of the convolutions."""
    return [width // divisor for width in WIDTHS if isinstance(width, int)]


class VGG11(nn.Module):
    """Eight 3×3 convolutions, each with batch normalization and relu, and one dense layer.

    The network of Laurent et al. 2018; ``divisor`` makes it narrower.
    """

    divisor: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width in WIDTHS:
            if width == POOL:  # "SAME": images smaller than 32 keep one pixel
                x = nn.max_pool(x, (2, 2), (2, 2), padding="SAME")
            else:
                x = nn.Conv(width // self.divisor, (3, 3))(x)
                x = nn.relu(nn.BatchNorm(use_running_average=False)(x))
        return nn.Dense(CLASSES)(x.reshape(len(x), -1))


class OneConvolution(nn.Module):
    """A 3×3 convolution from ``channels`` to as many, which are the classes."""

    channels: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Conv(self.channels, (3, 3))(x).mean((1, 2))


class Problem(NamedTuple):
    """``loss_fn(params, batch_stats, batch)`` is ``(ng.Loss, batch_stats)``."""

    loss_fn: Callable[..., Any]
    variables: tuple[Any, Any]  # params, batch_stats
    batch: Callable[[jax.Array], dict[str, jax.Array]]  # of a key


def make_problem(model: nn.Module, shape: tuple[int, ...], classes: int = CLASSES) -> Problem:
    """The classification of random images of ``shape`` (batch, height, width, channels)."""

    def loss_fn(params: Any, batch_stats: Any, batch: dict[str, jax.Array]) -> Any:
        variables = {"params": params, "batch_stats": batch_stats}
        logits, changed = model.apply(variables, batch["image"], mutable=["batch_stats"])
        return ng.Categorical(logits).nll(batch["label"]), changed.get("batch_stats", {})

    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *shape[1:])))
    draw = jax.jit(partial(random_batch, shape, classes))
    return Problem(loss_fn, (variables["params"], variables.get("batch_stats", {})), draw)


def random_batch(shape: tuple[int, ...], classes: int, key: jax.Array) -> dict[str, jax.Array]:
    of_image, of_label = jax.random.split(key)
    labels = jax.random.randint(of_label, shape[:1], 0, classes)
    return {"image": jax.random.normal(of_image, shape), "label": labels}
