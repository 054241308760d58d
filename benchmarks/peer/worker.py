"""One interpreter's half of ``compare.py``: builds optimizers, takes steps and tells their seconds.

    PYTHON benchmarks/peer/worker.py PROBLEM.npz MODULE…      # then requests, a line of JSON each

Both halves are this program, so that both run the same loop by the same clock: one with this
library, one with kfac-jax. MODULE is imported before anything compiles, since imports can change
what JAX's caches depend on. PROBLEM.npz, written by ``compare.py``, holds ``images`` (N, pixels),
``evaluated`` (M, pixels), ``order`` (steps, batch), learning rates ``rate_NAME``, the peer's
``setting_NAME`` and the first parameters ``kernel_0``, ``bias_0`` and so on.
"""

import importlib
import importlib.metadata
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # for lib and the other folders
from peer.optimizers import OURS, THEIRS, Optimizer, Problem, Setting, plain_params

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "kfac-jax")


def read(path: str) -> Problem:
    with np.load(path) as file:
        stored = dict(file)
    count = sum(name.startswith("kernel_") for name in stored)
    numbers = lambda kind: {
        name.removeprefix(kind): x.item() for name, x in stored.items() if name.startswith(kind)
    }
    return Problem(
        *(stored[name] for name in ("images", "evaluated", "order")),
        numbers("rate_"),
        Setting(**numbers("setting_")),
        [(stored[f"kernel_{i}"], stored[f"bias_{i}"]) for i in range(count)],
    )


class Trainer:
    """What a request may ask for: the name of a method, and its arguments."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.optimizers: dict[str, Optimizer] = {}
        self.carries: dict[str, Any] = {}  # steps taken, params, state
        self.evaluators: dict[str, Any] = {}

    def ask(self, do: str, **arguments: Any) -> Any:
        return getattr(self, do)(**arguments)

    def versions(self) -> dict[str, str]:
        known = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
        found = {name: known[name] for name in PACKAGES if name in known}
        return {"python": platform.python_version(), **found}

    def start(self, name: str) -> dict[str, float]:
        """Seconds to the end of the first step, and until all is compiled; those steps are lost.

        Finding layers, states and compiling count; making parameters and a batch do not.
        """
        jax.block_until_ready((self._inputs(0), jax.tree.map(jnp.copy, plain_params(self.problem))))
        begun = time.perf_counter()
        self.optimizers[name] = optimizer = (OURS | THEIRS)[name](self.problem)
        self.restart(name)
        self.advance(name, 1)
        first = time.perf_counter() - begun
        self.advance(name, optimizer.warmup - 1)
        setup = time.perf_counter() - begun
        self.evaluators[name] = jax.jit(optimizer.loss)
        self.restart(name)
        return {"first": first, "setup": setup}

    def restart(self, name: str) -> None:
        optimizer = self.optimizers[name]
        params = jax.tree.map(jnp.copy, optimizer.params)  # steps overwrite what they are given
        state = jax.block_until_ready(optimizer.init(params, self.problem.batch(0)))
        self.carries[name] = 0, params, state

    def advance(self, name: str, steps: int) -> list[float]:
        """Seconds of each of the next steps."""
        optimizer, (taken, *carry) = self.optimizers[name], self.carries[name]
        seconds = []
        for i in range(taken, taken + steps):
            inputs = jax.block_until_ready(self._inputs(i))
            begun = time.perf_counter()
            carry = jax.block_until_ready(optimizer.step(i, *carry, *inputs))
            seconds.append(time.perf_counter() - begun)
        self.carries[name] = taken + steps, *carry
        return seconds

    def _inputs(self, i: int) -> tuple[jax.Array, jax.Array]:
        """The batch and the key of a step."""
        return self.problem.batch(i), jax.random.fold_in(jax.random.key(1), i)

    def evaluate(self, name: str) -> float:
        return float(self.evaluators[name](self.carries[name][1], self.problem.evaluated))

    def gradient(self, name: str, file: str) -> float:
        """The loss at the start on the first batch; its gradient goes to FILE, layer by layer."""
        optimizer = self.optimizers[name]
        loss, grads = jax.value_and_grad(optimizer.loss)(optimizer.params, self.problem.batch(0))
        if isinstance(grads, dict):  # Flax's
            grads = [grads[f"Dense_{i}"] for i in range(len(grads))]
        leaves = [np.ravel(layer[part]) for layer in grads for part in ("kernel", "bias")]
        np.save(file, np.concatenate(leaves))
        return float(loss)

    def peak_memory(self) -> float:
        """MiB at most: of the accelerator, or resident.

        Not ``getrusage``: on Linux that starts at what the parent process held.
        """
        of_device = jax.devices()[0].memory_stats()
        if of_device:
            return of_device["peak_bytes_in_use"] / 2**20
        lines = Path("/proc/self/status").read_text().splitlines()
        (line,) = (line for line in lines if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 1024


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever else prints, answers stay readable
    file, *modules = sys.argv[1:]
    for module in modules:
        importlib.import_module(module)
    trainer = Trainer(read(file))
    for line in sys.stdin:
        print(json.dumps(trainer.ask(**json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
