"""What a cap on the factors' size costs: final losses of K-FAC, beside those without one.

    python benchmarks/races/capped.py                       # the task "characters", three seeds
    python benchmarks/races/capped.py --sizes 128 --seeds 0

``ng.kfac(0.1, layers)`` at its defaults, for the steps of a task of ``benchmarks/lib/tasks.py``,
with ``ng.Approximation(max_size=N)``, which sketches factors of more rows, and with their diagonal
alone (``beyond="diagonal"``). The loss is that on a fixed part of the training set, as in
``no_tuning.py``; of one seed all begin at the same parameters and see the same minibatches. Writes
PREFIX.json.

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
    for n in args.sizes:
        forms[f"max_size={n}"] = ng.Approximation(max_size=n)
        forms[f"max_size={n}, diagonal"] = ng.Approximation(max_size=n, beyond="diagonal")
    losses = {name: final_losses(field, form, args.seeds) for name, form in forms.items()}
    base = np.asarray(losses["no cap"])
    more = {name: (np.asarray(own) / base - 1).tolist() for name, own in losses.items()}
    console = Console()
    console.print(make_table(losses, more))
    settings = {
        "command": shlex.join(["python", "benchmarks/races/capped.py", *argv]),
        "task": args.task,
        "seeds": args.seeds,
        "final_loss": losses,
        "more_than_uncapped": more,
    }
    path = args.output.with_name(args.output.name + ".json")
    report.write_json(path, settings, [], [])
    report.tell_files(console, path)


def final_losses(field: Field, form: ng.Approximation, seeds: Sequence[int]) -> list[float]:
    """One for each seed."""
    compiled = field.compile(natural(partial(ng.kfac, approximation=form)), RATE)
    losses = []
    for seed in seeds:
        *_, curve = field.run(compiled, field.task.steps, seed, 1)
        losses.append(curve.loss[-1])
    return losses


def make_table(losses: dict[str, list[float]], more: dict[str, list[float]]) -> Table:
    table = Table(title="final loss", box=None, padding=(0, 1, 0, 0))
    table.add_column("approximation")
    for name in ("mean", "more than uncapped", "of each seed"):
        table.add_column(name, justify="right")
    for name, own in more.items():
        each = " ".join(f"{x:+.1%}" for x in own)
        mean = f"{np.mean(losses[name]):.4f}", f"{np.mean(own):+.1%}"
        table.add_row(name, *mean, each)
    return table


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--task", choices=TASKS, default="characters")
    add("--data-dir", metavar="DIR", help="where the files of MNIST and CIFAR-10 are")
    add("--sizes", nargs="*", type=positive, default=[256, 64, 60], metavar="N")
    add("--steps", type=positive, metavar="N", help="instead of the task's own")
    add("--seeds", type=integers, default=[0, 1, 2], metavar="S[,S…]")
    add("--output", type=Path, default=Path(__file__).parents[1] / "results/capped")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
