"""Several hosts: one program on each under jax.distributed, the refreshes divided among devices.

Without ``--coordinator`` two processes of two simulated devices each are started on this machine.
Every process holds its own rows of a batch; the step is that of one device. K-FAC refreshes all its
inverses in one step, each device its share (``ng.every(20, over=…)``). In a notebook, write
``!python`` before the command. On real hosts, run one of these on each, with its number:

    python examples/several_hosts.py         # a minute on two cores
    python examples/several_hosts.py --fast  # a few steps, as the tests do
    python examples/several_hosts.py --coordinator HOST:1234 --process-id 0  # and on another, 1
"""

import argparse
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

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

PROCESSES, DEVICES, WIDTHS, BATCH = 2, 2, (64, 128, 128, 10), 480
COLUMNS = ("steps", "seconds", "training loss", "validation loss", "accuracy")


def init(key):
    he, keys = jax.nn.initializers.he_normal(), jax.random.split(key, len(WIDTHS))
    return [{"w": he(k, size), "b": jnp.zeros(size[1])} for k, size in zip(keys, pairwise(WIDTHS))]


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


def train(steps, trained_on, held_out):
    """A row of ``COLUMNS`` every few steps. Every process calls this, with the same data."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), (AxisType.Auto,))
    everywhere, divided = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    example = [jax.ShapeDtypeStruct((BATCH, *x.shape[1:]), x.dtype) for x in trained_on]
    layers = ng.find_layers(loss_fn, jax.eval_shape(init, jax.random.key(0)), *example)
    tx = ng.kfac(0.1, layers, refresh=ng.every(20, over=(mesh, "data")))
    grad_fn = ng.value_and_grad(loss_fn, layers)

    @partial(jax.jit, out_shardings=everywhere)
    def start():
        params = init(jax.random.key(0))
        return params, tx.init(params)

    @partial(jax.jit, out_shardings=everywhere)
    def step(params, opt_state, images, labels, number):
        key = jax.random.fold_in(jax.random.key(0), number)
        _, grads, statistics = grad_fn(params, images, labels, rng=key, opt_state=opt_state)
        updates, opt_state = tx.update(grads, opt_state, params, statistics=statistics)
        return optax.apply_updates(params, updates), opt_state

    (params, opt_state), random, seconds, rows = start(), np.random.default_rng(0), 0.0, []
    first = jax.process_index() == 0
    for i in track(range(steps + 1), f"{mesh.size} devices", disable=not first):
        if i % 4 == 0:
            scores = evaluate(params, *trained_on)[0], *evaluate(params, *held_out)
            rows.append((i, seconds, *(float(x) for x in scores)))
        own = np.split(random.choice(len(trained_on[0]), BATCH, replace=False), jax.process_count())
        local = [x[own[jax.process_index()]] for x in trained_on]  # this process' rows
        batch = [jax.make_array_from_process_local_data(divided, x) for x in local]
        if i == 0:
            jax.block_until_ready(step(params, opt_state, *batch, 0))  # compiles
        begin = time.perf_counter()
        params, opt_state = jax.block_until_ready(step(params, opt_state, *batch, i))
        seconds += time.perf_counter() - begin
    return np.asarray(rows)


def launch(argv):
    """All processes on this machine, and what the first one found."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    with tempfile.TemporaryDirectory() as folder:
        numbers = Path(folder) / "numbers.json"
        options = ["--coordinator", coordinator, "--numbers", str(numbers), "--process-id"]
        command = [sys.executable, __file__, *argv, *options]
        running = [subprocess.Popen([*command, str(i)]) for i in range(PROCESSES)]
        while any(p.poll() is None for p in running) and not any(p.poll() for p in running):
            time.sleep(0.1)
        for process in running:  # where one failed, others wait for it
            process.kill()
            process.wait()
        if any(process.returncode for process in running):
            raise SystemExit("a process failed")
        return json.loads(numbers.read_text())


def show(rows, path):
    """The picture, the table, and the table's numbers."""
    figure, table = Figure((6, 3.6), dpi=80, layout="constrained"), Table("", *COLUMNS)
    ax, name = figure.subplots(), f"{jax.process_count()} processes, {jax.device_count()} devices"
    ax.semilogy(rows[:, 0], rows[:, 2], "C0", label="training")
    ax.semilogy(rows[:, 0], rows[:, 3], "C0--", label="validation")
    ax.set(xlabel="steps", ylabel="loss (nats per image)", title=name)
    ax.legend()
    figure.savefig(path)
    table.add_row(name, *(f"{x:.4g}" for x in rows[-1]))
    rich.print(table)
    return {"devices": jax.device_count(), **dict(zip(COLUMNS, rows[-1]))}


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="a few steps")
    parser.add_argument("--output", default="several_hosts.png", help="the picture")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0")
    parser.add_argument("--process-id", type=int, help="from 0")
    parser.add_argument("--numbers", type=Path, help="where process 0 writes the table as JSON")
    args, _ = parser.parse_known_args(argv)
    if args.coordinator is None:
        return launch(sys.argv[1:] if argv is None else argv)
    jax.config.update("jax_num_cpu_devices", DEVICES)
    jax.distributed.initialize(args.coordinator, PROCESSES, args.process_id)
    images, labels = load_digits(return_X_y=True)
    images, labels = np.float32(images / 16), np.int32(labels)
    parts = (images[:1500], labels[:1500]), (images[1500:], labels[1500:])
    rows = train(20 if args.fast else 100, *parts)
    if jax.process_index() > 0:
        return {}
    found = show(rows, args.output)
    if args.numbers is not None:
        args.numbers.write_text(json.dumps(found))
    return found


if __name__ == "__main__":
    main()
