"""Taps: how a layer's statistics leave the backward pass.

The output of an equation that uses a layer's kernel passes through an identity with a zero-valued
extra input, its slot. The identity's backward rule returns the layer's statistics as the slot's
cotangent, so that scan, remat, vmap, jit, sharding and accumulation treat statistics as they treat
gradients. What a reader reads is its own affair: tracing knows nothing of statistics.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from natgrad_jax.layers.layer_call import LayerCall
from natgrad_jax.utils import compat
from natgrad_jax.utils.sharding import vary


class Reader(Protocol):
    """What a layer is asked for; static."""

    def read(
        self, call: LayerCall, x: Any, g: jax.Array, bases: Any, weight: jax.Array | None
    ) -> Any:
        """What one call with input ``x`` and output cotangent ``g`` adds, its rows of that weight:
        a pytree like a slot's values."""


def tap(
    reader: Reader,
    call: LayerCall,
    slot: tuple[Any, Any],
    weight: jax.Array | None,
    given: Sequence[Any],
    scale: Any,
    s: jax.Array,
) -> jax.Array:
    """``s``, with what is read off this call of the layer as the cotangent of ``slot``.

    ``slot``: zeros in the form of what ``reader`` reads, and its bases. ``weight``: of the rows,
    ``(N, T or 1)``; None: one. ``given``: the equation's other operands. ``scale``: the factor of
    the parameter in the equation, None for one. The residual is cast to the dtype that the equation
    computes in, so that it is the array which the kernel's gradient keeps anyway.
    """
    axes = tuple(compat.varying_axes(s))
    slot = (vary(slot[0], axes), slot[1])  # inside the user's own shard_map
    shapes = jax.tree.map(jnp.shape, slot[0])
    is_float = jnp.issubdtype(given[0].dtype, jnp.floating)

    @jax.custom_vjp
    def identity(s: jax.Array, values: Any, rest: Any) -> jax.Array:
        return s

    def forward(s: jax.Array, values: Any, rest: Any) -> Any:
        return s, rest

    def backward(rest: Any, g: jax.Array) -> tuple[Any, ...]:
        (first, *others), scale, bases, weight = rest
        rows = g
        if scale is not None and is_float:
            first = first * scale.astype(first.dtype)
        elif scale is not None:
            rows = g * scale.astype(g.dtype)
        found = reader.read(call, (first, *others) if others else first, rows, bases, weight)
        return g, jax.tree.map(lambda r, shape: r.reshape(shape), found, shapes), None

    identity.defvjp(forward, backward)
    first = given[0].astype(s.dtype) if is_float else given[0]
    rest = jax.lax.stop_gradient(([first, *given[1:]], scale, slot[1], weight))
    return identity(s, slot[0], rest)
