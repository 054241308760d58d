"""Exact natural gradient in deep linear networks (Bernacchia et al. 2018, figure 1 A to C).

    python benchmarks/papers/deep_linear.py

Networks A (16 layers of 20), B (16 layers, 20 to 100 and back) and C (12 layers, 200 to 2 and back)
on inputs of condition e⁵ and the targets of a random network of the same class with noise:

1. with the exact expectations of 2000 training examples at α = 0.005: the slope of the logarithm of
   the excess loss, against 2 ln(1 − α) (A and B, which have no bottleneck);
2. with mini-batches of 1000 examples: the test loss against examples seen and seconds, against SGD
   with mini-batches of 20 at the best rate of a grid.

Float64; the picture and every number are written beside one another.
"""

import argparse
import itertools
import shlex
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

import natgrad_jax as ng

sys.path.insert(0, str(Path(__file__).parents[1]))  # for lib and the other folders
from lib import report

NETWORKS = {
    "A": (20,) * 17,
    "B": (20, *range(20, 100, 10), 100, *range(90, 20, -10), 20),
    "C": (200, 80, 34, 20, 10, 5, 2, 5, 10, 20, 34, 80, 200),
}
NOISE = 1e-6
ALPHA, EXACT_EXAMPLES = 0.005, 2000  # of the exact expectations
RATES = (0.0003, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08)  # of SGD


class Linear(nn.Module):
    """A product of matrices."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width in self.widths[1:]:
            x = nn.Dense(width, use_bias=False)(x)
        return x


class Task(NamedTuple):
    """One network's data: ``(x, y)`` each, and the least loss that it can reach on the test set."""

    model: Linear
    train: tuple[jax.Array, jax.Array]
    test: tuple[jax.Array, jax.Array]


def make_task(widths: tuple[int, ...], train: int, test: int, seed: int) -> Task:
    """Inputs N(0, Σ), eigenvalues e^{−5i/n₀}, random eigenvectors; a teacher of the same class."""
    random = np.random.default_rng(seed)
    n = widths[0]
    basis = np.linalg.qr(random.normal(size=(n, n)))[0]
    roots = np.exp(-2.5 * np.arange(n) / n)
    x = random.normal(size=(train + test, n)) * roots @ basis.T
    y = x
    for shape in itertools.pairwise(widths):
        y = y @ (random.normal(size=shape) / np.sqrt(min(shape)))
    y = y / np.sqrt(np.mean(y**2)) + np.sqrt(NOISE) * random.normal(size=y.shape)
    x, y = jnp.asarray(x), jnp.asarray(y)
    return Task(Linear(widths), (x[:train], y[:train]), (x[train:], y[train:]))


def start(task: Task, seed: int) -> Any:
    """Random orthogonal weights: products of many Gaussian ones have no inverse in float64."""
    random = np.random.default_rng(100 + seed)

    def orthogonal(shape: tuple[int, int]) -> jax.Array:
        tall = np.linalg.qr(random.normal(size=(max(shape), min(shape))))[0]
        return jnp.asarray(tall if shape[0] >= shape[1] else tall.T)

    pairs = itertools.pairwise(task.model.widths)
    return {f"Dense_{i}": {"kernel": orthogonal(shape)} for i, shape in enumerate(pairs)}


def loss_fn(model: Linear, params: Any, batch: Any) -> ng.Loss:
    return ng.Gaussian(model.apply({"params": params}, batch[0])).nll(batch[1])


def least(task: Task, batch: Any) -> float:
    """The least loss on ``batch`` of any linear map of the network's rank."""
    x, y = (np.asarray(a) for a in batch)
    root = np.linalg.cholesky(x.T @ x / len(x))
    W = np.linalg.lstsq(x, y, rcond=None)[0]
    lost = np.linalg.svd(root.T @ W, compute_uv=False)[min(task.model.widths) :]
    residual = y - x @ W
    return float(0.5 * np.mean(np.sum(residual**2, axis=1)) + 0.5 * np.sum(lost**2))


