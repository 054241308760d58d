"""The structure of a factor too wide for a matrix: its products with a few columns of signs."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from natgrad_jax.layers.factor_structure import FactorStructure
from natgrad_jax.linalg.low_rank import LowRankInverse
from natgrad_jax.linalg.nystrom import signs, sketch_of, sketched_gram, sketched_matrix
from natgrad_jax.utils.precision import HIGHEST


@dataclass(frozen=True)
class Sketched(FactorStructure):
    """A sketch of one matrix over all ``n`` coordinates, a bias among them: ``(n, columns + 1)``,
    last the diagonal (:mod:`~natgrad_jax.linalg.nystrom`). Whatever is computed from it is that of
    its approximation: ``columns`` eigenpairs, and one number for all others."""

    n: int
    columns: int

    @property
    def size(self) -> int:
        return self.n

    @property
    def width(self) -> int:
        return self.n

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.n, self.columns + 1)

    @property
    def rank(self) -> int:
        return self.columns

    @property
    def supports_low_rank(self) -> bool:
        return True

    @property
    def supports_partial_basis(self) -> bool:
        return True

    @property
    def cost(self) -> int:
        return self.n * self.columns**2

    def describe(self) -> str:
        return f"sketch {self.n} × {self.columns}"

    def spread(self, values: jax.Array, bias: jax.Array | None) -> jax.Array:
        return values

    def gram(self, rows: jax.Array, dtype: jnp.dtype) -> jax.Array:
        return sketched_gram(rows, self.columns, dtype)

    def narrow(self, factor: jax.Array) -> jax.Array:
        return sketch_of(factor, self.columns)

    def identity(self, lead: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        own = jnp.pad(signs(self.n, self.columns, dtype), [(0, 0), (0, 1)], constant_values=1)
        return jnp.broadcast_to(own, (*lead, *self.shape))

    def operator(self, matrix: Any) -> LowRankInverse:
        return matrix if isinstance(matrix, LowRankInverse) else sketched_matrix(matrix)

    def apply(self, matrix: Any, bias: jax.Array | None, x: jax.Array) -> jax.Array:
        return self.operator(matrix).apply(x)

    def trace(self, factor: jax.Array, bias: jax.Array | None) -> jax.Array:
        return factor[..., -1].sum(-1)

    def squared_norm(self, factor: jax.Array, bias: jax.Array | None) -> jax.Array:
        return jnp.square(self.eigenvalues(factor)).sum(-1)

    def update_rank(self, rank: int) -> int:
        return 0

    def eigenvalues(self, matrix: jax.Array) -> jax.Array:
        own = sketched_matrix(matrix)
        leading = jnp.linalg.eigvalsh(own.inner) + own.shift[..., None]
        lead = (*leading.shape[:-1], self.n - self.columns)
        return jnp.concatenate([jnp.broadcast_to(own.shift[..., None], lead), leading], axis=-1)

    def mean_eigenvalue(self, matrix: jax.Array) -> jax.Array:
        return self.trace(matrix, None) / self.n

    def project(self, basis: jax.Array, rows: jax.Array) -> jax.Array:
        return jnp.einsum("nt...i,...ij->nt...j", rows, basis, precision=HIGHEST)

    def rotate(self, basis: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.matmul(basis.mT, x, precision=HIGHEST)
