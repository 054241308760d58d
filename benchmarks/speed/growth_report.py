"""What ``growth.py`` leaves behind: points, exponents, tables and a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from lib.report import STYLES
from rich import box
from rich.table import Table

# What is told of a point, and how it is headed
COLUMNS = {
    "mean_step_ms": "mean step\n(ms)",
    "step_ms": "ordinary\nstep (ms)",
    "statistics_ms": "statistics\n(ms)",
    "refresh_ms": "refresh\n(ms)",
    "state_mib": "state\n(MiB)",
    "peak_mib": "peak memory\n(MiB)",
    "compile_s": "compile\n(s)",
}
PANELS = ("mean_step_ms", "refresh_ms", "state_mib", "peak_mib", "compile_s")


class Point(NamedTuple):
    """One method at one size; None where it has no such number."""

    series: str  # "width", "depth" (unrolled) or "scanned" (over depths too)
    size: int
    method: str
    mean_step_ms: float
    step_ms: float
    statistics_ms: float | None
    refresh_ms: float | None
    state_mib: float
    peak_mib: float
    compile_s: float
    loss: float


class Skipped(NamedTuple):
    """A point that would have taken too long."""

    series: str
    size: int
    method: str
    expected_seconds: float

    def told(self) -> str:
        because = "a smaller one was" if np.isinf(self.expected_seconds) else "too long"
        return f"{self.method} at {self.series} {self.size}: {because}"


class Slope(NamedTuple):
    """``value ∝ size^fitted`` by least squares of the logarithms; ``last``: of the last two."""

    series: str
    method: str
    quantity: str
    fitted: float
    last: float


def exponents(points: Sequence[Point]) -> list[Slope]:
    """Of each series, method and quantity with two sizes; a difference lost in noise is none."""
    found = []
    for series, method in dict.fromkeys((p.series, p.method) for p in points):
        own = [p for p in points if (p.series, p.method) == (series, method)]
        for quantity in COLUMNS:
            pairs = [(p.size, getattr(p, quantity)) for p in own]
            known = [(size, value) for size, value in pairs if value is not None and value > 0]
            if len(known) > 1:
                fit = lambda some: float(np.polyfit(*np.log(np.array(some)).T, 1)[0])
                found.append(Slope(series, method, quantity, fit(known), fit(known[-2:])))
    return found


def table(points: Sequence[Point], series: str) -> Table:
    """Every number of a series, and the mean step and peak memory as ratios to SGD."""
    shown = Table(title=f"over {series}", box=box.SIMPLE_HEAD, padding=0, title_justify="left")
    shown.add_column(series, justify="right")
    shown.add_column("method", no_wrap=True)
    for header in (*COLUMNS.values(), "mean step\n/ SGD's", "peak\n/ SGD's"):
        shown.add_column(header, justify="right", no_wrap=True)
    base = {p.size: p for p in points if p.method == "sgd"}
    for point in points:
        sgd = base.get(point.size)
        shown.add_row(
            str(point.size),
            point.method,
            *(_three(getattr(point, name)) for name in COLUMNS),
            _three(sgd and point.mean_step_ms / sgd.mean_step_ms),
            _three(sgd and point.peak_mib / sgd.peak_mib),
        )
    return shown


def exponent_table(slopes: Sequence[Slope]) -> Table:
    """Exponents fitted to all sizes, and in parentheses those of the last two."""
    title = "exponents in width or depth: of all sizes (of the last two)"
    shown = Table(title=title, box=box.SIMPLE_HEAD, padding=0, title_justify="left")
    shown.add_column("over", no_wrap=True)
    shown.add_column("method", no_wrap=True)
    for header in COLUMNS.values():
        shown.add_column(header.split("\n(")[0], justify="right", no_wrap=True)
    cells = {(s.series, s.method, s.quantity): f"{s.fitted:.2f} ({s.last:.2f})" for s in slopes}
    for series, method in dict.fromkeys((s.series, s.method) for s in slopes):
        shown.add_row(series, method, *(cells.get((series, method, q), "–") for q in COLUMNS))
    return shown


def _three(value: float | None) -> str:
    """Three digits without an exponent, or a dash."""
    if value is None:
        return "–"
    return np.format_float_positional(value, precision=3, fractional=False, trim="-")


def plot(points: Sequence[Point], title: str, path: Path) -> None:
    """Each quantity against width, and against depth: unrolled filled, scanned hollow."""
    from matplotlib.figure import Figure  # no pyplot: no global state, no display
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    rows = {"width": ("width",), "depth": ("depth", "scanned")}
    rows = {
        label: kept
        for label, series in rows.items()
        if (kept := [s for s in series if any(p.series == s for p in points)])
    }
    methods = list(dict.fromkeys(p.method for p in points))
    shown = lambda p, quantity: max(getattr(p, quantity) or 0.0, 0.0) or np.nan
    figure = Figure(figsize=(15, 0.9 + 3.1 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), len(PANELS), squeeze=False)
    for panels, (label, series) in zip(grid, rows.items(), strict=True):
        for axes, quantity in zip(panels, PANELS, strict=True):
            if not any(shown(p, quantity) > 0 for p in points if p.series in series):
                axes.set_axis_off()  # nothing to draw, and no logarithm of it
                continue
            for name in series:
                for place, method in enumerate(methods):
                    own = [p for p in points if (p.series, p.method) == (name, method)]
                    line, marker = STYLES[place]
                    axes.plot(
                        [p.size for p in own],
                        [shown(p, quantity) for p in own],
                        color=f"C{place}",
                        linestyle=line,
                        marker=marker,
                        fillstyle="none" if name == "scanned" else "full",
                        label=f"{method}, scanned" if name == "scanned" else method,
                    )
            axes.set(xscale="log", yscale="log", xlabel=label, title=COLUMNS[quantity])
            axes.set_xticks(sorted({p.size for p in points if p.series in series}))
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter(StrMethodFormatter("{x:g}"))
                axis.set_minor_formatter(NullFormatter())
            axes.grid(which="both", color="0.9")
    drawn = (axes.get_legend_handles_labels() for axes in grid[:, 0])
    lines = {label: line for pair in drawn for line, label in zip(*pair, strict=True)}
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=len(lines))
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
