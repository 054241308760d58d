"""Hyperparameters: numbers, arrays or schedules, and checks of their values."""

from collections.abc import Callable
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

# From the optimizer step, int32 (), to the value.
Schedule = Callable[[Any], ArrayLike]
# One number, or a schedule. Not optax.ScalarOrSchedule: optax has no types for type checkers.
Scalar = float | int | Array | Schedule


def at(value: Scalar, step: Int[Array, ""]) -> Float[Array, ""]:
    """The value at an optimizer step, in JAX's default float dtype."""
    return jnp.asarray(value(step) if callable(value) else value, float)


def is_concrete(x: object) -> bool:
    """Whether the value is known now, that is, not traced."""
    return not isinstance(x, jax.core.Tracer)


def check_positive(**values: object) -> None:
    """Raise ValueError for a value that is not positive; traced values and schedules pass."""
    for name, value in values.items():
        if _is_number(value, name) and not value > 0:
            raise ValueError(f"{name} must be positive; got {value!r}.")


def check_not_negative(**values: object) -> None:
    """Raise ValueError for a negative value; traced values and schedules pass."""
    for name, value in values.items():
        if _is_number(value, name) and not value >= 0:
            raise ValueError(f"{name} must not be negative; got {value!r}.")


def check_period(**values: object) -> None:
    """Raise ValueError for a period that is not a positive whole number of steps."""
    for name, value in values.items():
        if _is_number(value, name) and not (value >= 1 and float(value).is_integer()):
            raise ValueError(
                f"{name} counts optimizer steps: a whole number, at least 1; got {value!r}. "
                f"{name}=1 means every step."
            )


def check_fraction(**values: object) -> None:
    """Raise ValueError for a value outside [0, 1); traced values and schedules pass."""
    for name, value in values.items():
        if _is_number(value, name) and not 0 <= value < 1:
            raise ValueError(f"{name} must lie in [0, 1); got {value!r}. 0 means no averaging.")


def _is_number(value: object, name: str) -> TypeGuard[float]:
    """Whether the value is a known number; raises for anything that is no hyperparameter."""
    if callable(value):
        return False
    if not isinstance(value, int | float | np.generic | np.ndarray | jax.Array):
        raise TypeError(f"{name} takes a float, an array or a schedule; got {value!r}.")
    if jnp.ndim(value):
        raise ValueError(f"{name} is one number for all layers; got shape {jnp.shape(value)}.")
    return is_concrete(value)
