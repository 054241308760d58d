"""CIFAR-10 by a convolutional network in the manner of VGG: what ``papers/*_cifar.py`` share.

Pairs of 3×3 convolutions, pooling, one dense layer; --width channels at first, doubled at each
pooling. Random crops, 24×24 of 32×32, and reflections; 5,000 training images are held out for
validation; errors are those of central crops. Each method takes the rate of its grid with the
lowest validation loss after a short search, and divides it by ten after half and after three
quarters of the updates.
"""

import argparse
import json
import shlex
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from lib import data, report, training
from lib.arguments import positive
from rich.console import Console
from rich.table import Table

import natgrad_jax as ng

HELD_OUT = {"cifar10": 5000, "digits": 300}
SIDE = {"cifar10": 24, "digits": 6}  # of a crop
MOMENTUM = 0.9


class VGG(nn.Module):
    """Three pairs of 3×3 convolutions with relu, pooled; a dense layer."""

    width: int
    normalized: bool

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        for stage in range(3):
            for _ in range(2):
                x = nn.Conv(self.width * 2**stage, (3, 3))(x)
                if self.normalized:  # averages over 10 updates: a search is short
                    x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
                x = nn.relu(x)
            x = nn.max_pool(x, (2, 2), (2, 2), padding="SAME")
        return nn.Dense(data.CLASSES)(x.reshape(len(x), -1))


class Method(NamedTuple):
    """How to make a transformation of a rate (a schedule) and layers, the rates to search, its line
    in the picture, whether the network is normalized, and what it measures if it is one of ours."""

    make: Callable[[Any, ng.Layers], Any]
    rates: tuple[float, ...]
    line: str
    normalized: bool = False
    fisher: str | None = None


def sgd(rate: Any, layers: ng.Layers) -> Any:
    del layers
    return optax.sgd(rate, momentum=MOMENTUM)


class Curve(NamedTuple):
    """One run: updates, seconds of training, and what was seen then."""

    updates: list[int]
    seconds: list[float]
    train_loss: list[float]
    validation_loss: list[float]
    test_error: list[float]


class Images(NamedTuple):
    """Standardized images and labels of each part; ``side`` of a crop."""

    parts: dict[str, tuple[jax.Array, jax.Array]]
    side: int


def images_of(name: str, data_dir: Any) -> Images:
    found = data.load_or_exit(name, data_dir)
    mean, deviation = found.train_images.mean((0, 1, 2)), found.train_images.std((0, 1, 2))
    standard = lambda x: jnp.asarray((x - mean) / deviation)
    train, labels = standard(found.train_images), jnp.asarray(found.train_labels)
    held = HELD_OUT[name]
    parts = {
        "train": (train[held:], labels[held:]),
        "validation": (train[:held], labels[:held]),
        "test": (standard(found.test_images), jnp.asarray(found.test_labels)),
    }
    return Images(parts, SIDE[name])


def crops(images: jax.Array, side: int, key: jax.Array) -> jax.Array:
    """Random crops, half of them reflected."""
    of_place, of_side = jax.random.split(key)
    places = jax.random.randint(of_place, (len(images), 2), 0, images.shape[1] - side + 1)
    cut = lambda x, at: jax.lax.dynamic_slice(x, (at[0], at[1], 0), (side, side, x.shape[-1]))
    cropped = jax.vmap(cut)(images, places)
    reflected = jax.random.bernoulli(of_side, shape=(len(images), 1, 1, 1))
    return jnp.where(reflected, cropped[:, :, ::-1], cropped)


def central(images: jax.Array, side: int) -> jax.Array:
    at = (images.shape[1] - side) // 2
    return images[:, at : at + side, at : at + side]


class Program(NamedTuple):
    """A method at a rate, compiled: ``carry`` is params, opt_state and batch statistics."""

    carry: Any
    step: Callable[..., Any]  # carry, images, labels, which, key -> carry
    seen: Callable[..., Any]  # carry, images, labels -> loss and error of central crops


