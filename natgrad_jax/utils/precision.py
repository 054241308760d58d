"""The precision of curvature: float32 at least, and products of matrices without rounding inputs.

On TPU and recent GPUs a default product rounds its float32 inputs to 8 or 11 bits, after which a
factor is no longer a sum of squares.
"""

from typing import Any

import jax
import jax.numpy as jnp

HIGHEST = jax.lax.Precision.HIGHEST


def at_least_float32(dtype: Any) -> Any:
    """``dtype``, or float32 where it is narrower."""
    return jnp.promote_types(dtype, jnp.float32)
