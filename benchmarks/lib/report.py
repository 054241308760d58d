"""What a race leaves behind: a summary, a table, a picture and a JSON file."""

import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

PACKAGES = ("natgrad_jax", "jax", "jaxlib", "flax", "optax", "numpy")
LABELS = {"steps": "steps", "seconds": "training time (seconds)"}
# Told apart without colour: a line style and a marker each.
STYLES = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"), ((0, (5, 1, 1, 1, 1, 1)), "v"),
          ("-", "P"), ("--", "X"), (":", "*"), ("-.", "<"))  # fmt: skip


class Run(NamedTuple):
    """One optimizer, one seed: its curve at the evaluated steps, the first being step 0."""

    optimizer: str
    seed: int
    learning_rate: float
    setup_seconds: float  # finding layers, compiling, a first step: not in ``seconds``
    steps: list[int]
    seconds: list[float]  # of training alone, evaluations excluded
    loss: list[float]
    validation: Sequence[float] = ()  # the loss on what is held out, where anything is
    error: float | None = None  # the part of it that a classifier fails at the end

    @property
    def finished(self) -> bool:
        return math.isfinite(self.loss[-1])


class Summary(NamedTuple):
    """One optimizer, the mean over its seeds; None where any seed has no such number."""

    optimizer: str
    learning_rate: float
    setup_seconds: float
    milliseconds: float  # per step
    loss_after_steps: float | None
    loss_after_seconds: float | None
    steps_to_target: float | None
    seconds_to_target: float | None
    validation_loss: float | None  # after all steps
    lowest_validation: float | None  # of all evaluations
    validation_error: float | None


def equal_seconds(runs: Sequence[Run]) -> float:
    """The longest time that every finished run has trained for."""
    return min((run.seconds[-1] for run in runs if run.finished), default=0.0)


def summarize(runs: Sequence[Run], reference: str) -> list[Summary]:
    """The mean over seeds; the target is the final loss of ``reference`` with the same seed."""
    targets = {run.seed: run.loss[-1] for run in runs if run.optimizer == reference}
    seconds = equal_seconds(runs)
    names = dict.fromkeys(run.optimizer for run in runs)
    rows = {name: [run for run in runs if run.optimizer == name] for name in names}
    return [_summarize_one(own, targets, seconds) for own in rows.values()]


def _summarize_one(runs: list[Run], targets: dict[int, float], seconds: float) -> Summary:
    return Summary(
        optimizer=runs[0].optimizer,
        learning_rate=runs[0].learning_rate,
        setup_seconds=runs[0].setup_seconds,
        milliseconds=1e3 * float(np.mean([run.seconds[-1] / run.steps[-1] for run in runs])),
        loss_after_steps=_mean([run.loss[-1] for run in runs]),
        loss_after_seconds=_mean([_loss_at(run, seconds) for run in runs]),
        steps_to_target=mean_to(runs, targets, "steps"),
        seconds_to_target=mean_to(runs, targets, "seconds"),
        validation_loss=_mean([run.validation[-1] if run.validation else None for run in runs]),
        lowest_validation=_mean([min(run.validation, default=None) for run in runs]),
        validation_error=_mean([run.error for run in runs]),
    )


def mean_to(
    runs: Sequence[Run], targets: dict[int, float], along: str, curve: str = "loss"
) -> float | None:
    """The mean of the ``steps`` or ``seconds`` of one optimizer's runs to their seeds' targets."""

    def first(run: Run) -> float | None:
        pairs = zip(getattr(run, along), getattr(run, curve), strict=True)
        return next((at for at, loss in pairs if loss <= targets[run.seed]), None)

    return _mean([first(run) for run in runs])


def _loss_at(run: Run, seconds: float) -> float | None:
    """The last loss evaluated by then; none if the run diverged."""
    return run.loss[np.searchsorted(run.seconds, seconds, "right") - 1] if run.finished else None


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean, or None where a value is missing or not finite."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return float(np.mean(known)) if len(known) == len(values) else None


