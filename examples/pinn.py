"""A physics-informed network: Poisson's equation on a square, by Adam, K-FAC and the exact Fisher.

The network is trained until it fulfils −Δu = f inside and u = 0 on the boundary; the solution,
sin πx sin 2πy, is known, and serves to measure the error. The loss differentiates the network
twice. K-FAC finds its layers in it all the same, and takes its step size and momentum from the
exact quadratic model of the loss. ``ng.exact_ngd`` solves with the whole Fisher, which a network
of a few thousand parameters allows.

    python examples/pinn.py          # a minute on one core
    python examples/pinn.py --fast   # a few steps, as the tests do
"""

import argparse
import itertools
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

import natgrad_jax as ng

WIDTHS, INSIDE, BOUNDARY, GRID = (2, 32, 32, 1), 400, 120, 65
STEPS = {"Adam": 2500, "K-FAC": 600, "exact NGD": 80}
FAST = {"Adam": 100, "K-FAC": 100, "exact NGD": 25}


def solution(x):
    return jnp.sin(jnp.pi * x[..., 0]) * jnp.sin(2 * jnp.pi * x[..., 1])


def init(key):
    glorot, keys = jax.nn.initializers.glorot_normal(), jax.random.split(key, len(WIDTHS))
    return [(glorot(k, s), jnp.zeros(s[1])) for k, s in zip(keys, itertools.pairwise(WIDTHS))]


def network(params, x):
    """One number at each point: x is (2,) or (N, 2)."""
    for W, b in params[:-1]:
        x = jnp.tanh(x @ W + b)
    W, b = params[-1]
    return (x @ W + b)[..., 0]


def loss_fn(params, inside, boundary):
    laplacian = lambda x: jnp.trace(jax.hessian(network, argnums=1)(params, x))
    residual = jax.vmap(laplacian)(inside) + 5 * jnp.pi**2 * solution(inside)
    equation = ng.Gaussian(residual, event_ndims=0).nll(jnp.zeros(len(inside)))
    edge = ng.Gaussian(network(params, boundary), event_ndims=0).nll(jnp.zeros(len(boundary)))
    return equation + 100.0 * edge  # the source is large, so the boundary has to be


def sample(key):
    """Points inside, and on the four sides in turn."""
    keys, row = jax.random.split(key), jnp.arange(BOUNDARY)
    edge = jax.random.uniform(keys[1], (BOUNDARY, 2)).at[row, row % 2].set(row // 2 % 2)
    return jax.random.uniform(keys[0], (INSIDE, 2)), edge


def contender(name, params, points, steps):
    """The transformation, and what measures its loss, gradients and statistics."""
    if name == "Adam":  # of 3e-3, 1e-2, 2e-2 and 5e-2
        plain = jax.value_and_grad(lambda params, *points: loss_fn(params, *points).value)
        tx = optax.with_extra_args_support(optax.adam(optax.cosine_decay_schedule(2e-2, steps)))
        return tx, lambda params, points, _: (*plain(params, *points), None)
    if name == "K-FAC":  # damping: of 1e-4, 1e-3 and 1e-2
        layers = ng.find_layers(loss_fn, params, *points)
        grad_fn = ng.value_and_grad(loss_fn, layers, fisher="exact")
        kfac = ng.scale_by_kfac(layers, 1e-3, decay=0.0, inverse="eigh", statistics_fraction=0.25)
        tx = optax.chain(kfac, ng.scale_by_quadratic_model(loss_fn, damping=1e-3))
        return tx, lambda params, points, state: grad_fn(params, *points, opt_state=state)
    grad_fn = ng.value_and_grad(loss_fn, fisher="exact")  # without layers
    halving = optax.scale_by_backtracking_linesearch(
        20,
        decrease_factor=0.5,
        increase_factor=float("inf"),  # from 1, until the loss falls
    )
    tx = optax.chain(ng.scale_by_exact_ngd(1e-7), optax.scale(-1.0), halving)
    return tx, lambda params, points, _: grad_fn(params, *points)


def train(name, steps, tested):
    """The parameters, the relative L2 error after each step, and the seconds without compiling."""
    params, truth = init(jax.random.key(0)), solution(tested)
    tx, measure = contender(name, params, sample(jax.random.key(1)), steps)

    @jax.jit
    def step(params, opt_state, key):
        points = sample(key)  # new ones each time
        loss, grads, statistics = measure(params, points, opt_state)
        given = {"grad": grads, "value": loss, "statistics": statistics, "args": points}
        if name == "exact NGD":  # optax's line search gives value_fn all that it does not know
            given["value_fn"] = lambda params, statistics, args: loss_fn(params, *args).value
        updates, opt_state = tx.update(grads, opt_state, params, **given)
        params = optax.apply_updates(params, updates)
        error = jnp.linalg.norm(network(params, tested) - truth) / jnp.linalg.norm(truth)
        return params, opt_state, error

    opt_state, errors = tx.init(params), []
    # compiles; twice, since optax's line search begins with a state of other (weak) types
    _, again, _ = step(params, opt_state, jax.random.key(0))
    jax.block_until_ready(step(params, again, jax.random.key(0)))
    begun = time.perf_counter()
    for i in track(range(steps), f"{name:9}"):
        params, opt_state, error = step(params, opt_state, jax.random.key(i))
        errors.append(float(error))
    return params, errors, time.perf_counter() - begun


def plot(path, curves, seconds, tested, wrong):
    """Errors against seconds; the solution, and where the best network is wrong."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    axes, *maps = figure.subplots(1, 3, width_ratios=(1.3, 1, 1))
    for name, errors in curves.items():
        axes.plot(np.linspace(0, seconds[name], len(errors)), errors, label=name)
    axes.set(yscale="log", xlabel="seconds of training", ylabel="relative L2 error")
    axes.legend()
    for panel, title, values in zip(
        maps, ("solution", "error of exact NGD"), (solution(tested), wrong)
    ):
        limit = float(jnp.abs(values).max())
        image = panel.imshow(
            values.reshape(GRID, GRID).T, origin="lower", extent=(0, 1, 0, 1), cmap="RdBu",
            vmin=-limit, vmax=limit,
        )  # fmt: skip
        panel.set(title=title, xlabel="x", ylabel="y")
        figure.colorbar(image, ax=panel)
    figure.savefig(path, dpi=100)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="a few steps")
    parser.add_argument("--output", type=Path, default=Path("pinn.png"))
    args, _ = parser.parse_known_args(argv)  # a notebook has arguments of its own
    curves, seconds, table = {}, {}, Table("", "steps", "seconds", "relative L2 error")
    with jax.enable_x64(True):  # the exact natural gradient needs it to get far
        axis = jnp.linspace(0, 1, GRID)
        tested = jnp.stack(jnp.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
        for name, steps in (FAST if args.fast else STEPS).items():
            params, curves[name], seconds[name] = train(name, steps, tested)
            table.add_row(name, f"{steps}", f"{seconds[name]:.0f}", f"{curves[name][-1]:.1e}")
        plot(args.output, curves, seconds, tested, network(params, tested) - solution(tested))
    Console().print(table)
    return {name: errors[-1] for name, errors in curves.items()}


if __name__ == "__main__":
    main()
