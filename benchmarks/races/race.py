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
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

sys.path.insert(0, str(Path(__file__).parents[1]))  # for lib and the other folders
from lib import data, report
from lib.autoencoder import ENCODERS, Problem, entropy, make_problem
from lib.optimizers import LEARNING_RATES, OPTIMIZERS

EVALUATIONS = 100  # points on a curve
EVALUATED_IMAGES = 2000

Curve = tuple[list[int], list[float], list[float]]  # steps, seconds, loss


class Scale(NamedTuple):
    """How long to train: long enough that Adam's curve has flattened."""

    steps: int
    batch_size: int


SCALES = {
    "digits": Scale(1500, 500),
    "mnist": Scale(1000, 512),
    "fashion": Scale(1000, 512),
    "cifar10": Scale(500, 512),
}


class Compiled(NamedTuple):
    """An optimizer ready to run."""

    init: Callable[[Any], Any]
    step: Callable[..., tuple[Any, Any, jax.Array]]  # params, opt_state, images, indices, i, key
    seconds: float  # what it took to get there


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


def evaluated_images(problem: Problem) -> np.ndarray:
    """At most EVALUATED_IMAGES of the training set, evenly spaced."""
    return problem.images[:: -(-len(problem.images) // EVALUATED_IMAGES)]


def compile_step(
    problem: Any, images: Any, make: Callable[..., Any], rate: float, size: int
) -> Compiled:
    """Compiles, and takes one step that is thrown away: what only a first call costs is paid.

    ``images``, or what else there is to learn from: a pytree of arrays.
    """
    start = time.perf_counter()
    params = problem.init(0)
    contender = make(rate, problem.loss_fn, params, rows(images, slice(size)))

    def step(params, opt_state, images, indices, i, key):
        return contender.step(params, opt_state, rows(images, indices), jax.random.fold_in(key, i))

    opt_state, key = contender.init(params), jax.random.key(0)
    inputs = (params, opt_state, images, jnp.arange(size, dtype=jnp.int32), jnp.int32(0), key)
    # Donated, as any real training loop does: the state is updated in place. Compiled ahead of
    # time: a state that changed its types would be an error, not a silent second compilation.
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*inputs).compile()
    jax.block_until_ready(compiled(*inputs))
    return Compiled(contender.init, compiled, time.perf_counter() - start)


def rows(tree: Any, which: Any) -> Any:
    """Some examples of a pytree of arrays."""
    return jax.tree.map(lambda x: x[which], tree)


def train(*args: Any, **kwargs: Any) -> Curve:
    """The curve of a whole run: the arguments are those of :func:`training`."""
    *_, curve = training(*args, **kwargs)
    return curve


def training(
    compiled: Compiled,
    params: Any,
    images: Any,
    order: np.ndarray,
    seed: int,
    evaluate: Callable[[Any], jax.Array],
    show: Callable[[int, float, float], None] = lambda *_: None,
    evaluations: int = EVALUATIONS,
) -> Iterator[Curve]:
    """The curve so far, at every evaluation. Stops early where the loss is no longer finite."""
    opt_state = compiled.init(params)
    key = jax.random.key(seed + 1)
    steps, seconds, losses = [0], [0.0], [float(evaluate(params))]
    every = max(1, len(order) // evaluations)
    yield steps, seconds, losses
    while steps[-1] < len(order) and np.isfinite(losses[-1]):
        show(steps[-1], seconds[-1], losses[-1])
        chunk = range(steps[-1], min(steps[-1] + every, len(order)))
        jax.block_until_ready((params, opt_state))
        start = time.perf_counter()
        for i in chunk:
            params, opt_state, _ = compiled.step(
                params, opt_state, images, jnp.asarray(order[i]), jnp.int32(i), key
            )
        jax.block_until_ready((params, opt_state))
        seconds.append(seconds[-1] + time.perf_counter() - start)
        steps.append(chunk.stop)
        losses.append(float(evaluate(params)))
        yield steps, seconds, losses
    show(steps[-1], seconds[-1], losses[-1])


def minibatches(count: int, batch_size: int, steps: int, seed: int) -> np.ndarray:
    """Indices (steps, batch_size): a fresh shuffle each epoch, the rest of an epoch dropped."""
    rng = np.random.default_rng(seed)
    each = count // batch_size
    epochs = [rng.permutation(count)[: each * batch_size] for _ in range(-(-steps // each))]
    return np.concatenate(epochs).astype(np.int32).reshape(-1, batch_size)[:steps]


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


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, found {text}")
    return int(text)


def integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


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
