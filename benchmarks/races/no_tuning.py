"""K-FAC and EKFAC at their untuned defaults against other optimizers at the best of a grid.

    python benchmarks/races/no_tuning.py --data-dir DIR --seeds 0,1,2  # the six of lib/tasks.py
    python benchmarks/races/no_tuning.py --tasks digits-ae,characters,tabular  # nothing to download
    python benchmarks/races/no_tuning.py --tasks tabular --optimizers adam,shampoo
    python benchmarks/races/no_tuning.py --tasks characters-gpt2  # on an accelerator: lib/large.py

Each searched optimizer takes the rate of its grid (``lib/rivals.py``) with the lowest training loss
after a short search with the first seed; all else is its default. By default these are Adam, SGD
with momentum, Muon and our SOAP, and where they can be imported two found elsewhere: ``psgd-kron``,
PSGD with Kronecker factors (the package psgdax), and ``soap-port``, SOAP as in
github.com/haydn-jones/SOAP_JAX, which at 2c0c34f forgets the second moments between refreshes. To
have these without changing an environment::

    pip install --no-deps --target PEERS psgdax git+https://github.com/haydn-jones/SOAP_JAX
    PYTHONPATH=PEERS python benchmarks/races/no_tuning.py …

K-FAC and EKFAC take one learning rate on every task, that of the library's README, and their
defaults (``--trust-radius`` changes one). Then all train from the same parameters on the same
minibatches, in turn between two evaluations, so that a machine whose speed drifts slows all of
them. What is compared is the loss on a fixed part of the training set and that on a fixed part of
what is held out of it, and at the end a classifier's error on all that is held out. The reference
is the searched optimizer whose training loss ends lowest on average. K-FAC's seconds are also told
to the final training loss and to the lowest validation loss of each. Seconds are those of training
alone: neither compiling nor evaluating is counted. Writes PREFIX.png and PREFIX.json.
"""

import argparse
import math
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import natgrad_jax as ng

sys.path.insert(0, str(Path(__file__).parents[1]))  # for lib and the other folders
from lib import report, training
from lib.arguments import integers, positive
from lib.large import LARGE_TASKS
from lib.optimizers import OPTIMIZERS, first_order, natural
from lib.rivals import INSIDE, OUTSIDE, Searched, injected, outside, searched
from lib.tasks import TASKS, Task
from races.no_tuning_report import UNTUNED, Found, finish, table_of

RATE = 0.1  # theirs, of the library's README
EVALUATIONS = 50
EVALUATED_BATCHES = 4


def untuned(name: str, trust_radius: float | None) -> Callable[..., Any]:
    if trust_radius is None:
        return OPTIMIZERS[name]
    return natural(partial(getattr(ng, name), trust_radius=trust_radius))


class Field(NamedTuple):
    """A task made ready: the examples on the device, the evaluations, the minibatches."""

    task: Task
    examples: Any
    evaluate: Callable[[Any], jax.Array]
    validate: Callable[[Any], jax.Array]
    error: Callable[[Any], float | None]

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
            compiled, params, self.examples, order, seed, self.evaluate,
            evaluations=evaluations, validate=self.validate,
        )  # fmt: skip

    def race(
        self,
        rates: dict[str, float],
        compiled: dict[str, training.Compiled],
        seeds: Sequence[int],
        evaluations: int = EVALUATIONS,
    ) -> list[report.Run]:
        """Everyone in turn, seed by seed."""
        runs = []
        for seed in seeds:
            running = {
                name: self.run(one, self.task.steps, seed, evaluations)
                for name, one in compiled.items()
            }
            for name, curve in in_turn(running).items():
                setup, error = compiled[name].seconds, self.error(curve.params)
                runs.append(report.Run(name, seed, rates[name], setup, *curve[:4], error))
        return runs


def count(examples: Any) -> int:
    return len(jax.tree.leaves(examples)[0])


