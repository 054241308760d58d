"""What ``no_tuning.py`` leaves behind: tables, a picture and a JSON file."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lib import report
from lib.tasks import Task
from rich import box
from rich.console import Console
from rich.table import Table

UNTUNED = ("kfac", "ekfac")
# The losses that are compared, and which of a rival's is the target. An overfitting rival passes
# its last validation loss early, on the way down: there it is the lowest.
TARGETS: dict[str, Callable[[Sequence[float]], float]] = {
    "loss": lambda losses: losses[-1],
    "validation": min,
}


class Found(NamedTuple):
    """What a task showed."""

    task: Task
    runs: list[report.Run]
    search: dict[str, dict[str, float]]  # the loss of every rate that was tried

    @property
    def reference(self) -> str:
        """The searched optimizer whose final losses are lowest on average."""

        def mean(name: str) -> float:
            losses = [run.loss[-1] for run in self.of(name)]
            return math.inf if not all(map(math.isfinite, losses)) else sum(losses) / len(losses)

        return min(self.search, key=mean)

    def of(self, name: str) -> list[report.Run]:
        return [run for run in self.runs if run.optimizer == name]

    @property
    def summary(self) -> list[report.Summary]:
        return report.summarize(self.runs, self.reference)

    @property
    def rows(self) -> dict[str, report.Summary]:
        return {row.optimizer: row for row in self.summary}

    def against(self, rival: str) -> dict[str, float | None]:
        """K-FAC's seconds to each target of a rival over the rival's own; None: it never is there.

        NaN where the rival diverged, or never was better than before its first step.
        """

        def ratio(curve: str) -> float | None:
            targets = {run.seed: TARGETS[curve](getattr(run, curve)) for run in self.of(rival)}
            own, base = (
                report.mean_to(self.of(name), targets, "seconds", curve) for name in ("kfac", rival)
            )
            if not base:
                return math.nan
            return None if own is None else own / base

        return {curve: ratio(curve) for curve in TARGETS}


def make_table(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=0, title_justify="left")
    for headers, justify in ((left, "left"), (right, "right")):
        for header in headers:
            table.add_column(header, justify=justify, no_wrap=True)
    return table


LOSSES = ("training\nloss", "validation\nloss", "its\nlowest", "error")


def losses_of(row: report.Summary) -> list[str]:
    """The cells of LOSSES."""
    held_out = (row.validation_loss, row.lowest_validation)
    error = "" if row.validation_error is None else f"{row.validation_error:.2%}"
    return [told(row.loss_after_steps), *map(told, held_out), error]


def told(loss: float | None) -> str:
    return "diverged" if loss is None else f"{loss:.4g}"


def table_of(name: str, found: Found) -> Table:
    """One task: everyone."""
    base = found.rows[found.reference]
    title = (
        f"{name}: nats per {found.task.unit} after {found.task.steps} steps; "
        f"the target is {base.optimizer}'s training loss"
    )
    right = ("rate", "ms a\nstep", *LOSSES, "steps to\ntarget", "seconds to\ntarget")
    table = make_table(title, ["optimizer"], right)
    for row in found.summary:
        table.add_row(
            row.optimizer,
            f"{row.learning_rate:g}",
            f"{row.milliseconds:.0f}" if row.milliseconds > 99 else f"{row.milliseconds:.3g}",
            *losses_of(row),
            report.share(row.steps_to_target, base.steps_to_target, ".0f"),
            report.share(row.seconds_to_target, base.seconds_to_target, ".3g"),
        )
    return table


def overview(found: dict[str, Found]) -> Table:
    """Everyone's losses task by task, and how K-FAC stands to each rival in seconds."""
    title = "K-FAC's seconds to each rival's losses over the rival's own; *: the reference"
    right = (*LOSSES, "to its\ntraining\nloss", "to its\nlowest\nvalidation")
    table = make_table(title, ["optimizer"], right)
    for task, one in found.items():
        table.add_row(task)
        for row in one.summary:
            name, star = row.optimizer, " *" if row.optimizer == one.reference else ""
            ratios = one.against(name).values() if name in one.search else ()
            cells = ("never" if x is None else "" if math.isnan(x) else f"{x:.2f}" for x in ratios)
            table.add_row(f"  {name} {row.learning_rate:g}{star}", *losses_of(row), *cells)
    return table


def ahead(found: dict[str, Found]) -> dict[str, list[str]]:
    """The tasks on which each untuned method has the reference's final loss sooner, in seconds."""

    def sooner(name: str, one: Found) -> bool:
        own, base = (one.rows[n].seconds_to_target for n in (name, one.reference))
        return own is not None and base is not None and own < base

    return {name: [task for task in found if sooner(name, found[task])] for name in UNTUNED}


def plot(found: dict[str, Found], path: Path) -> None:
    """Training and validation losses against seconds, a row of panels for each task."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8 * len(found)), layout="constrained")
    grid = figure.subplots(len(found), 2, squeeze=False)
    for (name, one), panels in zip(found.items(), grid, strict=True):
        parts = zip(panels, ("training", "validation"), TARGETS, one.task.floors, strict=True)
        for axes, part, curve, floor in parts:
            runs = [run._replace(loss=getattr(run, curve)) for run in one.runs]
            report.draw(axes, runs, "seconds", floor, one.reference)
            above = " minus entropy" if floor else ""
            label = f"{part} loss{above}\n(nats per {one.task.unit})"
            axes.set(title=name, xlabel=report.LABELS["seconds"], xlim=(0, None), yscale="log")
            axes.set_ylabel(label)
            axes.grid(which="both", color="0.9")
        panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)


def numbers_of(found: Found) -> dict[str, Any]:
    """A task for the JSON file."""
    return {
        **{key: getattr(found.task, key) for key in ("steps", "batch_size", "unit", "floors")},
        "reference": found.reference,
        "search": found.search,
        "against": {rival: found.against(rival) for rival in found.search},
        "summary": [row._asdict() for row in found.summary],
        "runs": [run._asdict() for run in found.runs],
    }


def finish(
    found: dict[str, Found], settings: dict[str, Any], prefix: Path, console: Console
) -> None:
    """Prints the overview, draws the picture, writes the numbers."""
    console.print(overview(found))
    for name, won in ahead(found).items():
        text = f"{name} is ahead in seconds on {len(won)} of {len(found)}"
        console.print(f"{text}: {', '.join(won)}" if won else text, soft_wrap=True)
    figure, numbers = (prefix.with_name(prefix.name + s) for s in (".png", ".json"))
    figure.parent.mkdir(parents=True, exist_ok=True)
    plot(found, figure)
    tasks = {name: numbers_of(one) for name, one in found.items()}
    report.write_json(
        numbers, {**settings, "ahead_in_seconds": ahead(found), "tasks": tasks}, [], []
    )
    report.tell_files(console, figure, numbers)
