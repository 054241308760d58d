"""What a user meets first: K-FAC as it is, against SGD with momentum at the best of three rates.

    python benchmarks/races/first_day.py

A ResNet with BatchNorm, 64 to 256 channels, on pairs of scikit-learn's digits; causal transformers
of width 96 and 192 on the characters of ``no_tuning.py``: nothing to download. K-FAC has the
README's learning rate and its defaults. SGD trains with each rate of its grid, and the one whose
loss is lowest at the end is its best; K-FAC and that run again in turn, from the same parameters on
the same minibatches. The loss is the training loss on a fixed part of the training set, for the
ResNet with BatchNorm of that part; beside it is told that on what is held out, as in
``no_tuning.py``. Seconds are those of training alone. Writes PREFIX.json.
"""

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from rich.console import Console

import natgrad_jax as ng

sys.path.insert(0, str(Path(__file__).parents[1]))  # for lib and the other folders
from lib import data, report
from lib.arguments import integers, positive
from lib.optimizers import OPTIMIZERS
from lib.rivals import Searched
from lib.tasks import Supervised, Task, Transformer, characters
from races.no_tuning import RATE, make_field, search
from races.no_tuning_report import Found, numbers_of, table_of

STEPS = 30
PAIRS = 8192  # of digits
HELD_OUT_PAIRS = 1024  # of digits of other writers


class Residual(nn.Module):
    channels: int
    strides: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        norm = partial(nn.BatchNorm, use_running_average=False)
        conv = partial(nn.Conv, self.channels, use_bias=False)
        y = nn.relu(norm()(conv((3, 3), strides=self.strides)(x)))
        y = norm()(conv((3, 3))(y))
        if x.shape != y.shape:
            x = norm()(conv((1, 1), strides=self.strides)(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """One block each of so many channels."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(self.widths[0], (3, 3), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=False)(x))
        for i, channels in enumerate(self.widths):
            x = Residual(channels, 2 if i else 1)(x)
        return nn.Dense(data.CLASSES**2)(x.mean((1, 2)))


class Normalized(Supervised):
    """Its model normalizes by the batch; the running averages, for later, are not kept."""

    def outputs(self, params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        return self.model.apply({"params": params}, batch["input"], mutable=["batch_stats"])[0]


def resnet(widths: tuple[int, ...] = (64, 128, 256)) -> Task:
    """Two digits beside one another: which of a hundred numbers they are. (Of one digit alone
    everyone's loss is 0.01 after thirty steps.)"""
    digits = data.load_or_exit("digits")
    examples = pairs_of(digits.train_images, digits.train_labels, PAIRS)
    held_out = pairs_of(digits.test_images, digits.test_labels, HELD_OUT_PAIRS)
    mean = examples["input"].mean()
    parts = [{**part, "input": part["input"] - mean} for part in (examples, held_out)]
    problem = Normalized(ResNet(widths), ng.Categorical, parts[0]["input"][:1])
    return Task(problem, *parts, batch_size=128, steps=STEPS, unit="image", sgd=(0.3, 1.0, 3.0),
                wrong=problem.wrong)  # fmt: skip


def pairs_of(images: np.ndarray, labels: np.ndarray, count: int) -> dict[str, np.ndarray]:
    pairs = np.random.default_rng(0).integers(len(images), size=(count, 2))
    left, right = (images[side] for side in pairs.T)
    tens, ones = labels[pairs].T
    return {"input": np.concatenate([left, right], axis=2), "target": 10 * tens + ones}


def transformer(width: int, rates: tuple[float, ...]) -> Task:
    return characters(Transformer(width), batch_size=32, steps=STEPS)._replace(sgd=rates)


TASKS: dict[str, Callable[[], Task]] = {
    "ResNet 64-256": resnet,
    "transformer 96": lambda: transformer(96, (0.03, 0.1, 0.3)),
    "transformer 192": lambda: transformer(192, (0.01, 0.03, 0.1)),
}


def compete(task: Task, seeds: list[int], say: Callable[[str], None]) -> Found:
    """SGD at each rate, then its best and K-FAC in turn."""
    field = make_field(task)
    grid = Searched(partial(optax.sgd, momentum=0.9), task.sgd)
    best, sgd, tried = search(field, grid, argparse.Namespace(search=1.0, seeds=seeds))
    say(f"  sgd: {', '.join(f'{rate}: {loss:.4g}' for rate, loss in tried.items())}")
    compiled = {"kfac": field.compile(OPTIMIZERS["kfac"], RATE), "sgd": sgd}
    runs = field.race({"kfac": RATE, "sgd": best}, compiled, seeds, task.steps)
    return Found(task, runs, {"sgd": tried})


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parse_arguments(argv)
    console = Console()
    say = partial(console.print, soft_wrap=True)
    settings: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/races/first_day.py", *argv]),
        "untuned_rate": RATE,
        "tasks": {},
    }
    say(settings["command"])
    for name in args.tasks:
        task = TASKS[name]()._replace(steps=args.steps)
        say(f"{name}: {task.steps} steps of {task.batch_size}")
        found = compete(task, args.seeds, say)
        console.print(table_of(name, found))
        settings["tasks"][name] = numbers_of(found)
    path = args.output.with_name(args.output.name + ".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    report.write_json(path, settings, [], [])
    report.tell_files(console, path)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--task", dest="tasks", action="append", choices=list(TASKS), help="one; all by default")
    add("--steps", type=positive, default=STEPS, metavar="N")
    add("--seed", "--seeds", dest="seeds", type=integers, default=[0], metavar="S[,S…]")
    add("--output", type=Path, default=Path("first-day"), metavar="PREFIX")
    args = parser.parse_args(argv)
    args.tasks = args.tasks or list(TASKS)
    return args


if __name__ == "__main__":
    main()
