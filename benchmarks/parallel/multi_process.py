"""One training script on many hosts: data parallel under ``jax.distributed``, refreshes divided.

    python benchmarks/parallel/multi_process.py --processes 2 --devices 2   # both on this machine

or one on each host, with ``--process-id 0`` here and ``1`` there:

    python benchmarks/parallel/multi_process.py --processes 2 --coordinator HOST:1234 --process-id 0

The digits autoencoder. Every process holds its rows of each batch, and jit does the rest: the step
is that of one device, and every device factorises its share of the layers (``refresh_over``). The
first process prints the loss, and writes parameters and factors with ``--output``.
"""

import argparse
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

import natgrad_jax as ng

sys.path.insert(0, str(Path(__file__).parents[1]))  # for lib and the other folders
from lib.autoencoder import ENCODERS, Autoencoder, Problem
from lib.data import load_or_exit

OPTIMIZERS = {"kfac": ng.kfac, "ekfac": ng.ekfac}


class Trained(NamedTuple):
    """What a run leaves behind, the same on every process."""

    params: Any
    factors: Any
    losses: list[float]


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parse_arguments(argv)
    if args.coordinator is None:
        raise SystemExit(launch(argv, args.processes))
    jax.config.update("jax_num_cpu_devices", args.devices)
    jax.distributed.initialize(args.coordinator, args.processes, args.process_id)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    found = train(mesh, args, log=print if jax.process_index() == 0 else None)
    if args.output is not None and jax.process_index() == 0:
        flat = jax.tree_util.tree_flatten_with_path((found.params, found.factors))[0]
        np.savez(args.output, **{jax.tree_util.keystr(path): x for path, x in flat})


def launch(argv: Sequence[str], processes: int) -> int:
    """Start all processes on this machine; the exit code of the first that fails, or 0."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, __file__, *argv, "--coordinator", coordinator, "--process-id"]
    running = [subprocess.Popen([*command, str(i)]) for i in range(processes)]
    try:
        while any(p.poll() is None for p in running) and not any(p.poll() for p in running):
            time.sleep(0.1)
        return next((p.returncode for p in running if p.returncode), 0)
    finally:
        for process in running:  # of those that wait for one that failed
            process.kill()
            process.wait()


def train(mesh: Mesh, args: argparse.Namespace, log: Any = None) -> Trained:
    """Train on all devices of ``mesh``; every process calls this."""
    images = load_or_exit("digits").train_images
    problem = Problem(Autoencoder(tuple(args.encoder)), images.reshape(len(images), -1))
    everywhere, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    shapes = jax.eval_shape(partial(problem.init, 0))
    batch = jax.ShapeDtypeStruct((args.batch_size, problem.images.shape[1]), jnp.float32)
    layers = ng.find_layers(problem.loss_fn, shapes, batch)
    tx = OPTIMIZERS[args.optimizer](
        0.1,
        layers,
        damping=args.damping,
        statistics_period=args.statistics_period,
        refresh=ng.every(args.refresh_period, over=(mesh, "data")),
    )
    grad_fn = ng.value_and_grad(problem.loss_fn, layers)

    @partial(jax.jit, out_shardings=everywhere)
    def start() -> Any:
        params = problem.init(args.seed)
        return params, tx.init(params)

    @partial(jax.jit, donate_argnums=(0, 1), out_shardings=everywhere)
    def step(params: Any, opt_state: Any, batch: jax.Array, number: Any) -> Any:
        key = jax.random.fold_in(jax.random.key(args.seed), number)
        loss, grads, statistics = grad_fn(params, batch, rng=key, opt_state=opt_state)
        updates, opt_state = tx.update(grads, opt_state, params, statistics=statistics)
        return optax.apply_updates(params, updates), opt_state, loss

    params, opt_state = start()
    if log is not None:
        log(f"{jax.process_count()} processes, {mesh.size} devices, {args.optimizer}")
    losses = []
    for i, rows in enumerate(batches(problem.images, args)):
        batch = jax.make_array_from_process_local_data(split, own(rows), rows.shape)
        params, opt_state, loss = step(params, opt_state, batch, i)
        losses.append(loss)
        if log is not None and (i % 10 == 0 or i == args.steps - 1):
            log(f"step {i:4d}   loss {float(loss):.3f} nats per image")
    found = jax.device_get((params, ng.factors(opt_state), losses))
    return Trained(found[0], found[1], [float(loss) for loss in found[2]])


def batches(images: np.ndarray, args: argparse.Namespace) -> Iterator[np.ndarray]:
    """The same whole batches on every process. (A pipeline that reads only its own rows is one
    that gives :func:`jax.make_array_from_process_local_data` the same ones.)"""
    random = np.random.default_rng(args.seed)
    for _ in range(args.steps):
        yield images[random.choice(len(images), args.batch_size, replace=False)]


def own(rows: np.ndarray) -> np.ndarray:
    """This process' rows of a batch."""
    return np.split(rows, jax.process_count())[jax.process_index()]


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--processes", type=int, default=2, help="of all hosts together")
    add("--coordinator", metavar="HOST:PORT", help="of process 0; without it all are started here")
    add("--process-id", type=int, metavar="I", help="from 0; needed with --coordinator")
    add("--devices", type=int, default=1, help="of a process, on CPU")
    add("--optimizer", choices=OPTIMIZERS, default="kfac")
    add("--damping", type=float, default=1e-2)
    add("--statistics-period", type=int, default=10)
    add("--refresh-period", type=int, default=20)
    add("--steps", type=int, default=100)
    add("--batch-size", type=int, default=512)
    add("--encoder", type=int, nargs="+", default=ENCODERS["digits"], help="widths, pixels first")
    add("--seed", type=int, default=0)
    add("--output", type=Path, metavar="FILE.npz", help="parameters and factors at the end")
    args = parser.parse_args(argv)
    if (args.coordinator is None) != (args.process_id is None):
        parser.error("--coordinator and --process-id come together, or neither of them")
    if args.batch_size % (args.processes * args.devices):
        parser.error("--batch-size must be divisible by the number of all devices")
    return args


if __name__ == "__main__":
    main()
