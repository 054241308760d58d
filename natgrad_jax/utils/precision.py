"""The precision of curvature: at least float32, and matrix products of unrounded inputs.

TPUs and recent GPUs round the float32 inputs of matrix products to 8 or 11 bits by default, which
inverses of factors and their eigenvectors do not bear. Three passes (``HIGH`` on TPUs) leave out
the product of the lower bits: a Gram matrix is then not quite positive semidefinite.
"""

import jax
import jax.numpy as jnp
from jaxtyping import DTypeLike

HIGHEST = jax.lax.Precision.HIGHEST


def at_least_float32(dtype: DTypeLike) -> jnp.dtype:
    """``dtype``, or float32 if it is narrower."""
    return jnp.promote_types(dtype, jnp.float32)
