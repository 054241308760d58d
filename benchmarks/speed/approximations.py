"""Memory, refresh and step time of the approximations for convolutions, as ratios in one run.

    python benchmarks/speed/approximations.py                         # VGG11, batches of 100
    python benchmarks/speed/approximations.py --methods kfac-kfc kfac-sua --width 4

VGG11 with batch normalization at the setting of Laurent et al. 2018 (batch 100, momentum 0.9,
inverses every 50 steps, groups of 32), on random images of CIFAR-10's shape, by K-FAC and EKFAC
with KFC, SUA, groups and both. Timed apart, after compiling: an ordinary step, a step with
statistics, and a refresh alone, which is the program that makes new bases of the factors; the
same refresh for one layer, C channels to C by 3×3. The mean step is computed from them:
step + (statistics step − step) / 10 + refresh / 50. All methods take turns, so that a machine
whose speed drifts slows all of them. A number is the median over the rounds after a first one
that is thrown away; one run that takes all of --seconds is not repeated, and marked with a star.
Writes PREFIX.json and PREFIX.png.

On a busy CPU the threads of LAPACK wait for one another, and refreshes take many times as long:
OPENBLAS_NUM_THREADS=1 is then faster. The file tells how that was set.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

import natgrad_jax as ng

sys.path.insert(0, str(Path(__file__).parents[1]))  # for lib and the other folders
from lib.arguments import positive
from lib.runners import (
    DAMPING,
    DUE,
    METHODS,
    MOMENTUM,
    REFRESH_PERIOD,
    STATISTICS_PERIOD,
    Runner,
    first_order,
    second_order,
)
from lib.vgg import VGG11, OneConvolution, make_problem, widths
from speed import approximations_report
from speed.approximations_report import Measured

LAYER_IMAGE = 8  # pixels a side of the one layer's images: more positions than a patch has inputs


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parse_arguments(argv)
    console = Console()
    with progress_bar(console, args.quiet) as bar:
        runners = compile_all(args, bar)
        timings = measure(runners, args.rounds, args.seconds, bar)
    settings = {
        "command": shlex.join(["python", "benchmarks/speed/approximations.py", *argv]),
        "batch": args.batch,
        "image_size": args.image_size,
        "widths": widths(args.width),
        "channels": args.channels,
        "group_size": args.group_size,
        "rounds": args.rounds,
        "seconds": args.seconds,
        "statistics_period": STATISTICS_PERIOD,
        "refresh_period": REFRESH_PERIOD,
        "momentum": MOMENTUM,
        "damping": DAMPING,
    }
    measured = [of_runner(runner, timings) for runner in runners if "step" in runner.kinds]
    approximations_report.finish(measured, settings, args.output, console)


def compile_all(args: argparse.Namespace, bar: Progress) -> list[Runner]:
    """SGD and the methods on the network, then the methods on the one layer."""
    shape = (args.batch, args.image_size, args.image_size, 3)
    network = make_problem(VGG11(args.width), shape)
    shape = (args.batch, LAYER_IMAGE, LAYER_IMAGE, args.channels)
    layer = make_problem(OneConvolution(args.channels), shape, args.channels)
    of_network = tuple(kind for kind in DUE if kind != "layer_refresh")
    task = bar.add_task("compiling", total=2 * len(args.methods), status="sgd")
    bar.refresh()
    runners = [first_order(network)]
    for problem, kinds in ((network, of_network), (layer, ("layer_refresh",))):
        for name in args.methods:
            bar.update(task, status=name)
            bar.refresh()
            runners.append(second_order(problem, name, kinds, args.group_size))
            bar.advance(task)
    bar.update(task, status="")
    return runners


def measure(
    runners: Sequence[Runner], rounds: int, seconds: float, bar: Progress
) -> dict[tuple[str, str], list[float]]:
    """Seconds of each run by method and kind: all in turn, ``rounds`` times after a first one."""
    timings: dict[tuple[str, str], list[float]] = {}
    jobs = [(runner, kind) for runner in runners for kind in runner.kinds]
    task = bar.add_task("measuring", total=len(jobs) * (rounds + 1), status="")
    for turn in range(rounds + 1):
        for runner, kind in jobs:
            taken = timings.setdefault((runner.name, kind), [])
            if not taken or sum(taken) < seconds:
                bar.update(task, status=f"{runner.name} {kind.replace('_', ' ')}")
                bar.refresh()
                taken.append(runner.seconds(kind, jax.random.key(turn)))
            bar.advance(task)
    bar.update(task, status="")
    return timings


def of_runner(runner: Runner, timings: dict[tuple[str, str], list[float]]) -> Measured:
    """A method's seconds, sizes and loss."""
    _, opt_state, _ = runner.carry
    is_method = runner.refresh is not None
    return Measured(
        name=runner.name,
        factor_bytes=size_of(ng.factors(opt_state)) if is_method else None,
        state_bytes=size_of(opt_state),
        seconds={kind: taken for (name, kind), taken in timings.items() if name == runner.name},
        compile_s=runner.compile_s,
        loss=runner.losses[-1],
    )


def size_of(tree: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def progress_bar(console: Console, quiet: bool) -> Progress:
    """Redrawn between timings only (no thread of its own), to leave the clock alone."""
    columns = (
        TextColumn("{task.description:>9}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[status]}"),
    )
    return Progress(*columns, console=console, auto_refresh=False, disable=quiet)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME",
        help=f"of {', '.join(METHODS)}; SGD with momentum always runs too")  # fmt: skip
    add("--batch", type=positive, default=100, metavar="B")
    add("--image-size", type=positive, default=32, metavar="PIXELS", help="a side")
    add("--width", type=positive, default=1, metavar="N",
        help="divides the channels of VGG11")  # fmt: skip
    add("--channels", type=positive, default=512, metavar="C", help="of the one layer")
    add("--group-size", type=positive, default=32, metavar="N", help="channels in a group")
    add("--rounds", type=positive, default=5, metavar="N")
    add("--seconds", type=float, default=60, metavar="S",
        help="what has run so long in all is not repeated")  # fmt: skip
    add("--output", type=Path, default=Path("approximations"), metavar="PREFIX")
    add("--quiet", action="store_true", help="no progress bars")
    args = parser.parse_args(argv)
    narrowest = min(widths())
    if args.width > narrowest:
        parser.error(
            f"argument --width: divides the channels, and the first layer has {narrowest} of them: "
            f"expected 1 to {narrowest}, found {args.width}"
        )
    return args


if __name__ == "__main__":
    main()
