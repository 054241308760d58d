"""Natural Neural Networks, figure 2: whitening makes the Fisher well conditioned.

    python benchmarks/papers/prong_conditioning.py --data mnist --data-dir DIR

A 3-layer tanh network on images of 10 x 10 pixels, its explicit Fisher (float64) before and after
whitening, and the condition number while it trains with SGD, RMSprop, batch normalization and
PRONG, as a share of the one at the start. The picture and every number are written beside one
another.
"""

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
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
from lib import data, report

SIDE, HIDDEN, CLASSES = 10, 20, 10
EPSILON = 1e-3
RATES = {"sgd": 0.1, "rmsprop": 3e-3, "batch norm": 0.1, "prong": 0.01}


class MLP(nn.Module):
    """Three layers, tanh; batch normalization before each tanh if asked, whitened if asked."""

    normalized: bool = False
    whitened: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dense = ng.WhitenedDense if self.whitened else nn.Dense
        for i in range(2):
            x = dense(HIDDEN, name=f"hidden_{i}")(x)
            if self.normalized:
                x = nn.BatchNorm(use_running_average=False, name=f"norm_{i}")(x)
            x = nn.tanh(x)
        return dense(CLASSES, name="readout")(x)


class Setting(NamedTuple):
    """What all curves share: images, labels, and the part on which the Fisher is measured."""

    x: jax.Array
    y: jax.Array
    part: tuple[jax.Array, jax.Array]


def loss_fn(model: MLP, params: Any, batch: Any, whitening: Any = None) -> ng.Loss:
    variables = {"params": params, "whitening": whitening or {}}
    logits = model.apply(variables, batch[0], mutable=["batch_stats"])[0]
    return ng.Categorical(logits).nll(batch[1])


def shrink(images: np.ndarray) -> np.ndarray:
    """``(N, SIDE * SIDE)`` images by area averages."""
    size = images.shape[1]
    weights = np.zeros((SIDE, size))
    edges = np.linspace(0, size, SIDE + 1)
    for i in range(SIDE):
        inside = np.minimum(edges[i + 1], np.arange(1, size + 1)) - np.maximum(
            edges[i], np.arange(size)
        )
        weights[i] = np.maximum(inside, 0) / (edges[i + 1] - edges[i])
    small = np.einsum("ih,nhwc,jw->nij", weights, images, weights)
    return small.reshape(len(images), -1)


def hidden_fisher(
    model: MLP, setting: Setting, params: Any, coordinates: Any, layers: ng.Layers
) -> jax.Array:
    """The exact Fisher of the middle layer's parameters, in whitened ones where there are such."""
    if coordinates is not None:
        params = ng.whiten(params, layers, coordinates)
        model = model.clone(whitened=True)
        variables = ng.whitening_variables(coordinates)
    else:
        variables = None

    def of_middle(middle: Any, batch: Any) -> ng.Loss:
        return loss_fn(model, {**params, "hidden_1": middle}, batch, variables)

    return ng.fisher(of_middle, params["hidden_1"], setting.part, fisher="exact")


def condition(F: jax.Array) -> float:
    """The largest eigenvalue over the smallest that is not zero (batch normalization has some)."""
    values = np.linalg.eigvalsh(np.asarray(F))
    return float(values[-1] / values[values > 1e-10 * values[-1]][0])


