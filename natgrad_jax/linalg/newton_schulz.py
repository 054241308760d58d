"""Damped inverses from matrix products only, for backends where factorisations are slow."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from natgrad_jax.utils.precision import HIGHEST

ITERATIONS = 60
NEAR = 0.5  # with a smaller residual an inverse is a good start: each iteration squares it

# X, the residual I − M X, whether it still converges, and the number of iterations.
State = tuple[
    Float[Array, "*batch n n"], Float[Array, "*batch n n"], Bool[Array, "*batch"], Int[Array, ""]
]


def newton_schulz_inverse(
    factor: Float[Array, "*batch n n"],
    damping: Float[Array, "*batch"],
    last: Float[Array, "*batch n n"],
) -> Float[Array, "*batch n n"]:
    """``(F + d I)⁻¹`` by Newton–Schulz iteration.

    ``X ← X (2 I − M X)`` with ``M = F + d I``, which squares the residual ``I − M X``. It starts
    from the last inverse if ``‖I − M X‖ < 1/2`` there, and takes three to five iterations; else
    from ``I / ‖M‖∞``, and takes about ``log₂ κ(M) + 5``, where κ is the condition number. An
    iteration costs ``4 n³`` operations. It stops when the residual stagnates, at about ε κ(M).

    Args:
      factor: F, ``(*batch, n, n)``, symmetric positive semidefinite.
      damping: d > 0, ``(*batch,)``.
      last: an initial guess, ``(*batch, n, n)``, for example the inverse at the last refresh.

    Returns:
      ``(*batch, n, n)``, symmetric; NaN if it did not converge.

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

    def improve(state: State) -> State:
        X, R, active, rounds = state
        newer = X + jnp.matmul(X, R, precision=HIGHEST)
        newer = (newer + newer.mT) / 2
        after = residual(newer)
        # far from the solution the norm decreases slowly, which is no reason to stop
        better = (norm(after) < 0.9 * norm(R)) | (norm(after) >= NEAR)
        keep = active & (norm(after) < norm(R))
        X, R = jnp.where(wide(keep), newer, X), jnp.where(wide(keep), after, R)
        return X, R, keep & better, rounds + 1

    def unfinished(state: State) -> Bool[Array, ""]:
        _, _, active, rounds = state
        return jnp.any(active) & (rounds < ITERATIONS)

    active = norm(R) >= 0
    rounds = (damping.sum() * 0).astype(jnp.int32)
    X, R, _, _ = jax.lax.while_loop(unfinished, improve, (X, R, active, rounds))
    return jnp.where(wide(norm(R) < NEAR), X, jnp.nan)