def regular_start(task: Task, train: Any, steps: int) -> Any:
    """Of 100 starts the one whose path keeps farthest from singular maps.

    The product moves straight from W₀ to the optimum, and where that line meets a singular map (as
    half of all random ones do) natural gradient descent cannot pass.
    """
    x, y = (np.asarray(a) for a in train)
    best = np.linalg.lstsq(x, y, rcond=None)[0]
    shares = 1 - np.exp(-ALPHA * np.linspace(0, steps, 60))

    def least_singular_value(seed: int) -> float:
        W = np.linalg.multi_dot([p["kernel"] for p in start(task, seed).values()])
        path = [(1 - s) * W + s * best for s in shares]
        return min(np.linalg.svd(m, compute_uv=False)[-1] for m in path)

    return start(task, max(range(100), key=least_singular_value))


def exact(task: Task, steps: int) -> dict[str, Any]:
    """The excess training loss with exact expectations, and the slope of its logarithm."""
    own = partial(loss_fn, task.model)
    train = jax.tree.map(lambda a: a[:EXACT_EXAMPLES], task.train)
    params = regular_start(task, train, steps)
    layers = ng.find_layers(own, params, train)
    tx = ng.ngd(ALPHA, layers, damping=0.0, inverse=ng.Eigh(cutoff=1e-13))
    grad_fn = ng.value_and_grad(own, layers, fisher="exact")

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> Any:
        loss, grads, statistics = grad_fn(params, batch, opt_state=state)
        updates, state = tx.update(grads, state, params, statistics=statistics)
        return optax.apply_updates(params, updates), state, loss

    state, losses = tx.init(params), []
    for _ in range(steps):
        params, state, loss = step(params, state, train)
        losses.append(float(loss))
    excess = np.array(losses) - least(task, train)
    slopes = np.diff(np.log(excess))
    theory = 2 * np.log(1 - ALPHA)
    return {
        "excess": excess.tolist(),
        "theory": theory,
        "slope_over_theory": float(slopes.mean() / theory),
        "worst_step": float(np.abs(slopes / theory - 1).max()),
    }


