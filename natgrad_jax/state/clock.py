"""When statistics and refreshes are due: one small state inside every transformation's."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax.utils.hyperparams import Scalar


class Clock(NamedTuple):
    """``step``: updates so far, int32 ``()``; ``statistics_due``: whether the next step's
    statistics will be used, bool ``()``, or ``(terms,)`` for several terms of a loss."""

    step: jax.Array
    statistics_due: jax.Array


def start(terms: int = 1) -> Clock:
    """The clock before the first step, which always measures."""
    return Clock(jnp.zeros((), jnp.int32), jnp.ones((terms,) if terms > 1 else (), bool))


def due(step: jax.Array, period: Scalar) -> jax.Array:
    """Whether ``step`` (from 0) is a multiple of the period."""
    return step % jnp.asarray(period, jnp.int32) == 0


def tick(clock: Clock, wanted: jax.Array, examples: jax.Array) -> Clock:
    """The clock after one more step; ``wanted``: whether the next one needs statistics.

    With several terms, one that had no ``examples`` when due stays due until a batch has some.
    """
    if clock.statistics_due.ndim:
        wanted = wanted | (clock.statistics_due & (examples == 0))
    return Clock(clock.step + 1, wanted)
