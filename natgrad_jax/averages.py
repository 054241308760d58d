"""Factors: bias-corrected moving averages of what batches measured."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax.layers import Layer
from natgrad_jax.sums import Sums


class Factors(NamedTuple):
    """``A`` over inputs (bias last) and ``G`` over outputs: ``(*stack, *blocks, n, n)`` each."""

    A: jax.Array
    G: jax.Array


def zero_factors(layer: Layer) -> Factors:
    """Factors before anything was measured."""
    stack, dtype = layer.stack_sizes, layer.factor_dtype
    return Factors(
        jnp.zeros(stack + layer.input_factor_shape, dtype),
        jnp.zeros(stack + layer.output_factor_shape, dtype),
    )


def batch_factors(layer: Layer, sums: Sums, examples: jax.Array) -> tuple[Factors, jax.Array]:
    """The factors of one batch, and whether each element of the stack was measured, finitely.

    With N examples and T positions, ``A ⊗ G = Σ ā āᵀ ⊗ Σ g gᵀ / (N · N T)``. Convolutions put the
    positions' share on G (``A = Σ ā āᵀ / N``: Grosse & Martens 2016), other layers on A
    (``A = Σ ā āᵀ / NT``: Eschenhagen et al. 2023, expand).
    """
    assert sums.G is not None  # checked where statistics come in
    seen = (sums.rows > 0) & (examples > 0)
    rows, count = jnp.where(seen, sums.rows, 1), jnp.where(seen, examples, 1)
    over_a, over_g = (count, rows) if layer.kind == "conv" else (rows, count)
    axes = range(-len(layer.input_factor_shape), 0)
    A = sums.A / jnp.expand_dims(over_a, tuple(axes))
    G = sums.G / jnp.expand_dims(over_g, tuple(axes))
    # a diagonal of sums of squares: any NaN or inf that went into a factor shows in its trace
    blocks = tuple(range(len(layer.stack), len(layer.stack) + len(layer.blocks)))
    traces = jnp.trace(A, axis1=-2, axis2=-1) + jnp.trace(G, axis1=-2, axis2=-1)
    return Factors(A, G), seen & jnp.isfinite(traces.sum(blocks))


def update(
    old: jax.Array, new: jax.Array, weight: jax.Array, decay: jax.Array, informative: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """One step of a bias-corrected moving average, kept in corrected form.

    ``f ← f + (1 − decay) / w · (new − f)``, ``w ← decay · w + (1 − decay)``, from w = 0: the first
    measurement stands for itself. Nothing changes where ``informative`` is False, whatever ``new``
    holds.

    Args:
      old, new: ``(*stack, …)``; weight, informative: ``(*stack,)``; decay: scalar.
    """
    later = jnp.where(informative, decay * weight + (1 - decay), weight).astype(weight.dtype)
    rate = jnp.where(informative, (1 - decay) / jnp.where(later > 0, later, 1), 0)
    trailing = tuple(range(rate.ndim, old.ndim))
    rate, keep = (jnp.expand_dims(x, trailing) for x in (rate.astype(old.dtype), ~informative))
    return jnp.where(keep, old, old + rate * (new.astype(old.dtype) - old)), later
