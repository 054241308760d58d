"""Image classifier in Equinox: a CNN on scikit-learn's digits, by K-FAC and by Adam.

Three lines differ from training with plain optax: those with the comment "natgrad". The held-out
digits are by other writers. Linen, Flax NNX and Equinox have the same example.

    python examples/image_classifier_equinox.py         # a minute on two cores
    python examples/image_classifier_equinox.py --fast  # a few steps, as the tests do
"""

import argparse
import time
from collections.abc import Sequence
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich
from matplotlib.figure import Figure
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits

import natgrad_jax as ng

BATCH, KEY = 250, jax.random.key(0)
ADAM = 1e-2  # of 3e-3, 1e-2 and 3e-2, the lowest training loss at the end
COLUMNS = ("steps", "seconds", "training loss", "validation loss", "accuracy")


class CNN(eqx.Module):
    convs: list[eqx.nn.Conv2d]
    head: eqx.nn.Linear

    def __init__(self, *keys):
        conv = partial(eqx.nn.Conv2d, kernel_size=3, padding="SAME")
        sizes = (1, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1)
        self.convs = [conv(n, m, stride=stride, key=k) for (n, m, stride), k in zip(sizes, keys)]
        self.head = eqx.nn.Linear(32, 10, key=keys[4])

    def __call__(self, x):
        for conv in self.convs:
            x = jax.nn.relu(conv(x))
        return self.head(x.mean((1, 2)))


start, static = eqx.partition(CNN(*jax.random.split(KEY, 5)), eqx.is_inexact_array)
model = lambda params, images: jax.vmap(eqx.combine(params, static))(images)


def loss_fn(params, images, labels):
    return ng.Categorical(model(params, images)).nll(labels)


def kfac(params, images, labels):
    """The optimizer's state, and a step."""
    layers = ng.find_layers(loss_fn, params, images, labels)  # natgrad
    print(layers)
    tx = ng.kfac(0.1, layers)
    grad_fn = ng.value_and_grad(loss_fn, layers)  # natgrad

    @jax.jit
    def step(params, opt_state, images, labels, key):
        _, grads, statistics = grad_fn(params, images, labels, rng=key, opt_state=opt_state)
        updates, opt_state = tx.update(grads, opt_state, params, statistics=statistics)  # natgrad
        return eqx.apply_updates(params, updates), opt_state

    return tx.init(params), step


def adam(params, images, labels):
    tx = optax.adam(ADAM)
    grad_fn = jax.grad(lambda *args: loss_fn(*args).value)

    @jax.jit
    def step(params, opt_state, images, labels, key):
        grads = grad_fn(params, images, labels)
        updates, opt_state = tx.update(grads, opt_state, params)
        return eqx.apply_updates(params, updates), opt_state

    return tx.init(params), step


@jax.jit
def evaluate(params, images, labels):
    logits = model(params, images)
    return ng.Categorical(logits).nll(labels).value, jnp.mean(logits.argmax(-1) == labels)


def train(optimizer, steps, trained_on, held_out):
    """A row of ``COLUMNS`` every few steps; the seconds are those of the steps, once compiled."""
    images, labels = trained_on
    params = start
    opt_state, step = optimizer(params, images[:BATCH], labels[:BATCH])
    jax.block_until_ready(step(params, opt_state, images[:BATCH], labels[:BATCH], KEY))  # compiles
    random, seconds, rows = np.random.default_rng(0), 0.0, []
    for i in track(range(steps + 1), optimizer.__name__):
        if i % 4 == 0:
            scores = evaluate(params, *trained_on)[0], *evaluate(params, *held_out)
            rows.append((i, seconds, *scores))
        own = random.choice(len(images), BATCH, replace=False)
        batch, key = (images[own], labels[own]), jax.random.fold_in(KEY, i)
        begin = time.perf_counter()
        params, opt_state = jax.block_until_ready(step(params, opt_state, *batch, key))
        seconds += time.perf_counter() - begin
    return np.asarray(rows, float)


def show(curves, path):
    """The picture, the table, and the table's numbers."""
    figure, table = Figure((9, 3.6), dpi=80, layout="constrained"), Table("", *COLUMNS)
    for ax, column in zip(figure.subplots(1, 2, sharey=True), (0, 1)):
        for color, (name, rows) in zip(("C0", "C1"), curves.items()):
            ax.semilogy(rows[:, column], rows[:, 2], color, label=f"{name}, training")
            ax.semilogy(rows[:, column], rows[:, 3], color + "--", label=f"{name}, validation")
        ax.set(xlabel=COLUMNS[column], ylabel="loss (nats per image)")
    figure.axes[1].legend()
    figure.savefig(path)
    for name, rows in curves.items():
        table.add_row(name, *(f"{x:.4g}" for x in rows[-1]))
    rich.print(table)
    return {f"{name} {c}": x for name, rows in curves.items() for c, x in zip(COLUMNS, rows[-1])}


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="a few steps")
    parser.add_argument("--output", default="image_classifier_equinox.png", help="the picture")
    args, _ = parser.parse_known_args(argv)  # a notebook has arguments of its own
    images, labels = load_digits(return_X_y=True)
    images, labels = jnp.asarray(images.reshape(-1, 1, 8, 8) / 16), jnp.asarray(labels)
    parts = (images[:1500], labels[:1500]), (images[1500:], labels[1500:])
    steps = 60 if args.fast else 120
    curves = {name: train(f, steps, *parts) for name, f in (("K-FAC", kfac), ("Adam", adam))}
    return show(curves, args.output)


if __name__ == "__main__":
    main()
