"""Kronecker eigenbases of one block: found, refreshed, and moments carried from one to the next."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax.averages import bias_of, pair
from natgrad_jax.layer import Layer
from natgrad_jax.linalg.eigenbasis import eigenbasis
from natgrad_jax.linalg.orthogonal_iteration import off_diagonal, refine
from natgrad_jax.linalg.stacking import Problem, Solving
from natgrad_jax.sides import Side


class Refresh(NamedTuple):
    """How a basis is renewed; static.

    ``method``: ``"eigh"``, or ``"qr"``: one step of orthogonal iteration from the last basis.
    ``tolerance``: a basis is kept while ``‖B − diag B‖ ≤ tolerance · ‖B‖``, ``B = Qᵀ F Q``; None to
    renew always.
    """

    method: str = "eigh"
    tolerance: float | None = None


def eigenbases(
    layer: Layer, factors: Any, old: Any, first: jax.Array, how: Refresh
) -> Solving[tuple[Any, jax.Array]]:
    """The bases of A and G, and the eigenvalue products at every packed coordinate.

    ``old`` are the last bases; elements of the stack that have none yet (``first``, ``(*stack,)``)
    take ``eigh``. A computation for :func:`~natgrad_jax.linalg.stacking.solve`.
    """
    sides = [layer.input_side] + ([layer.output_side] if layer.output_side is not None else [])
    given = list(zip(sides, factors, old, strict=False))
    solutions = iter(
        (yield [_problem(*each, first, how) for each in given if not each[0].diagonal])
    )
    found = [
        (jnp.ones_like(factor), factor) if side.diagonal else next(solutions)
        for side, factor, _ in given
    ]
    bias = bias_of(factors)
    on_rows = layer.input_side.spread(found[0][1], bias)
    if layer.output_side is None:
        return pair(found[0][0]), on_rows[..., None]
    on_columns = layer.output_side.spread(found[1][1], None)
    bases = pair(found[0][0], found[1][0], None if bias is None else jnp.ones_like(bias))
    return bases, on_rows[..., :, None] * on_columns[..., None, :]


def _problem(
    side: Side, factor: jax.Array, old: jax.Array, first: jax.Array, how: Refresh
) -> Problem:
    if how == Refresh():
        return Problem(eigenbasis, (factor,))
    lead = factor.shape[:-2]
    first = jnp.broadcast_to(jnp.expand_dims(first, tuple(range(first.ndim, len(lead)))), lead)
    return Problem(renewed, (factor, old, first), tuple(how._asdict().items()))


def renewed(
    factor: jax.Array, old: jax.Array, first: jax.Array, method: str, tolerance: float | None
) -> tuple[jax.Array, jax.Array]:
    """The basis of each factor and what the factor is along it, from the last basis.

    Work is spared where all matrices of the batch allow it.
    """

    def renew() -> tuple[jax.Array, jax.Array]:
        if method == "eigh":
            return eigenbasis(factor)
        return jax.lax.cond(jnp.any(first), _first_or_refined, refine, factor, old)

    def _first_or_refined(factor: jax.Array, old: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _where(first, eigenbasis(factor), refine(factor, old))

    if tolerance is None:
        return renew()
    keep = ~first & (off_diagonal(factor, old) <= tolerance)
    kept = (old, _along(factor, old))
    return jax.lax.cond(jnp.all(keep), lambda: kept, lambda: _where(keep, kept, renew()))


def _where(choose: jax.Array, yes: Any, no: Any) -> Any:
    wide = lambda x: jnp.expand_dims(choose, tuple(range(choose.ndim, x.ndim)))
    return jax.tree.map(lambda a, b: jnp.where(wide(a), a, b), yes, no)


def _along(factor: jax.Array, basis: jax.Array) -> jax.Array:
    product = jnp.matmul(factor, basis, precision=jax.lax.Precision.HIGHEST)
    return jnp.maximum(jnp.sum(basis * product, axis=-2), 0)


def carried(layer: Layer, moments: jax.Array, old: Any, new: Any) -> jax.Array:
    """Moments S of the old bases in the new ones: ``diag(Q'ᵀ (Q diag(S) Qᵀ) Q')``.

    With ``P = Q'ᵀ Q`` on each side, ``S' = P_A² S (P_G²)ᵀ``, squares elementwise. Signs and order
    of eigenvectors do not matter, the trace stays, and a basis that hardly moved changes hardly
    anything.
    """
    S = _turned(layer.input_side, moments, old.A, new.A)
    if layer.output_side is None:
        return S
    return _turned(layer.output_side, S.mT, old.G, new.G).mT


def _turned(side: Side, S: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
    if side.diagonal:
        return S
    overlap = jnp.matmul(new.mT, old, precision=jax.lax.Precision.HIGHEST)
    return side.apply(jnp.square(overlap), None, S)


def to_basis(layer: Layer, bases: Any, x: jax.Array) -> jax.Array:
    """``Q_Aᵀ X Q_G`` of a packed matrix."""
    x = layer.input_side.rotate(bases.A, x)
    return x if layer.output_side is None else layer.output_side.rotate(bases.G, x.mT).mT


def from_basis(layer: Layer, bases: Any, x: jax.Array) -> jax.Array:
    """``Q_A X Q_Gᵀ``, the inverse of :func:`to_basis`."""
    x = layer.input_side.rotate_back(bases.A, x)
    return x if layer.output_side is None else layer.output_side.rotate_back(bases.G, x.mT).mT
