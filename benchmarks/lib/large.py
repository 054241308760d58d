"""ResNet-50 and GPT-2 small, which fill an accelerator: on drawn data, and as tasks to race on."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from lib.tasks import Task, Transformer, characters, classifier, initialized

import natgrad_jax as ng

GPT2 = {"width": 768, "heads": 12, "alphabet": 50257, "window": 1024}  # and 12 blocks
PIXELS, CLASSES = 224, 1000  # ImageNet's
RESNET50 = (3, 4, 6, 3)


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions beside a shortcut (He et al. 2016); the 3×3 has the stride."""

    width: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        norm = partial(nn.BatchNorm, use_running_average=False)
        conv = partial(nn.Conv, use_bias=False)
        h = nn.relu(norm()(conv(self.width, (1, 1))(x)))
        h = nn.relu(norm()(conv(self.width, (3, 3), self.stride)(h)))
        h = norm()(conv(4 * self.width, (1, 1))(h))
        if x.shape != h.shape:
            x = norm()(conv(4 * self.width, (1, 1), self.stride)(x))
        return nn.relu(x + h)


class ResNet(nn.Module):
    """``blocks``: how many of each of the four widths."""

    blocks: tuple[int, ...] = RESNET50
    width: int = 64
    enlarged: int = 1  # each pixel, to so many a side

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = jnp.repeat(jnp.repeat(x, self.enlarged, 1), self.enlarged, 2)
        x = nn.Conv(self.width, (7, 7), 2, use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=False)(x))
        x = nn.max_pool(x, (3, 3), (2, 2), padding="SAME")
        for i, count in enumerate(self.blocks):
            for j in range(count):
                x = Bottleneck(self.width * 2**i, 2 if i and not j else 1)(x)
        return nn.Dense(CLASSES)(x.mean((1, 2)))


class Large(NamedTuple):
    """A model of the second part of a batch given the first.

    Batch normalization takes the batch's own statistics; its running averages are not kept.
    """

    model: nn.Module
    draw: Callable[[int], tuple[jax.Array, jax.Array]]  # of a batch size

    def init(self, seed: int) -> Any:
        return initialized(self.model, seed, self.draw(1)[0])

    def loss_fn(self, params: Any, batch: Any) -> Any:
        logits, _ = self.model.apply({"params": params}, batch[0], mutable=["batch_stats"])
        return ng.Categorical(logits).nll(batch[1])


def images(size: int) -> tuple[jax.Array, jax.Array]:
    pixels = jax.random.normal(jax.random.key(0), (size, PIXELS, PIXELS, 3))
    return pixels, jax.random.randint(jax.random.key(1), (size,), 0, CLASSES)


def tokens(size: int) -> tuple[jax.Array, jax.Array]:
    ids = jax.random.randint(jax.random.key(0), (size, GPT2["window"] + 1), 0, GPT2["alphabet"])
    return ids[:, :-1], ids[:, 1:]


LARGE = {
    "resnet50": Large(ResNet(), images),
    "gpt2": Large(Transformer(blocks=12, tied=True, **GPT2), tokens),
}
# The text of the race's small transformer, and CIFAR-10 at ImageNet's size.
LARGE_TASKS: dict[str, Callable[[Any], Task]] = {
    "characters-gpt2": lambda d: characters(
        Transformer(768, 12, 12, window=1024), 1024, batch_size=8, steps=150, scale=0.1
    ),
    "cifar10-resnet50": lambda d: classifier(
        "cifar10", d, ResNet(enlarged=PIXELS // 32), batch_size=128, steps=200,
        sgd=(0.01, 0.03, 0.1, 0.3), scale=0.3,
    ),
}  # fmt: skip
