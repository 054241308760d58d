"""One step of orthogonal iteration: from the last eigenbasis towards the current one."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from natgrad_jax.linalg.batching import trace_of
from natgrad_jax.linalg.orthonormal import orthonormal_basis
from natgrad_jax.utils.precision import HIGHEST


def refine(
    factor: Float[Array, "*batch n n"], basis: Float[Array, "*batch n n"]
) -> tuple[Float[Array, "*batch n n"], Float[Array, "*batch n"]]:
    """``Q ← orth(F Q)``, and the Rayleigh quotients of the new columns, ``diag(Qᵀ F Q)``.

    orth makes each column orthogonal to those before it, by matrix products (Cholesky-QR). Before
    it, columns are sorted by their Rayleigh quotients in decreasing order, which the iteration
    needs to converge. Exact if ``basis`` is already an eigenbasis of F. Ten roundings of F's trace
    are added to F, so that directions in which it is zero stay in the basis.

    Args:
      factor: ``(*batch, n, n)``, symmetric positive semidefinite.
      basis: Q, the same shape, orthogonal.

    Returns:
      The new Q ``(*batch, n, n)``, and its Rayleigh quotients ``(*batch, n)``, clipped at zero.

    Source: Golub & Van Loan, section 7.3.2; Vyas et al. 2024 (SOAP) for its use here.

    >>> import jax.numpy as jnp
    >>> refine(jnp.diag(jnp.array([3.0, 1.0])), jnp.eye(2))[1]
    Array([3., 1.], dtype=float32)
    """
    product = jnp.matmul(factor, basis, precision=HIGHEST)
    order = jnp.argsort(-jnp.sum(basis * product, axis=-2), axis=-1)
    total = trace_of(factor)[..., None, None]
    shift = jnp.where(total == 0, 1, 10 * jnp.finfo(factor.dtype).eps * total)
    ordered = jnp.take_along_axis(product + shift * basis, order[..., None, :], axis=-1)
    new = orthonormal_basis(ordered)
    values = jnp.sum(new * jnp.matmul(factor, new, precision=HIGHEST), axis=-2)
    return new, jnp.maximum(values, 0)


def off_diagonal(
    factor: Float[Array, "*batch n n"], basis: Float[Array, "*batch n n"]
) -> Float[Array, "*batch"]:
    """``‖B − diag B‖ / ‖B‖`` for ``B = Qᵀ F Q``; 0 for an eigenbasis Q of F."""
    product = jnp.matmul(factor, basis, precision=HIGHEST)
    along = jnp.sum(jnp.square(jnp.sum(basis * product, axis=-2)), axis=-1)
    total = jnp.sum(jnp.square(product), axis=(-2, -1))  # ‖F Q‖ = ‖Qᵀ F Q‖
    off = jnp.sqrt(jnp.maximum(total - along, 0) / jnp.where(total > 0, total, 1))
    return jnp.where(total > 0, off, 0)
