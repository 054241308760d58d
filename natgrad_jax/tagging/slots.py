"""Slots: how a layer's statistics leave the backward pass.

A tagged layer's output passes through an identity with a zero-valued extra input, its slot. The
identity's backward rule returns the layer's sums as the slot's cotangent, so that scan, remat,
vmap, jit, sharding and accumulation treat statistics as they treat gradients.
"""

from typing import Any

import jax
import jax.numpy as jnp

from natgrad_jax.layers.kinds.regrouped import regrouped
from natgrad_jax.layers.layer import Layer
from natgrad_jax.statistics.layer_statistics import Readings, Wanted, read

# The name under which a layer's slot lies beside its kernel.
SLOT = "natgrad_slot"


@jax.tree_util.register_pytree_node_class
class Slot:
    """The zero readings of one layer and the bases they are taken in; what is wanted is static."""

    def __init__(self, readings: Readings, bases: Any, wanted: Any):
        self.readings, self.bases, self.wanted = readings, bases, wanted

    @property
    def layer(self) -> Layer:
        return self.wanted.layer

    def tree_flatten(self) -> tuple[tuple[Readings, Any], Any]:
        return (self.readings, self.bases), self.wanted

    @classmethod
    def tree_unflatten(cls, wanted: Any, children: tuple[Readings, Any]) -> "Slot":
        return cls(*children, wanted)


class Census:
    """In place of what is wanted: notes how many examples each call of a layer has."""

    def __init__(self, layer: Layer):
        self.layer, self.examples = layer, set[int]()


def tap(slot: Slot, call: Any, x: jax.Array, s: jax.Array) -> jax.Array:
    """``s``, with the readings of this call of the layer as the cotangent of ``slot``.

    ``x`` is the layer's input; the residual is cast to the dtype that the layer computes in, so
    that it is the array which the kernel's gradient keeps anyway.
    """
    wanted = slot.wanted
    if isinstance(wanted, Census):
        call = regrouped(call, wanted.layer.example_axis, s)
        wanted.examples.add(jax.eval_shape(call.outputs, s).shape[0])
        return s
    shapes = jax.tree.map(jnp.shape, slot.readings)

    @jax.custom_vjp
    def identity(s: jax.Array, x: jax.Array, readings: Readings, bases: Any) -> jax.Array:
        return s

    def forward(s: jax.Array, x: jax.Array, readings: Readings, bases: Any) -> Any:
        return s, (x, bases)

    def backward(residuals: Any, g: jax.Array) -> tuple[jax.Array, None, Readings, None]:
        x, bases = residuals
        found = read(wanted, call, x, g, _without_room(bases, wanted))
        return g, None, jax.tree.map(lambda r, shape: r.reshape(shape), found, shapes), None

    identity.defvjp(forward, backward)
    if jnp.issubdtype(x.dtype, jnp.floating):
        x = x.astype(s.dtype)
    return identity(s, jax.lax.stop_gradient(x), slot.readings, slot.bases)


def _without_room(bases: Any, wanted: Wanted) -> Any:
    """Bases in their own shapes: a slot's arrays may have unit axes in front."""
    if bases is None or wanted.moments is None:
        return bases
    outputs = wanted.moments.output_factor_shape
    assert outputs is not None
    shapes = (wanted.moments.input_factor_shape, outputs)
    own = (x.reshape(*s[:-1], x.shape[-1]) for x, s in zip(bases, shapes, strict=True))
    return type(bases)(*own)
