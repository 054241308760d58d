"""Orthonormal columns by matrix products, without LAPACK, whose threads wait for XLA's on CPU."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from natgrad_jax.linalg.cholesky import inverse_root
from natgrad_jax.utils.precision import HIGHEST
from natgrad_jax.utils.sharding import varying_like

PASSES = 3
AT_MOST = 5  # passes, of which usually one is enough
NEAR = 0.5  # ‖YᵀY − I‖ from where one pass more is the last


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

    def better(i: Int[Array, ""], Y: Float[Array, "*batch n k"]) -> Float[Array, "*batch n k"]:
        Y, gram = _normalized(Y)
        return _pass(Y, gram, jnp.where(i < PASSES - 1, 10 * k, k))

    return jax.lax.fori_loop(0, PASSES, better, Y)


def orthonormal_basis(Y: Float[Array, "*batch n n"]) -> Float[Array, "*batch n n"]:
    """The same for columns that are independent, to one rounding: as many passes as that takes,
    one where they are nearly orthogonal.

    >>> import jax.numpy as jnp
    >>> orthonormal_basis(jnp.array([[3.0, 1.0], [0.0, 2.0]])).round(3)
    Array([[1., 0.],
           [0., 1.]], dtype=float32)
    """
    eye = jnp.eye(Y.shape[-1], dtype=Y.dtype)
    State = tuple[Float[Array, "*batch n n"], Bool[Array, ""], Int[Array, ""]]

    def better(state: State) -> State:
        Y, gram = _normalized(state[0])
        near = jnp.all(jnp.sum(jnp.square(gram - eye), (-2, -1)) < NEAR**2)
        return _pass(Y, gram, jnp.where(near, 0, 10 * len(eye))), near, state[2] + 1

    unfinished = lambda state: ~state[1] & (state[2] < AT_MOST)
    start = Y, varying_like(jnp.zeros((), bool), Y), jnp.zeros((), jnp.int32)
    return jax.lax.while_loop(unfinished, better, start)[0]


def _normalized(
    Y: Float[Array, "*batch n k"],
) -> tuple[Float[Array, "*batch n k"], Float[Array, "*batch k k"]]:
    """With columns of length one (or zero), and their inner products."""
    norms = jnp.sqrt(jnp.sum(jnp.square(Y), -2, keepdims=True))
    Y = Y / jnp.where(norms > 0, norms, 1)
    return Y, jnp.matmul(Y.mT, Y, precision=HIGHEST)


def _pass(
    Y: Float[Array, "*batch n k"], gram: Float[Array, "*batch k k"], shift: Int[Array, ""]
) -> Float[Array, "*batch n k"]:
    """``Y U⁻¹`` with ``UᵀU = gram + shift``, in roundings of columns of length one."""
    added = shift.astype(Y.dtype) * jnp.finfo(Y.dtype).eps * jnp.eye(Y.shape[-1], dtype=Y.dtype)
    return jnp.matmul(Y, inverse_root(gram + added).mT, precision=HIGHEST)
