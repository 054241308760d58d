"""Trains a deep autoencoder with several optimizers and shows who is where, and when.

    python benchmarks/races/race.py                                   # scikit-learn's digits
    python benchmarks/races/race.py --data mnist --data-dir DIR

All start from the same parameters and see the same minibatches. The loss that is compared is the
training loss on a fixed part of the training set, evaluated at the same steps for all. Seconds
are those of training alone: compiling is told apart, evaluating is not counted. Besides the
table, PREFIX.png has loss against steps and against seconds, and PREFIX.json every number.
"""

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

sys.path.insert(0, str(Path(__file__).parents[1]))  # for lib and the other folders
from lib import data, report
from lib.arguments import integers, positive
from lib.autoencoder import ENCODERS, Problem, entropy, make_problem
from lib.optimizers import LEARNING_RATES, OPTIMIZERS
from lib.training import SCALES, compile_step, evaluated_images, minibatches, train


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parse_arguments(argv)
    problem = make_problem(data.load_or_exit(args.data, args.data_dir))
    if not 0 < args.batch_size <= len(problem.images):
        wanted = f"1 to {len(problem.images)}, the images there are"
        print(f"--batch-size: expected {wanted}, found {args.batch_size}", file=sys.stderr)
        raise SystemExit(2)
    console = Console()
    runs = race(problem, args, console)
    floor = entropy(evaluated_images(problem))
    finish(runs, floor, args, shlex.join(["python", "benchmarks/races/race.py", *argv]), console)


def race(problem: Problem, args: argparse.Namespace, console: Console) -> list[report.Run]:
    """Every optimizer with every seed, one after the other: no two share the processor."""
    runs = []
    images = jnp.asarray(problem.images)
    evaluated = jnp.asarray(evaluated_images(problem))
    evaluate_on = jax.jit(lambda params, images: problem.loss_fn(params, images).value)
    evaluate = partial(evaluate_on, images=evaluated)  # an argument: no constant in the program
    with progress_bars(console, args.quiet) as bars:
        for name in args.optimizers:
            bar = bars.add_task(name, total=args.steps * len(args.seeds), status="compiling")
            bars.refresh()
            compiled = compile_step(
                problem, images, OPTIMIZERS[name], args.rates[name], args.batch_size
            )
            for position, seed in enumerate(args.seeds):
                show = shower(bars, bar, position * args.steps)
                order = minibatches(len(images), args.batch_size, args.steps, seed)
                curve = train(compiled, problem.init(seed), images, order, seed, evaluate, show)
                runs.append(report.Run(name, seed, args.rates[name], compiled.seconds, *curve))
    return runs


def progress_bars(console: Console, quiet: bool) -> Progress:
    """Redrawn between timings only (no thread of its own), to leave the clock alone."""
    columns = (
        TextColumn("{task.description:>6}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("{task.fields[status]}"),
    )
    return Progress(*columns, console=console, auto_refresh=False, disable=quiet)


def shower(bars: Progress, bar: TaskID, done: int) -> Callable[[int, float, float], None]:
    """What a run calls to move its bar; ``done`` steps belong to the seeds before."""

    def show(step: int, seconds: float, loss: float) -> None:
        rate = f"{step / seconds:8.1f} steps/s" if step else ""
        bars.update(bar, completed=done + step, status=f"loss {loss:8.3f} {rate}")
        bars.refresh()

    return show


def finish(
    runs: list[report.Run], floor: float, args: argparse.Namespace, command: str, console: Console
) -> None:
    """Prints the table, draws the picture, writes the numbers."""
    reference = "adam" if "adam" in args.optimizers else args.optimizers[-1]
    rows = report.summarize(runs, reference)
    title = f"{args.data}: training loss of a deep autoencoder, nats per image"
    seconds = report.equal_seconds(runs)
    console.print(report.make_table(rows, title, args.steps, seconds, reference))
    figure, numbers = (args.output.with_name(args.output.name + s) for s in (".png", ".json"))
    figure.parent.mkdir(parents=True, exist_ok=True)
    report.plot(runs, title, floor, reference, figure)
    settings = {
        "command": command,
        "data": args.data,
        "encoder": ENCODERS[args.data],
        "steps": args.steps,
        "batch_size": args.batch_size,
        "seeds": args.seeds,
        "reference": reference,
        "equal_seconds": seconds,
        "entropy": floor,
    }
    report.write_json(numbers, settings, runs, rows)
    report.tell_files(console, figure, numbers)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", choices=data.DATASETS, default="digits")
    add("--data-dir", metavar="DIR", help="where the files of the data set are")
    add("--steps", type=positive, metavar="N")
    add("--batch-size", type=positive, metavar="B")
    add("--seed", "--seeds", dest="seeds", type=integers, default=[0], metavar="S[,S…]")
    add("--optimizers", type=names, default=["kfac", "sgd", "adam"], metavar="NAME[,NAME…]",
        help=f"of {', '.join(OPTIMIZERS)}")  # fmt: skip
    add("--lr", "--learning-rates", dest="rates", type=name_and_rate, nargs="+", default=[],
        action="extend", metavar="NAME=RATE", help="instead of the tuned default")  # fmt: skip
    add("--output", type=Path, metavar="PREFIX", help="default: race-DATA")
    add("--quiet", action="store_true", help="no progress bars")
    args = parser.parse_args(argv)
    args.rates = LEARNING_RATES[args.data] | dict(args.rates)
    args.steps = args.steps or SCALES[args.data].steps
    args.batch_size = args.batch_size or SCALES[args.data].batch_size
    args.output = args.output or Path(f"race-{args.data}")
    return args


def names(text: str) -> list[str]:
    return [known_name(part) for part in text.split(",")]


def name_and_rate(text: str) -> tuple[str, float]:
    name, _, rate = text.partition("=")
    return known_name(name), float(rate)


def known_name(name: str) -> str:
    if name not in OPTIMIZERS:
        found = f"expected one of {', '.join(OPTIMIZERS)}, found {name!r}"
        raise argparse.ArgumentTypeError(found)
    return name


if __name__ == "__main__":
    main()
