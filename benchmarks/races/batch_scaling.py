"""Steps to a training loss against the batch size, for SGD with momentum and K-FAC.

    python benchmarks/races/batch_scaling.py --data-dir DIR          # MNIST, batches of 128 to 8192
    python benchmarks/races/batch_scaling.py --data digits --batch-sizes 64,256,1024

The question of Ba, Grosse & Martens 2017 (Distributed second-order optimization using
Kronecker-factored approximations): larger batches have less noise, and what then limits SGD is
curvature. A narrow autoencoder (784-250-100-30-…, tanh) starts from the same parameters each time;
each optimizer has, for every batch size, the rate of its grid that needs the fewest steps until
the loss on a fixed part of the training set is at most --target; after the first size the grid is
the last best rate and its neighbours. That loss is looked at every 5 % of the steps so far.
Writes PREFIX.png and PREFIX.json.
"""

import argparse
import math
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich import box
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))  # for lib and the other folders
from lib import data, report, training
from lib.arguments import integers, positive
from lib.autoencoder import Autoencoder, Problem, make_problem
from lib.optimizers import OPTIMIZERS, first_order

ENCODERS = {"mnist": (784, 250, 100, 30), "digits": (64, 64, 32, 8)}
TARGETS = {"mnist": 90.0, "digits": 18.0}
SIZES = {"mnist": (128, 256, 512, 1024, 2048, 4096, 8192), "digits": (64, 256, 1024)}
RATES = {"sgd": (0.003, 0.006, 0.012, 0.025, 0.05), "kfac": (0.1,)}
SGD = first_order(
    optax.inject_hyperparams(lambda learning_rate: optax.sgd(learning_rate, momentum=0.9))
)
MAKERS = {"sgd": SGD, "kfac": OPTIMIZERS["kfac"]}
NEIGHBOURS = 2.5  # times larger or smaller than the last batch size's rate
CLOSER = 1.05  # an evaluation is at most so many times as late as the one before


class Reached(NamedTuple):
    """The target, by one optimizer at one batch size; None where no rate got there."""

    optimizer: str
    batch_size: int
    rate: float | None
    steps: int | None
    seconds: float | None  # of training alone
    tried: dict[str, int | None]  # steps of every rate; None: no sooner than the best before it


def steps_to(
    target: float,
    most: int,
    compiled: training.Compiled,
    problem: Problem,
    images: jax.Array,
    size: int,
    evaluate: Callable[[Any], jax.Array],
) -> tuple[int | None, float]:
    """The first evaluated step with the target's loss, None if not after ``most``; seconds."""
    params, key = problem.init(0), jax.random.key(1)
    opt_state = compiled.init(params)
    order, seconds, done = training.minibatches(len(images), size, most, seed=0), 0.0, 0
    while done < most:
        upto = min(max(done + 1, int(CLOSER * done)), most)
        jax.block_until_ready((params, opt_state))
        begun = time.perf_counter()
        for i in range(done, upto):
            params, opt_state, _ = compiled.step(
                params, opt_state, images, jnp.asarray(order[i]), jnp.int32(i), key
            )
        jax.block_until_ready((params, opt_state))
        seconds, done = seconds + time.perf_counter() - begun, upto
        loss = float(evaluate(params))
        if loss <= target:
            return done, seconds
        if not math.isfinite(loss):
            break
    return None, seconds


def reach(
    name: str, size: int, near: float | None, problem: Problem, images: Any, args: Any
) -> Reached:
    """The best rate, those near the last batch size's first: the others stop where it was done."""
    evaluated = jnp.asarray(training.evaluated_images(problem))
    evaluate = partial(jax.jit(lambda p, x: problem.loss_fn(p, x).value), x=evaluated)
    off = {rate: abs(math.log(rate / (near or rate))) for rate in RATES[name]}
    grid = sorted((rate for rate in off if off[rate] < math.log(NEIGHBOURS)), key=off.__getitem__)
    make, compiled = MAKERS[name], None
    best, tried = Reached(name, size, None, None, None, {}), {}
    for rate in grid:
        if compiled is None or name != "sgd":
            compiled = training.compile_step(problem, images, make, rate, size)
        start = make(rate, problem.loss_fn, problem.init(0), images[:size]).init
        most = args.most_steps if best.steps is None else best.steps - 1
        steps, seconds = steps_to(
            args.target, most, compiled._replace(init=start), problem, images, size, evaluate
        )
        tried[f"{rate:g}"] = steps
        if steps is not None:
            best = Reached(name, size, rate, steps, seconds, {})
    return best._replace(tried=tried)


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parse_arguments(argv)
    problem = make_problem(data.load_or_exit(args.data, args.data_dir))
    problem = problem._replace(model=Autoencoder(ENCODERS[args.data]))
    images, console, found = jnp.asarray(problem.images), Console(), []
    for name in args.optimizers:
        near = None
        for size in args.batch_sizes:
            found.append(reach(name, size, near, problem, images, args))
            near = found[-1].rate
            console.print(f"{name}, batches of {size}: {told(found[-1])}", soft_wrap=True)
    console.print(make_table(found, args))
    figure, numbers = (args.output.with_name(args.output.name + s) for s in (".png", ".json"))
    figure.parent.mkdir(parents=True, exist_ok=True)
    plot(found, args, figure)
    settings = {
        "command": shlex.join(["python", "benchmarks/races/batch_scaling.py", *argv]),
        "data": args.data,
        "encoder": ENCODERS[args.data],
        "target": args.target,
        "most_steps": args.most_steps,
        "reached": [one._asdict() for one in found],
    }
    report.write_json(numbers, settings, [], [])
    report.tell_files(console, figure, numbers)


