"""Leading eigenpairs by randomized subspace iteration, and inverses of low rank plus identity."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from natgrad_jax.linalg.batching import over_batch, trace_of
from natgrad_jax.linalg.orthonormal import orthonormal
from natgrad_jax.utils.precision import HIGHEST

GOLDEN = (5**0.5 - 1) / 2


class LowRankInverse(NamedTuple):
    """The symmetric matrix ``V diag(gains) Vᵀ + shift I``.

    ``V``: ``(*batch, n, k)``, orthonormal columns; ``gains``: ``(*batch, k)``; ``shift``:
    ``(*batch,)``.
    """

    V: Float[Array, "*batch n k"]
    gains: Float[Array, "*batch k"]
    shift: Float[Array, "*batch"]

    def as_matrix(self) -> jax.Array:
        """The matrix itself, ``(*batch, n, n)``."""
        eye = jnp.eye(self.V.shape[-2], dtype=self.V.dtype)
        inner = jnp.matmul(self.V * self.gains[..., None, :], self.V.mT, precision=HIGHEST)
        return inner + self.shift[..., None, None] * eye

    def apply(self, x: Float[Array, "*batch n m"]) -> Float[Array, "*batch n m"]:
        """Its product with ``x (*batch, n, m)``: ``4 n k m`` operations instead of ``2 n² m``."""
        inside = self.gains[..., None] * jnp.matmul(self.V.mT, x, precision=HIGHEST)
        outside = jnp.matmul(self.V, inside, precision=HIGHEST)
        return outside + self.shift[..., None, None] * x

    def apply_right(self, x: Float[Array, "*batch m n"]) -> Float[Array, "*batch m n"]:
        """``x (*batch, m, n)`` times it."""
        inside = jnp.matmul(x, self.V, precision=HIGHEST) * self.gains[..., None, :]
        outside = jnp.matmul(inside, self.V.mT, precision=HIGHEST)
        return outside + self.shift[..., None, None] * x

    def repeated(self) -> "LowRankInverse":
        """With one more batch axis, last: the same matrix for everything along it."""
        return LowRankInverse(
            self.V[..., None, :, :], self.gains[..., None, :], self.shift[..., None]
        )

    def is_finite(self, lead: int) -> jax.Array:
        """Whether all of its numbers are, for each index of the first ``lead`` axes: the shift is
        made of the sum of all eigenvalues, and tells of every one that is not finite."""
        return jnp.isfinite(self.shift.sum(tuple(range(lead, self.shift.ndim))))


def is_cheaper(rank: int, size: int) -> bool:
    """Whether products with that many eigenvectors take less work than with the whole matrix."""
    return 2 * rank < size


def between(left: LowRankInverse, x: jax.Array, right: LowRankInverse) -> jax.Array:
    """``L X R`` for ``X (*batch, n, m)``, reading X three times and writing it once.

    With ``P = V_LᵀX`` and ``Y = X V_R``::

        L X R = s_L s_R X + [V_L, s_L Y D_R + V_L D_L P V_R D_R] [s_R D_L P; V_Rᵀ]
    """
    times = partial(jnp.matmul, precision=HIGHEST)
    wide = lambda scalars: scalars[..., None, None]
    P = left.gains[..., None] * times(left.V.mT, x)
    Y = wide(left.shift) * times(x, right.V) + times(left.V, times(P, right.V))
    columns = jnp.concatenate([left.V, Y * right.gains[..., None, :]], axis=-1)
    rows = jnp.concatenate([wide(right.shift) * P, right.V.mT], axis=-2)
    return wide(left.shift * right.shift) * x + times(columns, rows)


def subspace(
    factor: Float[Array, "*batch n n"], start: Float[Array, "*batch n k"]
) -> tuple[Float[Array, "*batch n k"], Float[Array, "*batch k"]]:
    """Approximate leading eigenpairs of F: one step of subspace iteration and Rayleigh–Ritz.

    ``Y = F S``, ``Q = orth(Y)``, ``QᵀFQ = W diag(d) Wᵀ``, ``V = Q W``: ``4 n² k`` operations. From
    a random ``start`` this is the randomized SVD of Halko et al.; from the last V it is
    warm-started, and follows a factor that moves slowly.

    Args:
      factor: ``(*batch, n, n)``, symmetric positive semidefinite.
      start: ``(*batch, n, k)``.

    Returns:
      ``V (*batch, n, k)`` and d ``(*batch, k)``, ascending, not below zero.

    Source: Halko, Martinsson & Tropp 2011, algorithms 4.4 and 5.3.

    >>> import jax.numpy as jnp
    >>> values = subspace(jnp.diag(jnp.array([3.0, 1.0, 0.0])), jnp.eye(3)[:, :1])[1]
    >>> round(float(values[0]), 3)
    3.0
    """
    product = jnp.matmul(factor, start, precision=HIGHEST)
    # what a factor of zeros takes away comes back when it has some
    lost = jnp.sum(jnp.square(product), -2, keepdims=True) == 0
    Q = orthonormal(jnp.where(lost, start, product))
    small = jnp.matmul(Q.mT, jnp.matmul(factor, Q, precision=HIGHEST), precision=HIGHEST)
    values, W = over_batch(jnp.linalg.eigh, (small + small.mT) / 2)
    return jnp.matmul(Q, W, precision=HIGHEST), jnp.maximum(values, 0)


def initial_subspace(shape: tuple[int, ...], rank: int, dtype: Any) -> jax.Array:
    """A start of :func:`subspace` for ``shape = (*batch, n)``: fixed, columns of about unit length.

    Cosines of well-spread frequencies: as far from any eigenvector as random numbers are, in one
    line of the compiled program where a random number generator is many.
    """
    n = shape[-1]
    frequencies = jnp.pi * (jnp.arange(1, rank + 1) * GOLDEN % 1)
    waves = jnp.cos((jnp.arange(n)[:, None] + 0.5) * frequencies) * (2 / n) ** 0.5
    return jnp.broadcast_to(waves.astype(dtype), (*shape, rank))


def low_rank_identity(shape: tuple[int, ...], rank: int, dtype: Any) -> LowRankInverse:
    """The identity for ``shape = (*batch, n)`` in that form, V a start of :func:`subspace`."""
    V = initial_subspace(shape, rank, dtype)
    return LowRankInverse(V, jnp.zeros((*shape[:-1], rank), dtype), jnp.ones(shape[:-1], dtype))


def low_rank_inverse(factor: jax.Array, damping: jax.Array, start: jax.Array) -> LowRankInverse:
    """``(F + d I)⁻¹`` from k leading eigenpairs, the rest of the spectrum taken at its mean.

    With r the mean of the eigenvalues that are left out, ``(tr F − Σ dᵢ) / (n − k)``::

        V diag(1 / (dᵢ + d) − 1 / (r + d)) Vᵀ + I / (r + d)

    Exact where the others are equal; otherwise the error is at most that of taking each of them
    for r. Arguments as in :func:`subspace`; ``damping (*batch,)`` is positive.

    >>> import jax.numpy as jnp
    >>> F = jnp.diag(jnp.array([3.0, 1.0, 1.0]))
    >>> low_rank_inverse(F, jnp.array(1.0), jnp.eye(3)[:, :1]).as_matrix().round(3)
    Array([[0.25, 0.  , 0.  ],
           [0.  , 0.5 , 0.  ],
           [0.  , 0.  , 0.5 ]], dtype=float32)
    """
    V, values = subspace(factor, start)
    n, k = V.shape[-2:]
    left = trace_of(factor) - values.sum(-1)
    rest = jnp.maximum(left, 0) / max(n - k, 1) + damping
    return LowRankInverse(V, 1 / (values + damping[..., None]) - 1 / rest[..., None], 1 / rest)
