"""Moore–Penrose inverses of symmetric matrices, by their eigendecomposition."""

import jax
import jax.numpy as jnp

from natgrad_jax.linalg.eigh import eigenbasis
from natgrad_jax.utils.precision import HIGHEST


def pseudo_inverse(factor: jax.Array, damping: jax.Array, cutoff: float | None = None) -> jax.Array:
    """``(F + d I)⁺ = Q diag(1 / (f + d)) Qᵀ`` over the eigenvalues that are not zero.

    Args:
      factor: ``(*batch, n, n)``, symmetric positive semidefinite.
      damping: ``(*batch,)``, not negative; 0 for the Moore–Penrose inverse of F itself.
      cutoff: eigenvalues of ``F + d I`` at or below ``cutoff`` times the largest count as zero; the
        default is n times the precision's ε.

    Returns:
      ``(*batch, n, n)``, symmetric; NaN where the factorisation failed.

    >>> import jax.numpy as jnp
    >>> pseudo_inverse(jnp.diag(jnp.array([2.0, 0.0])), jnp.array(0.0))
    Array([[0.5, 0. ],
           [0. , 0. ]], dtype=float32)
    """
    basis, values = eigenbasis(factor)
    values = values + damping[..., None].astype(values.dtype)
    if cutoff is None:
        cutoff = factor.shape[-1] * float(jnp.finfo(factor.dtype).eps)
    small = values <= cutoff * values.max(-1, keepdims=True)
    gains = jnp.where(small, 0, 1 / jnp.where(small, 1, values))
    return jnp.matmul(basis * gains[..., None, :], basis.mT, precision=HIGHEST)


def reciprocal(x: jax.Array) -> jax.Array:
    """``x⁺`` of numbers that are not negative: 0 of 0."""
    return jnp.where(x > 0, 1 / jnp.where(x > 0, x, 1), 0)
