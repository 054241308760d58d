"""When statistics and refreshes are due: one small state that every transformation carries."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax.utils.hyperparams import Scalar


class Clock(NamedTuple):
    """``step``: updates so far, int32 ``()``; ``statistics_due``: whether the next step's
    statistics will be used, bool ``()``; of several terms of a loss those of each, ``(terms,)``."""

    step: jax.Array
    statistics_due: jax.Array


def start(terms: int = 1) -> Clock:
    """The clock before the first step, which always measures."""
    return Clock(jnp.zeros((), jnp.int32), jnp.ones((terms,) if terms > 1 else (), bool))


def due(step: jax.Array, period: Scalar) -> jax.Array:
    """Whether step ``step`` (from 0) falls on a period."""
    return step % jnp.asarray(period, jnp.int32) == 0


def tick(clock: Clock, wanted: jax.Array, examples: jax.Array) -> Clock:
    """The clock after one more step; ``wanted``: whether statistics of the next one are.

    Of several terms one that had no ``examples`` on its step waits for a batch that has some.
    """
    if clock.statistics_due.ndim:
        wanted = wanted | (clock.statistics_due & (examples == 0))
    return Clock(clock.step + 1, wanted)


def clocks(opt_state: Any) -> list[Clock]:
    """Every clock inside an optimizer state, however deep in a chain."""
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, Clock))
    return [x for x in leaves if isinstance(x, Clock)]


def statistics_due(opt_state: Any) -> jax.Array:
    """Whether any transformation in ``opt_state`` wants statistics from the next step: ``()``, or
    ``(terms,)`` for each term."""
    found = clocks(opt_state)
    if not found:
        raise ValueError(
            "opt_state holds no natgrad_jax transformation, so it cannot tell when statistics are "
            "due. Pass the state of a chain with scale_by_kfac (or another of this library) in "
            "it, or leave opt_state out to measure on every call."
        )
    # NNX optimizers wrap the arrays of their state in variables: a pytree of one leaf each
    wanted = [jax.tree.leaves(clock.statistics_due)[0] for clock in found]
    return functools.reduce(jnp.logical_or, wanted)
