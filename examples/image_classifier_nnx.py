"""Image classifier in Flax NNX: a CNN on scikit-learn's digits, by K-FAC and by Adam.

Three lines differ from training with plain optax: those with the comment "natgrad". The held-out
digits are by other writers. Linen, Flax NNX and Equinox have the same example.

    python examples/image_classifier_nnx.py         # a minute on two cores
    python examples/image_classifier_nnx.py --fast  # a few steps, as the tests do
"""

import argparse
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich
from flax import nnx
from matplotlib.figure import Figure
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits

import natgrad_jax as ng

BATCH, KEY = 250, jax.random.key(0)
ADAM = 3e-2  # of 3e-3, 1e-2, 3e-2 and 1e-1, the lowest training loss at the end
COLUMNS = ("steps", "seconds", "training loss", "validation loss", "accuracy")


class CNN(nnx.Module):
    def __init__(self):
        rngs, sizes = nnx.Rngs(0), ((1, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1))
        self.convs = nnx.List(nnx.Conv(n, m, (3, 3), stride, rngs=rngs) for n, m, stride in sizes)
        self.head = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x):
        for conv in self.convs:
            x = nnx.relu(conv(x))
        return self.head(x.mean((1, 2)))


def loss_fn(model, images, labels):
    return ng.Categorical(model(images)).nll(labels)


def kfac(model, images, labels):
    """The optimizer, and a step that changes it and the model."""
    layers = ng.find_layers(loss_fn, model, images, labels)  # natgrad
    print(layers)
    optimizer = nnx.Optimizer(model, ng.kfac(0.1, layers), wrt=nnx.Param)
    grad_fn = ng.value_and_grad(loss_fn, layers)  # natgrad

    @nnx.jit
    def step(model, optimizer, images, labels, key):
        state = optimizer.opt_state
        _, grads, statistics = grad_fn(model, images, labels, rng=key, opt_state=state)
        optimizer.update(model, grads, statistics=statistics)  # natgrad

    return optimizer, step


def adam(model, images, labels):
    optimizer = nnx.Optimizer(model, optax.adam(ADAM), wrt=nnx.Param)
    grad_fn = nnx.grad(lambda *args: loss_fn(*args).value)

    @nnx.jit
    def step(model, optimizer, images, labels, key):
        grads = grad_fn(model, images, labels)
        optimizer.update(model, grads)

    return optimizer, step


@nnx.jit
def evaluate(model, images, labels):
    logits = model(images)
    return ng.Categorical(logits).nll(labels).value, jnp.mean(logits.argmax(-1) == labels)


def train(make_optimizer, steps, trained_on, held_out):
    """A row of ``COLUMNS`` every few steps; the seconds are those of the steps, once compiled."""
    images, labels = trained_on
    model = CNN()
    optimizer, step = make_optimizer(model, images[:BATCH], labels[:BATCH])
    step(*nnx.clone((model, optimizer)), images[:BATCH], labels[:BATCH], KEY)  # compiles
    random, seconds, rows = np.random.default_rng(0), 0.0, []
    for i in track(range(steps + 1), make_optimizer.__name__):
        if i % 4 == 0:
            scores = evaluate(model, *trained_on)[0], *evaluate(model, *held_out)
            rows.append((i, seconds, *scores))
        own = random.choice(len(images), BATCH, replace=False)
        batch, key = (images[own], labels[own]), jax.random.fold_in(KEY, i)
        begin = time.perf_counter()
        step(model, optimizer, *batch, key)
        jax.block_until_ready(nnx.state(model))
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
    parser.add_argument("--output", default="image_classifier_nnx.png", help="the picture")
    args, _ = parser.parse_known_args(argv)  # a notebook has arguments of its own
    images, labels = load_digits(return_X_y=True)
    images, labels = jnp.asarray(images.reshape(-1, 8, 8, 1) / 16), jnp.asarray(labels)
    parts = (images[:1500], labels[:1500]), (images[1500:], labels[1500:])
    steps = 60 if args.fast else 120
    curves = {name: train(f, steps, *parts) for name, f in (("K-FAC", kfac), ("Adam", adam))}
    return show(curves, args.output)


if __name__ == "__main__":
    main()
