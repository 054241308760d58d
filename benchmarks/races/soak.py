"""A soak: many steps of one optimizer on a small model, and what should not grow.

    python benchmarks/races/soak.py                                 # K-FAC, 20,000 steps
    python benchmarks/races/soak.py --optimizer ekfac

The autoencoder 64-32-16-4-16-32-64 on scikit-learn's digits. Every window of steps is one sample:
seconds of a step, resident memory of the process, arrays alive, programs compiled so far. After a
warm-up none of them may drift; if one does, the script says so and exits with 1. Step times are
compared by each window's 10th percentile, as a ratio to that of the gradient alone, taken in turn
with the steps: a machine that is slower for a while slows both.
Writes PREFIX.json and PREFIX.png.
"""

import argparse
import gc
import json
import math
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console

import natgrad_jax as ng

sys.path.insert(0, str(Path(__file__).parents[1]))  # for lib and the other folders
from lib import data, report
from lib.autoencoder import Autoencoder, Problem
from lib.optimizers import OPTIMIZERS, natural

ENCODER = (64, 32, 16, 4)
CONTENDERS = {
    "kfac": (OPTIMIZERS["kfac"], 0.1),
    "ekfac": (OPTIMIZERS["ekfac"], 0.1),
    "prong": (natural(lambda learning_rate, layers: ng.prong(learning_rate, layers)), 0.01),
}
WARM_UP = 0.1  # of the run
SLOWER = 1.1  # the last third's step time over the first's, both in gradients
LARGER = 0.01  # of the resident memory, from the warm-up to the end
COMPILED = "/jax/core/compile/backend_compile_duration"


class Sample(NamedTuple):
    """One window: the step that ends it, milliseconds a step, and what there is at its end."""

    step: int
    fast_ms: float  # the 10th percentile
    gradient_ms: float  # of the gradient alone, likewise
    median_ms: float
    resident_mib: float
    live_arrays: int
    compiled: int
    loss: float


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parse_arguments(argv)
    console = Console()
    samples = soak(args.optimizer, args.steps, args.window, args.batch_size, args.seed)
    found = verdict(samples)
    for name, row in found.items():
        console.print(f"{name:20s} {row['value']:.4g} (at most {row['at_most']:g}): "
                      f"{'ok' if row['ok'] else 'DRIFTS'}", highlight=False)  # fmt: skip
    prefix = args.output or Path(f"soak-{args.optimizer}")
    settings = {
        "command": shlex.join(["python", "benchmarks/races/soak.py", *argv]),
        **{k: v for k, v in vars(args).items() if k != "output"},
        "encoder": ENCODER,
        "machine": report.describe_machine(),
        "versions": report.versions(),
    }
    rows = [sample._asdict() for sample in samples]
    prefix.parent.mkdir(parents=True, exist_ok=True)
    path = prefix.with_name(prefix.name + ".json")
    path.write_text(json.dumps({**settings, "verdict": found, "samples": rows}, indent=1) + "\n")
    plot(samples, args.optimizer, prefix.with_name(prefix.name + ".png"))
    report.tell_files(console, path)
    if not all(row["ok"] for row in found.values()):
        raise SystemExit(1)


