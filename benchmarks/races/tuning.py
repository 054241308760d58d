"""What tunes itself, on autoencoders: NGD against SGD, adaptive K-FAC against Adam and NAG.

    python benchmarks/races/tuning.py --data mnist --data-dir DIR

1. D of Bernacchia et al. 2018 (784-400-200-100-50-…, tanh, linear output, squared error): NGD with
   their adaptive damping on batches of 1000, against SGD on batches of 20 at the best rate of a
   grid: loss against examples and against seconds.
2. The deep autoencoder of the race: K-FAC with damping, step size and momentum of its own, on
   batches that grow by two up to a limit, against Adam and Nesterov's gradient at the best rates of
   a grid on batches of 512.
3. The same K-FAC from dampings 10⁴ times too large and too small, and NGD likewise.

Losses are training losses on a fixed part of the training set; seconds are training alone.
"""

import argparse
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

import natgrad_jax as ng

sys.path.insert(0, str(Path(__file__).parents[1]))  # for lib and the other folders
from lib import data, report
from lib.autoencoder import Autoencoder, Problem, make_problem

SQUARED = {"mnist": (784, 400, 200, 100, 50), "digits": (64, 40, 20, 10)}
GRIDS = {
    "sgd": (0.005, 0.01, 0.02, 0.04),
    "adam": (3e-4, 1e-3, 3e-3),
    "nag": (0.002, 0.005, 0.01),
}
SCALES = (1e-4, 1.0, 1e4)
INITIAL = {"ngd": 0.1, "kfac": 1.0}


class SquaredProblem(NamedTuple):
    """Reconstruction by a Gaussian of variance 1: half the squared error, in nats an image."""

    model: Any
    images: np.ndarray

    def init(self, seed: int) -> Any:
        return self.model.init(jax.random.key(seed), self.images[:1])["params"]

    def loss_fn(self, params: Any, batch: jax.Array) -> ng.Loss:
        return ng.Gaussian(self.model.apply({"params": params}, batch)).nll(batch)


class Schedule(NamedTuple):
    """Batch sizes, and how many steps each."""

    sizes: tuple[int, ...]
    steps: int

    def batches(self) -> list[int]:
        """The size of every batch."""
        return [size for size in self.sizes for _ in range(self.steps)]


def natural(problem: Any, make: Callable[..., Any]) -> tuple[Any, Callable[..., Any]]:
    """``init`` and a step of a transformation that takes everything there is."""
    params = problem.init(0)
    layers = ng.find_layers(problem.loss_fn, params, jnp.asarray(problem.images[:10]))
    tx = make(layers)
    grad_fn = ng.value_and_grad(problem.loss_fn, layers)

    def step(params: Any, state: Any, batch: Any, key: Any) -> Any:
        value, grads, statistics = grad_fn(params, batch, rng=key, opt_state=state)
        updates, state = tx.update(
            grads, state, params, statistics=statistics, value=value, args=(batch,),
            value_fn=lambda p: problem.loss_fn(p, batch).value,
        )  # fmt: skip
        return optax.apply_updates(params, updates), state

    return tx.init, step


