"""Symmetric matrices as optimizer states hold them, with one set of products for both forms.

A state holds a plain array, or a :class:`~natgrad_jax.linalg.low_rank.LowRankInverse`;
:func:`as_operator` is the one place that tells them apart.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax.linalg.low_rank import LowRankInverse
from natgrad_jax.utils.precision import HIGHEST


class DenseMatrix(NamedTuple):
    """A plain array ``(*batch, n, n)`` with the methods of a low-rank inverse."""

    matrix: jax.Array

    def as_matrix(self) -> jax.Array:
        """The matrix itself, ``(*batch, n, n)``."""
        return self.matrix

    def apply(self, x: jax.Array) -> jax.Array:
        """Its product with ``x (*batch, n, m)``."""
        return jnp.matmul(self.matrix, x, precision=HIGHEST)

    def apply_right(self, x: jax.Array) -> jax.Array:
        """``x (*batch, m, n)`` times it."""
        return jnp.matmul(x, self.matrix, precision=HIGHEST)

    def repeated(self) -> "DenseMatrix":
        """With one more batch axis, last: the same matrix for everything along it."""
        return DenseMatrix(self.matrix[..., None, :, :])

    def is_finite(self, lead: int) -> jax.Array:
        """Whether all of its numbers are, for each index of the first ``lead`` axes."""
        return jnp.isfinite(self.matrix.sum(tuple(range(lead, self.matrix.ndim))))


def as_operator(held: Any) -> DenseMatrix | LowRankInverse:
    """What a state holds, with its products."""
    return held if _is_low_rank(held) else DenseMatrix(held)


def operators_in(tree: Any) -> list[DenseMatrix | LowRankInverse]:
    """Every matrix (or any other array) of a tree, one of low rank as one."""
    return [as_operator(x) for x in jax.tree.leaves(tree, is_leaf=_is_low_rank)]


def can_join(left: Any, x: jax.Array, right: Any) -> bool:
    """Whether :func:`~natgrad_jax.linalg.low_rank.between` can apply both sides at once: both are
    of low rank, and the left one acts on all rows of ``x``."""
    both = _is_low_rank(left) and _is_low_rank(right)
    return both and left.V.shape[-2] == x.shape[-2]


def _is_low_rank(x: Any) -> bool:
    return isinstance(x, LowRankInverse)
