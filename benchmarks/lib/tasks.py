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

What is held out for validation: of images the data set's own test images, of the characters the
last tenth, of the patients every fifth.

The text of ``characters`` is the language reference that ships with Python for ``help()``
(``pydoc_data.topics``, more than 400,000 characters; it differs a little between versions).
"""

from collections.abc import Callable
from functools import cache
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
    validation: Any  # held out: as the examples, and none of them
    batch_size: int
    steps: int
    unit: str  # what the loss is a mean over, in nats
    sgd: tuple[float, ...]  # learning rates to try, with momentum
    scale: float = 1.0  # of the rates that the other grids try
    floors: tuple[float, float] = (0.0, 0.0)  # no model's losses can be lower: here, held out
    wrong: Callable[..., jax.Array] | None = None  # params, batch -> a classifier's failures


class Supervised(NamedTuple):
    """A model of ``batch["target"]`` given ``batch["input"]``."""

    model: nn.Module
    distribution: Callable[[jax.Array], Any]
    example: Any  # an input, (1, …)

    def init(self, seed: int) -> Any:
        return initialized(self.model, seed, self.example)

    def outputs(self, params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        # Batch normalization takes the batch's own statistics; its running averages are not kept.
        return self.model.apply({"params": params}, batch["input"], mutable=["batch_stats"])[0]

    def loss_fn(self, params: Any, batch: dict[str, jax.Array]) -> Any:
        return self.distribution(self.outputs(params, batch)).nll(batch["target"])

    def wrong(self, params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        return self.outputs(params, batch).argmax(-1) != batch["target"]


def initialized(model: nn.Module, seed: int, example: Any) -> Any:
    """Parameters, drawn on the CPU: what draws GPT-2 small's takes 4 s to compile there, 40 s for a
    GPU."""
    with jax.default_device(jax.devices("cpu")[0]):
        params = drawing(model, example.shape, example.dtype)(jax.random.key(seed))["params"]
    return jax.device_put(params, jax.devices()[0])


@cache
def drawing(model: nn.Module, shape: tuple[int, ...], dtype: Any) -> Callable[..., Any]:
    """Compiled once for all seeds."""
    return jax.jit(lambda key: model.init(key, jnp.zeros(shape, dtype)))


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
    """A causal language model with normalization before each block.

    ``tied``: logits are products with the embedding, as in GPT-2; else a layer of their own.
    """

    width: int = 64
    heads: int = 4
    blocks: int = 2
    alphabet: int = ALPHABET
    window: int = WINDOW
    tied: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        places = jnp.broadcast_to(jnp.arange(x.shape[-1]), x.shape)
        mask = nn.make_causal_mask(x)
        embed = nn.Embed(self.alphabet, self.width)
        h = embed(x) + nn.Embed(self.window, self.width)(places)
        for _ in range(self.blocks):
            h += nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(h), mask=mask)
            h += nn.Dense(self.width)(nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(h))))
        head = embed.attend if self.tied else nn.Dense(self.alphabet)
        return head(nn.LayerNorm()(h))


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width in (64, 64):
            x = nn.tanh(nn.Dense(width)(x))
        return nn.Dense(1)(x)


def autoencoder(name: str, data_dir: Any, **how: Any) -> Task:
    dataset = data.load_or_exit(name, data_dir)
    problem = make_problem(dataset)
    parts = (problem.images, dataset.test_images.reshape(len(dataset.test_images), -1))
    bounds = tuple(entropy(images[:: -(-len(images) // 2000)]) for images in parts)
    return Task(problem, *parts, unit="image", floors=bounds, **how)


def supervised(model: nn.Module, distribution: Any, train: Any, held_out: Any, **how: Any) -> Task:
    """Of two pairs of inputs and targets."""
    problem = Supervised(model, distribution, train[0][:1])
    parts = ({"input": inputs, "target": targets} for inputs, targets in (train, held_out))
    wrong = problem.wrong if distribution is ng.Categorical else None
    return Task(problem, *parts, wrong=wrong, **how)


def classifier(name: str, data_dir: Any, model: nn.Module, **how: Any) -> Task:
    """Images standardized by the training images' mean and deviation of each channel."""
    dataset = data.load_or_exit(name, data_dir)
    train, held_out = standardized(dataset.train_images, dataset.test_images, axes=(0, 1, 2))
    parts = (train, dataset.train_labels), (held_out, dataset.test_labels)
    return supervised(model, ng.Categorical, *parts, unit="label", **how)


def standardized(train: np.ndarray, held_out: np.ndarray, axes: Any = 0) -> Any:
    mean, deviation = train.mean(axes), train.std(axes)
    return (train - mean) / deviation, (held_out - mean) / deviation


def characters(model: nn.Module, window: int = WINDOW, **how: Any) -> Task:
    from pydoc_data.topics import topics

    text = "".join(topics[name] for name in sorted(topics))
    codes = np.frombuffer(text.encode("ascii", "replace"), np.uint8).astype(np.int32)
    count = (len(codes) - 1) // window
    windows = [codes[i : i + count * window].reshape(count, window) for i in (0, 1)]
    parts = zip(*(np.split(x, [count - count // 10]) for x in windows))
    sgd = (0.03, 0.1, 0.3, 1.0)
    return supervised(model, ng.Categorical, *parts, unit="character", sgd=sgd, **how)


def tabular(data_dir: Any) -> Task:
    """Progression of diabetes from ten measurements, 442 patients, standardized."""
    from sklearn.datasets import load_diabetes

    del data_dir
    inputs, target = (np.asarray(x, np.float32) for x in load_diabetes(return_X_y=True))
    fifth = np.arange(len(inputs)) % 5 == 0
    parts = zip(*(standardized(x[~fifth], x[fifth]) for x in (inputs, target[:, None])))
    return supervised(MLP(), ng.Gaussian, *parts, batch_size=128, steps=300,
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
    "characters": lambda d: characters(Transformer(), batch_size=32, steps=300),
    "tabular": tabular,
}  # fmt: skip
