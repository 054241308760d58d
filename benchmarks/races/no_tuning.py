"""K-FAC and EKFAC at their untuned defaults against first-order methods at the best of a grid.

    python benchmarks/races/no_tuning.py --data-dir DIR              # the six tasks of lib/tasks.py
    python benchmarks/races/no_tuning.py --tasks digits-ae,characters,tabular  # nothing to download
    python benchmarks/races/no_tuning.py --rivals --data-dir DIR     # Muon, SOAP, Shampoo

Each searched optimizer (Adam and SGD with momentum; with ``--rivals`` Adam and those of Muon, SOAP
and Shampoo that optax has) takes the rate of its grid with the lowest loss after a short search.
K-FAC and EKFAC take one learning rate on every task, that of the library's README, and their
defaults. Then all train from the same parameters on the same minibatches, in turn between two
evaluations, so that a machine whose speed drifts slows all of them. The loss that is compared is
the training loss on a fixed part of the training set; the reference is the searched optimizer that
ends lowest. Seconds are those of training alone: compiling is told apart, evaluating is not
counted. Writes PREFIX.png and PREFIX.json.
"""

import argparse
import math
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))  # for lib and the other folders
from lib import report, training
from lib.arguments import integers, positive
from lib.optimizers import OPTIMIZERS, first_order
from lib.tasks import TASKS, Task
from races.no_tuning_report import UNTUNED, Found, finish, table_of

RATE = 0.1  # theirs, of the library's README
EVALUATIONS = 50
EVALUATED_BATCHES = 4
RIVALS = ("muon", "soap", "shampoo")
RIVAL_TASKS = ("mnist-ae", "characters")
ADAM = (3e-4, 1e-3, 3e-3, 1e-2)  # and SOAP and Shampoo, whose updates are as large
MUON = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)


class Searched(NamedTuple):
    """An optimizer with a rate still to be found."""

    alias: Callable[[Any], optax.GradientTransformation]
    rates: tuple[float, ...]


def in_optax(name: str) -> Callable[..., Any] | None:
    return getattr(optax, name, None) or getattr(optax.contrib, name, None)


def searched(task: Task, rivals: bool) -> dict[str, Searched]:
    """What is searched on a task."""
    adam = {"adam": Searched(optax.adam, ADAM)}
    if not rivals:
        sgd = lambda rate: optax.sgd(rate, momentum=0.9)
        return adam | {"sgd": Searched(sgd, task.sgd)}
    found = {name: in_optax(name) for name in RIVALS}
    grids = {"muon": MUON}
    return adam | {
        name: Searched(muon if name == "muon" else alias, grids.get(name, ADAM))
        for name, alias in found.items()
        if alias is not None
    }


def muon(rate: Any) -> optax.GradientTransformation:
    """Muon for all kernels, attention's as matrices; Adam for embeddings, biases and scales."""
    matrices = optax.contrib.MuonDimensionNumbers

    def of(path: Any, x: jax.Array) -> Any:
        name, layer = path[-1].key, path[-2].key
        if name != "kernel" or x.ndim > 3:
            return None
        return matrices((0, 1), 2) if layer == "out" else matrices(0, tuple(range(1, x.ndim)))

    dimensions = partial(jax.tree.map_with_path, of)
    return optax.contrib.muon(rate, muon_weight_dimension_numbers=dimensions)


class Field(NamedTuple):
    """A task made ready: the examples on the device, the evaluation, the minibatches."""

    task: Task
    examples: Any
    evaluate: Callable[[Any], jax.Array]

    def compile(self, make: Callable[..., Any], rate: float) -> training.Compiled:
        return training.compile_step(
            self.task.problem, self.examples, make, rate, self.task.batch_size
        )

    def run(
        self, compiled: training.Compiled, steps: int, seed: int, evaluations: int
    ) -> Iterator[training.Curve]:
        order = training.minibatches(count(self.examples), self.task.batch_size, steps, seed)
        params = self.task.problem.init(seed)
        return training.curves(
            compiled, params, self.examples, order, seed, self.evaluate, evaluations=evaluations
        )


def count(examples: Any) -> int:
    return len(jax.tree.leaves(examples)[0])


