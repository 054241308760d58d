"""Patches: the receptive field of a convolution at each position of the output map.

``ā_t`` is the patch under output position t, flattened (kernel axes, channels), plus 1. Strides,
both dilations, every padding of Flax and groups affect the patches.
Source: Grosse & Martens 2016 (KFC).
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Padding = str | tuple[tuple[int, int], ...]


class ConvCall(NamedTuple):
    """Geometry of one call: channels last, any number of batch axes before the spatial ones.

    ``flipped``: kernel elements are in reverse order. ``wrapped``: the output map, after this
    padding, is summed over windows. ``local``: every position has its own kernel.
    """

    kernel_size: tuple[int, ...]
    strides: tuple[int, ...]
    padding: Padding
    input_dilation: tuple[int, ...]
    kernel_dilation: tuple[int, ...]
    groups: int
    bias: bool
    flipped: bool = False
    wrapped: bool = False
    local: bool = False

    @property
    def swapped(self) -> bool:
        return False

    def examples(self, x: jax.Array) -> jax.Array:
        """``x`` as ``(N, M, *spatial, channels)``: further batch axes are positions."""
        lead = x.ndim - len(self.kernel_size) - 1
        if lead == 1:  # the usual case, without a reshape, which may fail on sharded arrays
            return jnp.expand_dims(x, 1)
        return x.reshape(x.shape[0] if lead else 1, -1, *x.shape[lead:])

    def row_axes(self, ndim: int) -> tuple[int, ...]:
        """The output's batch axes: examples first, the others count as positions."""
        return tuple(range(ndim - len(self.kernel_size) - 1))

    def inputs(self, examples: jax.Array) -> jax.Array:
        """The patches: ``(N, T, *groups, kernel·channels/groups + bias)``."""
        patches = self.patches(examples)
        if self.local:  # positions are blocks
            patches = patches.reshape(*patches.shape[:2], *patches.shape[2:-2], -1)
        else:
            *lead, k, channels = patches.shape
            patches = patches.reshape(lead[0], -1, k, channels)
            if self.groups > 1:
                patches = patches.reshape(*patches.shape[:3], self.groups, -1)
                patches = jnp.moveaxis(patches, 3, 2)
            patches = patches.reshape(*patches.shape[:-2], -1)
        if not self.bias:
            return patches
        return jnp.concatenate([patches, jnp.ones_like(patches[..., :1])], axis=-1)

    def patches(self, examples: jax.Array) -> jax.Array:
        """The input at every kernel element: ``(N, M, *positions, kernel elements, channels)``."""
        flat = _flat(examples)
        x = padded(flat, self)
        starts = list(itertools.product(*(range(k) for k in self.kernel_size)))
        slices = [_slice(x, self, start) for start in (starts[::-1] if self.flipped else starts)]
        patches = jnp.stack(slices, axis=-2)
        if self.wrapped:
            patches = _wrap(patches, self, flat.shape[1:-1])
        if examples.shape[1] == 1:
            return jnp.expand_dims(patches, 1)
        return patches.reshape(*examples.shape[:2], *patches.shape[1:])

    def channel_rows(self, examples: jax.Array, with_one: bool = False) -> jax.Array | None:
        """Rows of channels ``(N, ·, *groups, channels)`` whose sum of products is that of the
        patches over all places: pixels times the square root of how often the kernel covers them.

        ``with_one``: append a channel of ones. None if every position has its own kernel, since
        patches are not summed then."""
        if self.local:
            return None
        if self.wrapped:
            rows, weights = self.patches(examples), np.ones(())
        else:
            rows = padded(_flat(examples), self)
            weights = np.sqrt(_visits(self, rows.shape[1:-1]))[..., None]
        rows = rows.reshape(*rows.shape[:-1], self.groups, -1) if self.groups > 1 else rows
        if with_one:
            rows = jnp.concatenate([rows, jnp.ones_like(rows[..., :1])], axis=-1)
        rows = rows * weights.reshape((*weights.shape, *[1] * (self.groups > 1))).astype(rows.dtype)
        lead = 2 if self.groups > 1 else 1
        return rows.reshape(len(examples), -1, *rows.shape[-lead:])

    def outputs(self, g: jax.Array) -> jax.Array:
        g = self.examples(g)
        if self.local:
            return g
        g = g.reshape(len(g), math.prod(g.shape[1:-1]), g.shape[-1])
        return g.reshape(*g.shape[:2], self.groups, -1) if self.groups > 1 else g

    def width(self, x: jax.Array) -> int:
        patches = jax.eval_shape(lambda x: self.inputs(self.examples(x)), x)
        return math.prod(patches.shape[1:])

    def positions(self, x: jax.Array) -> int:
        return jax.eval_shape(lambda x: self.inputs(self.examples(x)), x).shape[1]


def _flat(examples: jax.Array) -> jax.Array:
    """Both batch axes as one."""
    return examples[:, 0] if examples.shape[1] == 1 else examples.reshape(-1, *examples.shape[2:])


def _dilated(call: ConvCall) -> tuple[int, ...]:
    """The extent of the dilated kernel."""
    return tuple(
        (k - 1) * d + 1 for k, d in zip(call.kernel_size, call.kernel_dilation, strict=True)
    )


def padded(x: jax.Array, call: ConvCall) -> jax.Array:
    """``x`` padded and dilated so that a VALID convolution remains."""
    extent = _dilated(call)
    padding = call.padding
    if padding in ("CIRCULAR", "REFLECT"):
        sides = [((k - 1) // 2, k // 2) for k in extent]
        mode = "wrap" if padding == "CIRCULAR" else "reflect"
        x = jnp.pad(x, [(0, 0), *sides, (0, 0)], mode=mode)
        padding = "VALID"
    elif padding == "CAUSAL":
        x = jnp.pad(x, [(0, 0), (extent[0] - 1, 0), (0, 0)])
        padding = "VALID"
    pads: Sequence[tuple[int, int]]
    if isinstance(padding, str):
        pads = jax.lax.padtype_to_pads(x.shape[1:-1], extent, call.strides, padding)
    else:
        pads = padding
    dilations = zip(pads, call.input_dilation, strict=True)
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


def _wrap(patches: jax.Array, call: ConvCall, size: Sequence[int]) -> jax.Array:
    """As Flax after a CIRCULAR ConvTranspose: sum the map over periods of its size."""
    periods = [n * s for n, s in zip(size, call.input_dilation, strict=True)]
    pads = []
    for n, period in zip(patches.shape[1:], periods, strict=False):
        missing = -(n - period) % (2 * period)
        half = (missing // 2, (missing + 1) // 2)
        pads.append(half if call.flipped else half[::-1])
    patches = jnp.pad(patches, [(0, 0), *pads, (0, 0), (0, 0)])
    for axis, period in enumerate(periods, start=1):
        split = (*patches.shape[:axis], -1, period, *patches.shape[axis + 1 :])
        patches = patches.reshape(split).sum(axis)
    return patches
