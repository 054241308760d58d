"""Damped inverses by Cholesky factorisation."""

import jax
import jax.numpy as jnp


def damped_inverse(factor: jax.Array, damping: jax.Array) -> jax.Array:
    """``(F + d I)⁻¹`` for symmetric positive semidefinite F.

    Args:
      factor: ``(*batch, n, n)``, symmetric.
      damping: ``(*batch,)``, in the units of the factor.

    Returns:
      ``(*batch, n, n)``, symmetric; NaN where F + d I is not positive definite in its precision.

    >>> import jax.numpy as jnp
    >>> damped_inverse(jnp.diag(jnp.array([1.0, 3.0])), jnp.array(1.0))
    Array([[0.5 , 0.  ],
           [0.  , 0.25]], dtype=float32)
    """
    eye = jnp.eye(factor.shape[-1], dtype=factor.dtype)
    root = jnp.linalg.cholesky(factor + damping[..., None, None] * eye)
    half = jax.scipy.linalg.solve_triangular(root, jnp.broadcast_to(eye, root.shape), lower=True)
    return jnp.matmul(half.mT, half, precision=jax.lax.Precision.HIGHEST)
