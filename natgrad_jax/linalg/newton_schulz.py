"""Damped inverses by matrix products alone, for backends where factorisations are slow."""

from typing import Any

import jax
import jax.numpy as jnp

from natgrad_jax.utils.precision import HIGHEST

ITERATIONS = 60
NEAR = 0.5  # residual from which the last inverse is a start; the iteration squares it


def newton_schulz_inverse(factor: jax.Array, damping: jax.Array, last: jax.Array) -> jax.Array:
    """``(F + d I)⁻¹`` by ``X ← X (2 I − M X)``, ``M = F + d I``, which squares ``I − M X``.

    From the last inverse where ``‖I − M X‖ < 1/2``: then three to five rounds; else from
    ``I / ‖M‖∞``: about ``log₂ κ(M) + 5`` rounds, of ``4 n³`` operations each. It ends when the
    residual hardly falls any more, at what the precision allows, about ε κ(M).

    Args:
      factor: ``(*batch, n, n)``, symmetric positive semidefinite; damping: ``(*batch,)``, positive.
      last: ``(*batch, n, n)``, a guess.

    Returns:
      ``(*batch, n, n)``, symmetric; NaN where it did not converge.

    Source: Schulz 1933; Pan & Reif 1985 for the start.

    >>> import jax.numpy as jnp
    >>> newton_schulz_inverse(jnp.diag(jnp.array([1.0, 3.0])), jnp.array(1.0), jnp.eye(2)).round(3)
    Array([[0.5 , 0.  ],
           [0.  , 0.25]], dtype=float32)
    """
    eye = jnp.eye(factor.shape[-1], dtype=factor.dtype)
    M = factor + damping[..., None, None] * eye
    norm = lambda R: jnp.sqrt(jnp.sum(jnp.square(R), axis=(-2, -1)))
    residual = lambda X: eye - jnp.matmul(M, X, precision=HIGHEST)
    wide = lambda x: x[..., None, None]

    cold = eye / wide(jnp.abs(M).sum(-1).max(-1))
    guess = residual(last)
    X = jnp.where(wide(norm(guess) < NEAR), last, cold)
    R = jnp.where(wide(norm(guess) < NEAR), guess, residual(cold))

    def improve(carry: Any) -> Any:
        X, R, active, rounds = carry
        newer = X + jnp.matmul(X, R, precision=HIGHEST)
        newer = (newer + newer.mT) / 2
        after = residual(newer)
        # far from the solution the norm of R hardly falls: what counts is that it is below one
        better = (norm(after) < 0.9 * norm(R)) | (norm(after) >= NEAR)
        keep = active & (norm(after) < norm(R))
        X, R = jnp.where(wide(keep), newer, X), jnp.where(wide(keep), after, R)
        return X, R, keep & better, rounds + 1

    def unfinished(carry: Any) -> jax.Array:
        return jnp.any(carry[2]) & (carry[3] < ITERATIONS)

    active = norm(R) >= 0
    rounds = (damping.sum() * 0).astype(jnp.int32)
    X, R, _, _ = jax.lax.while_loop(unfinished, improve, (X, R, active, rounds))
    return jnp.where(wide(norm(R) < NEAR), X, jnp.nan)
