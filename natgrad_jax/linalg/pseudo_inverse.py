"""Moore–Penrose inverses of symmetric matrices, by eigendecomposition."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from natgrad_jax.linalg.eigh import eigenbasis
from natgrad_jax.utils.precision import HIGHEST


def pseudo_inverse(
    factor: Float[Array, "*batch n n"], damping: Float[Array, "*batch"], cutoff: float | None = None
) -> Float[Array, "*batch n n"]:
    """``(F + d I)⁺ = Q diag(1 / (f + d)) Qᵀ``, summed over the nonzero eigenvalues ``f + d``.

    Args:
      factor: ``(*batch, n, n)``, symmetric positive semidefinite.
      damping: d ≥ 0, ``(*batch,)``; 0 gives the Moore–Penrose inverse of F itself.
      cutoff: eigenvalues of ``F + d I`` up to ``cutoff`` times the largest one count as zero. The
        default is n times the machine epsilon.

    Returns:
      ``(*batch, n, n)``, symmetric; NaN if the factorisation failed.

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


def reciprocal(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """``x⁺`` of numbers that are not negative: 0 of 0."""
    return jnp.where(x > 0, 1 / jnp.where(x > 0, x, 1), 0)