def curve(
    name: str, setting: Setting, steps: int, points: int, batch_size: int
) -> tuple[list[int], list[float], list[float]]:
    """Steps, condition numbers and losses of one optimizer."""
    model = MLP(normalized=name == "batch norm")
    init = jax.jit(lambda key: model.init(key, setting.x[:2])["params"])
    params = jax.tree.map(lambda p: p.astype(jnp.float64), init(jax.random.key(0)))
    own_loss = partial(loss_fn, model)
    layers = ng.find_layers(own_loss, params, setting.part, blocks={"norm_*": "gradient"}
                            if model.normalized else None)  # fmt: skip
    make: Callable[[], Any] = {
        "sgd": lambda: optax.sgd(RATES[name]),
        "batch norm": lambda: optax.sgd(RATES[name]),
        "rmsprop": lambda: optax.rmsprop(RATES[name]),
        "prong": lambda: ng.prong(RATES[name], layers, momentum=None, epsilon=EPSILON,
                                  samples=1000, refresh_period=steps // 5),
    }[name]  # fmt: skip
    tx = make()
    grad_fn = ng.value_and_grad(own_loss, layers, fisher="none")

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> Any:
        own = {"opt_state": state} if name == "prong" else {}
        loss, grads, statistics = grad_fn(params, batch, **own)
        extra = {"statistics": statistics} if name == "prong" else {}
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state, loss

    measure = jax.jit(lambda params, coordinates: hidden_fisher(
        model, setting, params, coordinates, layers))  # fmt: skip
    state = tx.init(params)
    whole = ng.value_and_grad(own_loss, layers, fisher="none")
    order = np.random.default_rng(0).integers(len(setting.x), size=(steps, batch_size))
    found: tuple[list[int], list[float], list[float]] = ([], [], [])
    for i in range(steps + 1):
        if i % (steps // points) == 0:
            coordinates = None
            if name == "prong":
                coordinates = ng.bases(state) if i else ng.whitening(
                    whole(params, setting.part)[2], layers, EPSILON)  # fmt: skip
            found[0].append(i)
            found[1].append(condition(measure(params, coordinates)))
            found[2].append(float(own_loss(params, setting.part).value))
        if i < steps:
            index = jnp.asarray(order[i])
            params, state, _ = step(params, state, (setting.x[index], setting.y[index]))
    return found


def before_and_after(setting: Setting) -> tuple[np.ndarray, np.ndarray]:
    """The middle layer's Fisher at the start, canonical and whitened."""
    model = MLP()
    init = jax.jit(lambda key: model.init(key, setting.x[:2])["params"])
    params = jax.tree.map(lambda p: p.astype(jnp.float64), init(jax.random.key(0)))
    layers = ng.find_layers(partial(loss_fn, model), params, setting.part)
    grad_fn = ng.value_and_grad(partial(loss_fn, model), layers, fisher="none")
    coordinates = ng.whitening(grad_fn(params, setting.part)[2], layers, EPSILON)
    return tuple(
        np.asarray(hidden_fisher(model, setting, params, own, layers))
        for own in (None, coordinates)
    )


def plot(pair: Any, curves: dict[str, Any], path: Path) -> None:
    """The two matrices (absolute values, one scale each) and the curves."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.9), layout="constrained")
    axes = figure.subplots(1, 3)
    for ax, F, title in zip(axes, pair, ("before whitening", "after whitening"), strict=False):
        image = ax.imshow(np.abs(F) / np.abs(F).max(), cmap="gray_r", vmin=0, vmax=0.5)
        ax.set(title=f"{title}: condition number {condition(F):.3g}",
               xlabel="parameter of the middle layer", ylabel="parameter")  # fmt: skip
        figure.colorbar(image, ax=ax, label="|F| / max |F|", shrink=0.8)
    for (name, (steps, numbers, _)), (line, marker) in zip(
        curves.items(), report.STYLES, strict=False
    ):
        axes[2].plot(steps, 100 * np.asarray(numbers) / curves["sgd"][1][0], label=name,
                     linestyle=line, marker=marker, markersize=4)  # fmt: skip
    axes[2].set(xlabel="steps", yscale="log",
                ylabel="condition number (% of SGD's at the start)")  # fmt: skip
    axes[2].grid(which="both", color="0.9")
    axes[2].legend()
    figure.savefig(path, dpi=130)


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=data.DATASETS[:3], default="digits")
    parser.add_argument("--data-dir", metavar="DIR")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--points", type=int, default=10, help="measurements on a curve")
    parser.add_argument("--examples", type=int, default=1000, help="that the Fisher is of")
    parser.add_argument("--output", type=Path, default=Path("paper-prong-conditioning"))
    args = parser.parse_args(argv)
    with jax.enable_x64(True):
        dataset = data.load_or_exit(args.data, args.data_dir)
        x, y = jnp.asarray(shrink(dataset.train_images)), jnp.asarray(dataset.train_labels)
        setting = Setting(x, y, (x[: args.examples], y[: args.examples]))
        pair = before_and_after(setting)
        curves = {name: curve(name, setting, args.steps, args.points, 128) for name in RATES}
    command = shlex.join(["python", "benchmarks/papers/prong_conditioning.py", *argv])
    finish(pair, curves, args, command)


def finish(pair: Any, curves: Any, args: argparse.Namespace, command: str) -> None:
    figure, numbers = (args.output.with_name(args.output.name + s) for s in (".png", ".json"))
    figure.parent.mkdir(parents=True, exist_ok=True)
    plot(pair, curves, figure)
    before, after = map(condition, pair)
    settings = {
        "command": command, "data": args.data, "epsilon": EPSILON, "rates": RATES,
        "condition_before": before, "condition_after": after, "fall": 1 - after / before,
        "curves": {name: dict(zip(("steps", "condition", "loss"), c, strict=True))
                   for name, c in curves.items()},
    }  # fmt: skip
    report.write_json(numbers, settings, [], [])
    console = Console()
    console.print(f"condition number {before:.4g} before, {after:.4g} after whitening: "
                  f"{1 - after / before:.2%} lower")  # fmt: skip
    for name, (_, conditions, losses) in curves.items():
        console.print(f"{name:>10}: {conditions[0]:.4g} at the start, {conditions[-1]:.4g} at the "
                      f"end, loss {losses[-1]:.3f}")  # fmt: skip
    report.tell_files(console, figure, numbers)


if __name__ == "__main__":
    main()
