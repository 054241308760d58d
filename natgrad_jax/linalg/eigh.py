"""Eigendecompositions of symmetric matrices, by the backend's ``eigh`` (LAPACK on CPU)."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from natgrad_jax.linalg.batching import over_batch


def eigenbasis(
    factor: Float[Array, "*batch n n"],
) -> tuple[Float[Array, "*batch n n"], Float[Array, "*batch n"]]:
    """Q and d of ``F = Q diag(d) Qᵀ``; eigenvalues ascend, and negative ones are set to zero.

    Args:
      factor: ``(*batch, n, n)``, symmetric positive semidefinite.

    Returns:
      Q ``(*batch, n, n)``, with the eigenvectors in its columns, and d ``(*batch, n)``; NaN if the
      factorisation failed.

    >>> import jax.numpy as jnp
    >>> eigenbasis(jnp.diag(jnp.array([3.0, 1.0])))[1]
    Array([1., 3.], dtype=float32)
    """
    values, vectors = over_batch(jnp.linalg.eigh, factor)
    return vectors, jnp.maximum(values, 0)
