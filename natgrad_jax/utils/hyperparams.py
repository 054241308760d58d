"""Hyperparameters that are a float, an array or a schedule, and their checks."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Schedule = Callable[[Any], Any]
Scalar = float | int | jax.Array | Schedule


def at(value: Scalar, step: jax.Array) -> jax.Array:
    """The value at an optimizer step in JAX's default float dtype; schedules are called."""
    return jnp.asarray(value(step) if callable(value) else value, float)


def is_concrete(x: Any) -> bool:
    """Whether a value is known now: no tracer."""
    return not isinstance(x, jax.core.Tracer)


def check_positive(**values: Any) -> None:
    """Raise for a concrete value that is not positive; traced values and schedules pass."""
    for name, value in values.items():
        if _is_number(name, value) and not value > 0:
            raise ValueError(f"{name} must be positive; got {value!r}.")


def check_not_negative(**values: Any) -> None:
    """Raise for a concrete value below zero; traced values and schedules pass."""
    for name, value in values.items():
        if _is_number(name, value) and not value >= 0:
            raise ValueError(f"{name} must not be negative; got {value!r}.")


def check_period(**values: Any) -> None:
    """Raise for a concrete period that is not a whole number of at least one step."""
    for name, value in values.items():
        if _is_number(name, value) and not (value >= 1 and float(value).is_integer()):
            raise ValueError(
                f"{name} counts optimizer steps: a whole number, at least 1; got {value!r}. "
                f"{name}=1 means every step."
            )


def check_fraction(**values: Any) -> None:
    """Raise for a concrete value outside [0, 1)."""
    for name, value in values.items():
        if _is_number(name, value) and not 0 <= value < 1:
            raise ValueError(f"{name} must lie in [0, 1); got {value!r}. 0 means no averaging.")


def _is_number(name: str, value: Any) -> bool:
    """Whether the value is known now; raise where it is no scalar at all."""
    if callable(value):
        return False
    if not isinstance(value, int | float | np.generic | np.ndarray | jax.Array):
        raise TypeError(f"{name} takes a float, an array or a schedule; got {value!r}.")
    if jnp.ndim(value):
        raise ValueError(f"{name} is one number for all layers; got shape {jnp.shape(value)}.")
    return is_concrete(value)
