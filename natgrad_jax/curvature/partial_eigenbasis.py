"""A factor's eigenbasis: all eigenvectors, or the k leading ones V and all others as one.

A basis is partial if it has fewer columns than rows. Its coordinates are then those along V and,
last, the space of the n − k other eigenvectors, which share one number: the mean of their own.
Projections onto that space need no basis of it, ``‖x‖² − ‖Vᵀx‖²``.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from natgrad_jax.layers.factor_structure import FactorStructure
from natgrad_jax.linalg.low_rank import is_cheaper
from natgrad_jax.utils.precision import HIGHEST


def is_partial(side: FactorStructure, basis: jax.Array) -> bool:
    return side.supports_partial_basis and basis.shape[-1] < basis.shape[-2]


def may_be_partial(side: FactorStructure | None, rank: int | None) -> bool:
    """Whether ``rank`` eigenvectors are cheaper than a whole basis: for one wide dense matrix."""
    if side is None or rank is None or not side.supports_partial_basis:
        return False
    return is_cheaper(rank, side.width)


def count(side: FactorStructure, basis: jax.Array) -> int:
    """The number of coordinates."""
    return basis.shape[-1] + 1 if is_partial(side, basis) else side.packed


def laid_out(side: FactorStructure, basis: jax.Array) -> int:
    """How many numbers :func:`project_rows` returns for one row."""
    return side.packed + (basis.shape[-1] if is_partial(side, basis) else 0)


def eigenvalues(
    side: FactorStructure,
    basis: jax.Array,
    values: jax.Array,
    factor: jax.Array,
    bias: jax.Array | None,
) -> jax.Array:
    """Eigenvalues at every coordinate, ``(…, count)``, from those along the basis's columns."""
    if not is_partial(side, basis):
        return side.spread(values, bias)
    n, k = basis.shape[-2:]
    rest = jnp.maximum(side.trace(factor, None) - values.sum(-1), 0) / (n - k)
    return jnp.concatenate([values, rest[..., None]], axis=-1)


def everywhere(side: FactorStructure, basis: jax.Array, values: jax.Array) -> jax.Array:
    """Numbers ``(…, count)`` at every packed coordinate: the last one n − k times."""
    if not is_partial(side, basis):
        return values
    n, k = basis.shape[-2:]
    others = jnp.broadcast_to(values[..., -1:], (*values.shape[:-1], n - k))
    return jnp.concatenate([values[..., :-1], others], axis=-1)


def project_rows(side: FactorStructure, basis: jax.Array, rows: jax.Array) -> jax.Array:
    """``Qᵀ r`` of packed rows ``(N, T, *blocks, packed)``; of a partial basis ``[r, Vᵀ r]``.

    This form allows sums over rows and products of inputs and outputs;
    :func:`coordinate_moments` computes the coordinates' second moments from their squares.
    """
    inside = side.project(basis, rows)
    return jnp.concatenate([rows, inside], axis=-1) if is_partial(side, basis) else inside


def extended(side: FactorStructure, basis: jax.Array, x: jax.Array) -> jax.Array:
    """``[x, Vᵀ x]`` for a partial basis, in the form of :func:`project_rows`; x for a whole one."""
    if not is_partial(side, basis):
        return x
    return jnp.concatenate([x, side.rotate(basis, x)], axis=-2)


def coordinate_moments(
    side: FactorStructure, basis: jax.Array, squares: jax.Array, on_rows: bool = False
) -> jax.Array:
    """Second moments at the coordinates, from squares of projections on the last axis (or, with
    ``on_rows``, the one before)."""
    if not is_partial(side, basis):
        return squares
    if on_rows:
        return coordinate_moments(side, basis, squares.mT).mT
    n, k = basis.shape[-2:]
    leading = squares[..., n:]
    others = squares[..., :n].sum(-1) - leading.sum(-1)
    mean = jnp.maximum(others, 0) / (n - k)  # rounding may make it negative
    return jnp.concatenate([leading, mean[..., None]], axis=-1)


def transport(
    side: FactorStructure, moments: jax.Array, old: jax.Array, new: jax.Array
) -> jax.Array:
    """Second moments ``(…, count, columns)`` in the old basis, transported to the new one."""
    if not is_partial(side, new):
        return side.transport(moments, old, new)
    return jnp.matmul(_overlaps(new, old), moments, precision=HIGHEST)


def _overlaps(new: jax.Array, old: jax.Array) -> jax.Array:
    """``(q'ᵀ q)²`` of new and old vectors; other ones are summed (old) and averaged (new).

    A stochastic matrix: rows sum to 1.
    """
    squares = jnp.square(jnp.matmul(new.mT, old, precision=HIGHEST))
    n, k = new.shape[-2:]
    outside = jnp.maximum(1 - squares.sum(-1, keepdims=True), 0)
    from_leading = jnp.maximum(1 - squares.sum(-2, keepdims=True), 0) / (n - k)
    both = 1 - from_leading.sum(-1, keepdims=True)
    top = jnp.concatenate([squares, outside], axis=-1)
    return jnp.concatenate([top, jnp.concatenate([from_leading, both], axis=-1)], axis=-2)


def scaled(
    side: FactorStructure,
    basis: jax.Array,
    gains: jax.Array,
    x: jax.Array,
    inner: Callable[[jax.Array, jax.Array], jax.Array] = jnp.multiply,
) -> jax.Array:
    """``inner(gains, x)`` for gains ``(…, count, c)`` and ``x (…, packed, columns)``.

    x is in the coordinates of the basis if that is whole, else in its own.
    ``inner`` is linear in either argument and acts row by row. For a partial basis V, with gains
    ``g`` along it and ``r`` for the others: ``inner(r, x) + V inner(g − r, Vᵀ x)``.
    """
    if not is_partial(side, basis):
        return inner(gains, x)
    leading, others = gains[..., :-1, :], gains[..., -1:, :]
    inside = inner(leading - others, jnp.matmul(basis.mT, x, precision=HIGHEST))
    return inner(others, x) + jnp.matmul(basis, inside, precision=HIGHEST)
