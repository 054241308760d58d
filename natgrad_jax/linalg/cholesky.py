"""Cholesky factors, and damped inverses from them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from natgrad_jax.linalg.batching import over_batch
from natgrad_jax.utils.precision import HIGHEST

LEAF = 128  # up to this size a matrix is factorised row by row
PANEL = 64  # rows that are factorised one after another
OWN = 1536  # up to this size it is done without LAPACK on CPU
WHOLE = 512  # up to this size one matrix product is faster than a product by halves


def upper_factor(M: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """U, upper triangular, with ``M = UᵀU``; NaN where M is not positive definite.

    On CPU without LAPACK up to a size: its threads and XLA's wait for one another. Behind a matrix
    product, on two cores that others use too, its call takes half a second for 510 rows, this 2 ms.

    >>> import jax.numpy as jnp
    >>> upper_factor(jnp.array([[4.0, 2.0], [2.0, 5.0]]))
    Array([[2., 1.],
           [0., 2.]], dtype=float32)
    """
    backend = lambda M: jnp.linalg.cholesky(M, upper=True)
    if len(M) > OWN:
        return backend(M)
    return jax.lax.platform_dependent(M, cpu=_by_panels, default=backend)


def _by_panels(M: Float[Array, "n n"]) -> Float[Array, "n n"]:
    n, U = len(M), M[:0]
    for k in range(0, n, PANEL):
        top = slice(k, k + PANEL)
        panel = rows_of_factor(M[top, k:] - _matmul(U[:, top].T, U[:, k:]))
        U = jnp.concatenate([U, jnp.pad(panel, ((0, 0), (k, 0)))])
    return U


def rows_of_factor(panel: Float[Array, "b n"]) -> Float[Array, "b n"]:
    """The first b rows of the factor of a matrix, from these of its own."""
    b, n = panel.shape
    rows, columns = jnp.arange(b), jnp.arange(n)

    # slices of two axes: a third fewer kernels to compile than by indexing, and to run
    def row(j: jax.Array, P: Float[Array, "b n"]) -> Float[Array, "b n"]:
        above = jnp.where(rows < j, jax.lax.dynamic_slice(P, (0, j), (b, 1)).T, 0)
        left = jax.lax.dynamic_slice(P, (j, 0), (1, n)) - _matmul(above, P)
        pivot = jax.lax.dynamic_slice(left, (0, j), (1, 1))
        new = jnp.where(columns < j, 0, left / jnp.sqrt(pivot))
        return jax.lax.dynamic_update_slice(P, new, (j, 0))

    return jax.lax.fori_loop(0, b, row, panel)


def damped_inverse(
    factor: Float[Array, "*batch n n"], damping: Float[Array, "*batch"]
) -> Float[Array, "*batch n n"]:
    """``(F + d I)⁻¹`` for symmetric positive semidefinite F.

    Args:
      factor: ``(*batch, n, n)``, symmetric.
      damping: d, ``(*batch,)``, in the units of the factor.

    Returns:
      ``(*batch, n, n)``, symmetric; NaN if F + d I is not positive definite to working precision.

    >>> import jax.numpy as jnp
    >>> damped_inverse(jnp.diag(jnp.array([1.0, 3.0])), jnp.array(1.0)).round(3)
    Array([[0.5 , 0.  ],
           [0.  , 0.25]], dtype=float32)
    """
    return over_batch(_damped_inverse, factor, damping)


def _damped_inverse(
    factor: Float[Array, "*batch n n"], damping: Float[Array, "*batch"]
) -> Float[Array, "*batch n n"]:
    eye = jnp.eye(factor.shape[-1], dtype=factor.dtype)
    return squared(inverse_root(factor + damping[..., None, None] * eye))


def inverse_root(M: Float[Array, "*batch n n"]) -> Float[Array, "*batch n n"]:
    """``C⁻¹``, the inverse of the Cholesky factor of ``M = C Cᵀ``, recursively by halves.

    ``M = [[A, B], [Bᵀ, D]]`` has ``C⁻¹ = [[P, 0], [−R Yᵀ P, R]]``, where ``P`` is the inverse
    Cholesky factor of A, ``Y = P B``, and R is the inverse Cholesky factor of ``D − YᵀY``. On CPU
    there is no call of LAPACK. Errors are at most twice LAPACK's.
    """
    n = M.shape[-1]
    if n <= LEAF:
        return jax.lax.platform_dependent(M, cpu=_inverse_root_by_rows, default=_backend_root)
    m = n // 2
    P = inverse_root(M[..., :m, :m])
    Y = _matmul(P, M[..., :m, m:])
    R = inverse_root(M[..., m:, m:] - _matmul(Y.mT, Y))
    Q = -_matmul(_matmul(R, Y.mT), P)
    return _blocks(P, jnp.zeros((*M.shape[:-2], m, n - m), M.dtype), Q, R)


def _inverse_root_by_rows(M: Float[Array, "*batch n n"]) -> Float[Array, "*batch n n"]:
    """The rows of ``[M, I]`` become those of ``[U, U⁻ᵀ]``."""
    n = M.shape[-1]

    def one(M: Float[Array, "n n"]) -> Float[Array, "n n"]:
        return rows_of_factor(jnp.concatenate([M, jnp.eye(n, dtype=M.dtype)], 1))[:, n:]

    return jnp.vectorize(one, signature="(n,n)->(n,n)")(M)


def _backend_root(M: Float[Array, "*batch n n"]) -> Float[Array, "*batch n n"]:
    eye = jnp.broadcast_to(jnp.eye(M.shape[-1], dtype=M.dtype), M.shape)
    return jax.scipy.linalg.solve_triangular(jnp.linalg.cholesky(M), eye, lower=True)


def squared(half: Float[Array, "*batch n n"]) -> Float[Array, "*batch n n"]:
    """``HᵀH`` of a lower triangular H, recursively by halves: half the work of a full product.

    ``H = [[P, 0], [Q, R]]`` has ``HᵀH = [[PᵀP + QᵀQ, QᵀR], [RᵀQ, RᵀR]]``.
    """
    n = half.shape[-1]
    if n <= WHOLE:
        return _matmul(half.mT, half)
    m = n // 2
    P, Q, R = half[..., :m, :m], half[..., m:, :m], half[..., m:, m:]
    corner = _matmul(Q.mT, R)
    return _blocks(squared(P) + _matmul(Q.mT, Q), corner, corner.mT, squared(R))


def _blocks(
    A: Float[Array, "*batch n m"],
    B: Float[Array, "*batch n l"],
    C: Float[Array, "*batch k m"],
    D: Float[Array, "*batch k l"],
) -> Float[Array, "*batch n+k m+l"]:
    """``[[A, B], [C, D]]``."""
    top, bottom = jnp.concatenate([A, B], axis=-1), jnp.concatenate([C, D], axis=-1)
    return jnp.concatenate([top, bottom], axis=-2)


def _matmul(
    a: Float[Array, "*batch n m"], b: Float[Array, "*batch m k"]
) -> Float[Array, "*batch n k"]:
    return jnp.matmul(a, b, precision=HIGHEST)
