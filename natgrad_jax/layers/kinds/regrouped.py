"""A layer's call whose examples are not on its leading axis."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from natgrad_jax.layers.layer_call import LayerCall, Wrapped


class Regrouped(Wrapped):
    """Any kind of call, its rows grouped by another axis.

    ``axis``: which of the call's row axes counts examples; −1 if none does: all rows belong to one
    example, as inside ``vmap`` over examples. ``sizes``: of the row axes.
    """

    def __init__(self, call: LayerCall, axis: int, sizes: tuple[int, ...]):
        super().__init__(call)
        self.axis, self.sizes = axis, sizes

    def examples(self, x: Any) -> jax.Array:
        return self._group(self.call.examples(x))

    def outputs(self, g: jax.Array) -> jax.Array:
        return self._group(self.call.outputs(g))

    def width(self, x: Any) -> int:
        own = jax.eval_shape(self.call.examples, x).shape[0]
        return self.call.width(x) * own // (self.sizes[self.axis] if self.axis >= 0 else 1)

    def _group(self, rows: jax.Array) -> jax.Array:
        """``(examples, positions, …)`` from the call's own grouping, which keeps rows in order."""
        if self.axis < 0:
            return rows.reshape(1, -1, *rows.shape[2:])
        count, own = math.prod(self.sizes), rows.shape[0] * rows.shape[1]
        rows = rows.reshape(*self.sizes, own // count, *rows.shape[2:])
        rows = jnp.moveaxis(rows, self.axis, 0)
        return rows.reshape(self.sizes[self.axis], -1, *rows.shape[len(self.sizes) + 1 :])


class RegroupedImages(Regrouped):
    """A convolution, whose row axis is its batch axis, and is several axes merged.

    ``examples``: ``(N, images of one example, *spatial, channels)``.
    """

    def examples(self, x: Any) -> jax.Array:
        images = self.call.examples(x)
        images = images.reshape(*self.sizes, *images.shape[1:])
        if self.axis < 0:
            return images.reshape(1, -1, *images.shape[len(self.sizes) :])
        images = jnp.moveaxis(images, self.axis, 0)
        return images.reshape(self.sizes[self.axis], -1, *images.shape[len(self.sizes) :])

    def inputs(self, examples: jax.Array) -> jax.Array:
        return self._of_images(self.call.inputs, examples)

    def channel_rows(self, examples: jax.Array, with_one: bool = False) -> jax.Array:
        return self._of_images(lambda x: self.call.channel_rows(x, with_one), examples)  # type: ignore[attr-defined]

    def _of_images(self, of: Any, examples: jax.Array) -> jax.Array:
        rows = of(examples.reshape(-1, *examples.shape[2:]))
        return rows.reshape(len(examples), -1, *rows.shape[2:])


def regrouped(
    call: LayerCall, axis: int, sizes: tuple[int, ...], own: tuple[int, ...]
) -> LayerCall:
    """``call``, whose row axes have the sizes ``own``, with these divided into ``sizes`` and the
    examples on the one at ``axis``."""
    if axis == 0 and sizes == own:
        return call
    return (RegroupedImages if hasattr(call, "channel_rows") else Regrouped)(call, axis, sizes)
