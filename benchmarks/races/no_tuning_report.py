"""What ``no_tuning.py`` leaves behind: a table, a picture and a JSON file."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lib import report
from lib.tasks import Task
from rich import box
from rich.console import Console
from rich.table import Table

UNTUNED = ("kfac", "ekfac")


class Found(NamedTuple):
    """What a task showed."""

    task: Task
    runs: list[report.Run]
    search: dict[str, dict[str, float]]  # the loss of every rate that was tried

    @property
    def reference(self) -> str:
        """The searched optimizer whose final losses are lowest on average."""

        def mean(name: str) -> float:
            losses = [run.loss[-1] for run in self.runs if run.optimizer == name]
            return math.inf if not all(map(math.isfinite, losses)) else sum(losses) / len(losses)

        return min(self.search, key=mean)

    @property
    def summary(self) -> list[report.Summary]:
        return report.summarize(self.runs, self.reference)

    @property
    def rows(self) -> dict[str, report.Summary]:
        return {row.optimizer: row for row in self.summary}


def table_of(name: str, found: Found) -> Table:
    """One task: everyone."""
    title = f"{name}: training loss, nats per {found.task.unit}"
    seconds = report.equal_seconds(found.runs)
    steps = found.task.steps
    return report.make_table(found.summary, title, steps, seconds, found.reference)


def overview(found: dict[str, Found]) -> Table:
    """How each untuned method stands to the best of the others, task by task."""
    title = "untuned against the best of the others: steps and seconds to its final loss"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=0, title_justify="left")
    for header in ("task", "optimizer"):
        table.add_column(header, no_wrap=True)
    for header in ("loss", "best of the\nothers", "its loss", "steps", "seconds"):
        table.add_column(header, justify="right", no_wrap=True)
    for task, one in found.items():
        base = one.rows[one.reference]
        for name in UNTUNED:
            row = one.rows[name]
            table.add_row(
                task if name == UNTUNED[0] else "",
                name,
                "diverged" if row.loss_after_steps is None else f"{row.loss_after_steps:.4g}",
                f"{base.optimizer} {base.learning_rate:g}",
                f"{base.loss_after_steps:.4g}",
                report.share(row.steps_to_target, base.steps_to_target, ".0f"),
                report.share(row.seconds_to_target, base.seconds_to_target, ".3g"),
            )
    return table


def ahead(found: dict[str, Found]) -> dict[str, list[str]]:
    """The tasks on which each untuned method has the reference's final loss sooner, in seconds."""

    def sooner(name: str, one: Found) -> bool:
        own, base = (one.rows[n].seconds_to_target for n in (name, one.reference))
        return own is not None and base is not None and own < base

    return {name: [task for task in found if sooner(name, found[task])] for name in UNTUNED}


def plot(found: dict[str, Found], along: Sequence[str], path: Path) -> None:
    """A panel for each task, and for each of ``steps`` and ``seconds`` that is asked for."""
    from matplotlib.figure import Figure

    columns = 2 if len(along) == 2 else min(3, len(found))
    panels = [(task, what) for task in found for what in along]
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5 * columns, 3.8 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flat
    for axes, (name, what) in zip(grid, panels, strict=False):
        task, one = found[name].task, found[name]
        report.draw(axes, one.runs, what, task.floor, one.reference)
        above = " minus entropy" if task.floor else ""
        label = f"training loss{above}\n(nats per {task.unit})"
        axes.set(title=name, xlabel=report.LABELS[what], xlim=(0, None), yscale="log", ylabel=label)
        axes.grid(which="both", color="0.9")
        axes.legend(fontsize=8)
    for axes in list(figure.axes)[len(panels) :]:
        axes.remove()
    figure.savefig(path, dpi=120)


def finish(
    found: dict[str, Found],
    along: Sequence[str],
    settings: dict[str, Any],
    prefix: Path,
    console: Console,
) -> None:
    """Prints the overview, draws the picture, writes the numbers."""
    console.print(overview(found))
    for name, won in ahead(found).items():
        text = f"{name} is ahead in seconds on {len(won)} of {len(found)}"
        console.print(f"{text}: {', '.join(won)}" if won else text, soft_wrap=True)
    figure, numbers = (prefix.with_name(prefix.name + s) for s in (".png", ".json"))
    figure.parent.mkdir(parents=True, exist_ok=True)
    plot(found, along, figure)
    tasks = {
        name: {
            "steps": one.task.steps,
            "batch_size": one.task.batch_size,
            "unit": one.task.unit,
            "floor": one.task.floor,
            "reference": one.reference,
            "search": one.search,
            "summary": [row._asdict() for row in one.summary],
            "runs": [run._asdict() for run in one.runs],
        }
        for name, one in found.items()
    }
    settings = {**settings, "ahead_in_seconds": ahead(found), "tasks": tasks}
    report.write_json(numbers, settings, [], [])
    report.tell_files(console, figure, numbers)