def train(task: Task, make: Any, batch_size: int, passes: float, points: int, seed: int) -> Any:
    """Examples, seconds and test loss of one optimizer on shuffled mini-batches."""
    params = start(task, seed)
    own = partial(loss_fn, task.model)
    layers = ng.find_layers(own, params, task.train)
    tx, natural = make(layers)
    grad_fn = ng.value_and_grad(own, layers, fisher="mc" if natural else "none")
    plain = jax.value_and_grad(lambda p, b: own(p, b).value)

    @jax.jit
    def step(params: Any, state: Any, key: Any, indices: jax.Array) -> Any:
        batch = jax.tree.map(lambda a: a[indices], task.train)
        if natural:
            value, grads, statistics = grad_fn(params, batch, rng=key, opt_state=state)
            extra = {"statistics": statistics, "value": value, "args": (batch,),
                     "value_fn": lambda p: own(p, batch).value}  # fmt: skip
        else:
            (_, grads), extra = plain(params, batch), {}
        updates, state = optax.with_extra_args_support(tx).update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    test = jax.jit(lambda p: own(p, task.test).value)
    size = len(task.train[0])
    count = int(passes * size / batch_size)
    random = np.random.default_rng(seed)
    order = np.concatenate([random.permutation(size) for _ in range(int(passes) + 1)])
    order = jnp.asarray(order[: count * batch_size].reshape(count, batch_size))
    state = tx.init(params)
    jax.block_until_ready(step(params, state, jax.random.key(0), order[0]))  # compiled
    found: dict[str, list[float]]
    found = {"examples": [0], "seconds": [0.0], "loss": [float(test(params))]}
    begin, untimed = time.perf_counter(), 0.0
    for i in range(count):
        params, state = step(params, state, jax.random.key(i), order[i])
        if (i + 1) % max(count // points, 1) == 0:
            jax.block_until_ready(params)
            pause = time.perf_counter()
            found["seconds"].append(pause - begin - untimed)
            found["examples"].append((i + 1) * batch_size)
            found["loss"].append(float(test(params)))
            untimed += time.perf_counter() - pause
            if not np.isfinite(found["loss"][-1]):
                break
    return found


def natural(task: Task) -> Any:
    def make(layers: ng.Layers) -> Any:
        own = partial(loss_fn, task.model)
        damped = lambda damping: ng.ngd(1.0, layers, damping=damping)
        rule, bounds = ng.bernacchia(), (1e-12, 1e4)
        return ng.adaptive_damping(damped, rule, own, initial=1e-2, bounds=bounds), True

    return make


def compare(task: Task, args: argparse.Namespace) -> dict[str, Any]:
    """Natural gradient, and SGD at the best rate of the grid by its loss after a third of it."""
    found = {"ngd": train(task, natural(task), args.batch_size, args.passes, 60, 0)}
    last = lambda run: run["loss"][-1] if np.isfinite(run["loss"][-1]) else np.inf
    sgd = lambda rate: lambda layers: (optax.sgd(rate), False)
    search = {rate: last(train(task, sgd(rate), 20, args.passes / 3, 5, 0)) for rate in RATES}
    rate = min(search, key=search.__getitem__)
    found["sgd"] = train(task, sgd(rate), 20, args.passes, 60, 0) | {"rate": rate}
    found["least"] = least(task, task.test)
    found["search"] = {str(r): loss for r, loss in search.items()}
    return found


def plot(results: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    axes = figure.subplots(1, 3)
    for (name, result), (line, marker) in zip(results.items(), report.STYLES, strict=False):
        look = {"linestyle": line, "marker": marker, "markersize": 4}
        if "exact" in result:
            excess = np.array(result["exact"]["excess"])
            axes[0].plot(excess / excess[0], label=name, markevery=max(len(excess) // 8, 1), **look)
        for ax, x in ((axes[1], "examples"), (axes[2], "seconds")):
            for method, color in (("ngd", "C0"), ("sgd", "C3")):
                run = result["batches"][method]
                above = np.maximum(np.array(run["loss"]) - result["batches"]["least"], 1e-12)
                ax.plot(run[x], above, color=color, label=f"{name}, {method}",
                        markevery=10, **look)  # fmt: skip
    steps = np.arange(len(excess))
    axes[0].plot(steps, (1 - ALPHA) ** (2 * steps), "k:", label="(1 − α)²ᵗ")
    axes[0].set(xlabel=f"steps, α = {ALPHA}, exact expectations",
                ylabel="excess training loss / at the start", yscale="log")  # fmt: skip
    axes[1].set(xlabel="training examples seen", ylabel="test loss above the least one (nats)",
                yscale="log")  # fmt: skip
    axes[2].set(xlabel="seconds", yscale="log")
    for ax in axes:
        ax.grid(which="major", color="0.9")
        ax.legend(fontsize=7)
    figure.savefig(path, dpi=130)


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", default="A,B,C", help="of A, B, C")
    parser.add_argument("--steps", type=int, default=150, help="with exact expectations")
    parser.add_argument("--passes", type=float, default=10.0, help="over the training set")
    parser.add_argument("--batch-size", type=int, default=1000, help="of the natural gradient")
    parser.add_argument("--examples", type=int, default=10_000, help="in the training set")
    parser.add_argument("--output", type=Path, default=Path("deep-linear"))
    args = parser.parse_args(argv)
    console, results = Console(), {}
    with jax.enable_x64(True):
        for name in args.networks.split(","):
            task = make_task(NETWORKS[name], args.examples, 1000, seed=0)
            result: dict[str, Any] = {"batches": compare(task, args)}
            if min(NETWORKS[name]) == NETWORKS[name][0]:
                result["exact"] = slopes = exact(task, args.steps)
                console.print(f"{name}: slope {slopes['slope_over_theory']:.4f} of 2 ln(1 − α), "
                              f"worst step {slopes['worst_step']:.2%} off")  # fmt: skip
            results[name], runs = result, result["batches"]
            for method in ("ngd", "sgd"):
                run = runs[method]
                console.print(f"   {method}: test loss {run['loss'][-1]:.6g} (least "
                              f"{runs['least']:.6g}) after {run['examples'][-1]} examples, "
                              f"{run['seconds'][-1]:.1f} s")  # fmt: skip
    figure, numbers = (args.output.with_name(args.output.name + s) for s in (".png", ".json"))
    figure.parent.mkdir(parents=True, exist_ok=True)
    plot(results, figure)
    settings = {"command": shlex.join(["python", "benchmarks/papers/deep_linear.py", *argv]),
                "alpha": ALPHA, "noise": NOISE, "networks": results}  # fmt: skip
    report.write_json(numbers, settings, [], [])
    report.tell_files(console, figure, numbers)


if __name__ == "__main__":
    main()
