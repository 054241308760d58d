"""The precision of curvature: at least float32, and matrix products of unrounded inputs.

TPUs and recent GPUs round the float32 inputs of matrix products to 8 or 11 bits by default, which
inverses of factors and their eigenvectors do not bear.
"""

import jax
import jax.numpy as jnp
from jaxtyping import DTypeLike

HIGHEST = jax.lax.Precision.HIGHEST


def of_squares() -> jax.lax.Precision:
    """Of ``X Xᵀ``: on GPUs TF32, at twice the speed.

    Both inputs are rounded to the same 11 bits, so the result is positive semidefinite still, and
    what is added to its spectrum is 1e-7 of the mean eigenvalue. TPUs have 8 bits, or three passes
    (``HIGH``) that leave out the product of the lower bits: then it is not positive semidefinite.
    """
    return jax.lax.Precision.HIGH if jax.default_backend() == "gpu" else HIGHEST


def at_least_float32(dtype: DTypeLike) -> jnp.dtype:
    """``dtype``, or float32 if it is narrower."""
    return jnp.promote_types(dtype, jnp.float32)
