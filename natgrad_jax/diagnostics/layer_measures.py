"""One layer's curvature in a few numbers, ``(*stack,)`` each, by products of matrices only.

A layer's blocks count as one block-diagonal matrix.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from natgrad_jax.curvature import damping_split
from natgrad_jax.curvature.eigenbases import scaled
from natgrad_jax.curvature.factor_averages import bias_of
from natgrad_jax.curvature.inverses import operate
from natgrad_jax.curvature.partial_eigenbasis import eigenvalues, everywhere, is_partial
from natgrad_jax.layers.factor_structure import FactorStructure
from natgrad_jax.layers.layer import Layer
from natgrad_jax.linalg.batching import trace_of
from natgrad_jax.reparametrization.coordinates import Coordinates, second_and_mean

Measures = dict[str, jax.Array]
# A Kronecker factor's name, structure, the factor, and its entry at a separate bias.
Part = tuple[str, FactorStructure, jax.Array, jax.Array | None]

# Random directions in which the error of a large inverse is measured.
PROBES = 64


def parts(layer: Layer, factors: Any) -> Iterator[Part]:
    """The layer's factors: A, and G if there is one."""
    yield "A", layer.input_side, factors.A, bias_of(factors)
    if layer.output_side is not None and factors.G is not None:
        yield "G", layer.output_side, factors.G, None


def of_factors(layer: Layer, factors: Any) -> Measures:
    """``scale``, the mean eigenvalue ``tr F / n``, and ``rank``, the effective one,
    ``(tr F)² / ‖F‖²``: n for a multiple of the identity, 1 for a matrix of rank one."""
    found = {}
    for name, side, factor, bias in parts(layer, factors):
        trace = _total(layer, side.trace(factor, bias))
        found[f"scale_{name}"] = trace / (side.size * _blocks(layer))
        found[f"rank_{name}"] = _over(trace**2, _total(layer, side.squared_norm(factor, bias)))
    return found


def dampings(layer: Layer, factors: Any, damping: jax.Array, split: str) -> Measures:
    """The damping added to each factor, ``(*stack, *blocks)``: ``π√λ`` for A and ``√λ/π`` for G (or
    ``√λ`` for both), λ itself for a block with one matrix."""
    means = [side.trace(x, bias) / side.size for _, side, x, bias in parts(layer, factors)]
    if len(means) == 1:
        return {"A": jnp.broadcast_to(damping, means[0].shape).astype(means[0].dtype)}
    on_a, on_g = damping_split.rule(split)(means[0], means[1], damping)
    return {"A": on_a, "G": on_g}


def of_inverses(layer: Layer, factors: Any, inverses: Any, on: Measures) -> Measures:
    """``damping`` of each factor, and ``drift``, ``‖(F + d I) M − I‖ / √n`` of the stored inverse
    M: 0 for the inverse of the current factor, 1 for M = 0.

    If n is larger than ``PROBES``, I is replaced by that many random columns Z of signs:
    ``E‖X Z‖² = ‖X‖²``.
    """
    found = {}
    for name, side, factor, bias in parts(layer, factors):
        d, inverse = on[name].astype(factor.dtype), getattr(inverses, name)
        at_bias = None
        if bias is not None:
            at_bias = jnp.square((bias + d) * inverses.bias - 1)
        squares = side.inverse_error(factor, d, inverse, _probes(side.width, factor.dtype))
        missed = _total(layer, side.unpack(side.spread(squares, at_bias), -1))
        found[f"damping_{name}"] = _total(layer, d) / _blocks(layer)
        found[f"drift_{name}"] = jnp.sqrt(missed / (side.size * _blocks(layer)))
    return found


def of_bases(layer: Layer, factors: Any, bases: Any) -> tuple[Measures, Measures]:
    """``drift``, ``‖B − diag B‖ / ‖B‖`` with ``B = Qᵀ F Q`` in the stored basis Q: 0 for an
    eigenbasis of the current factor; and the diagonals of B, at every packed coordinate.

    For a partial basis V, ``‖F V − V diag(Vᵀ F V)‖ / ‖F V‖``, and at the other coordinates the mean
    of the remaining trace."""
    drifts, diagonals = {}, {}
    for name, side, factor, bias in parts(layer, factors):
        basis = getattr(bases, name)
        values, left, whole = side.along(factor, basis)
        if not is_partial(side, basis):
            none = None if bias is None else jnp.zeros_like(bias)
            left = side.spread(left, none)
            whole = side.spread(whole, None if bias is None else bias**2)
        drifts[f"drift_{name}"] = jnp.sqrt(_over(_total(layer, left), _total(layer, whole)))
        along = eigenvalues(side, basis, values, factor, bias)
        diagonals[name] = everywhere(side, basis, along)
    return drifts, diagonals