def make_table(rows: Sequence[Summary], title: str, steps: int, seconds: float, ref: str) -> Table:
    """The final table; ``seconds`` is the time at which the losses are compared."""
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=0, title_justify="left")
    table.add_column("optimizer", no_wrap=True)
    for header in (
        "rate",
        "ms a\nstep",
        f"loss after\n{steps} steps",
        f"loss after\n{seconds:.3g} s",
        f"steps to\n{ref}'s end",
        f"seconds to\n{ref}'s end",
        "compile\nseconds",
    ):
        table.add_column(header, justify="right", no_wrap=True)
    base = next(row for row in rows if row.optimizer == ref)
    for row in rows:
        table.add_row(
            row.optimizer,
            "adaptive" if math.isnan(row.learning_rate) else f"{row.learning_rate:g}",
            f"{row.milliseconds:.3g}",
            "diverged" if row.loss_after_steps is None else f"{row.loss_after_steps:.3f}",
            "diverged" if row.loss_after_seconds is None else f"{row.loss_after_seconds:.3f}",
            share(row.steps_to_target, base.steps_to_target, ".0f"),
            share(row.seconds_to_target, base.seconds_to_target, ".1f"),
            f"{row.setup_seconds:.1f}",
        )
    return table


def share(value: float | None, base: float | None, digits: str) -> str:
    """A number and its share of the reference's."""
    if value is None:
        return "never"
    return f"{value:{digits}}" + (f" {value / base:4.0%}" if base else "")


def plot(runs: Sequence[Run], title: str, entropy: float, reference: str, path: Path) -> None:
    """Training loss against steps and against seconds, legible in black and white.

    What is drawn is the loss above the entropy of the images: a model can lower only that.
    """
    from matplotlib.figure import Figure  # no pyplot: no global state, no display
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, (along, label) in zip((left, right), LABELS.items(), strict=True):
        draw(axes, runs, along, entropy, reference)
        axes.set(xlabel=label, xlim=(0, None), yscale="log")
        axes.grid(which="both", color="0.9")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    left.set_ylabel("training loss minus entropy of the images\n(nats per image)")
    right.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def draw(axes: Any, runs: Sequence[Run], along: str, floor: float, reference: str) -> None:
    """Losses above the floor along ``steps`` or ``seconds``, and where the reference ends."""
    names = list(dict.fromkeys(run.optimizer for run in runs))
    for run in runs:
        place = names.index(run.optimizer)
        line, marker = STYLES[place % len(STYLES)]
        every = max(1, len(run.steps) // 8)
        marks = (place * every // len(names), every)  # beside one another
        label = run.optimizer if run.seed == runs[0].seed else None  # once for all seeds
        look = {"linestyle": line, "marker": marker, "markevery": marks, "markersize": 4}
        excess = np.asarray(run.loss) - floor
        axes.plot(getattr(run, along), excess, color=f"C{place}", label=label, **look)
    target = next(run.loss[-1] for run in runs if run.optimizer == reference) - floor
    axes.axhline(target, color="0.6", linewidth=0.8, label=f"{reference}'s final loss")


def write_json(path: Path, settings: dict[str, Any], runs: Sequence[Run], rows: Any) -> None:
    """Everything needed to read the numbers again and to make them again."""
    result = {
        **settings,
        "machine": describe_machine(),
        "versions": versions(),
        "summary": [row._asdict() for row in rows],
        "runs": [run._asdict() for run in runs],
    }
    path.write_text(json.dumps(_rounded(result), indent=1, allow_nan=False) + "\n")


def tell_files(console: Console, *paths: Path) -> None:
    """What was written, and by what machine with which variables: the end of every benchmark."""
    console.print(f"written: {' '.join(map(str, paths))}", soft_wrap=True)
    machine, told = describe_machine(), variables()
    where = f"{machine['processor']}, {machine['cores']} cores, {machine['device']}"
    what = " ".join(f"{name}={value}" for name, value in told.items()) or NO_VARIABLES
    console.print(f"measured on {where}; {what}", soft_wrap=True, highlight=False, markup=False)


# Beginnings of the variables that decide how fast a machine is: the threads and kernels of linear
# algebra, how the C library keeps memory, and what XLA and JAX are told.
SPEED = (
    "OPENBLAS_", "GOTO_", "BLIS_", "OMP_", "MKL_", "VECLIB_", "GLIBC_TUNABLES", "MALLOC_",
    "LD_PRELOAD", "NPROC", "XLA_", "JAX_", "LIBTPU_", "NVIDIA_TF32_",
)  # fmt: skip
NO_VARIABLES = "no variables set"


def variables() -> dict[str, str]:
    """Those that are set."""
    return {name: os.environ[name] for name in sorted(os.environ) if name.startswith(SPEED)}


def describe_machine() -> dict[str, Any]:
    device = jax.devices()[0]
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "device": device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "environment": variables() or NO_VARIABLES,
    }


def _processor() -> str:
    """The model's name: Linux keeps it in a file, and platform knows it elsewhere at best."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if platform.system() == "Linux" else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None  # run from the source tree
    return found


def _rounded(value: Any) -> Any:
    """Six digits are plenty, and JSON knows no NaN: a loss that diverged is null."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
