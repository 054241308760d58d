"""Our K-FAC side by side with kfac-jax: steps at its own setting, and seconds to a training loss.

    python benchmarks/peer/compare.py --data-dir DIR --peer-python .venv-peer/bin/python
    python benchmarks/peer/compare.py --data digits                  # no peer, no files: ours alone

The deep autoencoders of ``lib/autoencoder.py``. kfac-jax (google-deepmind/kfac-jax) runs in an
interpreter of its own, since the versions differ: any in which ``import kfac_jax`` works::

    python3 -m venv .venv-peer
    .venv-peer/bin/pip install git+https://github.com/google-deepmind/kfac-jax

Both start from the same parameters and see the same minibatches; that their losses and gradients
agree is checked first. In both parts all take turns, so that a machine whose speed drifts slows all
of them; a process that waits computes nothing. Seconds are those of training alone.

Steps, as ratios to SGD with momentum: ``kfac-jax`` is the peer at fixed learning rate, momentum,
damping and norm constraint, with statistics every step and inverses every 5, by its default (LU) or
by Cholesky's; ``kfac-jax-adaptive`` as in its own example of this autoencoder. ``kfac-as-peer`` is
ours at the same fixed setting, with full inverses by Cholesky; ``-low-rank`` with our default's;
``kfac`` is ours at its defaults.
``sgd-there`` is SGD in the peer's interpreter. Peak memory is that of a process of its own.

Race: the target is Adam's loss after --target steps, at the tuned rate of ``lib/optimizers.py``.
Writes PREFIX.json and PREFIX.png.
"""

import argparse
import contextlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))  # for lib and the other folders
from lib import autoencoder, data, report
from lib.arguments import positive
from lib.optimizers import LEARNING_RATES
from lib.training import SCALES, evaluated_images, minibatches
from peer.optimizers import ADAPTIVE, OURS, THEIRS, Setting
from speed import step_time

WORKER = Path(__file__).with_name("worker.py")
PARTS = ("steps", "race")
RACERS = ("kfac", "adam", "kfac-jax", "kfac-jax-adaptive")
# Whose mean step, or seconds to the target, are divided by whose
STEP_RATIOS = (
    ("kfac-as-peer", "kfac-jax"),
    ("kfac-as-peer", "kfac-jax-cholesky"),
    ("kfac-as-peer-low-rank", "kfac-jax"),
    ("kfac", "kfac-jax"),
    ("sgd-there", "sgd"),
)
RACE_RATIOS = (("adam", "kfac"), ("kfac-jax", "kfac"), ("kfac-jax-adaptive", "kfac"))
EVALUATIONS = 100  # points on a curve
CLOSE = 1e-3  # relative: losses and gradients of two interpreters, in float32


class Worker:
    """A process that runs ``worker.py`` on a problem; what fails there ends the script."""

    def __init__(self, python: str, modules: Sequence[str], problem: Path) -> None:
        self.python, self.modules = python, modules
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (lives as long as the process)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors}
        command = [python, WORKER, problem, *modules]
        try:
            self.process: Any = subprocess.Popen(command, text=True, **pipes)
        except OSError as error:
            self.errors.close()
            fail(f"{python}: expected a Python interpreter, found: {error.strerror}")

    def ask(self, do: str, **arguments: Any) -> Any:
        """The answer of ``worker.Trainer``."""
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either
            self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            self.errors.seek(0)
            found = (self.errors.read().strip().splitlines() or ["no answer"])[-1]
            asked = " ".join(map(str, [do, *arguments.values()]))
            fail(f"{self.python}: expected an answer to {asked!r}, found: {found}")
        return json.loads(answer)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.errors.close()


Workers = dict[str, Worker]  # by the optimizer's name: two processes in all


