"""Damped inverses by Cholesky factorisation."""

import jax
import jax.numpy as jnp

from natgrad_jax.linalg.batching import over_batch

# Below this size LAPACK's triangular solve is as fast as anything.
LEAF = 128


def damped_inverse(factor: jax.Array, damping: jax.Array) -> jax.Array:
    """``(F + d I)⁻¹`` for symmetric positive semidefinite F.

    Args:
      factor: ``(*batch, n, n)``, symmetric.
      damping: ``(*batch,)``, in the units of the factor.

    Returns:
      ``(*batch, n, n)``, symmetric; NaN where F + d I is not positive definite in its precision.

    >>> import jax.numpy as jnp
    >>> damped_inverse(jnp.diag(jnp.array([1.0, 3.0])), jnp.array(1.0)).round(3)
    Array([[0.5 , 0.  ],
           [0.  , 0.25]], dtype=float32)
    """
    return over_batch(_damped_inverse, factor, damping)


def _damped_inverse(factor: jax.Array, damping: jax.Array) -> jax.Array:
    eye = jnp.eye(factor.shape[-1], dtype=factor.dtype)
    half = triangular_inverse(jnp.linalg.cholesky(factor + damping[..., None, None] * eye))
    return _matmul(half.mT, half)


def triangular_inverse(L: jax.Array) -> jax.Array:
    """``L⁻¹`` for lower triangular L ``(*batch, n, n)``, by halves.

    ``[[P, 0], [Q, R]]⁻¹ = [[P⁻¹, 0], [−R⁻¹ Q P⁻¹, R⁻¹]]``: matrix products on the nonzero blocks,
    a third of the arithmetic of solving against the identity, and on faster paths.
    """
    n = L.shape[-1]
    if n <= LEAF:
        eye = jnp.broadcast_to(jnp.eye(n, dtype=L.dtype), L.shape)
        return jax.scipy.linalg.solve_triangular(L, eye, lower=True)
    m = n // 2
    P, R = triangular_inverse(L[..., :m, :m]), triangular_inverse(L[..., m:, m:])
    Q = -_matmul(_matmul(R, L[..., m:, :m]), P)
    zeros = jnp.zeros((*L.shape[:-2], m, n - m), L.dtype)
    top, bottom = (jnp.concatenate(row, axis=-1) for row in ((P, zeros), (Q, R)))
    return jnp.concatenate([top, bottom], axis=-2)


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
