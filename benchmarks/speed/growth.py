"""How K-FAC grows with a network: step, refresh, memory and compile time, and their exponents.

    python benchmarks/speed/growth.py                        # widths 256 to 4096, depths 4 to 64
    python benchmarks/speed/growth.py --widths 256 512 --depths 4 8 16 --series width scanned

An MLP of square layers (tanh, Gaussian loss, random data): over widths at depth 4, and over depths
at width 256, its layers unrolled or stacked by ``nn.scan``. SGD with momentum, K-FAC at its
defaults, and K-FAC with full inverses by Cholesky (else at its defaults) take turns, so that a
machine whose speed drifts slows all of them. One program a method takes all its steps, by schedules
of both periods: one that measures and refreshes, one that measures, the one after, and ordinary
ones. ``refresh`` is what the first takes longer than the second; ``statistics`` what the second and
the one after take longer than ordinary ones (on a CPU, with factors of tens of megabytes, that one
takes longer too); the mean step is computed of them at the default periods. Times are medians over
the rounds after a first one that is thrown away. State is the optimizer's; peak memory is the
compiled step's own account (arguments, results, temporaries). Compile seconds are those until a
first step could be taken: layers found, state made, step traced and compiled; what only a first
compilation costs is paid before.

A point that would take longer than --limit-seconds, by how the last two grew, is left out with all
larger ones of its method, and named. Writes PREFIX.json and PREFIX.png.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import natgrad_jax as ng
from natgrad_jax.statistics.spec import MEASURED
from natgrad_jax.transforms.common.refresh_schedule import PERIOD

sys.path.insert(0, str(Path(__file__).parents[1]))  # for lib and the other folders
from lib import report
from lib.arguments import positive
from lib.optimizers import OPTIMIZERS, Contender, natural
from speed import growth_report
from speed.growth_report import Point, Skipped

WIDTHS, DEPTHS = (256, 512, 1024, 2048, 4096), (4, 8, 16, 32, 64)
WIDTH, DEPTH = 256, 4  # of the other series
LEARNING_RATE = 1e-3
KINDS = ("refresh", "statistics", "after", *["ordinary"] * 3)  # of step 0, 1, 2, 3, …: in turn


class Block(nn.Module):
    """One layer, in the form that ``nn.scan`` takes."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return jnp.tanh(nn.Dense(self.width)(x)), None


class MLP(nn.Module):
    """``depth`` layers of ``width`` units, unrolled or stacked."""

    width: int
    depth: int
    scanned: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.scanned:
            axes: dict[str, Any] = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
            stack = nn.scan(Block, length=self.depth, **axes)
            return stack(self.width)(x, None)[0]
        for _ in range(self.depth):
            x, _ = Block(self.width)(x, None)
        return x


# How a series makes its model from a size
SERIES = {
    "width": lambda size: MLP(size, DEPTH, scanned=False),
    "depth": lambda size: MLP(WIDTH, size, scanned=False),
    "scanned": lambda size: MLP(WIDTH, size, scanned=True),
}


def measures(step: jax.Array) -> jax.Array:
    """The period of statistics: 1 where they are due, and else one that no such step falls on."""
    return jnp.where(step % len(KINDS) > KINDS.index("statistics"), step + 1, 1)


def refreshes(step: jax.Array) -> jax.Array:
    """The period of refreshes, likewise."""
    return jnp.where(step % len(KINDS) == KINDS.index("refresh"), 1, step + 1)


def kfac(**how: Any) -> Any:
    """K-FAC that measures whole batches and refreshes as KINDS says; else the defaults."""
    when = {"statistics_period": measures, "refresh_period": refreshes, "statistics_fraction": 1.0}
    return natural(lambda rate, layers: ng.kfac(rate, layers, **when, **how))


METHODS = {
    "sgd": OPTIMIZERS["sgd"],
    "kfac": kfac(),
    "kfac-cholesky": kfac(inverse="cholesky"),
}


class Program(NamedTuple):
    """A compiled step with its state, ``carry``: params, opt_state."""

    step: Any
    carry: Any
    seconds: float  # to make it
    state_bytes: int
    peak_bytes: int


def compile_step(method: str, model: MLP, batch: tuple[jax.Array, jax.Array]) -> Program:
    def loss_fn(params: Any, batch: Any) -> Any:
        return ng.Gaussian(model.apply({"params": params}, batch[0])).nll(batch[1])

    params = jax.block_until_ready(jax.jit(model.init)(jax.random.key(0), batch[0])["params"])
    key = jax.random.key(0)
    begun = time.perf_counter()
    contender: Contender = METHODS[method](LEARNING_RATE, loss_fn, params, batch)
    state = jax.block_until_ready(contender.init(params))
    step = jax.jit(contender.step, donate_argnums=(0, 1)).lower(params, state, batch, key).compile()
    seconds = time.perf_counter() - begun
    needs = step.memory_analysis()
    peak = needs.argument_size_in_bytes + needs.output_size_in_bytes - needs.alias_size_in_bytes
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    return Program(step, (params, state), seconds, size, peak + needs.temp_size_in_bytes)


