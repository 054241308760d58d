"""Variational Monte Carlo: the ground state of a chain of spins, by Adam, K-FAC and minSR.

The transverse-field Ising chain at its critical point, H = −Σ σᶻᵢσᶻᵢ₊₁ − Σ σˣᵢ, has a positive
ground state ψ and a known ground energy. A network gives log ψ of a configuration, Markov chains
sample ψ², and the gradient of the energy takes local energies alone. ``ng.loss`` gives that
gradient a curvature, the covariance of the derivatives of log ψ. With it, ``ng.exact_ngd`` is
stochastic reconfiguration (minSR), and K-FAC is what FermiNet is trained by.

    python examples/variational_monte_carlo.py          # a minute on one core
    python examples/variational_monte_carlo.py --fast   # a few steps, as the tests do
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

import natgrad_jax as ng

SPINS, CHAINS, WIDTH, SWEEPS = 16, 256, 16, 2


class LogPsi(nn.Module):
    """log ψ of spins (N, SPINS) of ±1, the same for a configuration moved along the ring."""

    @nn.compact
    def __call__(self, spins):
        x = nn.Conv(WIDTH, (SPINS,), padding="CIRCULAR")(spins[..., None])
        x = nn.Dense(WIDTH)(nn.gelu(x))
        return nn.Dense(1)(nn.gelu(x).mean(-2))[..., 0] * SPINS


model = LogPsi()
log_psi = lambda params, spins: model.apply({"params": params}, spins)
# of free fermions, to which the chain is equivalent (Pfeuty 1970)
EXACT = -2 * np.abs(np.cos((2 * np.arange(SPINS) + 1) * np.pi / (2 * SPINS))).sum()


def local_energies(params, spins):
    """(Hψ)(s) / ψ(s), of configurations (N, SPINS)."""
    flipped = spins[:, None] * (1 - 2 * jnp.eye(SPINS))
    ratios = jnp.exp(log_psi(params, flipped) - log_psi(params, spins)[:, None])
    return -(spins * jnp.roll(spins, 1, -1)).sum(-1) - ratios.sum(-1)


def loss_fn(params, spins, energies):
    values = log_psi(params, spins)
    gradient = 2 * jnp.mean((energies - energies.mean()) * values)  # its gradient is the energy's
    return ng.loss(gradient, ng.Gaussian(values, event_ndims=0), centred=True)


def metropolis(params, spins, key):
    """SWEEPS · SPINS proposals, in each chain, to flip one spin."""

    def propose(carry, key):
        spins, old = carry
        keys = jax.random.split(key)
        site = jax.random.randint(keys[0], (CHAINS,), 0, SPINS)
        other = spins * (1 - 2 * jax.nn.one_hot(site, SPINS))
        new = log_psi(params, other)
        accepted = jnp.log(jax.random.uniform(keys[1], (CHAINS,))) < 2 * (new - old)
        return (jnp.where(accepted[:, None], other, spins), jnp.where(accepted, new, old)), None

    keys = jax.random.split(key, SWEEPS * SPINS)
    return jax.lax.scan(propose, (spins, log_psi(params, spins)), keys)[0][0]


def contender(name, params, spins):
    """The transformation, and what measures gradients and statistics."""
    given = spins, jnp.zeros(CHAINS)
    if name == "Adam":  # of 3e-3, 1e-2 and 3e-2
        plain = jax.grad(lambda params, *batch: loss_fn(params, *batch).value)
        tx = optax.with_extra_args_support(optax.adam(1e-2))
        return tx, lambda params, batch, key, state: (plain(params, *batch), None)
    if name == "K-FAC":  # damping: of 1e-3 and 1e-1
        layers = ng.find_layers(loss_fn, params, *given)
        grad_fn = ng.value_and_grad(loss_fn, layers)
        often = {"statistics_period": 1, "refresh_period": 1, "decay": 0.95}  # ψ² moves
        tx = ng.kfac(0.05, layers, damping=0.1, trust_radius=1e-2, momentum=None, **often)
        natural = lambda params, batch, key, state: grad_fn(
            params, *batch, rng=key, opt_state=state
        )
        return tx, lambda *given: natural(*given)[1:]
    grad_fn = ng.value_and_grad(loss_fn, fisher="exact")  # without layers
    tx = ng.exact_ngd(0.05, damping=1e-4)  # damping: of 1e-4 and 1e-3
    return tx, lambda params, batch, key, state: grad_fn(params, *batch)[1:]


def train(name, steps):
    """The mean local energy at each step, and the seconds without compiling."""
    keys = jax.random.split(jax.random.key(0), 3)
    spins = jax.random.rademacher(keys[0], (CHAINS, SPINS), float)
    params = model.init(keys[1], spins)["params"]
    tx, measure = contender(name, params, spins)
    opt_state, energies = tx.init(params), []

    @jax.jit
    def step(params, opt_state, spins, key):
        keys = jax.random.split(key)
        spins = metropolis(params, spins, keys[0])
        energies = local_energies(params, spins)
        grads, statistics = measure(params, (spins, energies), keys[1], opt_state)
        updates, opt_state = tx.update(grads, opt_state, params, statistics=statistics)
        return optax.apply_updates(params, updates), opt_state, spins, energies.mean()

    jax.block_until_ready(step(params, opt_state, spins, keys[2]))  # compiles
    begun = time.perf_counter()
    for i in track(range(steps), f"{name:10}"):
        key = jax.random.fold_in(keys[2], i)
        params, opt_state, spins, energy = step(params, opt_state, spins, key)
        energies.append(float(energy))
    return np.asarray(energies), time.perf_counter() - begun


def plot(path, curves):
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, energies in curves.items():
        error = np.abs(energies - EXACT) / -EXACT
        smooth = [error[max(0, i - 9) : i + 1].mean() for i in range(len(error))]
        axes.plot(np.arange(1, len(error) + 1), smooth, label=name)
    axes.set(
        title=f"Ising chain of {SPINS} spins, {CHAINS} samples a step",
        xlabel="step", ylabel="relative error of the energy", yscale="log",
    )  # fmt: skip
    axes.legend()
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="a few steps")
    parser.add_argument("--output", type=Path, default=Path("variational_monte_carlo.png"))
    args, _ = parser.parse_known_args(argv)  # a notebook has arguments of its own
    curves, results, steps = {}, {"exact": EXACT}, 60 if args.fast else 400
    table = Table("", "energy", "relative error", "ms a step", title=f"ground energy {EXACT:.4f}")
    for name in ("Adam", "K-FAC", "minSR"):
        curves[name], seconds = train(name, steps)
        energy = curves[name][-steps // 5 :].mean()  # of the last fifth of the steps
        results[name] = float(abs(energy - EXACT) / -EXACT)
        numbers = f"{energy:.4f}", f"{results[name]:.1e}", f"{1e3 * seconds / steps:.0f}"
        table.add_row(name, *numbers)
    Console().print(table)
    plot(args.output, curves)
    return results


if __name__ == "__main__":
    main()
