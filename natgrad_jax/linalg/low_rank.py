"""Leading eigenpairs by randomized subspace iteration, and inverses of low rank plus diagonal."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax.linalg.batching import over_batch

_PRECISION = jax.lax.Precision.HIGHEST
GOLDEN = (5**0.5 - 1) / 2


class LowRank(NamedTuple):
    """The symmetric matrix ``diag(shift) + V diag(gains) Vᵀ``.

    ``V``: ``(*batch, n, k)``; ``gains``: ``(*batch, k)``; ``shift``: ``(*batch, n)``, or
    ``(*batch, 1)`` for a multiple of the identity.
    """

    V: jax.Array
    gains: jax.Array
    shift: jax.Array

    def dense(self) -> jax.Array:
        """The matrix itself, ``(*batch, n, n)``."""
        eye = jnp.eye(self.V.shape[-2], dtype=self.V.dtype)
        return _times(self.V * self.gains[..., None, :], self.V.mT) + self.shift[..., None] * eye

    def apply(self, x: jax.Array) -> jax.Array:
        """Its product with ``x (*batch, n, m)``: ``4 n k m`` operations instead of ``2 n² m``."""
        inside = self.gains[..., None] * _times(self.V.mT, x)
        return _times(self.V, inside) + self.shift[..., None] * x

    def apply_right(self, x: jax.Array) -> jax.Array:
        """``x (*batch, m, n)`` times it."""
        inside = _times(x, self.V) * self.gains[..., None, :]
        return _times(inside, self.V.mT) + self.shift[..., None, :] * x


def between(left: LowRank, x: jax.Array, right: LowRank) -> jax.Array:
    """``L X R`` for ``X (*batch, n, m)``, reading X three times and writing it once.

    With ``P = D_L V_LᵀX`` and ``Y = L X V_R D_R``::

        L X R = S_L X S_R + [V_L, Y] [P S_R; V_Rᵀ]
    """
    P = left.gains[..., None] * _times(left.V.mT, x)
    Y = left.shift[..., None] * _times(x, right.V) + _times(left.V, _times(P, right.V))
    columns = jnp.concatenate([left.V, Y * right.gains[..., None, :]], axis=-1)
    rows = jnp.concatenate([P * right.shift[..., None, :], right.V.mT], axis=-2)
    return left.shift[..., None] * x * right.shift[..., None, :] + _times(columns, rows)


def subspace(factor: jax.Array, start: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Approximate leading eigenpairs of F: one step of subspace iteration and Rayleigh–Ritz.

    ``Y = F S``, ``Q = qr(Y)``, ``QᵀFQ = W diag(d) Wᵀ``, ``V = Q W``: ``4 n² k`` operations. From a
    random ``start`` this is the randomized SVD of Halko et al.; from the last V it is warm-started,
    and follows a factor that moves slowly.

    Args:
      factor: ``(*batch, n, n)``, symmetric positive semidefinite.
      start: ``(*batch, n, k)``.

    Returns:
      ``V (*batch, n, k)`` and d ``(*batch, k)``, ascending, not below zero.

    Source: Halko, Martinsson & Tropp 2011, algorithms 4.4 and 5.3.

    >>> import jax.numpy as jnp
    >>> subspace(jnp.diag(jnp.array([3.0, 1.0, 0.0])), jnp.eye(3)[:, :1])[1]
    Array([3.], dtype=float32)
    """
    Q = over_batch(lambda y: jnp.linalg.qr(y)[0], _times(factor, start))
    small = _times(Q.mT, _times(factor, Q))
    values, W = over_batch(jnp.linalg.eigh, (small + small.mT) / 2)
    return _times(Q, W), jnp.maximum(values, 0)


def initial_subspace(shape: tuple[int, ...], rank: int, dtype: Any) -> jax.Array:
    """A start of :func:`subspace` for ``shape = (*batch, n)``: fixed, columns of about unit length.

    Cosines of well-spread frequencies: as far from any eigenvector as random numbers are, in one
    line of the compiled program where a random number generator is many.
    """
    n = shape[-1]
    frequencies = jnp.pi * (jnp.arange(1, rank + 1) * GOLDEN % 1)
    waves = jnp.cos((jnp.arange(n)[:, None] + 0.5) * frequencies) * (2 / n) ** 0.5
    return jnp.broadcast_to(waves.astype(dtype), (*shape, rank))


def low_rank_inverse(factor: jax.Array, damping: jax.Array, last: LowRank) -> LowRank:
    """``(F + d I)⁻¹`` from k leading eigenpairs, what they leave of F taken at its diagonal.

    With ``F ≈ V D Vᵀ + diag(r)``, ``r = diag(F − V D Vᵀ)``, ``E = diag(1 / (r + d))`` and
    ``W = V D^{1/2}``, by Woodbury::

        E − U Uᵀ,   U = E W chol(I + WᵀEW)⁻ᵀ

    Exact where what is left is diagonal. The subspace is followed from that of the last inverse,
    ``E⁻¹ U``: :func:`subspace`.

    Args:
      factor: ``(*batch, n, n)``, symmetric positive semidefinite; damping: ``(*batch,)``, positive.
      last: the last inverse, or :func:`initial`.

    Source: Halko, Martinsson & Tropp 2011 for V; Woodbury 1950.

    >>> import jax.numpy as jnp
    >>> F = jnp.diag(jnp.array([3.0, 1.0, 0.0]))
    >>> last = LowRank(jnp.eye(3)[:, :1], jnp.zeros(1), jnp.ones(3))
    >>> jnp.diag(low_rank_inverse(F, jnp.array(1.0), last).dense()).round(3)
    Array([0.25, 0.5 , 1.  ], dtype=float32)
    """
    known = last.shift[..., None] > 0  # not where it is filled up with zeros
    start = jnp.where(known, last.V / jnp.where(known, last.shift[..., None], 1), 0)
    V, values = subspace(factor, start)
    left = jnp.diagonal(factor, axis1=-2, axis2=-1) - jnp.sum(V**2 * values[..., None, :], axis=-1)
    E = 1 / (jnp.maximum(left, 0) + damping[..., None])
    W = V * jnp.sqrt(values)[..., None, :]
    EW = E[..., None] * W
    inner = jnp.eye(W.shape[-1], dtype=W.dtype) + _times(W.mT, EW)
    U = over_batch(_half, inner, EW.mT).mT
    return LowRank(U, -jnp.ones_like(values), E)


def _half(inner: jax.Array, right: jax.Array) -> jax.Array:
    """``L⁻¹ R`` with ``L Lᵀ = inner``."""
    return jax.scipy.linalg.solve_triangular(jnp.linalg.cholesky(inner), right, lower=True)


def initial(shape: tuple[int, ...], rank: int, dtype: Any) -> LowRank:
    """The identity for ``shape = (*batch, n)``, whose subspace is a start."""
    V = initial_subspace(shape, rank, dtype)
    return LowRank(V, jnp.zeros((*shape[:-1], rank), dtype), jnp.ones(shape, dtype))


def _times(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=_PRECISION)