def fail(message: str) -> NoReturn:
    print(message, file=sys.stderr)
    raise SystemExit(2)


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parse_arguments(argv)
    # three processes: on a GPU none may take most of its memory at once
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    console = Console(width=max(Console().width, 112))  # the tables' own
    if args.peer_python is None:
        console.print("no --peer-python: kfac-jax is left out, ours is measured alone")
    problem = autoencoder.make_problem(data.load_or_exit(args.data, args.data_dir))
    found: dict[str, Any] = {}
    runs: list[report.Run] = []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        file = write_problem(problem, args, folder / "problem.npz")
        workers = {}
        for side, (python, modules, names) in interpreters(args).items():
            worker = Worker(python, modules, file)
            stack.callback(worker.close)
            found[f"versions_{side}"] = worker.ask("versions")
            workers |= dict.fromkeys(names, worker)
        started = {name: worker.ask("start", name=name) for name, worker in workers.items()}
        found["agreement"] = agreement(workers, folder)
        if "steps" in args.parts:
            found["steps"] = measure_steps(workers, started, problem, args, folder)
            console.print(step_time.make_table(found["steps"], args.batch_size))
            found["step_ratios"] = ratios(
                {row["optimizer"]: row["mean_ms"] for row in found["steps"]}, STEP_RATIOS
            )
            tell(console, "mean step", found["step_ratios"])
        if "race" in args.parts:
            runs = race(workers, started, args)
    finish(runs, found, problem, args, argv, console)


def interpreters(args: argparse.Namespace) -> dict[str, tuple[str, list[str], list[str]]]:
    """Each side's interpreter, the modules that it imports, and its optimizers."""
    here, there = ([name for name in names if name in args.optimizers] for names in (OURS, THEIRS))
    found = {"here": (sys.executable, ["optimizers"], here)}
    if args.peer_python and there:
        modules = ["kfac_jax"] if any("kfac" in name for name in there) else []
        found["there"] = (args.peer_python, modules, there)
    return found


def write_problem(problem: autoencoder.Problem, args: argparse.Namespace, file: Path) -> Path:
    """What ``worker.read`` reads."""
    params, rates = problem.init(0), LEARNING_RATES[args.data]
    order = minibatches(len(problem.images), args.batch_size, args.target, 0)
    arrays = {f"rate_{name}": rate for name, rate in rates.items()}
    arrays |= {f"setting_{name}": value for name, value in args.setting._asdict().items()}
    for i in range(len(params)):
        arrays |= {f"{part}_{i}": x for part, x in params[f"Dense_{i}"].items()}
    evaluated = evaluated_images(problem)
    np.savez(file, images=problem.images, evaluated=evaluated, order=order, **arrays)
    return file


def agreement(workers: Workers, folder: Path) -> dict[str, float] | None:
    """How far the other interpreter's loss and gradient are from ours, relative; None without it.

    Raises SystemExit where they do not train the same thing.
    """
    there = next((name for name in THEIRS if name in workers), None)
    if there is None:
        return None
    files = [str(folder / f"{name}.npy") for name in ("sgd", there)]
    losses = [
        workers[name].ask("gradient", name=name, file=file)
        for name, file in zip(("sgd", there), files, strict=True)
    ]
    here, other = (np.load(file) for file in files)
    apart = {
        "loss": abs(losses[1] / losses[0] - 1),
        "gradient": float(np.linalg.norm(other - here) / np.linalg.norm(here)),
    }
    if not max(apart.values()) < CLOSE:
        fail(f"the two losses: expected to agree to {CLOSE}, found relative differences {apart}")
    return apart


def measure_steps(
    workers: Workers,
    started: dict[str, Any],
    problem: autoencoder.Problem,
    args: argparse.Namespace,
    folder: Path,
) -> list[dict[str, Any]]:
    """Every optimizer's steps, a round of each in turn; then its memory, on one batch of images."""
    steps: dict[str, list[float]] = {name: [] for name in workers}
    for _ in range(args.rounds):
        for name, worker in workers.items():
            taken = worker.ask("advance", name=name, steps=step_time.UNTIMED + args.round)
            steps[name] += taken[step_time.UNTIMED :]
    timed = {
        name: step_time.Timed(
            steps[name], started[name]["first"], worker.ask("evaluate", name=name)
        )
        for name, worker in workers.items()
    }
    one = problem._replace(images=problem.images[: args.batch_size])
    file = write_problem(one, args, folder / "one-batch.npz")
    memory = {name: peak_memory(worker, name, file) for name, worker in workers.items()}
    return step_time.rows(timed, memory)


def peak_memory(like: Worker, name: str, file: Path) -> float:
    """MiB, of a process that takes a step."""
    with contextlib.closing(Worker(like.python, like.modules, file)) as worker:
        worker.ask("start", name=name)
        return worker.ask("peak_memory")


