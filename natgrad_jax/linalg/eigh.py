"""Orthonormal eigenvectors of a symmetric matrix, by LAPACK's (or the backend's) ``eigh``."""

import jax
import jax.numpy as jnp

from natgrad_jax.linalg.batching import over_batch


def eigenbasis(factor: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``F = Q diag(d) Qᵀ``: Q and d, eigenvalues ascending and not below zero.

    Args:
      factor: ``(*batch, n, n)``, symmetric positive semidefinite.

    Returns:
      ``Q (*batch, n, n)``, its columns the eigenvectors, and ``d (*batch, n)``; NaN where the
      factorisation failed.

    >>> import jax.numpy as jnp
    >>> eigenbasis(jnp.diag(jnp.array([3.0, 1.0])))[1]
    Array([1., 3.], dtype=float32)
    """
    values, vectors = over_batch(jnp.linalg.eigh, factor)
    return vectors, jnp.maximum(values, 0)
