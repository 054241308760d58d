"""Slots: how a layer's statistics leave the backward pass.

A tagged layer's output passes through an identity with a zero-valued extra input, its slot. The
identity's backward rule returns the layer's sums as the slot's cotangent, so that scan, remat,
vmap, jit, sharding and accumulation treat statistics as they treat gradients.
"""

from typing import Any

import jax

from natgrad_jax.layers import Layer
from natgrad_jax.sums import Sums, measure

# The name under which a layer's slot lies beside its kernel.
SLOT = "natgrad_slot"


@jax.tree_util.register_pytree_node_class
class Slot:
    """The zero sums of one layer, with the layer's record as static data."""

    def __init__(self, sums: Sums, layer: Layer):
        self.sums, self.layer = sums, layer

    def tree_flatten(self) -> tuple[tuple[Sums], Layer]:
        return (self.sums,), self.layer

    @classmethod
    def tree_unflatten(cls, layer: Layer, children: tuple[Sums]) -> "Slot":
        return cls(children[0], layer)


def tap(slot: Slot, call: Any, x: jax.Array, s: jax.Array) -> jax.Array:
    """``s``, with the sums of this call of the layer as the cotangent of ``slot``.

    ``x`` is the layer's input; the residual is cast to the dtype that the layer computes in, so
    that it is the array which the kernel's gradient keeps anyway.
    """
    layer = slot.layer

    @jax.custom_vjp
    def identity(s: jax.Array, x: jax.Array, sums: Sums) -> jax.Array:
        return s

    def forward(s: jax.Array, x: jax.Array, sums: Sums) -> tuple[jax.Array, jax.Array]:
        return s, x

    def backward(x: jax.Array, g: jax.Array) -> tuple[jax.Array, None, Sums]:
        return g, None, measure(layer, call, x, g)

    identity.defvjp(forward, backward)
    return identity(s, jax.lax.stop_gradient(x.astype(s.dtype)), slot.sums)
