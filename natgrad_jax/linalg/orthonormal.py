"""Orthonormal columns by matrix products, without LAPACK, whose threads wait for XLA's on CPU."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from natgrad_jax.linalg.cholesky import rows_of_factor
from natgrad_jax.utils.precision import HIGHEST

PASSES = 3


def orthonormal(Y: Float[Array, "*batch n k"]) -> Float[Array, "*batch n k"]:
    """Orthonormal columns Q that span those of Y, by shifted Cholesky-QR, three times.

    Each pass divides the columns by their norms and multiplies by ``U⁻¹``, ``UᵀU = YᵀY + s I``, s
    some roundings of the trace, in the last pass one. Directions of Y below the rounding of the
    others keep a length between 0 and 1.

    Source: Fukaya, Kannan, Nakatsukasa, Yamamoto & Yanagisawa 2020 (shifted Cholesky-QR3).

    >>> import jax.numpy as jnp
    >>> orthonormal(jnp.array([[3.0, 1.0], [0.0, 2.0]])).round(3)
    Array([[1., 0.],
           [0., 1.]], dtype=float32)
    """
    return jnp.vectorize(_orthonormal, signature="(n,k)->(n,k)")(Y)


def _orthonormal(Y: Float[Array, "n k"]) -> Float[Array, "n k"]:
    k = Y.shape[-1]
    eye = jnp.eye(k, dtype=Y.dtype)
    rounding = k * jnp.finfo(Y.dtype).eps

    def better(i: jax.Array, Y: Float[Array, "n k"]) -> Float[Array, "n k"]:
        norms = jnp.sqrt(jnp.sum(jnp.square(Y), 0))
        Y = Y / jnp.where(norms > 0, norms, 1)
        shift = jnp.where(i < PASSES - 1, 10 * rounding, rounding).astype(Y.dtype)
        gram = jnp.matmul(Y.T, Y, precision=HIGHEST) + shift * eye
        both = rows_of_factor(jnp.concatenate([gram, eye], 1))  # U, U⁻ᵀ
        return jnp.matmul(Y, both[:, k:].T, precision=HIGHEST)

    return jax.lax.fori_loop(0, PASSES, better, Y)
