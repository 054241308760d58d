"""Laplace: what a trained regression does not know, from the curvature that it was trained with.

A small network is fitted to noisy points of a curve, with a gap in them. Its EKFAC curvature over
the data gives a normal posterior of the parameters, the evidence chooses the prior's precision
without a validation set, and the network linearized at draws of the posterior gives a band: narrow
where there are data, wide in the gap and outside. Predictions of held-out points are scored with
it, and without.

    python examples/laplace.py          # half a minute on one core
    python examples/laplace.py --fast   # fewer steps, as the tests do
"""

import argparse
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

POINTS, NOISE, HIDDEN = 150, 0.15, 50
GAP = (0.0, 1.5)  # no data in it
truth = lambda x: jnp.sin(2 * x) + 0.3 * x


def observe(key, x):
    """Noisy values of the curve."""
    return truth(x) + NOISE * jax.random.normal(key, x.shape)


def init(key):
    keys, widths = jax.random.split(key, 3), (1, HIDDEN, HIDDEN, 1)
    make = lambda key, n, m: {"W": jax.random.normal(key, (n, m)) / n**0.5, "b": jnp.zeros(m)}
    return [make(*given) for given in zip(keys, widths, widths[1:])]


def predict(params, x):
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["W"] + layer["b"])
    return x @ params[-1]["W"] + params[-1]["b"]


def loss_fn(params, x, y):
    return ng.Gaussian(predict(params, x), NOISE**2).nll(y)  # NOISE is taken as known


def train(x, y, steps):
    params = init(jax.random.key(0))
    layers = ng.find_layers(loss_fn, params, x, y)
    tx = ng.kfac(optax.cosine_decay_schedule(0.1, steps), layers)
    grad_fn, opt_state = ng.value_and_grad(loss_fn, layers), tx.init(params)

    @jax.jit
    def step(params, opt_state, key):
        loss, grads, statistics = grad_fn(params, x, y, rng=key, opt_state=opt_state)
        updates, opt_state = tx.update(grads, opt_state, params, statistics=statistics)
        return optax.apply_updates(params, updates), opt_state, loss

    for i in track(range(steps), "training"):
        params, opt_state, loss = step(params, opt_state, jax.random.key(i))
    return params, layers, float(loss)


def posterior(params, layers, loss, x, y):
    """The curvature over the data, and the prior's precision of the largest evidence."""
    curvature = ng.posterior.from_data(
        loss_fn, params, [(x, y)], layers, kind="ekfac", fisher="exact"
    )
    grid = 10.0 ** jnp.linspace(-2, 3, 26)
    evidence = jax.vmap(
        lambda tau: ng.posterior.log_marginal_likelihood(
            curvature, params, loss, examples=len(x), prior_precision=tau
        )
    )(grid)
    return curvature, float(grid[evidence.argmax()])


def deviation(params, curvature, precision, at, draws=500):
    """The standard deviation of the linearized network's value at the points ``at``.

    ``f(θ*) + J (θ − θ*)`` is the model of which the posterior is exactly normal; f itself, at
    draws far from θ*, is not (Immer, Korzepa & Bauer 2021).
    """

    def value(key):
        drawn = ng.posterior.sample(
            curvature, params, key, examples=POINTS, prior_precision=precision
        )
        direction = jax.tree.map(jnp.subtract, drawn, params)
        return jax.jvp(lambda params: predict(params, at), (params,), (direction,))[1]

    return jax.jit(jax.vmap(value))(jax.random.split(jax.random.key(1), draws)).std(0)


def scores(y, mean, std):
    """The mean negative log likelihood, and the share of points within 95 %."""
    nll = 0.5 * ((y - mean) / std) ** 2 + jnp.log(std) + 0.5 * np.log(2 * np.pi)
    return float(nll.mean()), float((jnp.abs(y - mean) < 1.96 * std).mean())


def plot(path, x, y, grid, mean, std):
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes, grid = figure.subplots(), grid[:, 0]
    total = (std**2 + NOISE**2) ** 0.5
    for deviation, label, color in (
        (total, "95 % of observations", "C7"),
        (std, "95 % of the curve", "C0"),
    ):
        low, high = (mean + sign * 1.96 * deviation for sign in (-1, 1))
        axes.fill_between(grid, low[:, 0], high[:, 0], color=color, alpha=0.5, lw=0, label=label)
    axes.plot(grid, mean[:, 0], "C0", label="the network")
    axes.plot(grid, truth(grid), "k--", lw=1, label="the truth")
    axes.plot(x[:, 0], y[:, 0], "k.", ms=3, label="data")
    axes.set(
        xlabel="x",
        ylabel="y",
        ylim=(-4, 4),
        title="a network and its Laplace posterior",
    )
    axes.legend(ncols=2, fontsize="small")
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="fewer steps")
    parser.add_argument("--output", type=Path, default=Path("laplace.png"))
    args, _ = parser.parse_known_args(argv)  # a notebook has arguments of its own
    x = jnp.concatenate([jnp.linspace(-2.5, 0, POINTS // 2), jnp.linspace(1.5, 2.5, POINTS // 2)])
    x = x[:, None]
    y = observe(jax.random.key(0), x)
    params, layers, loss = train(x, y, 150 if args.fast else 1500)
    curvature, precision = posterior(params, layers, loss, x, y)

    tested = jnp.linspace(-4, 4, 2001)[:, None]
    values = observe(jax.random.key(2), tested)
    mean, std = predict(params, tested), deviation(params, curvature, precision, tested)
    beyond, within_gap = jnp.abs(tested) > 2.5, (tested > GAP[0]) & (tested < GAP[1])
    places = {"data": ~beyond & ~within_gap, "gap": within_gap, "beyond": beyond}
    results = {"precision": precision}
    table = Table("points", "network alone, nats", "Laplace, nats", "within 95 %", "std of curve")
    for place, rows in places.items():
        y_, mean_, std_ = (z[rows] for z in (values, mean, std))
        alone, _ = scores(y_, mean_, jnp.full_like(std_, NOISE))
        nll, within = scores(y_, mean_, (std_**2 + NOISE**2) ** 0.5)
        average = float(std_.mean())
        table.add_row(place, f"{alone:.2f}", f"{nll:.2f}", f"{within:.0%}", f"{average:.2f}")
        own = {"alone": alone, "laplace": nll, "within": within, "std": average}
        results |= {f"{place}_{name}": number for name, number in own.items()}
    Console().print(table, f"the evidence chose a prior's precision of {precision:.2g}")

    grid = jnp.linspace(-4, 4, 300)[:, None]
    at_grid = deviation(params, curvature, precision, grid)
    plot(args.output, x, y, grid, predict(params, grid), at_grid)
    return results


if __name__ == "__main__":
    main()
