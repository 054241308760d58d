"""Orthonormal columns by matrix products, without LAPACK, whose threads wait for XLA's on CPU."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from natgrad_jax.linalg.cholesky import inverse_root
from natgrad_jax.utils.precision import HIGHEST


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
    k = Y.shape[-1]
    return _passes(Y, (10 * k, 10 * k, k))


def orthonormal_basis(Y: Float[Array, "*batch n n"]) -> Float[Array, "*batch n n"]:
    """The same for columns that are clearly independent: two passes, to one rounding.

    >>> import jax.numpy as jnp
    >>> orthonormal_basis(jnp.array([[3.0, 1.0], [0.0, 2.0]])).round(3)
    Array([[1., 0.],
           [0., 1.]], dtype=float32)
    """
    return _passes(Y, (10 * Y.shape[-1], 0))


def _passes(Y: Float[Array, "*batch n k"], shifts: Sequence[int]) -> Float[Array, "*batch n k"]:
    """With shifts in roundings of columns of norm one."""
    added = jnp.asarray(shifts, Y.dtype) * jnp.finfo(Y.dtype).eps
    eye = jnp.eye(Y.shape[-1], dtype=Y.dtype)

    def better(i: jax.Array, Y: Float[Array, "*batch n k"]) -> Float[Array, "*batch n k"]:
        norms = jnp.sqrt(jnp.sum(jnp.square(Y), -2, keepdims=True))
        Y = Y / jnp.where(norms > 0, norms, 1)
        gram = jnp.matmul(Y.mT, Y, precision=HIGHEST) + added[i] * eye
        return jnp.matmul(Y, inverse_root(gram).mT, precision=HIGHEST)

    return jax.lax.fori_loop(0, len(shifts), better, Y)  # compiled once
