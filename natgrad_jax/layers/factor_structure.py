"""The structure of a Kronecker factor: which entries it keeps, and how it acts on coordinates.

A factor is a matrix over the rows (inputs) or the columns (outputs) of ``K̄``. It is stored as one
matrix over all coordinates, one for each group of them, one that all kernel offsets share, a sketch
or a diagonal. This file is the interface; ``simple_structures.py`` has the simple ones and chooses,
``grouped_structures.py`` and ``sketched.py`` have the others.
"""

from abc import ABC, abstractmethod
from typing import Any

import jax
import jax.numpy as jnp

from natgrad_jax.layers.layer_call import LayerCall
from natgrad_jax.linalg.batching import trace_of
from natgrad_jax.linalg.gram import gram
from natgrad_jax.linalg.low_rank import LowRankInverse
from natgrad_jax.linalg.operators import DenseMatrix, as_operator
from natgrad_jax.utils.precision import HIGHEST


class FactorStructure(ABC):
    """The interface of a factor's structure; static and hashable.

    Shapes: a factor is ``(…, *shape)``; packed coordinates are ``(…, packed, columns)``, rows of
    statistics ``(N, T, *blocks, size)``. ``bias`` is the entry at a separate bias, ``(…)``; None
    means 1. Defaults are those of one dense matrix.
    """

    # Shapes and properties.

    @property
    @abstractmethod
    def size(self) -> int:
        """Number of coordinates before packing."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Number of rows of one stored matrix."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the stored factor: ``(n, n)``, ``(groups, n, n)``, ``(n, k + 1)`` (a sketch) or
        ``(n,)`` (a diagonal)."""

    @property
    def packed(self) -> int:
        """Number of coordinates after :meth:`pack`."""
        return self.size

    @property
    def bias_apart(self) -> bool:
        """Whether the last coordinate is a separate bias, uncorrelated with all others."""
        return False

    @property
    def mean_included(self) -> bool:
        """Whether the stored matrix includes the channels' mean, so that it is no operator."""
        return False

    @property
    def supports_low_rank(self) -> bool:
        """Whether it is one matrix, whose inverse may be of low rank plus a multiple of I."""
        return False

    @property
    def supports_partial_basis(self) -> bool:
        """Whether a basis may keep some eigenvectors, with one number for all others."""
        return False

    @property
    def rank(self) -> int | None:
        """How many eigenvectors the stored factor has, where others share one eigenvalue; None:
        all."""
        return None

    @property
    def cost(self) -> int:
        """The work of one factorisation: the cubes of the sizes."""
        return self.width**3

    @abstractmethod
    def describe(self) -> str:
        """The sizes, for the coverage table."""

    # Coordinates.

    def pack(self, x: jax.Array, axis: int) -> jax.Array:
        """``x`` with the coordinates on ``axis`` in the order of the stored matrices."""
        return x

    def unpack(self, x: jax.Array, axis: int) -> jax.Array:
        """The inverse of :meth:`pack`."""
        return x

    @abstractmethod
    def spread(self, values: jax.Array, bias: jax.Array | None) -> jax.Array:
        """Values for the matrices ``(…, [groups,] width)``, at all coordinates ``(…, packed)``."""

    def each_matrix(self, x: jax.Array) -> jax.Array:
        """One number per factor ``(…)``, with a unit axis for groups if the factor has groups."""
        return x

    # Measuring a factor.

    def rows(self, x: jax.Array) -> jax.Array:
        """Rows ``(N, T, *blocks, size)`` in the form that :meth:`gram` takes, without the bias."""
        return x

    def gram(self, rows: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """The factor's sum of products over :meth:`rows`, ``(*blocks, *shape)``."""
        return gram(rows, dtype)

    def gram_without_rows(
        self,
        call: LayerCall,
        examples: jax.Array,
        dtype: jnp.dtype,
        weight: jax.Array | None = None,
    ) -> jax.Array | None:
        """The same sum directly from a call's input, whose rows have these weights ``(N, T or 1)``;
        None if :meth:`rows` are needed."""
        return None

    @abstractmethod
    def narrow(self, factor: jax.Array) -> jax.Array:
        """The factor in this structure, cut out of a whole one ``(…, size, size)``."""

    # The factor as an operator. ``matrix``: a factor, or a stored inverse.

    def identity(self, lead: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        """The identity as a factor, ``(*lead, *shape)``."""
        return jnp.broadcast_to(jnp.eye(self.width, dtype=dtype), (*lead, *self.shape))

    def operator(self, matrix: Any) -> DenseMatrix | LowRankInverse:
        """The stored matrix with its products."""
        return as_operator(matrix)

    @abstractmethod
    def apply(self, matrix: Any, bias: jax.Array | None, x: jax.Array) -> jax.Array:
        """``M x`` for ``x (…, packed, columns)``."""

    def apply_right(self, matrix: Any, x: jax.Array) -> jax.Array:
        """``x M`` for a symmetric M and ``x (…, rows, packed)``."""
        return self.apply(matrix, None, x.mT).mT

    @abstractmethod
    def trace(self, factor: jax.Array, bias: jax.Array | None) -> jax.Array:
        """The trace of the whole matrix: ``(…)``."""

    def squared_norm(self, factor: jax.Array, bias: jax.Array | None) -> jax.Array:
        """``‖M‖²`` of the whole matrix: ``(…)``."""
        columns = jnp.square(factor).sum(-2)
        return self.spread(columns, None if bias is None else bias**2).sum(-1)

    def direct_inverse(self, factor: jax.Array, damping: jax.Array) -> jax.Array | None:
        """``(F + d I)⁻¹`` for d ``(…)``; None if that needs a factorisation."""
        return None

    def inverse_error(
        self, factor: jax.Array, damping: jax.Array, inverse: Any, columns: jax.Array
    ) -> jax.Array:
        """Squared rows of ``((F + d I) M − I) Z`` for columns Z ``(width, m)``: ``(…, width)``."""
        y = as_operator(inverse).apply(columns)
        wide = jnp.expand_dims(damping, tuple(range(damping.ndim, y.ndim)))
        return jnp.square(self.operator(factor).apply(y) + wide * y - columns).sum(-1)

    def update_rank(self, rank: int) -> int:
        """The rank of one batch's update of an inverse, at most ``rank``; 0: no updates."""
        return min(rank, self.width)

    # Eigenvectors, in the columns of a basis that has the shape of a factor.

    def eigenvalues(self, matrix: jax.Array) -> jax.Array:
        """Eigenvalues of the stored matrices, ``(…, [groups,] width)``."""
        return jnp.linalg.eigvalsh(matrix)

    def mean_eigenvalue(self, matrix: jax.Array) -> jax.Array:
        """The mean eigenvalue of a stored matrix of any size."""
        return trace_of(matrix) / matrix.shape[-1]

    def direct_eigenbasis(self, factor: jax.Array) -> tuple[jax.Array, jax.Array] | None:
        """The basis and the eigenvalues; None if they need a factorisation."""
        return None

    @abstractmethod
    def project(self, basis: jax.Array, rows: jax.Array) -> jax.Array:
        """``Qᵀ r`` of packed rows ``(N, T, *blocks, packed)``."""

    def rotate(self, basis: jax.Array, x: jax.Array) -> jax.Array:
        """``Qᵀ x`` of packed ``(…, packed, columns)``: into the eigenbasis."""
        return self.apply(basis.mT, None, x)

    def rotate_back(self, basis: jax.Array, x: jax.Array) -> jax.Array:
        """``Q x``, the inverse of :meth:`rotate`."""
        return self.apply(basis, None, x)

    def turn(self, x: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
        """``Q'ᵀ Q x``: what is written in an old basis, in a new one."""
        return self.apply(jnp.matmul(new.mT, old, precision=HIGHEST), None, x)

    def transport(self, moments: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
        """Second moments ``(…, packed, columns)`` in an old basis, transported to a new one: they
        are multiplied by ``(Q'ᵀ Q)²``, squares elementwise."""
        overlaps = jnp.square(jnp.matmul(new.mT, old, precision=HIGHEST))
        return self.apply(overlaps, None, moments)

    def along(self, factor: jax.Array, basis: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """``qᵀ F q``, ``‖F q − q (qᵀ F q)‖²`` and ``‖F q‖²`` for each column q of a basis."""
        product = self.operator(factor).apply(basis)
        values = jnp.sum(basis * product, axis=-2)
        left = product - basis * values[..., None, :]
        return values, jnp.square(left).sum(-2), jnp.square(product).sum(-2)
