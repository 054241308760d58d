"""Slots: how a layer's statistics leave the backward pass.

A tagged layer's output passes through an identity with a zero-valued extra input, its slot. The
identity's backward rule returns the layer's statistics as the slot's cotangent, so that scan,
remat, vmap, jit, sharding and accumulation treat statistics as they treat gradients. What a reader
reads is its own affair: tagging knows nothing of statistics.
"""

from typing import Any, Protocol

import jax
import jax.numpy as jnp

from natgrad_jax.layers.layer import Layer
from natgrad_jax.layers.layer_call import LayerCall

# The name under which a layer's slot lies beside its kernel.
SLOT = "natgrad_slot"


class Reader(Protocol):
    """What a slot's layer is asked for; static."""

    @property
    def layer(self) -> Layer: ...

    def read(self, call: LayerCall, x: jax.Array, g: jax.Array, bases: Any) -> Any:
        """What one call with input ``x`` and output cotangent ``g`` adds: a pytree like a slot's
        ``values``."""

    def own_bases(self, bases: Any) -> Any:
        """``bases`` as ``read`` takes them."""


@jax.tree_util.register_pytree_node_class
class Slot:
    """A layer's zero-valued input. ``values``: zeros in the form of what ``reader`` reads (static),
    in ``bases``; None where ``reader.note(call, s)`` is to see the calls and no more."""

    def __init__(self, values: Any, bases: Any, reader: Any):
        self.values, self.bases, self.reader = values, bases, reader

    @property
    def layer(self) -> Layer:
        return self.reader.layer

    def tree_flatten(self) -> tuple[tuple[Any, Any], Any]:
        return (self.values, self.bases), self.reader

    @classmethod
    def tree_unflatten(cls, reader: Any, children: tuple[Any, Any]) -> "Slot":
        return cls(*children, reader)


def tap(slot: Slot, call: LayerCall, x: jax.Array, s: jax.Array) -> jax.Array:
    """``s``, with what is read off this call of the layer as the cotangent of ``slot``.

    ``x`` is the layer's input; the residual is cast to the dtype that the layer computes in, so
    that it is the array which the kernel's gradient keeps anyway.
    """
    if slot.values is None:
        slot.reader.note(call, s)
        return s
    reader: Reader = slot.reader
    shapes = jax.tree.map(jnp.shape, slot.values)

    @jax.custom_vjp
    def identity(s: jax.Array, x: jax.Array, values: Any, bases: Any) -> jax.Array:
        return s

    def forward(s: jax.Array, x: jax.Array, values: Any, bases: Any) -> Any:
        return s, (x, bases)

    def backward(residuals: Any, g: jax.Array) -> tuple[jax.Array, None, Any, None]:
        x, bases = residuals
        found = reader.read(call, x, g, reader.own_bases(bases))
        return g, None, jax.tree.map(lambda r, shape: r.reshape(shape), found, shapes), None

    identity.defvjp(forward, backward)
    if jnp.issubdtype(x.dtype, jnp.floating):
        x = x.astype(s.dtype)
    return identity(s, jax.lax.stop_gradient(x), slot.values, slot.bases)
