"""The exact Gauss-Newton step beside python-somax's: the same steps, and the seconds of each.

    python benchmarks/peer/gauss_newton.py

Needs ``pip install python-somax`` in this interpreter; without it ours is measured alone. Two small
networks, float32, each on one fixed batch: a regression by squared error, and digits by
cross-entropy. Damping and learning rate are the same for all, and so are the first parameters.

=========== ======================================================================================
exact-ngd   ``ng.exact_ngd``: the rows of J from each example by itself
egn         somax's ``egn_mse``, ``egn_ce``: also exact, a product with J Jᵀ for each row
egn-cg      its ``egn_mse_cg``: 20 steps of conjugate gradients over examples; squared error only
sgn         its ``sgn_mse``, ``sgn_ce``: 20 steps of conjugate gradients over parameters
=========== ======================================================================================

In turn, a few steps of each. The exact ones take the same steps: the table shows whether they do.
"""

import argparse
import importlib.metadata
import importlib.util
import itertools
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))  # for lib
from lib import data, report
from lib.arguments import positive

import natgrad_jax as ng

Params = list[tuple[jax.Array, jax.Array]]
STEPS_A_ROUND = 5
Stepper = tuple[Any, Callable[[Any, Any], tuple[Any, Any]]]  # a state; (params, state) onward


class Task(NamedTuple):
    """A network's widths, a batch, the kind of its loss, and the setting of all."""

    widths: tuple[int, ...]
    batch: dict[str, jax.Array]
    kind: str  # as somax's names end
    damping: float
    learning_rate: float

    def init(self) -> Params:
        random = np.random.default_rng(0)
        weights = lambda a, b: jnp.asarray(random.normal(size=(a, b)) / a**0.5, jnp.float32)
        return [(weights(a, b), jnp.zeros(b)) for a, b in itertools.pairwise(self.widths)]

    def loss_fn(self, params: Params, batch: dict[str, jax.Array]) -> ng.Loss:
        outputs = network(params, batch["x"])
        return (ng.Gaussian if self.kind == "mse" else ng.Categorical)(outputs).nll(batch["y"])


class Row(NamedTuple):
    task: str
    optimizer: str
    compile_seconds: float
    milliseconds: float  # the median step
    steps: int
    loss: float
    curve: list[float]


def network(params: Params, x: jax.Array) -> jax.Array:
    for W, b in params[:-1]:
        x = jnp.tanh(x @ W + b)
    W, b = params[-1]
    return x @ W + b


def tasks(size: int) -> dict[str, Task]:
    x = np.random.default_rng(1).normal(size=(4 * size, 8)).astype(np.float32)
    y = np.sin(2 * x[:, :1]) + x[:, 1:2] * x[:, 2:3]
    digits = data.load("digits")
    images, labels = digits.train_images[:size].reshape(size, -1), digits.train_labels[:size]
    batch = lambda x, y: {"x": jnp.asarray(x), "y": jnp.asarray(y)}
    return {
        "regression": Task((8, 64, 64, 1), batch(x, y), "mse", 1e-3, 0.5),
        "digits": Task((64, 64, 10), batch(images, labels), "ce", 1e-2, 0.5),
    }


def ours(task: Task) -> Stepper:
    tx = ng.exact_ngd(task.learning_rate, damping=task.damping)
    grad_fn = ng.value_and_grad(task.loss_fn, fisher="exact")

    def step(params: Params, state: Any) -> tuple[Params, Any]:
        _, grads, rows = grad_fn(params, task.batch)
        updates, state = tx.update(grads, state, params, statistics=rows)
        return optax.apply_updates(params, updates), state

    return tx.init(task.init()), step


def theirs(name: str, task: Task) -> Stepper:
    import somax

    setting = {"lam0": task.damping, "learning_rate": task.learning_rate}
    method = somax.make(name.format(task.kind), predict_fn=network, **setting)
    key = jax.random.key(0)
    return method.init(task.init()), lambda p, s: method.step(p, task.batch, s, key)[:2]


OPTIMIZERS: dict[str, Callable[[Task], Stepper]] = {
    "exact-ngd": ours,
    "egn": partial(theirs, "egn_{}"),
    "egn-cg": partial(theirs, "egn_{}_cg"),
    "sgn": partial(theirs, "sgn_{}"),
}


def measure(task_name: str, task: Task, names: Sequence[str], rounds: int) -> list[Row]:
    """A round of steps of each in turn."""
    steppers, states, compiled = {}, {}, {}
    loss_of = jax.jit(lambda params: task.loss_fn(params, task.batch).value)
    for name in names:
        begun = time.perf_counter()
        state, step = OPTIMIZERS[name](task)
        step = jax.jit(step)
        jax.block_until_ready(step(task.init(), state))
        compiled[name] = time.perf_counter() - begun
        steppers[name], states[name] = step, (task.init(), state)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    curves = {name: [float(loss_of(task.init()))] for name in names}
    for _ in range(rounds):
        for name, step in steppers.items():
            for _ in range(STEPS_A_ROUND):
                begun = time.perf_counter()
                states[name] = jax.block_until_ready(step(*states[name]))
                seconds[name].append(time.perf_counter() - begun)
                curves[name].append(float(loss_of(states[name][0])))
    return [
        Row(task_name, name, compiled[name], 1e3 * float(np.median(seconds[name])),
            len(seconds[name]), curves[name][-1], curves[name])
        for name in names
    ]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=positive, default=4, metavar="N", help="of 5 steps each")
    parser.add_argument("--size", type=positive, default=128, metavar="B",
                        help="images of digits; four times as many of the regression")  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("gauss-newton"), metavar="PREFIX")
    args, console, found = parser.parse_args(argv), Console(), []
    peer = importlib.util.find_spec("somax") is not None
    if not peer:
        console.print("no somax: ours is measured alone")
    console.print("task       optimizer  ms/step      loss  steps compile s")
    for name, task in tasks(args.size).items():
        names = [n for n in OPTIMIZERS if n == "exact-ngd" or peer]
        if task.kind == "ce":
            names = [n for n in names if n != "egn-cg"]
        for row in measure(name, task, names, args.rounds):
            found.append(row)
            console.print(
                f"{row.task:11}{row.optimizer:10}{row.milliseconds:8.3g}{row.loss:10.3e}"
                f"{row.steps:7}{row.compile_seconds:10.1f}",
                highlight=False,
            )
    settings = {
        "command": shlex.join(["python", "benchmarks/peer/gauss_newton.py", *argv]),
        "tasks": {
            name: task._asdict() | {"batch": len(task.batch["x"])}
            for name, task in tasks(args.size).items()
        },
        "somax": importlib.metadata.version("python-somax") if peer else None,
    }
    numbers = args.output.with_name(args.output.name + ".json")
    numbers.parent.mkdir(parents=True, exist_ok=True)
    report.write_json(numbers, settings, found, [])
    report.tell_files(console, numbers)


if __name__ == "__main__":
    main()