def race(workers: Workers, started: dict[str, Any], args: argparse.Namespace) -> list[report.Run]:
    """Training curves from the same start, some steps of each in turn."""
    racers = {name: workers[name] for name in RACERS if name in workers}
    rates = LEARNING_RATES[args.data] | {"kfac-jax": args.setting.learning_rate}
    runs = []
    for name, worker in racers.items():
        worker.ask("restart", name=name)
        start = [0], [0.0], [worker.ask("evaluate", name=name)]
        setup = started[name]["setup"]
        runs.append(report.Run(name, 0, rates.get(name, float("nan")), setup, *start))
    every = max(1, args.target // EVALUATIONS)
    for begin in range(0, args.target, every):
        count = min(every, args.target - begin)
        for run in runs:
            seconds = sum(racers[run.optimizer].ask("advance", name=run.optimizer, steps=count))
            run.steps.append(begin + count)
            run.seconds.append(run.seconds[-1] + seconds)
            run.loss.append(racers[run.optimizer].ask("evaluate", name=run.optimizer))
    return runs


def ratios(of: dict[str, float | None], pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Of the pairs that were measured."""
    return {f"{a} / {b}": of[a] / of[b] for a, b in pairs if of.get(a) and of.get(b)}


def tell(console: Console, what: str, found: dict[str, float]) -> None:
    parts = (f"{pair} = {ratio:.2f}" for pair, ratio in found.items())
    console.print(f"{what}: {', '.join(parts)}", soft_wrap=True)


def finish(
    runs: list[report.Run],
    found: dict[str, Any],
    problem: autoencoder.Problem,
    args: argparse.Namespace,
    argv: Sequence[str],
    console: Console,
) -> None:
    """Prints the race's table, draws its picture, writes the numbers of both parts."""
    floor = autoencoder.entropy(evaluated_images(problem))
    figure, numbers = (args.output.with_name(args.output.name + s) for s in (".png", ".json"))
    figure.parent.mkdir(parents=True, exist_ok=True)
    rows = report.summarize(runs, "adam") if runs else []
    if runs:
        title = f"{args.data}: training loss of a deep autoencoder, nats per image"
        seconds = report.equal_seconds(runs)
        console.print(report.make_table(rows, title, args.target, seconds, "adam"))
        to_target = {row.optimizer: row.seconds_to_target for row in rows}
        found["race_ratios"] = ratios(to_target, RACE_RATIOS)
        tell(console, "seconds to Adam's loss", found["race_ratios"])
        report.plot(runs, title, floor, "adam", figure)
    settings = {
        "command": shlex.join(["python", "benchmarks/peer/compare.py", *argv]),
        "data": args.data,
        "encoder": autoencoder.ENCODERS[args.data],
        "batch_size": args.batch_size,
        "rounds": args.rounds,
        "steps_a_round": args.round,
        "target": args.target,
        "peer_setting": args.setting._asdict(),
        "peer_adaptive": ADAPTIVE,
        "entropy": floor,
        **found,
    }
    report.write_json(numbers, settings, runs, rows)
    report.tell_files(console, numbers, *([figure] if runs else []))


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--peer-python", metavar="PATH", help="an interpreter with kfac-jax; without it ours alone")
    add("--data", choices=data.DATASETS, default="mnist")
    add("--data-dir", metavar="DIR", help="where the files of the data set are")
    add("--batch-size", type=positive, metavar="B")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    add("--optimizers", nargs="+", choices=[*OURS, *THEIRS], default=[*OURS, *THEIRS],
        metavar="NAME", help=f"of {', '.join([*OURS, *THEIRS])}; sgd and adam always")  # fmt: skip
    add("--rounds", type=positive, default=5, metavar="N", help="of steps of each optimizer")
    add("--round", type=positive, default=step_time.STEPS_A_ROUND, metavar="N",
        help="steps in a round: whole refresh periods")  # fmt: skip
    add("--target", type=positive, default=400, metavar="N", help="steps of the race")
    add("--setting", nargs="+", type=name_and_value, default=[], metavar="NAME=VALUE",
        help=f"of the peer's fixed setting, by default {Setting()}")  # fmt: skip
    add("--output", type=Path, default=Path("peer"), metavar="PREFIX")
    args = parser.parse_args(argv)
    args.batch_size = args.batch_size or SCALES[args.data].batch_size
    args.setting = Setting()._replace(**dict(args.setting))
    args.optimizers = ["sgd", "adam", *args.optimizers]
    return args


def name_and_value(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    kinds = Setting.__annotations__
    if name not in kinds:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(kinds)}, found {name!r}")
    return name, kinds[name](value)


if __name__ == "__main__":
    main()