def told(one: Reached) -> str:
    tried = ", ".join(f"{rate}: {steps or '-'}" for rate, steps in one.tried.items())
    if one.steps is None:
        return f"never ({tried})"
    return f"{one.steps} steps, {one.seconds:.1f} s at rate {one.rate:g} ({tried})"


def gains(found: Sequence[Reached], name: str) -> list[float | None]:
    """How many times fewer steps each batch size needs than the one before it."""
    steps = [one.steps for one in found if one.optimizer == name]
    pairs = pairwise(steps)
    return [None, *(a / b if a and b else None for a, b in pairs)]


def make_table(found: Sequence[Reached], args: argparse.Namespace) -> Table:
    title = f"{args.data}: steps to a training loss of {args.target:g} nats per image"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=0, title_justify="left")
    for header in ("optimizer", "batch", "rate", "steps", "times\nfewer", "seconds"):
        table.add_column(header, justify="left" if header == "optimizer" else "right")
    for name in args.optimizers:
        own = [one for one in found if one.optimizer == name]
        for one, gain in zip(own, gains(found, name), strict=True):
            numbers = ("", "never", "") if one.steps is None else (
                f"{one.rate:g}", f"{one.steps}", f"{one.seconds:.1f}")  # fmt: skip
            fewer = "" if gain is None else f"{gain:.2f}"
            table.add_row(name, str(one.batch_size), *numbers[:2], fewer, numbers[2])
    return table


def plot(found: Sequence[Reached], args: argparse.Namespace, path: Path) -> None:
    """Steps against batch size, and where half the steps for twice the batch would lead."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.subplots()
    for place, (name, (line, marker)) in enumerate(zip(args.optimizers, report.STYLES)):
        own = [one for one in found if one.optimizer == name and one.steps is not None]
        if not own:
            continue
        sizes = np.array([one.batch_size for one in own])
        look = {"color": f"C{place}", "marker": marker, "linestyle": line}
        axes.plot(sizes, [one.steps for one in own], label=name, **look)
        ideal = own[0].steps * sizes[0] / sizes
        label = "twice the batch, half the steps" if place == 0 else None
        axes.plot(sizes, ideal, color="0.6", linewidth=0.8, linestyle=":", label=label)
    axes.set(xscale="log", yscale="log", xlabel="batch size (images)",
             ylabel=f"steps to a training loss of {args.target:g} nats per image")  # fmt: skip
    axes.set_xticks(args.batch_sizes, [str(size) for size in args.batch_sizes])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.grid(which="both", color="0.9")
    axes.legend()
    figure.savefig(path, dpi=150)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", choices=ENCODERS, default="mnist")
    add("--data-dir", metavar="DIR", help="where the files of MNIST are")
    add("--batch-sizes", type=integers, metavar="B[,B…]")
    add("--optimizers", nargs="+", choices=MAKERS, default=list(MAKERS), metavar="NAME")
    add("--target", type=float, metavar="NATS", help="the loss to reach, per image")
    add("--most-steps", type=positive, default=2000, metavar="N", help="of one run")
    add("--output", type=Path, default=Path("batch-scaling"), metavar="PREFIX")
    args = parser.parse_args(argv)
    args.batch_sizes = args.batch_sizes or list(SIZES[args.data])
    args.target = args.target or TARGETS[args.data]
    return args


if __name__ == "__main__":
    main()
