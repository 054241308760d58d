"""Step time, first step and memory of each optimizer, as ratios to SGD with momentum.

    python benchmarks/speed/step_time.py                              # batches of 512 and 2048
    python benchmarks/speed/step_time.py --batch-sizes 512 --rounds 10
    python benchmarks/speed/step_time.py --model resnet50 --batch-sizes 128    # on an accelerator

The autoencoder 784-1000-500-250-30-…-784, or a model of ``lib/large.py``, on one drawn batch (what
it shows does not change the time). All optimizers run in one process, in turn, so that a machine
whose speed drifts slows all of them. Peak memory is that of a process of its own; on an accelerator
what the compiled step needs there. The loss after the run stands beside the times. The steps that
follow a change of optimizer are not timed: they pay for memory that the other's program gave back.
Writes PREFIX.json.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import natgrad_jax as ng

sys.path.insert(0, str(Path(__file__).parents[1]))  # for lib and the other folders
from lib import report
from lib.autoencoder import ENCODERS, Autoencoder, Problem
from lib.large import LARGE
from lib.optimizers import LEARNING_RATES, OPTIMIZERS, first_order
from lib.rivals import muon

STEPS_A_ROUND = 20  # a whole refresh period of the defaults
UNTIMED = 5  # steps before those, of each round
MODELS = (*ENCODERS, *LARGE)
CONTENDERS = OPTIMIZERS | {"muon": first_order(muon), "soap": first_order(ng.soap)}
LARGE_RATES = {"sgd": 1e-2, "adam": 1e-4, "muon": 1e-3, "soap": 1e-4}  # not searched


class Timed(NamedTuple):
    """What was measured of one optimizer: seconds of each step, of the first, and the loss."""

    steps: list[float]
    first: float
    loss: float


class Runner(NamedTuple):
    """A compiled step with its state: ``state`` is params, opt_state."""

    step: Any
    state: Any
    first: float

    @property
    def memory(self) -> float:
        """MiB that the step needs on the device, as its compiler says."""
        needs = self.step.memory_analysis()
        held = needs.argument_size_in_bytes + needs.output_size_in_bytes
        return (held - needs.alias_size_in_bytes + needs.temp_size_in_bytes) / 2**20


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parse_arguments(argv)
    if args.memory_of:
        start(args.memory_of, *problem_of(args.model, args.batch_sizes[0]), args.model)
        print(peak_of_this_process())
        return
    console = Console()
    results: dict[str, Any] = {}
    for size in args.batch_sizes:
        problem, batch = problem_of(args.model, size)
        runners = {name: start(name, problem, batch, args.model) for name in args.optimizers}
        memory = {name: peak_memory(name, one, size, args.model) for name, one in runners.items()}
        timed = measure(runners, batch, args.rounds)
        results[str(size)] = rows(timed, memory)
        console.print(make_table(results[str(size)], size))
    settings = {
        "command": shlex.join(["python", "benchmarks/speed/step_time.py", *argv]),
        "model": args.model,
        "rounds": args.rounds,
        "steps_a_round": STEPS_A_ROUND,
        "machine": report.describe_machine(),
        "versions": report.versions(),
    }
    path = args.output.with_name(args.output.name + ".json")
    path.write_text(json.dumps({**settings, "batches": results}, indent=1) + "\n")
    report.tell_files(console, path)


def problem_of(model: str, size: int) -> tuple[Any, Any]:
    """A problem and a batch of it on the device."""
    if model in LARGE:
        return LARGE[model], LARGE[model].draw(size)
    pixels = np.random.default_rng(0).random((size, ENCODERS[model][0]), np.float32)
    return Problem(Autoencoder(ENCODERS[model]), pixels), jnp.asarray(pixels)


def measure(runners: dict[str, Runner], batch: Any, rounds: int) -> dict[str, Timed]:
    """Every optimizer's steps, a round of each in turn."""
    steps: dict[str, list[float]] = {name: [] for name in runners}
    losses, states = {}, {name: runner.state for name, runner in runners.items()}
    for turn in range(rounds):
        for name, runner in runners.items():
            state = states.pop(name)
            for i in range(UNTIMED + STEPS_A_ROUND):
                begun = time.perf_counter()
                *state, loss = runner.step(*state, batch, jax.random.key(turn * 1000 + i))
                loss.block_until_ready()
                if i >= UNTIMED:
                    steps[name].append(time.perf_counter() - begun)
            states[name] = state
            losses[name] = float(loss)
    return {name: Timed(steps[name], one.first, losses[name]) for name, one in runners.items()}


