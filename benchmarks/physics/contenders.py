"""Whom ``pinn.py`` compares: a step of each optimizer, and the few settings that it may choose of.

A setting's numbers are arguments of the step, so that all settings share one compiled program.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from lib import pde

import natgrad_jax as ng

Setting = dict[str, float]
Making = Callable[..., Any]  # layers, the loss, options: a transformation
# A problem and the fraction of points that statistics are measured on: what starts a state, of
# params and a setting, and the step, of params, opt_state, points, key, part and a setting.
Contender = Callable[[pde.Problem, float], tuple[Callable[..., Any], Callable[..., Any]]]


def exact(make: Callable[..., Any]) -> Contender:
    """``make(**setting)``: a transformation of the rows of ``fisher="exact"`` without layers."""

    def contender(problem, _):
        grad_fn = ng.value_and_grad(problem.loss_fn, fisher="exact")

        def step(params, opt_state, points, key, part, setting):
            loss, grads, rows = grad_fn(params, points)
            # optax's line search gives its function all that update gets, and wants it named
            value_fn = lambda params, statistics: problem.loss_fn(params, points).value
            more = {"statistics": rows, "value": loss, "grad": grads, "value_fn": value_fn}
            tx = optax.with_extra_args_support(make(**setting))
            updates, opt_state = tx.update(grads, opt_state, params, **more)
            return optax.apply_updates(params, updates), opt_state, loss

        return lambda params, setting: make(**setting).init(params), step

    return contender


def searching(**setting: Any) -> Any:
    """From the whole step, the rate 1, by halves until the loss falls."""
    halving = optax.scale_by_backtracking_linesearch(
        20, decrease_factor=0.5, increase_factor=float("inf")
    )
    return optax.chain(ng.scale_by_exact_ngd(**setting), optax.scale(-1.0), halving)


def natural(make: Making, fisher: str = "exact") -> Contender:
    """K-FAC or EKFAC, with ``fisher`` of the layers."""

    def contender(problem, fraction):
        layers = ng.find_layers(problem.loss_fn, problem.init(0), problem.points)
        grad_fn = ng.value_and_grad(problem.loss_fn, layers, fisher=fisher)

        def transformation(setting: Setting) -> Any:
            numbers = dict(setting)
            period = jnp.asarray(numbers.pop("period"), jnp.int32)  # of measuring and refreshing
            numbers |= {"statistics_period": period, "refresh_period": period}
            return make(layers, problem.loss_fn, statistics_fraction=fraction, **numbers)

        def step(params, opt_state, points, key, part, setting):
            loss, grads, statistics = grad_fn(params, points, rng=key, opt_state=opt_state)
            more = {"statistics": statistics, "grad": grads, "args": (points,)}
            updates, opt_state = transformation(setting).update(grads, opt_state, params, **more)
            return optax.apply_updates(params, updates), opt_state, loss

        return lambda params, setting: transformation(setting).init(params), step

    return contender


def at_rate(alias: Callable[..., Any], **how: str) -> Making:
    return lambda layers, _, learning_rate, **more: alias(learning_rate, layers, **how, **more)


def rescaled(scale: Callable[..., Any], **how: str) -> Making:
    def make(layers, loss_fn, damping, **more):
        model = ng.scale_by_quadratic_model(loss_fn, damping=damping)
        return optax.chain(scale(layers, damping, **how, **more), model)

    return make


def adam(problem: pde.Problem, _: float) -> Any:
    """``part``: of the seconds, how many have passed."""
    tx = optax.scale_by_adam()

    def step(params, opt_state, points, key, part, setting):
        loss, grads = jax.value_and_grad(lambda p: problem.loss_fn(p, points).value)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        rate = setting["learning_rate"] * (0.5 + 0.5 * jnp.cos(jnp.pi * part))
        return jax.tree.map(lambda p, u: p - rate * u, params, updates), opt_state, loss

    return lambda params, setting: tx.init(params), step


def lbfgs(problem: pde.Problem, _: float) -> Any:
    tx = optax.lbfgs()

    def step(params, opt_state, points, key, part, setting):
        value_fn = lambda params: problem.loss_fn(params, points).value
        loss, grads = optax.value_and_grad_from_state(value_fn)(params, state=opt_state)
        more = {"value": loss, "grad": grads, "value_fn": value_fn}
        updates, opt_state = tx.update(grads, opt_state, params, **more)
        return optax.apply_updates(params, updates), opt_state, loss

    return lambda params, setting: tx.init(params), step


# The best few of small grids on poisson-2: damping 1e-6 to 1e-2, rate 0.03 to 0.3, momentum 0 and
# 0.9, decay 0 to 0.95, trust radius 1e-3 to 1, period 2 to 20.
DESCENT = {"period": 20, "learning_rate": 0.1, "momentum": 0.9, "decay": 0.0}
DAMPED = [DESCENT | {"damping": radius, "trust_radius": radius} for radius in (1e-3, 1e-2)]
RESCALED = [{"period": 20, "decay": 0.0, "damping": damping} for damping in (1e-4, 1e-3)]
# Damping 1e-8 to 1 on all problems; SPRING's rate 0.1 and 0.3, momentum 0.5 and 0.9 on poisson-2.
SEARCHING = [{"damping": damping} for damping in (1e-7, 1e-5, 1e-3)]
FIXED = {"learning_rate": 0.3, "momentum": 0.9}
SPRING = [FIXED | {"damping": damping} for damping in (1e-3, 1e-2, 1e-1)]
KFAC, EKFAC = {"inverse": "eigh"}, {"basis": "eigh"}
CONTENDERS: dict[str, tuple[Contender, list[Setting]]] = {
    "kfac": (natural(at_rate(ng.kfac, **KFAC)), DAMPED),
    "ekfac": (natural(at_rate(ng.ekfac, **EKFAC)), DAMPED),
    "kfac-rescaled": (natural(rescaled(ng.scale_by_kfac, **KFAC)), RESCALED),
    "kfac-rescaled-mc": (natural(rescaled(ng.scale_by_kfac, **KFAC), "mc"), RESCALED),
    "ekfac-rescaled": (natural(rescaled(ng.scale_by_ekfac, **EKFAC)), RESCALED),
    "exact-ngd": (exact(searching), SEARCHING),
    "spring": (exact(ng.exact_ngd), SPRING),
    "adam": (adam, [{"learning_rate": rate} for rate in (1e-3, 3e-3, 1e-2)]),
    "lbfgs": (lbfgs, [{}]),
}