def soak(name: str, steps: int, window: int, batch_size: int, seed: int) -> list[Sample]:
    """A run of so many steps, and its samples."""
    counted = {"compiled": 0}

    def listen(event: str, duration: float, **_: Any) -> None:
        counted["compiled"] += event == COMPILED

    jax.monitoring.register_event_duration_secs_listener(listen)
    images = data.load("digits").train_images.reshape(-1, ENCODER[0])
    problem = Problem(Autoencoder(ENCODER), images)
    make, rate = CONTENDERS[name]
    params = problem.init(seed)
    contender = make(rate, problem.loss_fn, params, images[:batch_size])
    step = jax.jit(contender.step, donate_argnums=(0, 1))
    gradient = jax.jit(jax.grad(lambda params, batch: problem.loss_fn(params, batch).value))
    state, random = contender.init(params), np.random.default_rng(seed)
    samples, seconds, alone = [], [], []
    for i in range(1, steps + 1):
        batch = images[random.integers(len(images), size=batch_size)]
        key = jax.random.key(i)
        begun = time.perf_counter()
        jax.block_until_ready(gradient(params, batch))
        between = time.perf_counter()
        params, state, loss = jax.block_until_ready(step(params, state, batch, key))
        seconds.append(time.perf_counter() - between)
        alone.append(between - begun)
        if i % window == 0:
            fast, median = 1e3 * np.quantile(seconds, [0.1, 0.5])
            reference = 1e3 * np.quantile(alone, 0.1)
            gc.collect()  # what waits to be collected is no leak
            samples.append(
                Sample(i, float(fast), float(reference), float(median), resident(),
                       len(jax.live_arrays()), counted["compiled"], float(loss))
            )  # fmt: skip
            seconds, alone = [], []
    return samples


def resident() -> float:
    """MiB of memory that this process holds now."""
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) / 1024


def verdict(samples: Sequence[Sample]) -> dict[str, dict[str, Any]]:
    """What grew after the warm-up, and by how much it may."""
    warm = samples[math.ceil(WARM_UP * len(samples)) :]
    of = lambda field: np.array([getattr(s, field) for s in warm])
    third = max(len(warm) // 3, 1)
    relative, memory = of("fast_ms") / of("gradient_ms"), of("resident_mib")
    growth = float(np.polyfit(np.linspace(0, 1, len(warm)), memory, 1)[0]) if len(warm) > 1 else 0.0
    values = {
        "step_time_ratio": (
            float(np.median(relative[-third:]) / np.median(relative[:third])),
            SLOWER,
        ),
        "memory_growth_mib": (growth, LARGER * float(memory[0])),
        "arrays_more": (float(of("live_arrays")[-1] - of("live_arrays")[0]), 0),
        "programs_more": (float(of("compiled")[-1] - of("compiled")[0]), 0),
        "losses_not_finite": (float(np.sum(~np.isfinite(of("loss")))), 0),
    }
    return {k: {"value": v, "at_most": most, "ok": v <= most} for k, (v, most) in values.items()}


def plot(samples: Sequence[Sample], name: str, path: Path) -> None:
    """What is watched, against steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6.5), layout="constrained")
    times, memory, programs = figure.subplots(3, 1, sharex=True)
    steps = [s.step for s in samples]
    times.plot(steps, [s.median_ms for s in samples], "0.6", label="median of the window")
    times.plot(steps, [s.fast_ms for s in samples], "k", label="10th percentile")
    times.plot(steps, [s.gradient_ms for s in samples], "k:", label="the gradient alone")
    times.set_ylabel("time of a step (ms)")
    times.legend()
    memory.plot(steps, [s.resident_mib for s in samples], "k")
    memory.set_ylabel("resident memory (MiB)")
    programs.plot(steps, [s.compiled for s in samples], "k", label="programs compiled")
    programs.plot(steps, [s.live_arrays for s in samples], "k--", label="arrays alive")
    programs.set(xlabel="steps", ylabel="number")
    programs.legend()
    for axes in (times, memory, programs):
        axes.set_ylim(0, 1.25 * max(y for line in axes.lines for y in line.get_ydata()))
        axes.grid(color="0.9")
    times.set_xlim(0, steps[-1])
    figure.suptitle(f"{name}: {steps[-1]:,} steps of an autoencoder of digits")
    figure.savefig(path, dpi=150)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--optimizer", choices=CONTENDERS, default="kfac")
    add("--steps", type=int, default=20_000)
    add("--window", type=int, default=200, help="steps of one sample")
    add("--batch-size", type=int, default=50)
    add("--seed", type=int, default=0)
    add("--output", type=Path, metavar="PREFIX", help="soak-OPTIMIZER by default")
    args = parser.parse_args(argv)
    if args.steps < 2 * args.window:
        parser.error(f"--steps must be at least two windows of {args.window}, got {args.steps}")
    return args


if __name__ == "__main__":
    main()