def make_field(task: Task) -> Field:
    examples, held_out = (jax.tree.map(jnp.asarray, x) for x in (task.examples, task.validation))
    size = EVALUATED_BATCHES * task.batch_size
    part = lambda x: training.rows(x, slice(None, None, -(-count(x) // size)))
    loss = jax.jit(lambda params, batch: task.problem.loss_fn(params, batch).value)
    wrong = task.wrong and jax.jit(task.wrong)

    def error(params: Any) -> float | None:
        if wrong is None:
            return None
        parts = (slice(at, at + size) for at in range(0, count(held_out), size))
        found = [wrong(params, training.rows(held_out, x)) for x in parts]
        return float(np.mean(np.concatenate(found)))

    evaluate, validate = (partial(loss, batch=part(x)) for x in (examples, held_out))
    return Field(task, examples, evaluate, validate, error)


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
        *_, curve = field.run(compiled[rate], steps, args.seeds[0], 1)
        losses[rate] = curve.loss[-1] if math.isfinite(curve.loss[-1]) else math.inf
    best = min(losses, key=losses.__getitem__)
    return best, compiled[best], {f"{rate:g}": loss for rate, loss in losses.items()}


def compete(field: Field, args: argparse.Namespace, say: Callable[[str], None]) -> Found:
    """The search, then everyone in turn."""
    rates, compiled, tried = {}, {}, {}
    for name in UNTUNED:
        rates[name], compiled[name] = RATE, field.compile(untuned(name, args.trust_radius), RATE)
        say(f"  {name} compiled in {compiled[name].seconds:.1f} s")
    for name in args.optimizers:
        grid = searched(field.task)[name]
        rates[name], compiled[name], tried[name] = search(field, grid, args)
        edge = ", at the edge" if rates[name] in (grid.rates[0], grid.rates[-1]) else ""
        told = ", ".join(f"{rate}: {loss:.4g}" for rate, loss in tried[name].items())
        say(f"  {name} takes {rates[name]:g}{edge} (losses after the search: {told})")
    return Found(field.task, field.race(rates, compiled, args.seeds), tried)


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
    absent = [name for name in OUTSIDE if name not in outside()]
    if absent:
        say(f"cannot be imported: {', '.join(absent)}")
    found = {}
    for name in args.tasks:
        task = (TASKS | LARGE_TASKS)[name](args.data_dir)
        task = task._replace(steps=args.steps or task.steps)
        say(f"{name}: {task.steps} steps of {task.batch_size}")
        found[name] = compete(make_field(task), args, say)
        console.print(table_of(name, found[name]))
    settings = {
        "command": shlex.join(["python", "benchmarks/races/no_tuning.py", *argv]),
        "untuned_rate": RATE,
        "trust_radius": args.trust_radius,
        "search": args.search,
        "seeds": args.seeds,
        "absent": absent,
    }
    finish(found, settings, args.output, console)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--tasks", type=names_of(TASKS | LARGE_TASKS), default=list(TASKS), metavar="NAME[,NAME…]",
        help=f"of {', '.join(TASKS | LARGE_TASKS)}")  # fmt: skip
    add("--optimizers", type=names_of((*INSIDE, *outside())), default=[*INSIDE[:4], *outside()],
        metavar="NAME[,NAME…]", help=f"searched, of {', '.join((*INSIDE, *OUTSIDE))}")  # fmt: skip
    add("--trust-radius", type=float, metavar="X", help="of K-FAC and EKFAC, not their default")
    add("--data-dir", metavar="DIR", help="where the files of MNIST and CIFAR-10 are")
    add("--steps", type=positive, metavar="N", help="instead of each task's own")
    add("--search", type=fraction, default=0.25, metavar="F",
        help="of the steps, for each rate of a grid (default: 0.25)")  # fmt: skip
    add("--seed", "--seeds", dest="seeds", type=integers, default=[0], metavar="S[,S…]")
    add("--output", type=Path, default=Path("no-tuning"), metavar="PREFIX")
    return parser.parse_args(argv)


def names_of(known: Iterable[str]) -> Callable[[str], list[str]]:
    def names(text: str) -> list[str]:
        for name in text.split(","):
            if name not in known:
                wanted = f"expected one of {', '.join(known)}, found {name!r}"
                raise argparse.ArgumentTypeError(wanted)
        return text.split(",")

    return names


def fraction(text: str) -> float:
    if not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"expected more than 0 and at most 1, found {text}")
    return float(text)


if __name__ == "__main__":
    main()