def measure(
    programs: dict[str, Program], batch: Any, rounds: int
) -> tuple[dict[str, list[list[float]]], dict[str, float]]:
    """Seconds of each method's steps, round by round and kind by kind; and the last losses."""
    seconds: dict[str, list[list[float]]] = {method: [] for method in programs}
    carries = {method: program.carry for method, program in programs.items()}
    losses = {}
    for turn in range(rounds + 1):
        for method, program in programs.items():
            taken = []
            for kind in range(len(KINDS)):
                key = jax.random.key(turn * len(KINDS) + kind)
                begun = time.perf_counter()
                *carries[method], loss = jax.block_until_ready(
                    program.step(*carries[method], batch, key)
                )
                taken.append(time.perf_counter() - begun)
            seconds[method].append(taken)
            losses[method] = float(loss)
    return seconds, losses


def make_point(
    series: str, size: int, method: str, program: Program, taken: list[list[float]], loss: float
) -> Point:
    refresh, statistics, after, *_ = np.median(taken[1:], axis=0)
    ordinary = np.median(np.asarray(taken)[1:, KINDS.index("ordinary") :])
    share = {}
    mean = ordinary
    if method == "sgd":  # all its steps are alike
        mean = ordinary = np.median(taken[1:])
    else:
        share = {
            "statistics": statistics + after - 2 * ordinary,
            "refresh": refresh - statistics,
        }
        mean += share["statistics"] / MEASURED + share["refresh"] / PERIOD
    in_ms = lambda x: None if x is None else 1e3 * float(x)
    return Point(
        series=series,
        size=size,
        method=method,
        mean_step_ms=in_ms(mean),
        step_ms=in_ms(ordinary),
        statistics_ms=in_ms(share.get("statistics")),
        refresh_ms=in_ms(share.get("refresh")),
        state_mib=program.state_bytes / 2**20,
        peak_mib=program.peak_bytes / 2**20,
        compile_s=program.seconds,
        loss=loss,
    )


def grow(
    series: str, args: argparse.Namespace, console: Console
) -> tuple[list[Point], list[Skipped]]:
    """The points of a series, smallest first, and what was left out."""
    points: list[Point] = []
    skipped: list[Skipped] = []
    took: dict[str, list[float]] = {method: [] for method in args.methods}
    for size in args.widths if series == "width" else args.depths:
        model = SERIES[series](size)
        random = np.random.default_rng(0)
        shape = (2, args.batch_size, model.width)
        batch = tuple(jnp.asarray(random.normal(size=shape), jnp.float32))
        expected = {method: forecast(took[method]) for method in args.methods}
        late = [method for method in args.methods if expected[method] > args.limit_seconds]
        for method in late:
            took[method].append(float("inf"))  # and so are all larger ones
            skipped.append(Skipped(series, size, method, expected[method]))
            console.print(f"skipped: {skipped[-1].told()}", soft_wrap=True)
        programs = {m: compile_step(m, model, batch) for m in args.methods if m not in late}
        seconds, losses = measure(programs, batch, args.rounds)
        for method, program in programs.items():
            took[method].append(program.seconds + float(np.sum(seconds[method])))
            points.append(
                make_point(series, size, method, program, seconds[method], losses[method])
            )
        console.print(f"{series} {size}: {', '.join(programs) or 'nothing'}", soft_wrap=True)
    return points, skipped


def forecast(took: Sequence[float]) -> float:
    """Seconds of the next point if it grows as the last did; nothing where none can be told."""
    if len(took) < 2:
        return 0.0
    return took[-1] * max(took[-1] / took[-2], 1) if np.isfinite(took[-1]) else took[-1]


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parse_arguments(argv)
    console = Console(width=max(Console().width, 112))  # the tables' own
    points, skipped = [], []
    for method in args.methods:  # what only a first compilation costs is paid, and thrown away
        compile_step(method, MLP(2, 1, scanned=False), (jnp.ones((1, 2)), jnp.ones((1, 2))))
    for series in args.series:
        more, left_out = grow(series, args, console)
        points += more
        skipped += left_out
        console.print(growth_report.table(more, series))
    slopes = growth_report.exponents(points)
    console.print(growth_report.exponent_table(slopes))
    figure, numbers = (args.output.with_name(args.output.name + s) for s in (".png", ".json"))
    figure.parent.mkdir(parents=True, exist_ok=True)
    title = f"an MLP of square layers, batch {args.batch_size}"
    growth_report.plot(points, title, figure)
    settings = {
        "command": shlex.join(["python", "benchmarks/speed/growth.py", *argv]),
        "batch_size": args.batch_size,
        "rounds": args.rounds,
        "limit_seconds": args.limit_seconds,
        "depth_of_widths": DEPTH,
        "width_of_depths": WIDTH,
        "exponents": [slope._asdict() for slope in slopes],
        "skipped": [each._asdict() for each in skipped],
    }
    report.write_json(numbers, settings, [], points)
    report.tell_files(console, numbers, figure)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--widths", type=positive, nargs="+", default=list(WIDTHS), metavar="N")
    add("--depths", type=positive, nargs="+", default=list(DEPTHS), metavar="N")
    add("--series", nargs="+", choices=SERIES, default=list(SERIES))
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add("--batch-size", type=positive, default=512, metavar="B")
    add("--rounds", type=positive, default=3, metavar="N", help="after one that is thrown away")
    add("--limit-seconds", type=float, default=300, metavar="S",
        help="what a method may take at one size, compiling and all rounds")  # fmt: skip
    add("--output", type=Path, default=Path("growth"), metavar="PREFIX")
    args = parser.parse_args(argv)
    args.widths, args.depths = sorted(args.widths), sorted(args.depths)
    return args


if __name__ == "__main__":
    main()
