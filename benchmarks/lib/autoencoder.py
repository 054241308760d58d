"""The deep autoencoders that the benchmarks train: dense layers, tanh, a linear code.

The classic test of second-order methods (Hinton & Salakhutdinov 2006; Martens 2010; Martens &
Grosse 2015): deep, narrow in the middle, and badly conditioned, so that a first-order optimizer
makes slow progress however long it is tuned.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from lib.data import Dataset

import natgrad_jax as ng

# Widths from the pixels to the code; the decoder mirrors them.
ENCODERS = {
    "digits": (64, 256, 128, 64, 8),
    "mnist": (784, 1000, 500, 250, 30),
    "fashion": (784, 1000, 500, 250, 30),
    "cifar10": (3072, 1000, 500, 250, 60),
}


class Autoencoder(nn.Module):
    """Dense layers of the given widths; tanh after all but the code and the last one."""

    encoder: tuple[int, ...]  # from the pixels to the code

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        widths = self.encoder[1:] + self.encoder[-2::-1]
        code = len(self.encoder) - 2
        for i, width in enumerate(widths):
            x = nn.Dense(width)(x)
            if i not in (code, len(widths) - 1):
                x = jnp.tanh(x)
        return x


class Problem(NamedTuple):
    """What an optimizer gets: ``loss_fn(params, batch)`` is an ``ng.Loss``, in nats per image."""

    model: nn.Module
    images: np.ndarray  # (N, pixels), the training set

    def init(self, seed: int) -> Any:
        return self.model.init(jax.random.key(seed), self.images[:1])["params"]

    def loss_fn(self, params: Any, batch: jax.Array) -> Any:
        return ng.Bernoulli(self.model.apply({"params": params}, batch)).nll(batch)


def entropy(images: np.ndarray) -> float:
    """The mean entropy of images as Bernoulli probabilities: no model's loss can be lower."""
    x = np.clip(images.astype(np.float64), 1e-12, 1 - 1e-12)
    return float(-np.mean(np.sum(x * np.log(x) + (1 - x) * np.log1p(-x), axis=-1)))


def make_problem(dataset: Dataset) -> Problem:
    """The autoencoder of this data set, with its training images laid flat."""
    images = dataset.train_images
    return Problem(Autoencoder(ENCODERS[dataset.name]), images.reshape(len(images), -1))
