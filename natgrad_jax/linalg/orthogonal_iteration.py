"""One step of orthogonal iteration: from the last eigenbasis towards the current one."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from natgrad_jax.linalg.batching import over_batch
from natgrad_jax.utils.precision import HIGHEST


def refine(
    factor: Float[Array, "*batch n n"], basis: Float[Array, "*batch n n"]
) -> tuple[Float[Array, "*batch n n"], Float[Array, "*batch n"]]:
    """``Q ← qr(F Q)``, and the Rayleigh quotients of the new columns, ``diag(Qᵀ F Q)``.

    Before the QR step, columns are sorted by their Rayleigh quotients in decreasing order, which
    the iteration needs to converge. Exact if ``basis`` is already an eigenbasis of F.

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
    ordered = jnp.take_along_axis(product, order[..., None, :], axis=-1)
    new, _ = over_batch(jnp.linalg.qr, ordered)
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
