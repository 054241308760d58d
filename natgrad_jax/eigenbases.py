"""Kronecker eigenbases of one block: found, refreshed, and moments carried from one to the next."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax.averages import bias_of, pair
from natgrad_jax.layer import Layer
from natgrad_jax.linalg.eigenbasis import eigenbasis
from natgrad_jax.linalg.orthogonal_iteration import off_diagonal, refine
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
) -> tuple[Any, jax.Array]:
    """The bases of A and G, and the eigenvalue products at every packed coordinate.

    ``old`` are the last bases; where any element of the stack has none yet (``first``, ``()``),
    ``eigh`` is taken.
    """
    Q_A, d_A = _of_side(layer.input_side, factors.A, old.A, first, how)
    on_rows = layer.input_side.spread(d_A, bias_of(factors))
    if layer.output_side is None:
        return pair(Q_A), on_rows[..., None]
    Q_G, d_G = _of_side(layer.output_side, factors.G, old.G, first, how)
    on_columns = layer.output_side.spread(d_G, None)
    bias = bias_of(factors)
    bases = pair(Q_A, Q_G, None if bias is None else jnp.ones_like(bias))
    return bases, on_rows[..., :, None] * on_columns[..., None, :]


def _of_side(
    side: Side, factor: jax.Array, old: jax.Array, first: jax.Array, how: Refresh
) -> tuple[jax.Array, jax.Array]:
    if side.diagonal:
        return jnp.ones_like(factor), factor

    def renew(factor: jax.Array) -> tuple[jax.Array, jax.Array]:
        if how.method == "eigh":
            return eigenbasis(factor)
        return jax.lax.cond(first, eigenbasis, lambda f: refine(f, old), factor)

    if how.tolerance is None:
        return renew(factor)
    keep = ~first & jnp.all(off_diagonal(factor, old) <= how.tolerance)
    return jax.lax.cond(keep, lambda f: (old, _along(f, old)), renew, factor)


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
