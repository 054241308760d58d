"""Six small real tasks on which ``no_tuning.py`` compares optimizers.

=========== ================================================================= ==================
name        model                                                             loss, nats a
=========== ================================================================= ==================
digits-ae   autoencoder 64-256-128-64-8-…, tanh                               image (Bernoulli)
mnist-ae    autoencoder 784-1000-500-250-30-…, tanh                           image (Bernoulli)
mnist-cnn   two convolutions and two dense layers, relu                       label (Categorical)
cifar10-cnn four convolutions and two dense layers, relu                      label (Categorical)
characters  causal transformer, two blocks of width 64, four heads            character
tabular     dense layers 10-64-64-1, tanh, of scikit-learn's diabetes table   patient (Gaussian)
=========== ================================================================= ==================

The text of ``characters`` is the language reference that ships with Python for ``help()``
(``pydoc_data.topics``, more than 400,000 characters; it differs a little between versions).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from lib import data
from lib.autoencoder import entropy, make_problem

import natgrad_jax as ng

WINDOW = 64  # characters that the transformer sees at once
ALPHABET = 128


class Task(NamedTuple):
    """A problem (``init(seed)``, ``loss_fn(params, batch)``), and how it is trained."""

    problem: Any
    examples: Any  # a pytree of arrays, (N, …)
    batch_size: int
    steps: int
    unit: str  # what the loss is a mean over, in nats
    sgd: tuple[float, ...]  # learning rates to try, with momentum
    floor: float = 0.0  # no model's loss can be lower


class Supervised(NamedTuple):
    """A model of ``batch["target"]`` given ``batch["input"]``."""

    model: nn.Module
    distribution: Callable[[jax.Array], Any]
    example: Any  # an input, (1, …)

    def init(self, seed: int) -> Any:
        return jax.jit(self.model.init)(jax.random.key(seed), self.example)["params"]

    def loss_fn(self, params: Any, batch: dict[str, jax.Array]) -> Any:
        outputs = self.model.apply({"params": params}, batch["input"])
        return self.distribution(outputs).nll(batch["target"])


class CNN(nn.Module):
    """Convolutions 3×3, each second one with stride 2 if there are four, else all; then dense."""

    channels: tuple[int, ...]
    strides: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width, stride in zip(self.channels, self.strides, strict=True):
            x = nn.relu(nn.Conv(width, (3, 3), strides=stride)(x))
        x = nn.relu(nn.Dense(128)(x.reshape(len(x), -1)))
        return nn.Dense(data.CLASSES)(x)


class Transformer(nn.Module):
    """A causal language model with normalization before each block."""

    width: int = 64
    heads: int = 4
    blocks: int = 2

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        places = jnp.broadcast_to(jnp.arange(x.shape[-1]), x.shape)
        mask = nn.make_causal_mask(x)
        h = nn.Embed(ALPHABET, self.width)(x) + nn.Embed(WINDOW, self.width)(places)
        for _ in range(self.blocks):
            h += nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(h), mask=mask)
            h += nn.Dense(self.width)(nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(h))))
        return nn.Dense(ALPHABET)(nn.LayerNorm()(h))


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width in (64, 64):
            x = nn.tanh(nn.Dense(width)(x))
        return nn.Dense(1)(x)


def autoencoder(name: str, data_dir: Any, **how: Any) -> Task:
    problem = make_problem(data.load_or_exit(name, data_dir))
    bound = entropy(problem.images[:: -(-len(problem.images) // 2000)])
    return Task(problem, problem.images, unit="image", floor=bound, **how)


def supervised(model: nn.Module, distribution: Any, inputs: Any, targets: Any, **how: Any) -> Task:
    problem = Supervised(model, distribution, inputs[:1])
    return Task(problem, {"input": inputs, "target": targets}, **how)


def classifier(name: str, data_dir: Any, model: nn.Module, **how: Any) -> Task:
    """Images standardized by one mean and one deviation a channel."""
    dataset = data.load_or_exit(name, data_dir)
    images = dataset.train_images
    images = (images - images.mean((0, 1, 2))) / images.std((0, 1, 2))
    return supervised(model, ng.Categorical, images, dataset.train_labels, unit="label", **how)


def characters(data_dir: Any) -> Task:
    from pydoc_data.topics import topics

    del data_dir
    text = "".join(topics[name] for name in sorted(topics))
    codes = np.frombuffer(text.encode("ascii", "replace"), np.uint8).astype(np.int32)
    count = (len(codes) - 1) // WINDOW
    windows = [codes[i : i + count * WINDOW].reshape(count, WINDOW) for i in (0, 1)]
    return supervised(Transformer(), ng.Categorical, *windows, batch_size=32, steps=300,
                      unit="character", sgd=(0.03, 0.1, 0.3, 1.0))  # fmt: skip


def tabular(data_dir: Any) -> Task:
    """Progression of diabetes from ten measurements, 442 patients, standardized."""
    from sklearn.datasets import load_diabetes

    del data_dir
    inputs, target = (np.asarray(x, np.float32) for x in load_diabetes(return_X_y=True))
    inputs, target = ((x - x.mean(0)) / x.std(0) for x in (inputs, target[:, None]))
    return supervised(MLP(), ng.Gaussian, inputs, target, batch_size=128, steps=300,
                      unit="patient", sgd=(0.01, 0.03, 0.1, 0.3))  # fmt: skip


TASKS: dict[str, Callable[[Any], Task]] = {
    "digits-ae": lambda d: autoencoder(
        "digits", d, batch_size=500, steps=400, sgd=(0.01, 0.02, 0.03, 0.05)
    ),
    "mnist-ae": lambda d: autoencoder(
        "mnist", d, batch_size=512, steps=300, sgd=(0.001, 0.003, 0.005, 0.01)
    ),
    "mnist-cnn": lambda d: classifier(
        "mnist", d, CNN((16, 32), (2, 2)), batch_size=256, steps=300, sgd=(0.01, 0.03, 0.1, 0.3)
    ),
    "cifar10-cnn": lambda d: classifier(
        "cifar10", d, CNN((32, 32, 64, 64), (1, 2, 1, 2)),
        batch_size=128, steps=500, sgd=(0.01, 0.03, 0.1, 0.3),
    ),
    "characters": characters,
    "tabular": tabular,
}  # fmt: skip