def start(name: str, problem: Any, batch: Any, model: str) -> Runner:
    """Find layers, initialize, compile and take the first step: all that a user waits for."""
    params = problem.init(0)
    jax.block_until_ready(params)
    begun = time.perf_counter()
    rates = LEARNING_RATES.get(model, LARGE_RATES)
    contender = CONTENDERS[name](rates.get(name, 0.1), problem.loss_fn, params, batch)
    given = params, contender.init(params), batch, jax.random.key(0)
    step = jax.jit(contender.step, donate_argnums=(0, 1)).lower(*given).compile()
    *state, loss = step(*given)
    jax.block_until_ready((state, loss))
    return Runner(step, state, time.perf_counter() - begun)


def peak_of_this_process() -> float:
    """MiB. Not ``getrusage``: on Linux that starts at what the parent process held."""
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def peak_memory(name: str, runner: Runner, size: int, model: str) -> float:
    """MiB; on CPU of resident memory at most, in a process that takes one step."""
    if jax.devices()[0].platform != "cpu":
        return runner.memory
    script = [sys.executable, __file__, "--memory-of", name]
    command = [*script, "--batch-sizes", str(size), "--model", model]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def rows(timed: dict[str, Timed], memory: dict[str, float]) -> list[dict[str, Any]]:
    base = timed["sgd"]
    mean = float(np.mean(base.steps))
    return [
        {
            "optimizer": name,
            "mean_ms": 1e3 * float(np.mean(t.steps)),
            "mean_ratio": float(np.mean(t.steps)) / mean,
            "median_ratio": float(np.median(t.steps) / np.median(base.steps)),
            "p90_ratio": float(np.quantile(t.steps, 0.9)) / mean,
            "p99_over_median": float(np.quantile(t.steps, 0.99) / np.median(t.steps)),
            "first_step_s": t.first,
            "first_step_ratio": t.first / base.first,
            "peak_memory_mib": memory[name],
            "peak_memory_ratio": memory[name] / memory["sgd"],
            "loss": t.loss,
        }
        for name, t in timed.items()
    ]


def make_table(measured: Sequence[dict[str, Any]], size: int) -> Table:
    table = Table(
        title=f"batch {size}: ratios to SGD with momentum", box=None, padding=(0, 1, 0, 0)
    )
    columns = {
        "optimizer": "{}",
        "mean_ms": "{:.0f}",
        "mean_ratio": "{:.2f}",
        "median_ratio": "{:.2f}",
        "p90_ratio": "{:.2f}",
        "p99_over_median": "{:.1f}",
        "first_step_s": "{:.1f}",
        "first_step_ratio": "{:.1f}",
        "peak_memory_mib": "{:.0f}",
        "peak_memory_ratio": "{:.2f}",
        "loss": "{:.0f}",
    }
    for name in columns:
        side = "left" if name == "optimizer" else "right"
        table.add_column(name.replace("_", " "), justify=side, overflow="fold")
    for row in measured:
        table.add_row(*(form.format(row[name]) for name, form in columns.items()))
    return table


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--batch-sizes", type=int, nargs="+", default=[512, 2048], metavar="B")
    add("--rounds", type=int, default=5, help=f"of {STEPS_A_ROUND} steps of each optimizer")
    add("--optimizers", nargs="+", choices=CONTENDERS, default=["sgd", "adam", "kfac"])
    add("--model", choices=MODELS, default="mnist", help="an autoencoder's data, or a large one")
    add("--output", type=Path, default=Path("step-time"), metavar="PREFIX")
    add("--memory-of", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if "sgd" not in args.optimizers:
        args.optimizers = ["sgd", *args.optimizers]
    return args


if __name__ == "__main__":
    main()
