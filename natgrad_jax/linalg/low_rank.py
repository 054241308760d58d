"""Leading eigenpairs by randomized subspace iteration, and inverses of low rank plus identity."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from natgrad_jax.linalg.batching import over_batch, trace_of
from natgrad_jax.linalg.cholesky import inverse_root, squared
from natgrad_jax.linalg.orthonormal import orthonormal
from natgrad_jax.utils.precision import HIGHEST
from natgrad_jax.utils.short_repr import printed_short

GOLDEN = (5**0.5 - 1) / 2


@printed_short
class LowRankInverse(NamedTuple):
    """The symmetric matrix ``V inner Vᵀ + shift I``.

    ``V``: ``(*batch, n, k)``, orthonormal columns; ``inner``: ``(*batch, k, k)``, symmetric;
    ``shift``: ``(*batch,)``.
    """

    V: Float[Array, "*batch n k"]
    inner: Float[Array, "*batch k k"]
    shift: Float[Array, "*batch"]

    def as_matrix(self) -> jax.Array:
        """The matrix itself, ``(*batch, n, n)``."""
        eye = jnp.eye(self.V.shape[-2], dtype=self.V.dtype)
        return _times(_times(self.V, self.inner), self.V.mT) + self.shift[..., None, None] * eye

    def apply(self, x: Float[Array, "*batch n m"]) -> Float[Array, "*batch n m"]:
        """Its product with ``x (*batch, n, m)``: ``4 n k m`` operations instead of ``2 n² m``."""
        outside = _times(self.V, _times(self.inner, _times(self.V.mT, x)))
        return outside + self.shift[..., None, None] * x

    def apply_right(self, x: Float[Array, "*batch m n"]) -> Float[Array, "*batch m n"]:
        """``x (*batch, m, n)`` times it."""
        outside = _times(_times(_times(x, self.V), self.inner), self.V.mT)
        return outside + self.shift[..., None, None] * x

    def repeated(self) -> "LowRankInverse":
        """With one more batch axis, last: the same matrix for everything along it."""
        return LowRankInverse(
            self.V[..., None, :, :], self.inner[..., None, :, :], self.shift[..., None]
        )

    def is_finite(self, lead: int) -> jax.Array:
        """Whether all of its numbers are, for each index of the first ``lead`` axes. (The shift is
        made of the factor's trace; in ``inner`` a failed factorisation shows.)"""
        total = self.shift + self.inner.sum((-2, -1))
        return jnp.isfinite(total.sum(tuple(range(lead, total.ndim))))


def from_eigenpairs(V: jax.Array, values: jax.Array, rest: jax.Array) -> LowRankInverse:
    """The matrix with eigenvectors V ``(*batch, n, k)``, their eigenvalues ``(*batch, k)`` and
    ``rest (*batch,)`` for all others."""
    eye = jnp.eye(values.shape[-1], dtype=values.dtype)
    return LowRankInverse(V, (values - rest[..., None])[..., None, :] * eye, rest)


def is_cheaper(rank: int, size: int) -> bool:
    """Whether products with that many eigenvectors take less work than with the whole matrix."""
    return 2 * rank < size


def between(left: LowRankInverse, x: jax.Array, right: LowRankInverse) -> jax.Array:
    """``L X R`` for ``X (*batch, n, m)``, reading X three times and writing it once.

    With ``P = V_LᵀX`` and ``Y = X V_R``::

        L X R = s_L s_R X + [V_L, s_L Y D_R + V_L D_L P V_R D_R] [s_R D_L P; V_Rᵀ]

    where D is ``inner``.
    """
    wide = lambda scalars: scalars[..., None, None]
    P = _times(left.inner, _times(left.V.mT, x))
    Y = wide(left.shift) * _times(x, right.V) + _times(left.V, _times(P, right.V))
    columns = jnp.concatenate([left.V, _times(Y, right.inner)], axis=-1)
    rows = jnp.concatenate([wide(right.shift) * P, right.V.mT], axis=-2)
    return wide(left.shift * right.shift) * x + _times(columns, rows)


def projected(
    factor: Float[Array, "*batch n n"], start: Float[Array, "*batch n k"]
) -> tuple[Float[Array, "*batch n k"], Float[Array, "*batch k k"]]:
    """One step of subspace iteration: ``Q = orth(F S)`` and ``QᵀFQ``, by products alone."""
    product = _times(factor, start)
    # what a factor of zeros takes away comes back when it has some
    lost = jnp.sum(jnp.square(product), -2, keepdims=True) == 0
    Q = orthonormal(jnp.where(lost, start, product))
    small = _times(Q.mT, _times(factor, Q))
    return Q, (small + small.mT) / 2


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
    Q, small = projected(factor, start)
    values, W = over_batch(jnp.linalg.eigh, small)
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


def low_rank_identity(shape: tuple[int, ...], rank: int, dtype: Any) -> LowRankInverse:
    """The identity for ``shape = (*batch, n)`` in that form, V a start of :func:`subspace`."""
    V = initial_subspace(shape, rank, dtype)
    inner = jnp.zeros((*shape[:-1], rank, rank), dtype)
    return LowRankInverse(V, inner, jnp.ones(shape[:-1], dtype))


def low_rank_inverse(factor: jax.Array, damping: jax.Array, start: jax.Array) -> LowRankInverse:
    """``(F + d I)⁻¹`` from the span Q of k leading eigenvectors, the rest of the spectrum taken at
    its mean.

    With ``T = QᵀFQ`` and r the mean of the eigenvalues that are left out,
    ``(tr F − tr T) / (n − k)``::

        Q [(T + d I)⁻¹ − I / (r + d)] Qᵀ + I / (r + d)

    Exact where the others are equal; otherwise the error is at most that of taking each of them
    for r. An inverse of T needs no eigenvectors, so that all of it is matrix products. Arguments as
    in :func:`subspace`; ``damping (*batch,)`` is positive, and raised to the rounding errors of T.

    >>> import jax.numpy as jnp
    >>> F = jnp.diag(jnp.array([3.0, 1.0, 1.0]))
    >>> low_rank_inverse(F, jnp.array(1.0), jnp.eye(3)[:, :1]).as_matrix().round(3)
    Array([[0.25, 0.  , 0.  ],
           [0.  , 0.5 , 0.  ],
           [0.  , 0.  , 0.5 ]], dtype=float32)
    """
    return from_projection(*projected(factor, start), trace_of(factor), damping)


def from_projection(
    Q: Float[Array, "*batch n k"],
    T: Float[Array, "*batch k k"],
    trace: Float[Array, "*batch"],
    damping: Float[Array, "*batch"],
) -> LowRankInverse:
    """``(F + d I)⁻¹`` from orthonormal columns Q, ``T ≈ QᵀFQ`` and ``tr F``."""
    inside, eye = trace_of(T), jnp.eye(T.shape[-1], dtype=Q.dtype)
    rest = mean_of_others(Q, T, trace) + damping
    least = jnp.maximum(damping, inside * jnp.finfo(Q.dtype).eps)
    whole = squared(inverse_root(T + least[..., None, None] * eye))
    return LowRankInverse(Q, whole - eye / rest[..., None, None], 1 / rest)


def mean_of_others(
    Q: Float[Array, "*batch n k"], T: Float[Array, "*batch k k"], trace: Float[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """The mean of the eigenvalues outside of the columns Q, ``(tr F − tr T) / (n − k)``."""
    n, k = Q.shape[-2:]
    return jnp.maximum(trace - trace_of(T), 0) / max(n - k, 1)


_times = partial(jnp.matmul, precision=HIGHEST)
