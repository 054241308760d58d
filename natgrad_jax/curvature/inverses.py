"""Linear operators on one block, as pairs of structured matrices for its rows and columns."""

from typing import Any

import jax
import jax.numpy as jnp

from natgrad_jax.curvature import damping_split
from natgrad_jax.curvature.factor_averages import FactorsLike, bias_of, make_factors, zero_factors
from natgrad_jax.curvature.inverse_methods import Cholesky, InverseMethod
from natgrad_jax.layers.factor_structure import FactorStructure
from natgrad_jax.layers.layer import Layer
from natgrad_jax.linalg.batched_solve import Problem, Solving
from natgrad_jax.linalg.low_rank import between, low_rank_identity, low_rank_inverse
from natgrad_jax.linalg.nystrom import sketched_inverse
from natgrad_jax.linalg.operators import can_join, operators_in
from natgrad_jax.linalg.pseudo_inverse import reciprocal
from natgrad_jax.linalg.retry import Retried
from natgrad_jax.linalg.woodbury import root, woodbury

CHOLESKY = Cholesky()


def identities(layer: Layer, how: InverseMethod = CHOLESKY) -> FactorsLike:
    """The identity operator."""
    zeros = zero_factors(layer)

    def one(side: FactorStructure | None, x: jax.Array | None) -> Any:
        if x is None or side is None:
            return None
        if rank := _rank(layer, side, how):
            return low_rank_identity(x.shape[:-1], rank, x.dtype)
        return side.identity(x.shape[: x.ndim - len(side.shape)], x.dtype)

    A = one(layer.input_side, zeros.A)
    assert A is not None
    bias = bias_of(zeros)
    return make_factors(A, one(layer.output_side, zeros.G), None if bias is None else bias + 1)


def inverses(
    layer: Layer,
    factors: FactorsLike,
    damping: jax.Array,
    old: FactorsLike | None = None,
    how: InverseMethod = CHOLESKY,
    split: str = damping_split.DEFAULT,
) -> Solving[tuple[FactorsLike, jax.Array]]:
    """``(A + π√λ I)⁻¹`` and ``(G + (√λ/π) I)⁻¹``; for a block with one matrix ``(F + λ I)⁻¹``,
    never of low rank.

    ``split`` names the rule of :mod:`~natgrad_jax.curvature.damping_split` that divides λ between
    the factors by their mean eigenvalues; ``old`` are the last inverses, from which iterations
    start. Also returns how many factorisations failed and needed more damping, int32 ``()``. A
    computation for :func:`~natgrad_jax.linalg.batched_solve.solve`.
    """
    if layer.output_side is None or factors.G is None:
        on_f = jnp.broadcast_to(damping, factors.A.shape[:-2]).astype(factors.A.dtype)
        last = None if old is None else old.A
        found, failures = _counted((yield [how.exact(factors.A, on_f, last)]))
        return make_factors(*found), failures
    bias = bias_of(factors)
    dampings = damping_split.rule(split)(
        layer.input_side.trace(factors.A, bias) / layer.input_side.size,
        layer.output_side.trace(factors.G, None) / layer.output_side.size,
        damping,
    )
    sides = (layer.input_side, layer.output_side)
    starts = (None, None) if old is None else (old.A, old.G)
    given = list(zip(sides, (factors.A, factors.G), dampings, starts, strict=True))
    known = [side.direct_inverse(factor, on) for side, factor, on, _ in given]
    factored = [x for x, direct in zip(given, known, strict=True) if direct is None]
    found, failures = _counted((yield [_problem(layer, *x, how) for x in factored]))
    solutions = iter(found)
    A, G = (next(solutions) if direct is None else direct for direct in known)
    return make_factors(A, G, None if bias is None else reciprocal(bias + dampings[0])), failures


def _problem(
    layer: Layer,
    side: FactorStructure,
    factor: jax.Array,
    damping: jax.Array,
    old: Any,
    how: InverseMethod,
) -> Problem:
    damping = side.each_matrix(damping.astype(factor.dtype))
    damping = jnp.broadcast_to(damping, factor.shape[:-2])
    rank = _rank(layer, side, how)
    if side.rank:
        return Problem(sketched_inverse, (factor, damping, *[old.V] * (rank < side.rank)))
    if rank:
        return Problem(low_rank_inverse, (factor, damping, old.V))
    return how.exact(factor, damping, old)


def _rank(layer: Layer, side: FactorStructure, how: InverseMethod) -> int:
    """The rank of that factor's inverse; 0: a whole matrix."""
    low = how.low_rank(layer, side)
    return low if side.rank is None else min(low or side.rank, side.rank)


def _counted(solutions: list[Any]) -> tuple[list[Any], jax.Array]:
    """Results without their counts of failures, and the sum of these counts."""
    failures = jnp.zeros((), jnp.int32)
    found = []
    for solution in solutions:
        if isinstance(solution, Retried):
            solution, failed = solution
            failures += failed.sum(dtype=jnp.int32)
        found.append(solution)
    return found, failures


def updated(
    layer: Layer, old: FactorsLike, batch: FactorsLike, rate: jax.Array, rank: int
) -> FactorsLike:
    """Inverses after one more batch: ``((1 − r) M + r F)⁻¹`` from each ``M⁻¹``, by Woodbury.

    F, the batch's factor, enters through a root of rank ``rank``. Factors without such updates wait
    for the next refresh; elements of the stack that saw no examples are unchanged.
    """

    def one(side: FactorStructure | None, inverse: Any, factor: Any) -> Any:
        if inverse is None or factor is None or side is None or not side.update_rank(rank):
            return inverse
        keep = 1 - rate.astype(factor.dtype)
        keep = jnp.expand_dims(keep, tuple(range(keep.ndim, factor.ndim)))
        safe = jnp.where(keep > 0, keep, 1)
        new = woodbury(inverse, root(factor, side.update_rank(rank)), safe)
        return jnp.where((keep > 0) & (keep < 1), new, inverse)

    return old._replace(
        A=one(layer.input_side, old.A, batch.A), G=one(layer.output_side, old.G, batch.G)
    )


def operate(layer: Layer, operator: FactorsLike, x: jax.Array) -> jax.Array:
    """``A X G`` of a packed matrix; ``A X`` for a block with one matrix (both are symmetric)."""
    if can_join(operator.A, x, operator.G):
        return between(operator.A, x, operator.G)
    x = layer.input_side.apply(operator.A, bias_of(operator), x)
    if layer.output_side is None or operator.G is None:
        return x
    return layer.output_side.apply_right(operator.G, x)


def keep_finite(
    layer: Layer, new: Any, old: Any, weights: jax.Array, checked: Any = None
) -> tuple[Any, jax.Array]:
    """``new`` where it is finite and its factors were measured, else ``old``; and the failures.

    All matrices of one element of the stack are kept or dropped together. ``checked``: a
    cheaper subset of arrays that is non-finite whenever ``new`` is.
    """
    lead = len(layer.stack)
    finite = jnp.ones(weights.shape, bool)
    for x in operators_in(new if checked is None else checked):
        finite &= x.is_finite(lead)
    known = weights > 0
    use = known & finite

    def choose(n: jax.Array, o: jax.Array) -> jax.Array:
        return jnp.where(jnp.expand_dims(use, tuple(range(lead, n.ndim))), n, o)

    return jax.tree.map(choose, new, old), jnp.sum(known & ~finite, dtype=jnp.int32)
