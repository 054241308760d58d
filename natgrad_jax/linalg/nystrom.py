"""Sketches of matrices that are never formed whole: their products with fixed columns of signs.

``F Ω`` is linear in F, so that sketches are added, averaged and scaled as F itself would be. From
it comes the Nyström approximation ``F Ω (Ωᵀ F Ω)⁻¹ (F Ω)ᵀ``, which is exact if the rank of F is at
most the number of columns. A sketch here is ``[F Ω, diag F]``, ``(*batch, n, k + 1)``.

Source: Tropp, Yurtsever, Udell & Cevher 2017, algorithm 3.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from natgrad_jax.linalg.batching import over_batch
from natgrad_jax.linalg.cholesky import inverse_root
from natgrad_jax.linalg.gram import products
from natgrad_jax.linalg.low_rank import LowRankInverse, from_projection, mean_of_others, projected
from natgrad_jax.linalg.orthonormal import orthonormal
from natgrad_jax.utils.precision import HIGHEST


def signs(n: int, k: int, dtype: jnp.dtype) -> Float[Array, "n k"]:
    """Ω: 1 or −1, as if random, and the same on every machine: integers alone are computed.

    >>> signs(4, 2, jnp.dtype("float32"))
    Array([[-1.,  1.],
           [-1., -1.],
           [ 1., -1.],
           [-1.,  1.]], dtype=float32)
    """
    rows, columns = jnp.arange(n, dtype=jnp.uint32), jnp.arange(k, dtype=jnp.uint32)
    bits = rows[:, None] * jnp.uint32(0x9E3779B1) + columns * jnp.uint32(0x85EBCA77)
    for shift, odd in ((16, 0x7FEB352D), (15, 0x846CA68B)):  # a hash of 32 bits
        bits = (bits ^ (bits >> shift)) * jnp.uint32(odd)
    return jnp.where(bits >> 31 == 1, 1, -1).astype(dtype)


def sketch_of(F: Float[Array, "*batch n n"], k: int) -> Float[Array, "*batch n k1"]:
    """``[F Ω, diag F]``.

    >>> sketch_of(jnp.diag(jnp.array([2.0, 3.0])), 1)
    Array([[-2.,  2.],
           [-3.,  3.]], dtype=float32)
    """
    FO = jnp.matmul(F, signs(F.shape[-1], k, F.dtype), precision=HIGHEST)
    return jnp.concatenate([FO, jnp.diagonal(F, axis1=-2, axis2=-1)[..., None]], axis=-1)


def sketched_gram(rows: Shaped[Array, "n t ..."], k: int, dtype: jnp.dtype) -> Float[Array, "..."]:
    """The sketch of ``Σ r rᵀ`` over the two leading axes of rows ``(N, T, *batch, n)``."""
    rows = rows.astype(dtype)
    inside = jnp.einsum("...i,ij->...j", rows, signs(rows.shape[-1], k, dtype), precision=HIGHEST)
    diagonal = jnp.sum(jnp.square(rows), axis=(0, 1))
    return jnp.concatenate([products(rows, inside, dtype, HIGHEST), diagonal[..., None]], axis=-1)


def root(
    FO: Float[Array, "*batch n k"], test: Float[Array, "n k"], trace: Float[Array, "*batch"]
) -> Float[Array, "*batch n k"]:
    """E with ``E Eᵀ ≈ F``, the Nyström approximation from ``F Ω`` and Ω, of columns of about unit
    length. F is shifted by some of its rounding errors first, as in the source."""
    tiny = jnp.finfo(FO.dtype)
    shift = 10 * tiny.eps * trace[..., None, None] + tiny.tiny**0.5
    FO = FO + shift * test
    core = jnp.matmul(test.T, FO, precision=HIGHEST)
    return jnp.matmul(FO, inverse_root((core + core.mT) / 2).mT, precision=HIGHEST)


def decomposed(
    sketch: Float[Array, "*batch n k1"],
) -> tuple[Float[Array, "*batch n k"], Float[Array, "*batch k k"], Float[Array, "*batch"]]:
    """Orthonormal columns Q, and T, with ``Q T Qᵀ`` the Nyström approximation; and ``tr F``."""
    n, k = sketch.shape[-2], sketch.shape[-1] - 1
    trace = sketch[..., k].sum(-1)
    E = root(sketch[..., :k] / n**0.5, signs(n, k, sketch.dtype) / n**0.5, trace)
    Q = orthonormal(E)
    inside = jnp.matmul(Q.mT, E, precision=HIGHEST)
    return Q, jnp.matmul(inside, inside.mT, precision=HIGHEST), trace


def sketched_matrix(sketch: Float[Array, "*batch n k1"]) -> LowRankInverse:
    """``Q T Qᵀ + r (I − Q Qᵀ)``, the matrix that a sketch stands for: r is the mean of the
    eigenvalues that the approximation leaves out, ``(tr F − tr T) / (n − k)``."""
    Q, T, trace = decomposed(sketch)
    rest, eye = mean_of_others(Q, T, trace), jnp.eye(T.shape[-1], dtype=T.dtype)
    return LowRankInverse(Q, T - rest[..., None, None] * eye, rest)


def sketched_inverse(
    sketch: Float[Array, "*batch n k1"],
    damping: Float[Array, "*batch"],
    start: Float[Array, "*batch n r"] | None = None,
) -> LowRankInverse:
    """``(F + d I)⁻¹`` of that matrix; from ``start``, with r of its leading eigenvectors alone, as
    :func:`~natgrad_jax.linalg.low_rank.low_rank_inverse` of it would be.

    >>> found = sketched_inverse(sketch_of(jnp.diag(jnp.array([3.0, 0.0])), 1), jnp.array(1.0))
    >>> jnp.diagonal(found.as_matrix()).round(3)
    Array([0.25, 1.  ], dtype=float32)
    """
    Q, T, trace = decomposed(sketch)
    if start is not None:
        W, T = projected(T, jnp.matmul(Q.mT, start, precision=HIGHEST))
        Q = jnp.matmul(Q, W, precision=HIGHEST)
    return from_projection(Q, T, trace, damping)


def sketched_subspace(
    sketch: Float[Array, "*batch n k1"], rank: int
) -> tuple[Float[Array, "*batch n r"], Float[Array, "*batch r"]]:
    """The approximation's leading eigenvectors and their eigenvalues, ascending."""
    Q, T, _ = decomposed(sketch)
    values, W = over_batch(jnp.linalg.eigh, T)
    V = jnp.matmul(Q, W[..., -rank:], precision=HIGHEST)
    return V, jnp.maximum(values[..., -rank:], 0)
