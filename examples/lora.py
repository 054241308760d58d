"""Fine-tuning with LoRA: low-rank updates of a frozen network, by K-FAC and by Adam.

A small network is pretrained on the digits 0 to 4. For all ten, its weights stay frozen; low-rank
products beside them are trained, and the head. ``optax.partition`` says which parameters are which;
K-FAC measures only those that are trained, and keeps factors of no others.

    python examples/lora.py         # a minute on two cores
    python examples/lora.py --fast  # a few steps, as the tests do
"""

import argparse
import time
from collections.abc import Sequence

import flax.linen as nn
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

RANK, BATCH, KEY = 4, 250, jax.random.key(0)
ADAM = 3e-2  # of 3e-3, 1e-2, 3e-2 and 1e-1, the lowest training loss at the end
COLUMNS = ("trained", "steps", "seconds", "training loss", "validation loss", "accuracy")


class LoRADense(nn.Module):
    """x W + b + (x D) U: W and b are pretrained, U begins at zero."""

    features: int

    @nn.compact
    def __call__(self, x):
        up = nn.Dense(self.features, False, kernel_init=nn.initializers.zeros, name="up")
        low_rank = up(nn.Dense(RANK, False, name="down")(x))
        return nn.Dense(self.features, name="pretrained")(x) + low_rank


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(3):
            x = nn.relu(LoRADense(128)(x))
        return nn.Dense(10, name="head")(x)


model = Net()


def loss_fn(params, images, labels):
    return ng.Categorical(model.apply({"params": params}, images)).nll(labels)


def kind(path):
    names = [key.key for key in path]
    return next((name for name in ("pretrained", "head") if name in names), "low rank")


def optimizer(name, params, trained, images, labels):
    """The state of K-FAC or Adam for the parameters of the kinds ``trained``, and a step."""
    layers = ng.find_layers(loss_fn, params, images, labels)
    tx = ng.kfac(0.1, layers) if name == "K-FAC" else optax.adam(ADAM)
    tx = optax.partition(
        {
            k: tx if k in trained else optax.set_to_zero()
            for k in ("pretrained", "head", "low rank")
        },
        jax.tree_util.tree_map_with_path(lambda path, _: kind(path), params),
    )
    natural = ng.value_and_grad(loss_fn, layers)
    plain = jax.grad(lambda *args: loss_fn(*args).value)

    @jax.jit
    def step(params, opt_state, images, labels, key):
        if name == "K-FAC":
            _, grads, statistics = natural(params, images, labels, rng=key, opt_state=opt_state)
            updates, opt_state = tx.update(grads, opt_state, params, statistics=statistics)
        else:
            updates, opt_state = tx.update(plain(params, images, labels), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state = tx.init(params)
    if name == "K-FAC":
        print("factors of", *("/".join(path) for path in ng.factors(opt_state)))
    return opt_state, step


@jax.jit
def evaluate(params, images, labels):
    logits = model.apply({"params": params}, images)
    return ng.Categorical(logits).nll(labels).value, jnp.mean(logits.argmax(-1) == labels)


def train(name, params, trained, steps, train_set, held_out):
    """Parameters, and a row of ``COLUMNS`` every few steps; compiling is not in the seconds."""
    images, labels = train_set
    leaves = jax.tree_util.tree_leaves_with_path(params)
    size = sum(x.size for path, x in leaves if kind(path) in trained)
    opt_state, step = optimizer(name, params, trained, images[:BATCH], labels[:BATCH])
    jax.block_until_ready(step(params, opt_state, images[:BATCH], labels[:BATCH], KEY))  # compiles
    random, seconds, rows = np.random.default_rng(0), 0.0, []
    for i in track(range(steps + 1), f"{name}, {trained[0]}"):
        if i % 4 == 0:
            scores = evaluate(params, *train_set)[0], *evaluate(params, *held_out)
            rows.append((size, i, seconds, *scores))
        own = random.choice(len(images), BATCH, replace=False)
        batch, key = (images[own], labels[own]), jax.random.fold_in(KEY, i)
        begin = time.perf_counter()
        params, opt_state = jax.block_until_ready(step(params, opt_state, *batch, key))
        seconds += time.perf_counter() - begin
    return params, np.asarray(rows, float)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="a few steps")
    parser.add_argument("--output", default="lora.png", help="the picture")
    args, _ = parser.parse_known_args(argv)  # a notebook has arguments of its own
    images, labels = load_digits(return_X_y=True)
    images, labels = jnp.asarray(images / 16), jnp.asarray(labels)
    every, held_out = (images[:1500], labels[:1500]), (images[1500:], labels[1500:])
    few = tuple(x[labels[:1500] < 5] for x in every)
    old = tuple(x[labels[1500:] < 5] for x in held_out)
    steps, first = 100 if args.fast else 120, model.init(KEY, images[:1])["params"]
    before, _ = train("K-FAC", first, ("pretrained", "head"), 40, few, old)
    curves = {}
    for name in ("K-FAC", "Adam"):
        after, curves[name] = train(name, before, ("low rank", "head"), steps, every, held_out)
        same = jax.tree.map(lambda x, y: bool((x == y).all()), before, after)
        for path, x in jax.tree_util.tree_leaves_with_path(same):
            assert x == (kind(path) == "pretrained")  # frozen bit for bit, and no others

    figure, table = Figure((9, 3.6), dpi=80, layout="constrained"), Table("", *COLUMNS)
    for ax, column in zip(figure.subplots(1, 2, sharey=True), (1, 2)):
        for color, (name, rows) in zip(("C0", "C1"), curves.items()):
            ax.semilogy(rows[:, column], rows[:, 3], color, label=f"{name}, training")
            ax.semilogy(rows[:, column], rows[:, 4], color + "--", label=f"{name}, validation")
        ax.set(xlabel=COLUMNS[column], ylabel="loss on all ten digits (nats)")
    figure.axes[1].legend()
    figure.savefig(args.output)
    table.add_row("before", "0", "0", "0", *(f"{x:.4g}" for x in rows[0][3:]))
    for name, rows in curves.items():
        table.add_row(name, *(f"{x:.4g}" for x in rows[-1]))
    rich.print(table)
    return {f"{name} {c}": x for name, rows in curves.items() for c, x in zip(COLUMNS, rows[-1])}


if __name__ == "__main__":
    main()