def make_field(task: Task) -> Field:
    examples = jax.tree.map(jnp.asarray, task.examples)
    every = -(-count(examples) // (EVALUATED_BATCHES * task.batch_size))
    evaluated = training.rows(examples, slice(None, None, every))
    loss = jax.jit(lambda params, batch: task.problem.loss_fn(params, batch).value)
    return Field(task, examples, partial(loss, batch=evaluated))


def search(
    field: Field, grid: Searched, args: argparse.Namespace
) -> tuple[float, training.Compiled, dict[str, float]]:
    """The rate of the lowest loss after a short run, its compiled step, and every loss seen."""
    make = first_order(injected(grid.alias))
    once = field.compile(make, grid.rates[0])
    steps = max(1, round(args.search * field.task.steps))
    compiled, losses = {}, {}
    for rate in grid.rates:
        start = make(rate, field.task.problem.loss_fn, None, None).init
        compiled[rate] = once._replace(init=start)
        *_, (_, _, loss) = field.run(compiled[rate], steps, args.seeds[0], 1)
        losses[rate] = loss[-1] if math.isfinite(loss[-1]) else math.inf
    best = min(losses, key=losses.__getitem__)
    return best, compiled[best], {f"{rate:g}": loss for rate, loss in losses.items()}


def injected(alias: Callable[[Any], Any]) -> Callable[[float], Any]:
    """The alias with its rate as a part of the state: one compiled step serves all rates."""
    return optax.inject_hyperparams(lambda learning_rate: alias(learning_rate))


def compete(field: Field, args: argparse.Namespace, say: Callable[[str], None]) -> Found:
    """The search, then everyone in turn."""
    rates, compiled, tried = {}, {}, {}
    for name, grid in searched(field.task, args.rivals).items():
        rates[name], compiled[name], tried[name] = search(field, grid, args)
        edge = ", at the edge" if rates[name] in (grid.rates[0], grid.rates[-1]) else ""
        told = ", ".join(f"{rate}: {loss:.4g}" for rate, loss in tried[name].items())
        say(f"  {name} takes {rates[name]:g}{edge} (losses after the search: {told})")
    for name in UNTUNED:
        rates[name], compiled[name] = RATE, field.compile(OPTIMIZERS[name], RATE)
        say(f"  {name} compiled in {compiled[name].seconds:.1f} s")
    runs = []
    for seed in args.seeds:
        running = {name: field.run(compiled[name], field.task.steps, seed, EVALUATIONS)
                   for name in (*UNTUNED, *tried)}  # fmt: skip
        for name, curve in in_turn(running).items():
            runs.append(report.Run(name, seed, rates[name], compiled[name].seconds, *curve))
    return Found(field.task, runs, tried)


def in_turn(running: dict[str, Iterator[Any]]) -> dict[str, Any]:
    """The last item of each iterator, all advanced in turn."""
    last, left = {}, dict(running)
    while left:
        for name in list(left):
            try:
                last[name] = next(left[name])
            except StopIteration:
                del left[name]
    return last


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parse_arguments(argv)
    console = Console()
    say = partial(console.print, soft_wrap=True)
    absent = [name for name in RIVALS if in_optax(name) is None] if args.rivals else []
    if absent:
        say(f"not in optax {optax.__version__}: {', '.join(absent)}")
    found = {}
    for name in args.tasks:
        task = TASKS[name](args.data_dir)
        task = task._replace(steps=args.steps or task.steps)
        say(f"{name}: {task.steps} steps of {task.batch_size}")
        found[name] = compete(make_field(task), args, say)
        console.print(table_of(name, found[name]))
    settings = {
        "command": shlex.join(["python", "benchmarks/races/no_tuning.py", *argv]),
        "untuned_rate": RATE,
        "search": args.search,
        "seeds": args.seeds,
        "not_in_optax": absent,
    }
    along = ("steps", "seconds") if args.rivals else ("seconds",)
    finish(found, along, settings, args.output, console)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--tasks", type=task_names, metavar="NAME[,NAME…]", help=f"of {', '.join(TASKS)}")
    rivals = f"against {', '.join(RIVALS)} and Adam, by default on {', '.join(RIVAL_TASKS)}"
    add("--rivals", action="store_true", help=rivals)
    add("--data-dir", metavar="DIR", help="where the files of MNIST and CIFAR-10 are")
    add("--steps", type=positive, metavar="N", help="instead of each task's own")
    add("--search", type=fraction, default=0.25, metavar="F",
        help="of the steps, for each rate of a grid (default: 0.25)")  # fmt: skip
    add("--seed", "--seeds", dest="seeds", type=integers, default=[0], metavar="S[,S…]")
    add("--output", type=Path, metavar="PREFIX", help="default: no-tuning, or rivals")
    args = parser.parse_args(argv)
    args.tasks = args.tasks or list(RIVAL_TASKS if args.rivals else TASKS)
    args.output = args.output or Path("rivals" if args.rivals else "no-tuning")
    return args


def task_names(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in TASKS:
            found = f"expected one of {', '.join(TASKS)}, found {name!r}"
            raise argparse.ArgumentTypeError(found)
    return names


def fraction(text: str) -> float:
    if not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"expected more than 0 and at most 1, found {text}")
    return float(text)


if __name__ == "__main__":
    main()
