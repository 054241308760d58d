"""Patches: the receptive field of a convolution at each position of the output map.

``ā_t`` is the patch under output position t, flattened (kernel axes, channels), plus 1. Strides,
both dilations, padding and groups affect the patches.
Source: Grosse & Martens 2016 (KFC).
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from natgrad_jax.layers.kinds.dense import with_bias


class ConvCall(NamedTuple):
    """Geometry of one call, as ``conv_general_dilated`` has it.

    ``x_order``, ``s_order``: the axes of input and output in the order batch, spatial, channels.
    ``flipped``: for each kernel axis whether the parameter's elements are in reverse order.
    ``bias``: what stands beside the patch; see :class:`DenseCall`.
    """

    kernel_size: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    input_dilation: tuple[int, ...]
    kernel_dilation: tuple[int, ...]
    groups: int
    x_order: tuple[int, ...]
    s_order: tuple[int, ...]
    flipped: tuple[bool, ...]
    bias: float | None = None

    @property
    def swapped(self) -> bool:
        return False

    def examples(self, x: jax.Array) -> jax.Array:
        """``x`` as ``(N, *spatial, channels)``."""
        return x.transpose(self.x_order)

    def row_axes(self, ndim: int) -> tuple[int, ...]:
        return (self.s_order[0],)

    def output_axes(self, ndim: int) -> tuple[int, ...]:
        return (self.s_order[-1],)

    @property
    def block_axes(self) -> tuple[int, ...]:
        return ()  # groups are a part of the channels

    def inputs(self, examples: jax.Array) -> jax.Array:
        """The patches: ``(N, T, *groups, kernel·channels/groups + bias)``."""
        if self.groups == 1:  # written once, the bias's input with them
            elements = self._elements(examples)
            ones = [] if self.bias is None else [jnp.full_like(elements[0][..., :1], self.bias)]
            patches = jnp.concatenate([*elements, *ones], axis=-1)
            return patches.reshape(len(patches), -1, patches.shape[-1])
        patches = self.patches(examples)
        *_, k, channels = patches.shape
        patches = patches.reshape(len(examples), -1, k, self.groups, channels // self.groups)
        patches = jnp.moveaxis(patches, 3, 2)
        return with_bias(patches.reshape(*patches.shape[:-2], -1), self.bias)

    def patches(self, examples: jax.Array) -> jax.Array:
        """The input at every kernel element: ``(N, *positions, kernel elements, channels)``."""
        return jnp.stack(self._elements(examples), axis=-2)

    def _elements(self, examples: jax.Array) -> list[jax.Array]:
        """The input at each kernel element, ``(N, *positions, channels)``."""
        x = padded(examples, self)
        pairs = zip(self.kernel_size, self.flipped, strict=True)
        starts = itertools.product(*(range(k)[::-1] if turned else range(k) for k, turned in pairs))
        return [_slice(x, self, start) for start in starts]

    def channel_rows(self, examples: jax.Array, with_one: bool = False) -> jax.Array:
        """Rows of channels ``(N, ·, *groups, channels)`` whose sum of products is that of the
        patches over all places: pixels times the square root of how often the kernel covers them.

        ``with_one``: append a channel of ones."""
        rows = padded(examples, self)
        weights = np.sqrt(_visits(self, rows.shape[1:-1]))[..., None]
        rows = rows.reshape(*rows.shape[:-1], self.groups, -1) if self.groups > 1 else rows
        if with_one:
            rows = jnp.concatenate([rows, jnp.ones_like(rows[..., :1])], axis=-1)
        rows = rows * weights.reshape((*weights.shape, *[1] * (self.groups > 1))).astype(rows.dtype)
        lead = 2 if self.groups > 1 else 1
        return rows.reshape(len(examples), -1, *rows.shape[-lead:])

    def outputs(self, g: jax.Array) -> jax.Array:
        g = g.transpose(self.s_order)
        g = g.reshape(len(g), math.prod(g.shape[1:-1]), g.shape[-1])
        return g.reshape(*g.shape[:2], self.groups, -1) if self.groups > 1 else g

    def width(self, x: jax.Array) -> int:
        patches = jax.eval_shape(lambda x: self.inputs(self.examples(x)), x)
        return math.prod(patches.shape[1:])

    def positions(self, x: jax.Array) -> int:
        return jax.eval_shape(lambda x: self.inputs(self.examples(x)), x).shape[1]


def _dilated(call: ConvCall) -> tuple[int, ...]:
    """The extent of the dilated kernel."""
    return tuple(
        (k - 1) * d + 1 for k, d in zip(call.kernel_size, call.kernel_dilation, strict=True)
    )


def padded(x: jax.Array, call: ConvCall) -> jax.Array:
    """``x`` padded and dilated so that a VALID convolution remains."""
    dilations = zip(call.padding, call.input_dilation, strict=True)
    config = [(low, high, d - 1) for (low, high), d in dilations]
    return jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *config, (0, 0, 0)])


def _output_size(call: ConvCall, padded: Sequence[int]) -> list[int]:
    """Spatial size of the output map for a padded input of spatial size ``padded``."""
    extents = zip(padded, _dilated(call), call.strides, strict=True)
    return [max((n - k) // s + 1, 0) for n, k, s in extents]


def _slice(x: jax.Array, call: ConvCall, offset: Sequence[int]) -> jax.Array:
    """The input at the kernel element ``offset``, for every output position."""
    out = _output_size(call, x.shape[1:-1])
    start = [o * d for o, d in zip(offset, call.kernel_dilation, strict=True)]
    ends = zip(start, out, call.strides, strict=True)
    limit = [a + (n - 1) * s + 1 if n else a for a, n, s in ends]
    n, c = x.shape[0], x.shape[-1]
    return jax.lax.slice(x, (0, *start, 0), (n, *limit, c), (1, *call.strides, 1))


def _visits(call: ConvCall, padded: Sequence[int]) -> np.ndarray:
    """How many pairs of kernel element and output position use each padded pixel."""
    counts = np.ones((), int)
    outputs = _output_size(call, padded)
    for n, out, k, stride, dilation in zip(
        padded, outputs, call.kernel_size, call.strides, call.kernel_dilation, strict=True
    ):
        seen = np.add.outer(np.arange(out) * stride, np.arange(k) * dilation)
        counts = np.multiply.outer(counts, np.bincount(seen.ravel(), minlength=n))
    return counts
