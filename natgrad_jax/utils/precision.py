"""The precision of curvature: at least float32, and matrix products whose inputs keep their bits.

TPUs and recent GPUs round the float32 inputs of matrix products to 8 or 11 bits by default.
``HIGHEST`` keeps all. ``HIGH`` is for products of rows with themselves, ``Σ r rᵀ``: on GPUs it
rounds to 11 bits, twice as fast, on TPUs it keeps 16, and on CPUs all. Both inputs are rounded
alike, so that the sum is that of rounded rows, positive semidefinite (on an H200 small eigenvalues
are off by 1e-8 of the trace).
"""

import jax
import jax.numpy as jnp
from jaxtyping import DTypeLike

HIGHEST = jax.lax.Precision.HIGHEST
HIGH = jax.lax.Precision.HIGH


def at_least_float32(dtype: DTypeLike) -> jnp.dtype:
    """``dtype``, or float32 if it is narrower."""
    return jnp.promote_types(dtype, jnp.float32)
