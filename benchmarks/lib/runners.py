"""Training steps and refreshes, compiled apart: what ``approximations.py`` runs in turn."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from lib.vgg import Problem

import natgrad_jax as ng

MOMENTUM = 0.9
LEARNING_RATE = 1e-3
DAMPING = 1e-2
STATISTICS_PERIOD = 10
REFRESH_PERIOD = 50


class Method(NamedTuple):
    """A transformation of natgrad_jax, by name, and its approximation."""

    transformation: str
    convolution: str
    grouped: bool


METHODS = {
    "kfac-kfc": Method("scale_by_kfac", "kfc", False),
    "kfac-sua": Method("scale_by_kfac", "sua", False),
    "kfac-groups": Method("scale_by_kfac", "kfc", True),
    "kfac-sua-groups": Method("scale_by_kfac", "sua", True),
    "ekfac-kfc": Method("scale_by_ekfac", "kfc", False),
    "ekfac-sua": Method("scale_by_ekfac", "sua", False),
    "ekfac-groups": Method("scale_by_ekfac", "kfc", True),
    "ekfac-sua-groups": Method("scale_by_ekfac", "sua", True),
}


class Due(NamedTuple):
    """What the clock says is due: ``step`` 0 is due for a refresh, 1 is not."""

    step: int
    statistics: bool


# What is timed. The refresh of the one layer is that of another problem.
DUE = {
    "step": Due(1, False),
    "statistics_step": Due(1, True),
    "refresh": Due(0, False),
    "layer_refresh": Due(0, False),
}


@dataclass
class Runner:
    """Compiled programs with what they work on, which every run replaces.

    ``carry``: params, opt_state, batch_stats. ``step``: of carry, batch, key; gives the next carry
    and the loss. ``refresh``: of the preconditioner's state, which is first in its chain.
    """

    name: str
    kinds: tuple[str, ...]
    batch: Callable[[jax.Array], Any]
    carry: Any
    step: Callable[..., Any]
    compile_s: float
    refresh: Callable[[Any], Any] | None = None
    losses: list[float] = field(default_factory=list)

    def seconds(self, kind: str, key: jax.Array) -> float:
        """Of one run."""
        if self.refresh is not None:
            self._set_clock(DUE[kind])
        batch = self.batch(key)
        jax.block_until_ready((self.carry, batch))
        begun = time.perf_counter()
        if kind.endswith("refresh"):
            params, (state, *rest), batch_stats = self.carry
            state = jax.block_until_ready(self.refresh(state))
            self.carry = params, (state, *rest), batch_stats
            return time.perf_counter() - begun
        self.carry, loss = jax.block_until_ready(self.step(self.carry, batch, key))
        ended = time.perf_counter()
        self.losses.append(float(loss))
        return ended - begun

    def _set_clock(self, due: Due) -> None:
        params, (state, *rest), batch_stats = self.carry
        clock = state.clock._replace(
            step=jnp.asarray(due.step, jnp.int32), statistics_due=jnp.asarray(due.statistics)
        )
        self.carry = params, (state._replace(clock=clock), *rest), batch_stats


def first_order(problem: Problem) -> Runner:
    """SGD with momentum: the reference of the steps."""
    tx = optax.sgd(LEARNING_RATE, momentum=MOMENTUM)

    def value(params: Any, batch_stats: Any, batch: Any) -> Any:
        loss, batch_stats = problem.loss_fn(params, batch_stats, batch)
        return loss.value, batch_stats

    def step(carry: Any, batch: Any, key: jax.Array) -> Any:
        del key
        params, opt_state, batch_stats = carry
        grad_fn = jax.value_and_grad(value, has_aux=True)
        (loss, batch_stats), grads = grad_fn(params, batch_stats, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state, batch_stats), loss

    carry = start(problem, tx)
    compiled, seconds = compile_step(problem, step, carry)
    return Runner("sgd", ("step",), problem.batch, carry, compiled, seconds)


def second_order(problem: Problem, name: str, kinds: tuple[str, ...], group_size: int) -> Runner:
    """A method after its first step, which measures and refreshes."""
    method, batch, key = METHODS[name], problem.batch(jax.random.key(0)), jax.random.key(0)
    layers = ng.find_layers(problem.loss_fn, *problem.variables, batch)
    scale = getattr(ng, method.transformation)(
        layers,
        DAMPING,
        statistics_period=STATISTICS_PERIOD,
        refresh_period=REFRESH_PERIOD,
        approximation=ng.Approximation(method.convolution, group_size if method.grouped else None),
    )
    tx = optax.chain(scale, optax.trace(MOMENTUM), optax.scale(-LEARNING_RATE))
    grad_fn = ng.value_and_grad(problem.loss_fn, layers, has_aux=True)

    def measured(carry: Any, batch: Any, key: jax.Array) -> Any:
        params, opt_state, batch_stats = carry
        return grad_fn(params, batch_stats, batch, rng=key, opt_state=opt_state)

    def step(carry: Any, batch: Any, key: jax.Array) -> Any:
        params, opt_state, _ = carry
        (loss, batch_stats), grads, statistics = measured(carry, batch, key)
        updates, opt_state = tx.update(grads, opt_state, params, statistics=statistics)
        return (optax.apply_updates(params, updates), opt_state, batch_stats), loss

    carry = start(problem, tx)
    shapes = jax.eval_shape(measured, carry, batch, key)[2]

    def refresh(state: Any) -> Any:
        """A step that measured nothing; its updates are not asked for, so not computed either."""
        nothing = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        grads = jax.tree.map(jnp.zeros_like, problem.variables[0])
        return scale.update(grads, state, grads, statistics=nothing)[1]

    compiled, seconds = compile_step(problem, step, carry)
    alone = jax.jit(refresh, donate_argnums=0).lower(carry[1][0]).compile()
    carry, _ = jax.block_until_ready(compiled(carry, batch, key))
    return Runner(name, kinds, problem.batch, carry, compiled, seconds, alone)


def start(problem: Problem, tx: optax.GradientTransformation) -> Any:
    """The first carry, of copies: what a step is given it overwrites."""
    params, batch_stats = jax.tree.map(jnp.copy, problem.variables)
    return params, tx.init(params), batch_stats


def compile_step(problem: Problem, step: Callable[..., Any], carry: Any) -> tuple[Any, float]:
    """The compiled step, and the seconds it took to trace and compile."""
    batch, key = problem.batch(jax.random.key(0)), jax.random.key(0)
    begun = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=0).lower(carry, batch, key).compile()
    return compiled, time.perf_counter() - begun
