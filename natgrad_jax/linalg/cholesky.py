"""Damped inverses by Cholesky factorisation."""

import jax
import jax.numpy as jnp

from natgrad_jax.linalg.batching import over_batch
from natgrad_jax.utils.precision import HIGHEST

# Up to this size LAPACK is as fast as anything, and up to the larger one a whole product is.
LEAF = 128
WHOLE = 512


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
    return squared(inverse_root(factor + damping[..., None, None] * eye))


def inverse_root(M: jax.Array) -> jax.Array:
    """``C⁻¹`` of the Cholesky factor of ``M = C Cᵀ``, ``(*batch, n, n)``, by halves.

    ``M = [[A, B], [Bᵀ, D]]`` has ``C⁻¹ = [[P, 0], [−R Yᵀ P, R]]`` with ``P = C_A⁻¹``, ``Y = P B``
    and R that of ``D − YᵀY``. All but the smallest blocks is matrix products, which run on every
    core where LAPACK's factorisation runs on one; errors are at most twice LAPACK's.
    """
    n = M.shape[-1]
    if n <= LEAF:
        eye = jnp.broadcast_to(jnp.eye(n, dtype=M.dtype), M.shape)
        return jax.scipy.linalg.solve_triangular(jnp.linalg.cholesky(M), eye, lower=True)
    m = n // 2
    P = inverse_root(M[..., :m, :m])
    Y = _matmul(P, M[..., :m, m:])
    R = inverse_root(M[..., m:, m:] - _matmul(Y.mT, Y))
    Q = -_matmul(_matmul(R, Y.mT), P)
    return _blocks(P, jnp.zeros((*M.shape[:-2], m, n - m), M.dtype), Q, R)


def squared(half: jax.Array) -> jax.Array:
    """``HᵀH`` of a lower triangular H, ``(*batch, n, n)``, by halves: half of a product's work.

    ``H = [[P, 0], [Q, R]]`` has ``HᵀH = [[PᵀP + QᵀQ, QᵀR], [RᵀQ, RᵀR]]``.
    """
    n = half.shape[-1]
    if n <= WHOLE:
        return _matmul(half.mT, half)
    m = n // 2
    P, Q, R = half[..., :m, :m], half[..., m:, :m], half[..., m:, m:]
    corner = _matmul(Q.mT, R)
    return _blocks(squared(P) + _matmul(Q.mT, Q), corner, corner.mT, squared(R))


def _blocks(A: jax.Array, B: jax.Array, C: jax.Array, D: jax.Array) -> jax.Array:
    top, bottom = jnp.concatenate([A, B], axis=-1), jnp.concatenate([C, D], axis=-1)
    return jnp.concatenate([top, bottom], axis=-2)


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=HIGHEST)
