"""What a cap on the factors' size costs: final losses of K-FAC, beside those without one.

    python benchmarks/races/capped.py                       # the task "characters", three seeds
    python benchmarks/races/capped.py --sizes 128 --seeds 0

``ng.kfac(0.1, layers)`` at its defaults, for the steps of a task of ``benchmarks/lib/tasks.py``,
with ``ng.Approximation(max_size=N)``, which keeps the diagonal alone of factors of more rows, and
with ``group_size=N``, which keeps blocks of N rows of every factor. The loss is that on a fixed
part of the training set, as in ``no_tuning.py``; of one seed all begin at the same parameters and
see the same minibatches. Writes PREFIX.json.

In ``characters`` factors have 64 and 65 rows (with the bias), 128 (the head's outputs), and 256 and
257 (between a block's two dense layers).
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

import natgrad_jax as ng

sys.path.insert(0, str(Path(__file__).parents[1]))  # for lib and the other folders
from lib import report
from lib.arguments import integers, positive
from lib.optimizers import natural
from lib.tasks import TASKS
from races.no_tuning import RATE, Field, make_field


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parse_arguments(argv)
    task = TASKS[args.task](args.data_dir)
    field = make_field(task._replace(steps=args.steps or task.steps))
    forms = {"no cap": ng.Approximation()}
    forms |= {f"max_size={n}": ng.Approximation(max_size=n) for n in args.sizes}
    forms |= {f"group_size={n}": ng.Approximation(group_size=n) for n in args.groups}
    runs = [run for name, form in forms.items() for run in train(field, name, form, args.seeds)]
    more = excess(runs)
    console = Console()
    console.print(make_table(runs, more))
    settings = {
        "command": shlex.join(["python", "benchmarks/races/capped.py", *argv]),
        "task": args.task,
        "excess_of_final_loss": more,
    }
    path = args.output.with_name(args.output.name + ".json")
    report.write_json(path, settings, runs, [])
    report.tell_files(console, path)


def train(
    field: Field, name: str, form: ng.Approximation, seeds: Sequence[int]
) -> list[report.Run]:
    """A run for each seed."""
    compiled = field.compile(natural(partial(ng.kfac, approximation=form)), RATE)
    runs = []
    for seed in seeds:
        *_, curve = field.run(compiled, field.task.steps, seed, 1)
        runs.append(report.Run(name, seed, RATE, compiled.seconds, *curve))
    return runs


def excess(runs: Sequence[report.Run]) -> dict[str, list[float]]:
    """By which share the final losses are above those of the same seed without a cap."""
    base = {run.seed: run.loss[-1] for run in runs if run.optimizer == runs[0].optimizer}
    names = dict.fromkeys(run.optimizer for run in runs)
    return {
        name: [run.loss[-1] / base[run.seed] - 1 for run in runs if run.optimizer == name]
        for name in names
    }


def make_table(runs: Sequence[report.Run], more: dict[str, list[float]]) -> Table:
    table = Table(title="final loss", box=None, padding=(0, 1, 0, 0))
    table.add_column("approximation")
    for name in ("mean", "more than uncapped", "of each seed"):
        table.add_column(name, justify="right")
    for name, own in more.items():
        mean = float(np.mean([run.loss[-1] for run in runs if run.optimizer == name]))
        each = " ".join(f"{x:+.1%}" for x in own)
        table.add_row(name, f"{mean:.4f}", f"{float(np.mean(own)):+.1%}", each)
    return table


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--task", choices=TASKS, default="characters")
    add("--data-dir", metavar="DIR", help="where the files of MNIST and CIFAR-10 are")
    add("--sizes", nargs="*", type=positive, default=[256, 128, 64, 60], metavar="N")
    add("--groups", nargs="*", type=positive, default=[128], metavar="N")
    add("--steps", type=positive, metavar="N", help="instead of the task's own")
    add("--seeds", type=integers, default=[0, 1, 2], metavar="S[,S…]")
    add("--output", type=Path, default=Path(__file__).parents[1] / "results/capped")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
