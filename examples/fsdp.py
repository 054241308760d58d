"""FSDP: parameters, factors and their inverses divided among devices, not copied to each.

Four devices are simulated on the CPU; on accelerators leave that line out. The parameters are put
on the mesh in parts, and ``tx.init(params)``, outside jit, divides the optimizer's state as well.
The step is that of one device. Trained with copies on every device and with parts.

    python examples/fsdp.py         # a minute on two cores
    python examples/fsdp.py --fast  # a few steps, as the tests do
"""

import argparse
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
WIDTHS, BATCH, KEY = (64, 512, 512, 10), 480, jax.random.key(0)
COLUMNS = ("weights (MB)", "state (MB)", "steps", "training loss", "validation loss", "accuracy")


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


def megabytes(tree):
    """What each device holds of a tree of arrays."""
    shards = [shard for x in jax.tree.leaves(tree) for shard in x.addressable_shards]
    held = dict.fromkeys(jax.devices(), 0.0)
    for shard in shards:
        held[shard.device] += shard.data.nbytes / 1e6
    return list(held.values())


def train(name, spec, steps, trained_on, held_out):
    """Rows of ``COLUMNS``, and the state's megabytes on each device."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), (AxisType.Auto,))
    divided = NamedSharding(mesh, P("data"))
    params = jax.device_put(init(KEY), NamedSharding(mesh, P()))
    for layer in params:  # a weight by its rows; biases are small
        layer["w"] = jax.device_put(layer["w"], NamedSharding(mesh, spec))
    example = [jax.ShapeDtypeStruct((BATCH, *x.shape[1:]), x.dtype) for x in trained_on]
    layers = ng.find_layers(loss_fn, params, *example)
    tx, grad_fn = ng.kfac(0.1, layers), ng.value_and_grad(loss_fn, layers)
    opt_state = tx.init(params)  # outside jit: it sees where the parameters lie

    @jax.jit
    def step(params, opt_state, images, labels, key):
        _, grads, statistics = grad_fn(params, images, labels, rng=key, opt_state=opt_state)
        updates, opt_state = tx.update(grads, opt_state, params, statistics=statistics)
        return optax.apply_updates(params, updates), opt_state

    random, rows = np.random.default_rng(0), []
    for i in track(range(steps + 1), name):
        if i % 4 == 0:
            scores = evaluate(params, *trained_on)[0], *evaluate(params, *held_out)
            sizes = max(megabytes(params)), max(megabytes(opt_state))
            rows.append((*sizes, i, *scores))
        own = random.choice(len(trained_on[0]), BATCH, replace=False)
        batch = [jax.device_put(x[own], divided) for x in trained_on]
        key = jax.random.fold_in(KEY, i)
        params, opt_state = jax.block_until_ready(step(params, opt_state, *batch, key))
    return np.asarray(rows, float), megabytes(opt_state)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="a few steps")
    parser.add_argument("--output", default="fsdp.png", help="the picture")
    args, _ = parser.parse_known_args(argv)  # a notebook has arguments of its own
    images, labels = load_digits(return_X_y=True)
    images, labels = np.float32(images / 16), np.int32(labels)
    parts = (images[:1500], labels[:1500]), (images[1500:], labels[1500:])
    specs, steps = {"copies": P(), "parts": P("data")}, 8 if args.fast else 60
    runs = {name: train(name, spec, steps, *parts) for name, spec in specs.items()}

    figure = Figure((9, 3.6), dpi=80, layout="constrained")
    table = Table("", *COLUMNS, title="on each of the devices")
    axes = figure.subplots(1, 2)
    for i, (name, (rows, held)) in enumerate(runs.items()):
        axes[0].bar(np.arange(len(held)) + 0.4 * i - 0.2, held, 0.4, color=f"C{1 - i}", label=name)
        style = {"color": f"C{1 - i}", "lw": 5 - 3.5 * i}
        axes[1].semilogy(rows[:, 2], rows[:, 3], label=f"{name}, training", **style)
        axes[1].semilogy(rows[:, 2], rows[:, 4], ls="--", label=f"{name}, validation", **style)
        table.add_row(name, *(f"{x:.4g}" for x in rows[-1]))
    axes[0].set(xlabel="device", ylabel="state on it (MB)", xticks=range(len(held)))
    axes[0].margins(y=0.3)  # room for the legend
    axes[1].set(xlabel="steps", ylabel="loss (nats per image)")
    for ax in axes:
        ax.legend()
    figure.savefig(args.output)
    rich.print(table)
    return {f"{n} {c}": x for n, (rows, _) in runs.items() for c, x in zip(COLUMNS, rows[-1])}


if __name__ == "__main__":
    main()
