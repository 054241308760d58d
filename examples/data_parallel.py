"""Data parallel: the batch divided among devices under jit, and a step that is the same.

Four devices are simulated on the CPU, so nothing is faster here; on four accelerators leave that
line out. The step says nothing of devices: loss, gradients and curvature are those of the whole
batch, because the batch is one array that lies on all of them. Trained on one device and on four.

    python examples/data_parallel.py         # a minute on two cores
    python examples/data_parallel.py --fast  # a few steps, as the tests do
"""

import argparse
import time
from collections.abc import Sequence
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from matplotlib.figure import Figure
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits

import natgrad_jax as ng

jax.config.update("jax_num_cpu_devices", 4)  # before anything is computed
WIDTHS, BATCH, KEY = (64, 128, 128, 10), 480, jax.random.key(0)
COLUMNS = ("rows on each", "steps", "seconds", "training loss", "validation loss", "accuracy")


def init(key):
    he, keys = jax.nn.initializers.he_normal(), jax.random.split(key, len(WIDTHS))
    sizes = pairwise(WIDTHS)
    return [{"w": he(k, size), "b": jnp.zeros(size[1])} for k, size in zip(keys, sizes)]


def model(params, x):
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def loss_fn(params, images, labels):
    return ng.Categorical(model(params, images)).nll(labels)


@jax.jit
def evaluate(params, images, labels):
    logits = model(params, images)
    return ng.Categorical(logits).nll(labels).value, jnp.mean(logits.argmax(-1) == labels)


def train(devices, steps, trained_on, held_out):
    """A row of ``COLUMNS`` every few steps; compiling is not in the seconds."""
    mesh = jax.make_mesh((devices,), ("data",), (AxisType.Auto,), devices=jax.devices()[:devices])
    everywhere, divided = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    params = jax.device_put(init(KEY), everywhere)
    example = [jax.ShapeDtypeStruct((BATCH, *x.shape[1:]), x.dtype) for x in trained_on]
    layers = ng.find_layers(loss_fn, params, *example)
    tx, grad_fn = ng.kfac(0.1, layers), ng.value_and_grad(loss_fn, layers)

    @jax.jit
    def step(params, opt_state, images, labels, key):
        _, grads, statistics = grad_fn(params, images, labels, rng=key, opt_state=opt_state)
        updates, opt_state = tx.update(grads, opt_state, params, statistics=statistics)
        return optax.apply_updates(params, updates), opt_state

    opt_state = jax.device_put(tx.init(params), everywhere)  # or the second step compiles again
    random, seconds, rows = np.random.default_rng(0), 0.0, []
    for i in track(range(steps + 1), f"devices: {devices}"):
        if i % 4 == 0:
            scores = evaluate(params, *trained_on)[0], *evaluate(params, *held_out)
            rows.append((BATCH // devices, i, seconds, *scores))
        own = random.choice(len(trained_on[0]), BATCH, replace=False)
        batch = [jax.device_put(x[own], divided) for x in trained_on]
        if i == 0:
            jax.debug.visualize_array_sharding(batch[1])
            jax.block_until_ready(step(params, opt_state, *batch, KEY))  # compiles
        begin = time.perf_counter()
        params, opt_state = step(params, opt_state, *batch, jax.random.fold_in(KEY, i))
        jax.block_until_ready(params)
        seconds += time.perf_counter() - begin
    return np.asarray(rows, float)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="a few steps")
    parser.add_argument("--output", default="data_parallel.png", help="the picture")
    args, _ = parser.parse_known_args(argv)  # a notebook has arguments of its own
    images, labels = load_digits(return_X_y=True)
    images, labels = np.float32(images / 16), np.int32(labels)
    parts = (images[:1500], labels[:1500]), (images[1500:], labels[1500:])
    curves = {n: train(n, 20 if args.fast else 100, *parts) for n in (1, jax.device_count())}
    one, many = curves.values()

    figure, table = Figure((9, 3.6), dpi=80, layout="constrained"), Table("devices", *COLUMNS)
    axes = figure.subplots(1, 2)
    for (n, rows), color, width in zip(curves.items(), ("C1", "C0"), (5, 1.5)):
        for column, style in ((3, "-"), (4, "--")):
            label = f"{COLUMNS[column]}, devices: {n}"
            axes[0].semilogy(rows[:, 1], rows[:, column], color + style, lw=width, label=label)
        table.add_row(str(n), *(f"{x:.4g}" for x in rows[-1]))
    axes[0].set(xlabel="steps", ylabel="loss (nats per image)")
    axes[0].legend()
    for column, style in ((3, "-"), (4, "--")):
        difference = 1e6 * (many[:, column] / one[:, column] - 1)
        axes[1].plot(one[:, 1], difference, "C0" + style, label=COLUMNS[column])
    axes[1].set(xlabel="steps", ylabel="how far the losses are apart (millionths)")
    axes[1].legend()
    figure.savefig(args.output)
    rich.print(table)
    return {f"{n} {c}": x for n, rows in curves.items() for c, x in zip(COLUMNS, rows[-1])}


if __name__ == "__main__":
    main()
