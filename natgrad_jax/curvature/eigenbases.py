"""Kronecker eigenbases of one block: computed, refreshed, and second moments S in them."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from natgrad_jax.curvature import partial_eigenbasis
from natgrad_jax.curvature.factor_averages import FactorsLike, bias_of, make_factors
from natgrad_jax.curvature.inverses import identities
from natgrad_jax.layers.factor_structure import FactorStructure
from natgrad_jax.layers.layer import Layer
from natgrad_jax.linalg.batched_solve import Problem, Solving
from natgrad_jax.linalg.eigh import eigenbasis
from natgrad_jax.linalg.low_rank import initial_subspace, subspace
from natgrad_jax.linalg.nystrom import sketched_subspace
from natgrad_jax.linalg.orthogonal_iteration import off_diagonal, refine
from natgrad_jax.utils.precision import HIGHEST


@dataclasses.dataclass(frozen=True)
class Eigenbasis:
    """All eigenvectors Q of each factor F, and how a refresh updates them.

    Args:
      method: ``"eigh"``, or ``"qr"``: after the first basis one step of orthogonal iteration.
      tolerance: keep a basis while ``B = QᵀFQ`` has ``‖B − diag B‖ ≤ tolerance · ‖B‖``; None: renew
        it at every refresh.

    Raises:
      ValueError: an unknown method.

    Source: Golub & Van Loan, section 7.3.2; Vyas et al. 2024 (SOAP) for ``"qr"`` here.

    >>> import natgrad_jax as ng
    >>> tx = ng.ekfac(0.1, ng.Layers({}), basis=ng.Eigenbasis("qr", tolerance=0.1))
    """

    method: Literal["eigh", "qr"] = "eigh"
    tolerance: float | None = None

    def __post_init__(self) -> None:
        if self.method not in ("eigh", "qr"):
            raise ValueError(f"method must be 'eigh' or 'qr'; got {self.method!r}.")


def initial(layer: Layer, rank: int | None = None) -> tuple[FactorsLike, jax.Array]:
    """Initial bases, partial where ``rank`` makes them cheaper, and zero moments.

    A block with one matrix always has a whole basis, and its eigenvalues as moments.
    """
    whole = identities(layer)
    rank = None if layer.output_side is None else rank

    def one(side: FactorStructure | None, x: Any) -> Any:
        if side is not None and side.rank:
            return x.V[..., : rank or side.rank]
        if not partial_eigenbasis.may_be_partial(side, rank):
            return x
        assert rank is not None
        return initial_subspace(x.shape[:-1], rank, x.dtype)

    A, G = one(layer.input_side, whole.A), one(layer.output_side, whole.G)
    rows = partial_eigenbasis.count(layer.input_side, A)
    columns = 1 if layer.output_side is None else partial_eigenbasis.count(layer.output_side, G)
    S = jnp.zeros((*layer.stack_sizes, *layer.factor_blocks, rows, columns), layer.factor_dtype)
    return whole._replace(A=A, G=G), S


def eigenbases(
    layer: Layer, factors: FactorsLike, old: FactorsLike, first: jax.Array, how: Eigenbasis
) -> Solving[tuple[FactorsLike, jax.Array]]:
    """The bases of A and G, and the products of their eigenvalues at all coordinates.

    ``old`` are the last bases; the new ones are partial where these are. Elements of the stack
    without a basis yet (``first``, ``(*stack,)``) use ``eigh``. A computation for
    :func:`~natgrad_jax.linalg.batched_solve.solve`.
    """
    sides = [layer.input_side] + ([layer.output_side] if layer.output_side is not None else [])
    given = list(zip(sides, (factors.A, factors.G), (old.A, old.G), strict=False))
    known = [side.direct_eigenbasis(factor) for side, factor, _ in given]
    pairs = zip(given, known, strict=True)
    solutions = iter((yield [_problem(*x, first, how) for x, direct in pairs if direct is None]))
    found = [next(solutions) if direct is None else direct for direct in known]
    bias = bias_of(factors)
    on_rows, *on_columns = (
        partial_eigenbasis.eigenvalues(
            side, basis, values, factor, bias if side is sides[0] else None
        )
        for (side, factor, _), (basis, values) in zip(given, found, strict=True)
    )
    if not on_columns:
        return make_factors(found[0][0]), on_rows[..., None]
    bases = make_factors(found[0][0], found[1][0], None if bias is None else jnp.ones_like(bias))
    return bases, on_rows[..., :, None] * on_columns[0][..., None, :]


def _problem(
    side: FactorStructure, factor: jax.Array, old: jax.Array, first: jax.Array, how: Eigenbasis
) -> Problem:
    if side.rank:
        return Problem(sketched_subspace, (factor,), (("rank", old.shape[-1]),))
    if partial_eigenbasis.is_partial(side, old):
        return Problem(subspace, (factor, old))
    if how == Eigenbasis():
        return Problem(eigenbasis, (factor,))
    lead = factor.shape[:-2]
    first = jnp.broadcast_to(jnp.expand_dims(first, tuple(range(first.ndim, len(lead)))), lead)
    return Problem(renewed, (factor, old, first), tuple(dataclasses.asdict(how).items()))


def renewed(
    factor: jax.Array, old: jax.Array, first: jax.Array, method: str, tolerance: float | None
) -> tuple[jax.Array, jax.Array]:
    """The basis of each factor, from the last basis, and the factor's diagonal in it.

    Work is skipped only if all matrices of the batch allow it.
    """

    def renew() -> tuple[jax.Array, jax.Array]:
        if method == "eigh":
            return eigenbasis(factor)
        refined = refine(factor, old)
        anew = lambda: _where(first, eigenbasis(factor), refined)
        return jax.lax.cond(jnp.any(first), anew, lambda: refined)

    if tolerance is None:
        return renew()
    keep = ~first & (off_diagonal(factor, old) <= tolerance)
    kept = (old, _along(factor, old))
    return jax.lax.cond(jnp.all(keep), lambda: kept, lambda: _where(keep, kept, renew()))


def _where(choose: jax.Array, yes: Any, no: Any) -> Any:
    wide = lambda x: jnp.expand_dims(choose, tuple(range(choose.ndim, x.ndim)))
    return jax.tree.map(lambda a, b: jnp.where(wide(a), a, b), yes, no)


def _along(factor: jax.Array, basis: jax.Array) -> jax.Array:
    product = jnp.matmul(factor, basis, precision=HIGHEST)
    return jnp.maximum(jnp.sum(basis * product, axis=-2), 0)


def transport(layer: Layer, moments: jax.Array, old: FactorsLike, new: FactorsLike) -> jax.Array:
    """Moments S of the old bases in the new ones: ``diag(Q'ᵀ (Q diag(S) Qᵀ) Q')``.

    With ``P = Q'ᵀ Q`` for inputs and outputs, ``S' = P_A² S (P_G²)ᵀ``, squares elementwise. Signs
    and order of eigenvectors do not matter, the trace is preserved, and a basis that hardly moved
    changes S hardly at all.
    """
    S = partial_eigenbasis.transport(layer.input_side, moments, old.A, new.A)
    if layer.output_side is None:
        return S
    return partial_eigenbasis.transport(layer.output_side, S.mT, old.G, new.G).mT


def entered(layer: Layer, bases: FactorsLike, x: jax.Array) -> jax.Array:
    """A packed matrix in the coordinates of the whole ones among its bases: ``Q_Aᵀ X Q_G``."""
    return _on_whole_sides(layer, lambda side, x, Q: side.rotate(Q, x), x, bases)


def left(layer: Layer, bases: FactorsLike, x: jax.Array) -> jax.Array:
    """The inverse of :func:`entered`."""
    return _on_whole_sides(layer, lambda side, x, Q: side.rotate_back(Q, x), x, bases)


def turned(layer: Layer, x: jax.Array, old: FactorsLike, new: FactorsLike) -> jax.Array:
    """What has entered the old bases, in the new ones."""
    return _on_whole_sides(layer, lambda side, *given: side.turn(*given), x, old, new)


def _on_whole_sides(layer: Layer, op: Any, x: jax.Array, *bases: FactorsLike) -> jax.Array:
    """``op(side, x, *bases)`` from the left for inputs, from the right for outputs."""
    if not partial_eigenbasis.is_partial(layer.input_side, bases[-1].A):
        x = op(layer.input_side, x, *(b.A for b in bases))
    side = layer.output_side
    if side is None or partial_eigenbasis.is_partial(side, bases[-1].G):
        return x
    return op(side, x.mT, *(b.G for b in bases)).mT


def second_moments(layer: Layer, bases: FactorsLike, x: jax.Array) -> jax.Array:
    """One packed gradient's contribution to S: ``(Q_Aᵀ X Q_G)²``, elementwise, at the coordinates
    of the bases."""
    return moments_inside(layer, bases, entered(layer, bases, x))


def moments_inside(layer: Layer, bases: FactorsLike, x: jax.Array) -> jax.Array:
    """:func:`second_moments` of what has :func:`entered` the bases."""
    side = layer.output_side
    found = partial_eigenbasis.extended(layer.input_side, bases.A, x)
    if side is not None:
        found = partial_eigenbasis.extended(side, bases.G, found.mT).mT
    found = jnp.square(found)
    if side is not None:
        found = partial_eigenbasis.coordinate_moments(side, bases.G, found)
    return partial_eigenbasis.coordinate_moments(layer.input_side, bases.A, found, on_rows=True)


def scaled(layer: Layer, bases: FactorsLike, gains: jax.Array, x: jax.Array) -> jax.Array:
    """``Q_A [gains ∘ (Q_Aᵀ X Q_G)] Q_Gᵀ`` of a packed matrix."""
    return left(layer, bases, scaled_inside(layer, bases, gains, entered(layer, bases, x)))


def scaled_inside(layer: Layer, bases: FactorsLike, gains: jax.Array, x: jax.Array) -> jax.Array:
    """``gains ∘ X`` of what has :func:`entered` the bases."""
    side = layer.output_side
    if side is None:
        return partial_eigenbasis.scaled(layer.input_side, bases.A, gains, x)
    inner = lambda g, y: partial_eigenbasis.scaled(side, bases.G, g.mT, y.mT).mT
    return partial_eigenbasis.scaled(layer.input_side, bases.A, gains, x, inner)


def everywhere(layer: Layer, bases: FactorsLike, moments: jax.Array) -> jax.Array:
    """Moments at every packed coordinate: a mean moment is repeated for each that it stands for."""
    side = layer.output_side
    if side is not None:
        moments = partial_eigenbasis.everywhere(side, bases.G, moments)
    return partial_eigenbasis.everywhere(layer.input_side, bases.A, moments.mT).mT
