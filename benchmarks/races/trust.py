"""What a trust radius would have to know: K-FAC's ``ΔᵀFΔ`` beside the Fisher's, along its steps.

    python benchmarks/races/trust.py --data-dir DIR
    python benchmarks/races/trust.py --tasks digits-ae,characters,tabular  # nothing to download

``ng.kfac(0.1, layers)`` at its defaults on the tasks of ``lib/tasks.py``. At some steps, with the
parameters and the inverses held, minibatches i = 1 … K that were not trained on give gradients ∇ᵢ
and natural gradients Δᵢ:

=========== ======================================================================================
square      mean of ``Δᵢᵀ∇ᵢ = ΔᵢᵀFΔᵢ`` with K-FAC's damped F: what the trust radius compares
signal      mean of ``Δᵢᵀ∇ⱼ``, i ≠ j, in which independent noise cancels
noise       their difference: ``tr(F⁻¹ Σ) / N``, Σ the covariance of the examples' gradients
assumed     ``tr(F⁻¹ F) / N`` from K-FAC's factors, the same if Σ were F
ratio       ``ΔᵢᵀFΔᵢ`` with the exact Fisher of another minibatch, over ``Δᵢᵀ∇ᵢ``
=========== ======================================================================================

Writes PREFIX.json.
"""

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

import natgrad_jax as ng

sys.path.insert(0, str(Path(__file__).parents[1]))  # for lib and the other folders
from lib import report, training
from lib.arguments import integers, positive
from lib.optimizers import OPTIMIZERS
from lib.tasks import TASKS, Task
from races.no_tuning import RATE, count, names_of

BATCHES = 6
DAMPING = 1e-2  # the default


class Seen(NamedTuple):
    """One row: see the module."""

    task: str
    step: int
    loss: float
    square: float
    signal: float
    noise: float
    assumed: float
    ratio: float


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parse_arguments(argv)
    console, rows = Console(), []
    console.print(f"{'task':12}" + "".join(f"{name:>10}" for name in Seen._fields[1:]))
    for name in args.tasks:
        task = TASKS[name](args.data_dir)
        for row in look(name, task._replace(steps=args.steps or task.steps), args.at):
            numbers = "".join(f"{x:10.3g}" for x in row[2:])
            console.print(f"{row.task:12}{row.step:10}{numbers}", highlight=False)
            rows.append(row._asdict())
    command = shlex.join(["python", "benchmarks/races/trust.py", *argv])
    path = args.output.with_name(args.output.name + ".json")
    report.write_json(path, {"command": command, "batches": BATCHES, "seen": rows}, [], [])
    report.tell_files(console, path)


def look(name: str, task: Task, at: Sequence[int]) -> Any:
    """Trains, and yields what is seen before the steps ``at``."""
    examples, loss_fn = jax.tree.map(jnp.asarray, task.examples), task.problem.loss_fn
    params, key = task.problem.init(0), jax.random.key(0)
    orders = [training.minibatches(count(examples), task.batch_size, task.steps, s) for s in (0, 1)]
    batch = lambda order, i: training.rows(examples, order[i % len(order)])
    contender = OPTIMIZERS["kfac"](RATE, loss_fn, params, batch(orders[0], 0))
    state, step = contender.init(params), jax.jit(contender.step)
    layers = ng.find_layers(loss_fn, params, batch(orders[0], 0))
    seen = jax.jit(probe(loss_fn, layers))
    for i in range(max(at) + 1):
        if i in at:
            others = [batch(orders[1], i + k) for k in range(BATCHES)]
            stacked = jax.tree.map(lambda *x: jnp.stack(x), *others)
            products, ratio, loss = jax.device_get(seen(params, state[0], stacked))
            square = float(np.mean(np.diag(products)))
            signal = float(products[~np.eye(BATCHES, dtype=bool)].mean())
            assumed = effective_parameters(layers, state[0]) / examples_of(others[0])
            yield Seen(name, i, float(loss), square, signal, square - signal, assumed, float(ratio))
        params, state, _ = step(params, state, batch(orders[0], i), jax.random.fold_in(key, i))


def probe(loss_fn: Any, layers: ng.Layers) -> Callable[..., Any]:
    """Of parameters, K-FAC's state and stacked minibatches: the products, the ratio, the loss."""
    held = ng.scale_by_kfac(layers, refresh=ng.every(1_000_000))
    grad_fn = ng.value_and_grad(loss_fn, layers)

    def seen(params: Any, state: ng.KFACState, batches: Any) -> Any:
        nothing, key = jnp.zeros_like(state.clock.statistics_due), jax.random.key(0)
        state = state._replace(
            clock=state.clock._replace(step=jnp.int32(1), statistics_due=nothing)
        )
        grads, steps, losses, each = [], [], [], range(BATCHES)
        for i in each:
            loss, grad, statistics = grad_fn(params, of(batches, i), rng=key, opt_state=(state,))
            grads.append(grad)
            steps.append(held.update(grad, state, params, statistics=statistics)[0])
            losses.append(getattr(loss, "value", loss))
        products = jnp.array([[optax.tree.vdot(d, g) for g in grads] for d in steps])
        exact = [
            optax.tree.vdot(d, ng.fisher_vector_product(loss_fn, params, of(batches, i - 1))(d))
            for i, d in enumerate(steps)
        ]
        return products, sum(exact) / jnp.trace(products), sum(losses) / BATCHES

    return seen


def of(batches: Any, i: int) -> Any:
    return jax.tree.map(lambda x: x[i], batches)


def examples_of(batch: Any) -> int:
    """Numbers that the loss is a mean over: characters, not windows."""
    target = batch["target"] if isinstance(batch, dict) else batch
    integers_of_each = jnp.issubdtype(target.dtype, jnp.integer)
    return target.size if integers_of_each else len(target)


def effective_parameters(layers: ng.Layers, state: Any) -> float:
    """``Σ tr(F (F + λ)⁻¹)`` over the blocks, with K-FAC's damping of each factor."""
    found = 0.0
    for path, factors in ng.factors(state).items():
        one = layers[path]
        a = spectrum(factors.A)
        if factors.G is None:
            found += float(np.sum(a / (a + DAMPING)))
            continue
        g, root = spectrum(factors.G), DAMPING**0.5
        pi = (np.mean(a, -1) / one.input_side.size * a.shape[-1]) ** 0.5 / np.mean(g, -1) ** 0.5
        on_a, on_g = (pi * root)[..., None], (root / pi)[..., None]
        found += float(np.sum((a / (a + on_a)).sum(-1) * (g / (g + on_g)).sum(-1)))
    return found


def spectrum(factor: Any) -> np.ndarray:
    """Eigenvalues of matrices, or the numbers of a diagonal."""
    factor = np.asarray(factor, np.float64)
    square = factor.ndim > 1 and factor.shape[-1] == factor.shape[-2]
    return np.maximum(np.linalg.eigvalsh(factor) if square else factor, 1e-30)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--tasks", type=names_of(TASKS), default=list(TASKS), metavar="NAME[,NAME…]")
    add("--data-dir", metavar="DIR", help="where the files of MNIST and CIFAR-10 are")
    add("--at", type=integers, default=[1, 5, 20, 60, 150, 290], metavar="STEP[,STEP…]")
    add("--steps", type=positive, metavar="N", help="instead of each task's own")
    add("--output", type=Path, default=Path("trust"), metavar="PREFIX")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
