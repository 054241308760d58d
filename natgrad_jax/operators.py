"""Linear operators of one block, as pairs of structured matrices on its rows and columns."""

from typing import Any

import jax
import jax.numpy as jnp

from natgrad_jax.averages import bias_of, pair, zero_factors
from natgrad_jax.damping_rules import split
from natgrad_jax.layer import Layer
from natgrad_jax.linalg.cholesky import damped_inverse
from natgrad_jax.sides import Side


def identities(layer: Layer) -> Any:
    """The operator that changes nothing."""
    zeros = zero_factors(layer)

    def one(side: Side | None, x: jax.Array | None) -> jax.Array | None:
        if x is None or side is None:
            return None
        return x + (1 if side.diagonal else jnp.eye(x.shape[-1], dtype=x.dtype))

    A = one(layer.input_side, zeros.A)
    assert A is not None
    bias = bias_of(zeros)
    return pair(A, one(layer.output_side, zeros.G), None if bias is None else bias + 1)


def inverses(layer: Layer, factors: Any, damping: jax.Array) -> Any:
    """``(A + π√λ I)⁻¹`` and ``(G + (√λ/π) I)⁻¹``; ``(F + λ I)⁻¹`` of a block with one matrix."""
    if layer.output_side is None or factors.G is None:
        lead = factors.A.shape[:-2]
        return pair(damped_inverse(factors.A, jnp.broadcast_to(damping, lead)))
    bias = bias_of(factors)
    on_a, on_g = split(
        layer.input_side.trace(factors.A, bias) / layer.input_side.size,
        layer.output_side.trace(factors.G, None) / layer.output_side.size,
        damping,
    )
    return pair(
        _damped_inverse(layer.input_side, factors.A, on_a),
        _damped_inverse(layer.output_side, factors.G, on_g),
        None if bias is None else 1 / (bias + on_a),
    )


def _damped_inverse(side: Side, factor: jax.Array, damping: jax.Array) -> jax.Array:
    if side.diagonal:
        return 1 / (factor + damping[..., None])
    if side.grouped:
        damping = jnp.broadcast_to(damping[..., None], factor.shape[:-2])
    return damped_inverse(factor, damping)


def operate(layer: Layer, operator: Any, x: jax.Array) -> jax.Array:
    """``A X G`` of a packed matrix; ``A X`` for a block with one matrix (both are symmetric)."""
    x = layer.input_side.apply(operator.A, bias_of(operator), x)
    if layer.output_side is None or operator.G is None:
        return x
    if layer.output_side.grouped:
        return layer.output_side.apply(operator.G, None, x.mT).mT
    return jnp.matmul(x, operator.G, precision=jax.lax.Precision.HIGHEST)


def keep_finite(layer: Layer, new: Any, old: Any, weights: jax.Array) -> tuple[Any, jax.Array]:
    """``new`` where it is finite and its factors were measured, else ``old``; and how many failed.

    All matrices of one element of the stack are kept or dropped together.
    """
    lead = len(layer.stack)
    finite = jnp.ones(weights.shape, bool)
    for x in jax.tree.leaves(new):
        finite &= jnp.isfinite(x.sum(tuple(range(lead, x.ndim))))
    known = weights > 0
    use = known & finite

    def choose(n: jax.Array, o: jax.Array) -> jax.Array:
        return jnp.where(jnp.expand_dims(use, tuple(range(lead, n.ndim))), n, o)

    return jax.tree.map(choose, new, old), jnp.sum(known & ~finite, dtype=jnp.int32)