def of_moments(layer: Layer, S: jax.Array, diagonals: Measures, damping: jax.Array) -> Measures:
    """``condition`` of ``S + λ``, and ``kfac_error``, ``‖S − b_A b_Gᵀ‖ / ‖S‖`` with the diagonals b
    of K-FAC's factors in the same bases: the error of K-FAC that EKFAC corrects."""
    exists = layer.to_matrix(*(jnp.ones(p.shape, bool) for p in layer.parameters))
    exists = layer.pack(exists)  # False in the padding of the last group
    axes = tuple(range(len(layer.stack), S.ndim))
    largest = jnp.max(S, axes, where=exists, initial=0) + damping.astype(S.dtype)
    least = jnp.min(S, axes, where=exists, initial=jnp.inf) + damping.astype(S.dtype)
    found = {"condition": largest / least}
    if "G" in diagonals:
        product = diagonals["A"][..., :, None] * diagonals["G"][..., None, :]
        missed = _total(layer, jnp.square(S - product))
        found["kfac_error"] = jnp.sqrt(_over(missed, _total(layer, jnp.square(S))))
    return found


def of_coordinates(layer: Layer, factors: Any, own: Coordinates) -> Measures:
    """``drift`` as for bases; ``variance``, the largest of a whitened unit, at most 1 in
    coordinates of the current factors; ``drift_mean``, ``‖E[h] − c‖ / √(tr Σ)``."""
    second, mean = factors.A, None
    if own.A_scale is not None:
        second, mean = second_and_mean(layer, factors.A)
    found = {}
    for name, side, factor, basis, scale in (
        ("A", layer.input_side, second, own.A, own.A_scale),
        ("G", layer.output_side, factors.G, own.G, own.G_scale),
    ):
        if factor is None or side is None:
            continue
        values = factor
        if basis is not None:
            values, left, whole = side.along(factor, basis)
            found[f"drift_{name}"] = jnp.sqrt(_over(_total(layer, left), _total(layer, whole)))
        if scale is not None:
            white = values * scale**2
            found[f"variance_{name}"] = white.max(tuple(range(len(layer.stack), white.ndim)))
    if mean is not None and own.mean is not None:
        spread = _total(layer, trace_of(second))
        found["drift_mean"] = jnp.sqrt(_over(_total(layer, (mean - own.mean) ** 2), spread))
    return found


def kl(layer: Layer, factors: Any, update: jax.Array) -> jax.Array:
    """``½ Δᵀ (A ⊗ G) Δ`` of a packed update, in nats per example."""
    return _total(layer, update * operate(layer, factors, update)) / 2


def kl_of_moments(layer: Layer, bases: Any, S: jax.Array, update: jax.Array) -> jax.Array:
    """``½ Σ S (Q_Aᵀ Δ Q_G)²``, in nats per example."""
    return _total(layer, update * scaled(layer, bases, S, update)) / 2


def of_update(update: jax.Array | None, gradient: jax.Array | None, stack: int) -> Measures:
    """Norms, and ``decrease``, ``−∇ᵀΔ``: the first-order decrease of the loss."""
    total = lambda x: x.sum(tuple(range(stack, x.ndim)))
    found = {}
    if update is not None:
        found["update_norm"] = jnp.sqrt(total(jnp.square(update)))
    if gradient is not None:
        found["gradient_norm"] = jnp.sqrt(total(jnp.square(gradient)))
    if update is not None and gradient is not None:
        found["decrease"] = -total(update * gradient)
    return found


def _total(layer: Layer, x: jax.Array) -> jax.Array:
    """The sum over all axes except those of the stack."""
    return x.sum(tuple(range(len(layer.stack), x.ndim)))


def _blocks(layer: Layer) -> int:
    return math.prod(layer.factor_blocks)


def _over(part: jax.Array, whole: jax.Array) -> jax.Array:
    """``part / whole``, 0 where ``whole`` is 0."""
    return jnp.where(whole > 0, part / jnp.where(whole > 0, whole, 1), 0)


def _probes(size: int, dtype: Any) -> jax.Array:
    """Columns for which ``E[Z Zᵀ] = I``."""
    if size <= PROBES:
        return jnp.eye(size, dtype=dtype)
    return jax.random.rademacher(jax.random.key(0), (size, PROBES), dtype) / math.sqrt(PROBES)
