"""Linear operators of one block, as pairs of structured matrices on its rows and columns."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax.curvature.damping_split import split
from natgrad_jax.curvature.factor_averages import bias_of, pair, zero_factors
from natgrad_jax.layers.factor_structure import Side
from natgrad_jax.layers.layer import Layer
from natgrad_jax.linalg.batched_solve import Problem, Solving
from natgrad_jax.linalg.cholesky import damped_inverse
from natgrad_jax.linalg.low_rank import LowRank, between, initial_subspace, low_rank_inverse
from natgrad_jax.linalg.newton_schulz import newton_schulz_inverse
from natgrad_jax.linalg.pseudo_inverse import pseudo_inverse
from natgrad_jax.linalg.retry import raised
from natgrad_jax.linalg.woodbury import root, woodbury
from natgrad_jax.utils.precision import HIGHEST

# How factors are inverted; woodbury by Cholesky at a refresh, and by updates between.
INVERSES = ("cholesky", "eigh", "low_rank", "newton_schulz", "woodbury")
RANK = 64  # of low-rank inverses where none is given


class Inversion(NamedTuple):
    """``method``: of ``INVERSES``; ``rank``: of low-rank inverses and updates; ``cutoff``: of
    pseudo-inverses."""

    method: str = "cholesky"
    rank: int | None = None
    cutoff: float | None = None

    def low_rank(self, layer: Layer, side: Side) -> bool:
        """Whether a side's inverse is of low rank plus identity: only where that is cheaper, and
        never where the block has one matrix, which is inverted exactly."""
        if self.method != "low_rank" or layer.output_side is None:
            return False
        if side.diagonal or side.grouped:
            return False
        assert self.rank is not None
        return 2 * self.rank < side.width


CHOLESKY = Inversion()


def inversion(method: str, rank: Any, cutoff: Any = None) -> Inversion:
    """The checked choice; raises ValueError with what there is."""
    if method not in INVERSES:
        raise ValueError(f"inverse must be {' or '.join(map(repr, INVERSES))}; got {method!r}.")
    if method in ("low_rank", "woodbury"):
        rank = checked_rank(rank, method, RANK if method == "low_rank" else None)
    elif rank is not None:
        raise ValueError(f'rank={rank!r} goes with inverse="low_rank" or "woodbury".')
    return Inversion(method, rank, cutoff)


def checked_rank(rank: Any, method: str, default: int | None = RANK) -> int:
    """The rank, or the default for None; raises ValueError where it is no whole number."""
    rank = default if rank is None else rank
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(
            f"{method!r} needs rank=, how many directions it keeps: a whole number; got {rank!r}. "
            "(Under optax.inject_hyperparams name it in static_args.)"
        )
    return rank


def identities(layer: Layer, how: Inversion = CHOLESKY) -> Any:
    """The operator that changes nothing."""
    zeros = zero_factors(layer)

    def one(side: Side | None, x: jax.Array | None) -> Any:
        if x is None or side is None:
            return None
        if how.low_rank(layer, side):
            V = initial_subspace(x.shape[:-1], how.rank or 1, x.dtype)
            return LowRank(V, jnp.zeros(V.shape[:-2] + V.shape[-1:], x.dtype),
                           jnp.ones(V.shape[:-2], x.dtype))  # fmt: skip
        return x + (1 if side.diagonal else jnp.eye(x.shape[-1], dtype=x.dtype))

    A = one(layer.input_side, zeros.A)
    assert A is not None
    bias = bias_of(zeros)
    return pair(A, one(layer.output_side, zeros.G), None if bias is None else bias + 1)


def inverses(
    layer: Layer,
    factors: Any,
    damping: jax.Array,
    old: Any = None,
    how: Inversion = CHOLESKY,
    divide: Callable[..., tuple[jax.Array, jax.Array]] = split,
) -> Solving[tuple[Any, jax.Array]]:
    """``(A + π√λ I)⁻¹`` and ``(G + (√λ/π) I)⁻¹``; of a block with one matrix ``(F + λ I)⁻¹``,
    exactly: no method makes it of low rank.

    ``divide`` splits λ between the factors by their mean eigenvalues; ``old`` are the last
    inverses, from which those of low rank start. Also how many factorisations failed and took more
    damping, int32 ``()``. A computation for :func:`~natgrad_jax.linalg.batched_solve.solve`.
    """
    if layer.output_side is None or factors.G is None:
        on_f = jnp.broadcast_to(damping, factors.A.shape[:-2]).astype(factors.A.dtype)
        last = None if old is None else old.A
        found, failures = _counted((yield [_exact(factors.A, on_f, last, how)]))
        return pair(*found), failures
    bias = bias_of(factors)
    dampings = divide(
        layer.input_side.trace(factors.A, bias) / layer.input_side.size,
        layer.output_side.trace(factors.G, None) / layer.output_side.size,
        damping,
    )
    sides = (layer.input_side, layer.output_side)
    starts = (None, None) if old is None else (old.A, old.G)
    problems = [
        _problem(layer, *each, how)
        for each in zip(sides, (factors.A, factors.G), dampings, starts, strict=True)
        if not each[0].diagonal
    ]
    found, failures = _counted((yield problems))
    solutions = iter(found)
    A, G = (
        _reciprocal(factor + _over_columns(on, factor)) if side.diagonal else next(solutions)
        for side, factor, on in zip(sides, (factors.A, factors.G), dampings, strict=True)
    )
    return pair(A, G, None if bias is None else _reciprocal(bias + dampings[0])), failures


def _problem(
    layer: Layer, side: Side, factor: jax.Array, damping: jax.Array, old: Any, how: Inversion
) -> Problem:
    damping = damping.astype(factor.dtype)
    damping = jnp.broadcast_to(damping[..., None] if side.grouped else damping, factor.shape[:-2])
    if how.low_rank(layer, side):
        return Problem(low_rank_inverse, (factor, damping, old.V))
    return _exact(factor, damping, old, how)


def _exact(factor: jax.Array, damping: jax.Array, old: Any, how: Inversion) -> Problem:
    if how.method == "eigh":
        return Problem(pseudo_inverse, (factor, damping), (("cutoff", how.cutoff),))
    if how.method == "newton_schulz":
        return Problem(newton_schulz_inverse, (factor, damping, old), fills=True)
    return Problem(raised, (factor, damping), (("op", damped_inverse),), fills=True)


def _counted(solutions: list[Any]) -> tuple[list[Any], jax.Array]:
    """Results without their counts of failures, and the sum of those."""
    failures = jnp.zeros((), jnp.int32)
    found = []
    for solution in solutions:
        if isinstance(solution, tuple) and not isinstance(solution, LowRank):
            solution, failed = solution
            failures += failed.sum(dtype=jnp.int32)
        found.append(solution)
    return found, failures


def _over_columns(damping: jax.Array, factor: jax.Array) -> jax.Array:
    return damping.astype(factor.dtype)[..., None]


def _reciprocal(x: jax.Array) -> jax.Array:
    """``x⁺`` of numbers that are not negative."""
    return jnp.where(x > 0, 1 / jnp.where(x > 0, x, 1), 0)


def followed(layer: Layer, old: Any, batch: Any, rate: jax.Array, rank: int) -> Any:
    """Inverses after one more batch, ``((1 − r) M + r F)⁻¹`` of each side's ``M⁻¹``, by Woodbury.

    F, the batch's factor, through a root of that rank. Diagonals wait for the next refresh, and so
    does an element of the stack that saw nothing.
    """

    def one(side: Side | None, inverse: Any, factor: Any) -> Any:
        if inverse is None or factor is None or side is None or side.diagonal:
            return inverse
        keep = 1 - rate.astype(factor.dtype)
        keep = jnp.expand_dims(keep, tuple(range(keep.ndim, factor.ndim)))
        safe = jnp.where(keep > 0, keep, 1)
        new = woodbury(inverse, root(factor, min(rank, side.width)), safe)
        return jnp.where((keep > 0) & (keep < 1), new, inverse)

    return old._replace(
        A=one(layer.input_side, old.A, batch.A), G=one(layer.output_side, old.G, batch.G)
    )


def operate(layer: Layer, operator: Any, x: jax.Array) -> jax.Array:
    """``A X G`` of a packed matrix; ``A X`` for a block with one matrix (both are symmetric)."""
    low_rank = isinstance(operator.A, LowRank) and isinstance(operator.G, LowRank)
    if low_rank and x.shape[-2] == operator.A.V.shape[-2]:
        return between(operator.A, x, operator.G)
    x = _times(layer.input_side, operator.A, bias_of(operator), x)
    if layer.output_side is None or operator.G is None:
        return x
    if isinstance(operator.G, LowRank):
        return operator.G.apply_right(x)
    if layer.output_side.grouped:
        return _times(layer.output_side, operator.G, None, x.mT).mT
    return jnp.matmul(x, operator.G, precision=HIGHEST)


def _times(side: Side, factor: Any, bias: jax.Array | None, x: jax.Array) -> jax.Array:
    if not isinstance(factor, LowRank):
        return side.apply(factor, bias, x)
    end = x.shape[-2] - side.bias
    parts = x[..., :end, :].reshape(*x.shape[:-2], -1, side.width, x.shape[-1])
    at_places = LowRank(
        factor.V[..., None, :, :], factor.gains[..., None, :], factor.shift[..., None]
    )
    out = at_places.apply(parts).reshape(*x.shape[:-2], end, x.shape[-1])
    if not side.bias:
        return out
    rest = x[..., end:, :]
    rest = rest if bias is None else rest * bias[..., None, None].astype(rest.dtype)
    return jnp.concatenate([out, rest], axis=-2)


def keep_finite(
    layer: Layer, new: Any, old: Any, weights: jax.Array, told_by: Any = None
) -> tuple[Any, jax.Array]:
    """``new`` where it is finite and its factors were measured, else ``old``; and how many failed.

    All matrices of one element of the stack are kept or dropped together. ``told_by``: arrays of
    which one is not finite wherever ``new`` is not, where fewer than all of ``new`` tell.
    """
    lead = len(layer.stack)
    finite = jnp.ones(weights.shape, bool)
    for x in jax.tree.leaves(new if told_by is None else told_by):
        finite &= jnp.isfinite(x.sum(tuple(range(lead, x.ndim))))
    known = weights > 0
    use = known & finite

    def choose(n: jax.Array, o: jax.Array) -> jax.Array:
        return jnp.where(jnp.expand_dims(use, tuple(range(lead, n.ndim))), n, o)

    return jax.tree.map(choose, new, old), jnp.sum(known & ~finite, dtype=jnp.int32)