def program(method: Method, rate: Any, of: Images, width: int, batch_size: int) -> Program:
    images, labels = of.parts["train"]
    model = VGG(width, method.normalized)
    variables = jax.jit(model.init)(jax.random.key(0), central(images[:2], of.side))
    params, kept = variables["params"], variables.get("batch_stats", {})

    def loss_fn(params: Any, kept: Any, batch: Any) -> Any:
        variables = {"params": params, "batch_stats": kept}
        logits, new = model.apply(variables, batch[0], mutable=["batch_stats"])
        return ng.Categorical(logits).nll(batch[1]), new.get("batch_stats", {})

    example = central(images[:batch_size], of.side), labels[:batch_size]
    layers = ng.find_layers(loss_fn, params, kept, example)
    tx = method.make(rate, layers)
    # SGD takes the same gradients: statistics that nobody uses are not compiled
    grad_fn = ng.value_and_grad(loss_fn, layers, has_aux=True, fisher=method.fisher or "none")

    @partial(jax.jit, donate_argnums=0)
    def step(carry: Any, images: Any, labels: Any, which: jax.Array, key: jax.Array) -> Any:
        params, opt_state, kept = carry
        of_crops, of_labels = jax.random.split(key)
        batch = crops(images[which], of.side, of_crops), labels[which]
        asked = {"opt_state": opt_state} if method.fisher else {}
        (_, kept), grads, statistics = grad_fn(params, kept, batch, rng=of_labels, **asked)
        extra = {"statistics": statistics} if method.fisher else {}
        updates, opt_state = tx.update(grads, opt_state, params, **extra)
        return optax.apply_updates(params, updates), opt_state, kept

    @jax.jit
    def seen(carry: Any, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        params, _, kept = carry
        variables = {"params": params, "batch_stats": kept}
        logits = model.apply(variables, central(images, of.side), train=False)
        loss = ng.Categorical(logits).nll(labels).value
        return loss, (logits.argmax(-1) != labels).mean()

    return Program((params, tx.init(params), kept), step, seen)


def run(method: Method, rate: float, of: Images, args: argparse.Namespace, updates: int) -> Curve:
    """One method at one rate."""
    schedule = optax.piecewise_constant_schedule(rate, {updates // 2: 0.1, 3 * updates // 4: 0.1})
    carry, step, seen = program(method, schedule, of, args.width, args.batch_size)
    images, labels = of.parts["train"]

    def look(carry: Any, part: str, limit: int) -> tuple[float, float]:
        whole = [x[:limit] for x in of.parts[part]]
        batches = zip(*(np.array_split(x, -(-len(x) // 1000)) for x in whole), strict=True)
        return tuple(map(float, np.mean([seen(carry, *b) for b in batches], axis=0)))

    order = training.minibatches(len(images), args.batch_size, updates, seed=0)
    curve = Curve([], [], [], [], [])
    every, spent = max(1, updates // args.evaluations), 0.0
    for start in range(0, updates, every):
        begun, end = time.perf_counter(), min(start + every, updates)
        for i in range(start, end):
            carry = step(carry, images, labels, jnp.asarray(order[i]), jax.random.key(i))
        jax.block_until_ready(carry)
        spent += time.perf_counter() - begun if start else 0.0  # the first part compiles
        limit = 10_000 if end == updates else 2000
        (train, _), (validation, _), (_, error) = (
            look(carry, part, limit) for part in ("train", "validation", "test")
        )
        for column, value in zip(curve, (end, spent, train, validation, error), strict=True):
            column.append(value)
    return curve


def search(method: Method, of: Images, args: argparse.Namespace) -> tuple[float, dict[str, float]]:
    """The rate with the lowest validation loss, and what was seen; nothing to see for one rate."""
    if len(method.rates) == 1:
        return method.rates[0], {}
    losses = [run(method, rate, of, args, args.search).validation_loss[-1] for rate in method.rates]
    best = method.rates[int(np.argmin(np.where(np.isfinite(losses), losses, np.inf)))]
    return best, {f"{rate:g}": loss for rate, loss in zip(method.rates, losses, strict=True)}


def compare(methods: dict[str, Method], script: str, doc: str, argv: Sequence[str]) -> None:
    """Search, train, print, write: what a script does with its methods."""
    args = parse_arguments(argv, doc, "paper-" + Path(script).stem.replace("_", "-"))
    of, console = images_of(args.data, args.data_dir), Console()
    searched: dict[str, dict[str, float]] = {}
    curves, rates = {}, {}
    for name, method in methods.items():
        if args.trust_radius is not None and method.fisher == "mc":
            make = partial(method.make, trust_radius=args.trust_radius)
            method = method._replace(make=make)
        rates[name], searched[name] = search(method, of, args)
        curves[name] = run(method, rates[name], of, args, args.updates)
        console.print(f"{name:>10} {rates[name]:g}: test error {curves[name].test_error[-1]:.2%}")
    console.print(table_of(curves, rates, args.data))
    figure, numbers = (args.output.with_name(args.output.name + s) for s in (".png", ".json"))
    lines = {name: method.line for name, method in methods.items()}
    plot(curves, lines, f"{args.data}: a VGG-like network", figure)
    settings = {
        "command": shlex.join(["python", f"benchmarks/{script}", *argv]),
        "width": args.width, "batch_size": args.batch_size, "updates": args.updates,
        "search_updates": args.search, "searched": searched, "rates": rates,
        "machine": report.describe_machine(), "versions": report.versions(),
        "curves": {name: curve._asdict() for name, curve in curves.items()},
    }  # fmt: skip
    numbers.write_text(json.dumps(settings, indent=1) + "\n")
    report.tell_files(console, figure, numbers)


def table_of(curves: dict[str, Curve], rates: dict[str, float], name: str) -> Table:
    table = Table(title=f"{name}: at the end, and half way", box=None, padding=(0, 1, 0, 0))
    for column in ("method", "rate", "train loss", "half way", "test error", "half way", "seconds"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for method, c in curves.items():
        half = (len(c.updates) - 1) // 2
        table.add_row(method, f"{rates[method]:g}", f"{c.train_loss[-1]:.4f}",
                      f"{c.train_loss[half]:.4f}", f"{c.test_error[-1]:.2%}",
                      f"{c.test_error[half]:.2%}", f"{c.seconds[-1]:.0f}")  # fmt: skip
    return table


def plot(curves: dict[str, Curve], lines: dict[str, str], title: str, path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for name, c in curves.items():
        how = {"color": "black", "markersize": 3}
        axes[0].semilogy(c.updates, c.train_loss, lines[name], label=name, **how)
        axes[1].plot(c.updates, [100 * e for e in c.test_error], lines[name], **how)
    axes[0].set(xlabel="updates", ylabel="training loss (nats a label)")
    axes[1].set(xlabel="updates", ylabel="test error (%)")
    axes[0].legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def parse_arguments(argv: Sequence[str], doc: str, output: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", choices=HELD_OUT, default="cifar10")
    add("--data-dir", metavar="DIR", help="where the files of the data set are")
    add("--updates", type=positive, default=2000)
    add("--search", type=positive, default=200, help="updates of each rate in the search")
    add("--evaluations", type=positive, default=20)
    add("--batch-size", type=positive, default=128)
    add("--width", type=positive, default=16, help="channels of the first convolutions")
    add("--trust-radius", type=float, metavar="X", help="of K-FAC and EKFAC, not their default")
    add("--output", type=Path, default=Path(output))
    return parser.parse_args(argv)
