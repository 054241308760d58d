"""What ``approximations.py`` leaves behind: two tables, a picture and a JSON file."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from lib import report
from rich import box
from rich.console import Console
from rich.table import Table

REFERENCE = "kfac-kfc"  # of memory and refreshes; that of steps is SGD
MIB = 2**20
ONCE = "*"


class Measured(NamedTuple):
    """What was seen of one method; ``seconds`` by kind: every run, the first one among them."""

    name: str
    factor_bytes: int | None
    state_bytes: int
    seconds: dict[str, list[float]]
    compile_s: float
    loss: float


class Row(NamedTuple):
    """One method; None where it has no such number, or its reference was not measured.

    Ratios of memory and refreshes are to REFERENCE, those of steps to SGD with momentum. ``once``:
    the kinds that were run a single time, so that nothing warmed them up.
    """

    method: str
    factors_mib: float | None
    factors_ratio: float | None
    state_mib: float
    state_ratio: float | None
    refresh_s: float | None
    refresh_ratio: float | None
    layer_refresh_s: float | None
    layer_refresh_ratio: float | None
    step_ms: float
    step_ratio: float
    statistics_step_ms: float  # SGD's has none: its step
    statistics_step_ratio: float
    mean_step_ms: float  # computed: see mean_step
    mean_step_ratio: float
    compile_s: float
    loss: float
    once: list[str]


class Runs(NamedTuple):
    """Seconds of every run of one kind."""

    method: str
    kind: str
    seconds: list[float]


def finish(
    measured: Sequence[Measured], settings: dict[str, Any], prefix: Path, console: Console
) -> None:
    """Prints the tables, draws the picture, writes the numbers; SGD is the first one measured."""
    rows = summarize(measured, settings["statistics_period"], settings["refresh_period"])
    for table in (memory_table(rows, settings), step_table(rows, settings)):
        console.print(table)
    if any(row.once for row in rows):
        console.print(f"{ONCE} run once: not warmed up, not repeated")
    figure, numbers = (prefix.with_name(prefix.name + s) for s in (".png", ".json"))
    figure.parent.mkdir(parents=True, exist_ok=True)
    plot(rows, settings, figure)
    runs = [Runs(m.name, kind, taken) for m in measured for kind, taken in m.seconds.items()]
    report.write_json(numbers, settings, runs, rows)
    report.tell_files(console, figure, numbers)


def summarize(measured: Sequence[Measured], every: int, refresh_every: int) -> list[Row]:
    """A row a method; statistics ``every`` so many steps, a refresh ``refresh_every`` so many."""
    sgd = measured[0]
    base = next((m for m in measured if m.name == REFERENCE), None)

    def row(m: Measured) -> Row:
        return Row(
            m.name,
            *_pair(lambda x: x.factor_bytes, m, base, 1 / MIB),
            *_pair(lambda x: x.state_bytes, m, base, 1 / MIB),
            *_pair(lambda x: median(x, "refresh"), m, base),
            *_pair(lambda x: median(x, "layer_refresh"), m, base),
            *_pair(lambda x: median(x, "step"), m, sgd, 1e3),
            *_pair(lambda x: median(x, "statistics_step") or median(x, "step"), m, sgd, 1e3),
            *_pair(lambda x: mean_step(x, every, refresh_every), m, sgd, 1e3),
            m.compile_s,
            m.loss,
            [kind for kind, taken in m.seconds.items() if len(taken) == 1],
        )

    return [row(m) for m in measured]


def _pair(
    of: Callable[[Measured], float | None],
    m: Measured,
    base: Measured | None,
    unit: float = 1.0,
) -> tuple[float | None, float | None]:
    """A number in its unit, and its ratio to the same of ``base``."""
    value, reference = of(m), None if base is None else of(base)
    if value is None:
        return None, None
    return value * unit, None if reference is None else value / reference


def median(m: Measured, kind: str) -> float | None:
    """Seconds: the median of all runs but the first, which warms up; of one run, that one."""
    taken = m.seconds.get(kind)
    return float(np.median(taken[1:] or taken)) if taken else None


def mean_step(m: Measured, every: int, refresh_every: int) -> float | None:
    """Seconds of a step on average: ``step + (statistics step − step) / every + refresh / …``."""
    step, measuring, refresh = (median(m, k) for k in ("step", "statistics_step", "refresh"))
    if step is None or measuring is None or refresh is None:
        return step
    return step + (measuring - step) / every + refresh / refresh_every


def memory_table(rows: Sequence[Row], settings: dict[str, Any]) -> Table:
    """Memory and refreshes, absolute and as ratios to REFERENCE."""
    title = f"memory and refresh; × is the ratio to {REFERENCE}"
    layer = f"one layer\nof {settings['channels']},\nrefresh s"
    headers = ("factors\nMiB", "×", "state\nMiB", "×", "refresh\ns", "×", layer, "×")
    table = _table(title, headers)
    for row in rows:
        table.add_row(
            row.method,
            *_cells(row.factors_mib, row.factors_ratio),
            *_cells(row.state_mib, row.state_ratio),
            *_cells(row.refresh_s, row.refresh_ratio, "refresh" in row.once),
            *_cells(row.layer_refresh_s, row.layer_refresh_ratio, "layer_refresh" in row.once),
        )
    return table


def step_table(rows: Sequence[Row], settings: dict[str, Any]) -> Table:
    """Steps, absolute and as ratios to SGD with momentum."""
    title = f"steps of {settings['batch']} images; × is the ratio to SGD with momentum"
    every, refresh_every = settings["statistics_period"], settings["refresh_period"]
    mean = f"mean ms,\ncomputed:\n1/{every}, 1/{refresh_every}"
    headers = ("step\nms", "×", "with\nstatistics\nms", "×", mean, "×", "compile\ns", "loss")
    table = _table(title, headers)
    for row in rows:
        single = any(kind in row.once for kind in ("step", "statistics_step", "refresh"))
        table.add_row(
            row.method,
            *_cells(row.step_ms, row.step_ratio, "step" in row.once),
            *_cells(
                row.statistics_step_ms, row.statistics_step_ratio, "statistics_step" in row.once
            ),
            *_cells(row.mean_step_ms, row.mean_step_ratio, single),
            f"{row.compile_s:.1f}",
            f"{row.loss:.2f}",
        )
    return table


def _table(title: str, headers: Sequence[str]) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=0, title_justify="left")
    table.add_column("method", no_wrap=True)
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    return table


def _cells(value: float | None, ratio: float | None, once: bool = False) -> tuple[str, str]:
    """A number and its ratio, to three digits."""
    mark = ONCE if once else ""
    return _three(value) + mark, _three(ratio)


def _three(value: float | None) -> str:
    """Three digits without an exponent, or a dash."""
    if value is None:
        return "–"
    return np.format_float_positional(value, precision=3, fractional=False, trim="-")


def plot(rows: Sequence[Row], settings: dict[str, Any], path: Path) -> None:
    """Bars of memory, refresh and mean step: K-FAC grey, EKFAC hatched, SGD white."""
    from matplotlib.figure import Figure  # no pyplot: no global state, no display
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    figure = Figure(figsize=(12, 4.2), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    every, refresh_every = settings["statistics_period"], settings["refresh_period"]
    mean = f"mean step (ms), statistics every {every},\nrefresh every {refresh_every}: computed"
    contents = (
        ("factors (MiB)", REFERENCE, "factors_mib", "factors_ratio", "log"),
        ("refresh (s)", REFERENCE, "refresh_s", "refresh_ratio", "log"),
        (mean, "SGD", "mean_step_ms", "mean_step_ratio", "linear"),
    )
    places = range(len(rows))
    for axes, (label, reference, value, ratio, scale) in zip(panels, contents, strict=True):
        for place, row in zip(places, rows, strict=True):
            width = getattr(row, value)
            if width is None:
                continue
            axes.barh(place, width, edgecolor="black", **_look(row.method))
            times = "" if getattr(row, ratio) is None else f" ×{_three(getattr(row, ratio))}"
            mark = ONCE if value == "refresh_s" and "refresh" in row.once else ""
            axes.text(width, place, times + mark, va="center", fontsize=8)
        axes.set(xlabel=label, xscale=scale, title=f"× is the ratio to {reference}")
        if scale == "log":
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.margins(x=0.25)
        axes.grid(axis="x", color="0.9")
        axes.set_axisbelow(True)
    panels[0].set_yticks(list(places), [row.method for row in rows])
    panels[0].invert_yaxis()
    widths = settings["widths"]
    figure.suptitle(
        f"VGG11 of {widths[0]} to {widths[-1]} channels, batch {settings['batch']}, "
        f"groups of {settings['group_size']}"
    )
    figure.savefig(path, dpi=150)


def _look(method: str) -> dict[str, str]:
    if method.startswith("ekfac"):
        return {"color": "0.9", "hatch": "///"}
    return {"color": "0.6" if method.startswith("kfac") else "white"}
