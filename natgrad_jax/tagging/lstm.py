"""Linen's OptimizedLSTMCell, whose eight dense layers are two products of joined kernels."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import dtypes

GATES = ("i", "f", "g", "o")

# (name of the dense layer, its input, its output) → its output
Tap = Callable[[str, jax.Array, jax.Array], jax.Array]


def forward(
    cell: nn.OptimizedLSTMCell, params: Mapping[str, Any], tap: Tap, carry: Any, inputs: jax.Array
) -> Any:
    """What the cell computes, with each dense layer's output passed through ``tap``."""
    c, h = carry
    hidden, given = (_dense(cell, params, tap, *pair) for pair in (("h", h), ("i", inputs)))
    i, f, g, o = (hidden[gate] + given[gate] for gate in GATES)
    new_c = cell.gate_fn(f) * c + cell.gate_fn(i) * cell.activation_fn(g)
    new_h = cell.gate_fn(o) * cell.activation_fn(new_c)
    return (new_c, new_h), new_h


def _dense(
    cell: nn.OptimizedLSTMCell, params: Mapping[str, Any], tap: Tap, side: str, x: jax.Array
) -> dict[str, jax.Array]:
    layers = [nn.meta.unbox(params[side + gate]) for gate in GATES]
    kernel = jnp.concatenate([layer["kernel"] for layer in layers], axis=-1)
    bias = jnp.concatenate([layer["bias"] for layer in layers]) if side == "h" else None
    x, kernel, bias = dtypes.promote_dtype(x, kernel, bias, dtype=cell.dtype)
    s = jnp.dot(x, kernel)
    s = s if bias is None else s + bias
    parts = jnp.split(s, len(GATES), axis=-1)
    return {gate: tap(side + gate, x, part) for gate, part in zip(GATES, parts, strict=True)}