def first_order(problem: Any, tx: optax.GradientTransformation) -> tuple[Any, Callable[..., Any]]:
    grad_fn = jax.grad(lambda p, b: problem.loss_fn(p, b).value)

    def step(params: Any, state: Any, batch: Any, key: Any) -> Any:
        del key
        updates, state = tx.update(grad_fn(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    return tx.init, step


def train(
    problem: Any, pair: tuple[Any, Callable[..., Any]], schedule: Any, points: int
) -> dict[str, Any]:
    """Examples, seconds and loss at some points of a run; every batch size is compiled before."""
    init, step = pair
    images = jnp.asarray(problem.images)
    evaluated = images[:: -(-len(images) // 2000)]
    evaluate = jax.jit(lambda p: problem.loss_fn(p, evaluated).value)
    jitted = jax.jit(lambda p, s, indices, key: step(p, s, images[indices], key))
    params = problem.init(0)
    state, sizes, random = init(params), schedule.batches(), np.random.default_rng(0)
    for size in dict.fromkeys(sizes):
        jax.block_until_ready(jitted(params, state, jnp.arange(size), jax.random.key(0)))
    found: dict[str, Any] = {"examples": [0], "seconds": [0.0], "loss": [float(evaluate(params))]}
    seconds, seen, begin = 0.0, 0, time.perf_counter()
    for i, size in enumerate(sizes):
        indices = jnp.asarray(random.choice(len(images), size, replace=False))
        params, state = jitted(params, state, indices, jax.random.key(i))
        seen += size
        if (i + 1) % max(len(sizes) // points, 1) == 0 or i + 1 == len(sizes):
            jax.block_until_ready(params)
            seconds += time.perf_counter() - begin
            found["examples"].append(seen)
            found["seconds"].append(seconds)
            found["loss"].append(float(evaluate(params)))
            begin = time.perf_counter()
            if not np.isfinite(found["loss"][-1]):
                break
    if isinstance(state, ng.AdaptiveDampingState):
        found |= {"damping": np.asarray(state.history[: min(len(sizes), 1000)]).tolist(),
                  "refused": int(state.refused)}  # fmt: skip
    return found


def searched(
    problem: Any, name: str, alias: Callable[[float], Any], schedule: Schedule, points: int
) -> dict[str, Any]:
    """The best rate of the grid after a quarter of the steps, trained in full."""
    quarter = schedule._replace(steps=max(schedule.steps // 4, 1))
    tried = {rate: train(problem, first_order(problem, alias(rate)), quarter, 1)["loss"][-1]
             for rate in GRIDS[name]}  # fmt: skip
    rate = min(tried, key=lambda r: tried[r] if np.isfinite(tried[r]) else np.inf)
    tried_text = {str(r): loss for r, loss in tried.items()}
    return train(problem, first_order(problem, alias(rate)), schedule, points) | {
        "rate": rate, "tried": tried_text}  # fmt: skip


def ngd(problem: Any, initial: float) -> Any:
    def make(layers: ng.Layers) -> Any:
        damped = lambda damping: ng.ngd(1.0, layers, damping=damping)
        return ng.adaptive_damping(damped, ng.bernacchia(1.0), problem.loss_fn, initial=initial)

    return natural(problem, make)


def kfac(problem: Any, initial: float) -> Any:
    make = lambda layers: ng.adaptive_kfac(layers, problem.loss_fn, initial=initial)
    return natural(problem, make)


def experiment(squared: Any, deep: Problem, args: argparse.Namespace, say: Any) -> dict[str, Any]:
    points, found = 40, {}
    count = int(args.passes * len(squared.images))
    own, small = min(1000, len(squared.images)), 20
    found["ngd"] = train(
        squared, ngd(squared, INITIAL["ngd"]), Schedule((own,), count // own), points
    )
    say("ngd", found["ngd"])
    sgd = partial(searched, squared, "sgd", optax.sgd, Schedule((small,), count // small))
    found["sgd"] = sgd(points)
    say("sgd", found["sgd"])
    sizes = tuple(min(args.batch_size * 2**i, len(deep.images)) for i in range(args.stages))
    growing = Schedule(sizes, args.steps)
    found["kfac"] = train(deep, kfac(deep, INITIAL["kfac"]), growing, points)
    say("adaptive kfac", found["kfac"])
    fixed = Schedule((min(512, len(deep.images)),), args.baseline_steps)
    for name, alias in (("adam", optax.adam), ("nag", nesterov)):
        found[name] = searched(deep, name, alias, fixed, points)
        say(name, found[name])
    few = min(256, len(deep.images))
    for name, make, problem, size in (("kfac", kfac, deep, few), ("ngd", ngd, squared, own)):
        schedule = Schedule((size,), args.recovery_steps)
        for scale in SCALES:
            pair = make(problem, INITIAL[name] * scale)
            found[f"{name} from {scale:g}"] = train(problem, pair, schedule, points)
            say(f"{name}, initial damping x {scale:g}", found[f"{name} from {scale:g}"])
    return found


def nesterov(rate: float) -> optax.GradientTransformation:
    return optax.sgd(rate, momentum=0.9, nesterov=True)


def plot(found: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8), layout="constrained")
    axes = figure.subplots(2, 3)
    groups = ((0, ("ngd", "sgd"), "squared error, half, per image"),
              (1, ("kfac", "adam", "nag"), "loss, nats per image"))  # fmt: skip
    for row, names, label in groups:
        for name, (line, marker) in zip(names, report.STYLES, strict=False):
            run, look = found[name], {"linestyle": line, "marker": marker, "markersize": 3}
            axes[row, 0].plot(run["examples"], run["loss"], label=name, **look)
            axes[row, 1].plot(run["seconds"], run["loss"], label=name, **look)
        for ax, x in zip(axes[row], ("training examples", "seconds of training"), strict=False):
            ax.set(xlabel=x, ylabel=f"training {label}", yscale="log")
    for row, name in ((0, "ngd"), (1, "kfac")):
        for scale, (line, _) in zip(SCALES, report.STYLES, strict=False):
            run = found[f"{name} from {scale:g}"]
            axes[row, 2].plot(run["damping"], linestyle=line, label=f"{name}, start × {scale:g}")
        axes[row, 2].set(xlabel="steps", ylabel="damping λ (nats)", yscale="log")
    for ax in axes.flat:
        ax.grid(which="major", color="0.9")
        ax.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", choices=("digits", "mnist"), default="digits")
    add("--data-dir", metavar="DIR")
    add("--passes", type=float, default=3.0, help="over the training set, NGD and SGD")
    add("--batch-size", type=int, default=512, help="K-FAC's first")
    add("--stages", type=int, default=4, help="how often K-FAC's batch doubles, and one")
    add("--steps", type=int, default=60, help="of each stage")
    add("--recovery-steps", type=int, default=200, help="from wrong initial dampings")
    add("--baseline-steps", type=int, default=1500, help="of Adam and NAG")
    add("--output", type=Path, default=Path("tuning"))
    args = parser.parse_args(argv)
    dataset = data.load_or_exit(args.data, args.data_dir)
    deep, console = make_problem(dataset), Console()
    squared = SquaredProblem(Autoencoder(SQUARED[args.data]), deep.images)

    def say(name: str, run: dict[str, Any]) -> None:
        text = f"{name}: {run['loss'][0]:.4g} to {run['loss'][-1]:.4g} in {run['examples'][-1]} "
        text += f"examples, {run['seconds'][-1]:.1f} s"
        if "rate" in run:
            text += f", rate {run['rate']:g}"
        if "damping" in run:
            first, last = run["damping"][0], run["damping"][-1]
            text += f", damping {first:.3g} to {last:.3g}, {run['refused']} refused"
        console.print(text)

    found = experiment(squared, deep, args, say)
    figure, numbers = (args.output.with_name(args.output.name + s) for s in (".png", ".json"))
    figure.parent.mkdir(parents=True, exist_ok=True)
    plot(found, figure)
    command = shlex.join(["python", "benchmarks/races/tuning.py", *argv])
    settings = {"command": command, "data": args.data, "batch_sizes": args.batch_size,
                "experiments": found}  # fmt: skip
    report.write_json(numbers, settings, [], [])
    report.tell_files(console, figure, numbers)


if __name__ == "__main__":
    main()
