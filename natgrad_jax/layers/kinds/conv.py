"""Convolutions of any rank: rows are patches, one for each position of the output map.

``ā_t`` is the patch under output position t, flattened (kernel axes, channels), plus 1.
Strides, both dilations, every padding of Flax and groups change what a patch is; all are read
off the layer. Transposed and locally connected ones are convolutions too, read otherwise.
Source: Grosse & Martens 2016 (KFC).
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from natgrad_jax.layers.layer import Layout

Padding = str | tuple[tuple[int, int], ...]


class ConvCall(NamedTuple):
    """Geometry of one call: channels last, any number of batch axes before the spatial ones.

    ``flipped``: kernel elements count from the other end. ``wrapped``: the output map is added up
    over windows, after this padding. ``local``: every position has a kernel of its own.
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

    def examples(self, x: jax.Array) -> jax.Array:
        """``x`` as ``(N, M, *spatial, channels)``: more batch axes than one are positions."""
        lead = x.ndim - len(self.kernel_size) - 1
        if lead == 1:  # the usual case without a reshape, which sharded arrays may not have
            return jnp.expand_dims(x, 1)
        return x.reshape(x.shape[0] if lead else 1, -1, *x.shape[lead:])

    def row_axes(self, ndim: int) -> tuple[int, ...]:
        """The output's axes of examples and of what else shares the kernel, places apart."""
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
        """What every kernel element sees: ``(N, M, *positions, kernel elements, channels)``."""
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

    def channel_rows(self, examples: jax.Array, constant: bool = False) -> jax.Array:
        """Rows of channels ``(N, ·, *groups, channels)`` whose products add up to those of all
        patches' places: pixels times the root of how often the kernel sees them.

        ``constant``: with one more channel, of ones."""
        if self.wrapped:
            rows, weights = self.patches(examples), np.ones(())
        else:
            rows = padded(_flat(examples), self)
            weights = np.sqrt(_visits(self, rows.shape[1:-1]))[..., None]
        rows = rows.reshape(*rows.shape[:-1], self.groups, -1) if self.groups > 1 else rows
        if constant:
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


def conv(
    kernel_shape: tuple[int, ...],
    strides: int | Sequence[int] | None,
    padding: str | int | Sequence[int | tuple[int, int]],
    input_dilation: int | Sequence[int] | None,
    kernel_dilation: int | Sequence[int] | None,
    groups: int,
    bias: bool,
) -> tuple[ConvCall, Layout, Layout | None]:
    """The call and the layouts of a convolution with Flax's arguments."""
    size = kernel_shape[:-2]
    rank = len(size)
    call = ConvCall(
        size,
        _each(strides, rank),
        _padding(padding, rank),
        _each(input_dilation, rank),
        _each(kernel_dilation, rank),
        groups,
        bias,
    )
    axes = tuple(range(rank + 1))
    features = kernel_shape[-1]
    if groups == 1:
        return (
            call,
            Layout(kernel_shape, (), axes, (rank + 1,)),
            Layout((features,), (), (), (0,)) if bias else None,
        )
    per_group = (groups, features // groups)
    return (
        call,
        Layout((*kernel_shape[:-1], *per_group), (rank + 1,), axes, (rank + 2,)),
        Layout(per_group, (0,), (), (1,)) if bias else None,
    )


def transpose(
    kernel_shape: tuple[int, ...],
    strides: int | Sequence[int] | None,
    padding: str | int | Sequence[int | tuple[int, int]],
    kernel_dilation: int | Sequence[int] | None,
    transpose_kernel: bool,
    bias: bool,
) -> tuple[ConvCall, Layout, Layout | None]:
    """A transposed convolution: one over the input dilated by its strides.

    With ``transpose_kernel`` the kernel is that of the forward convolution: ``(…, out, in)``, and
    read backwards.
    """
    size = kernel_shape[:-2]
    rank = len(size)
    steps, dilation = _each(strides, rank), _each(kernel_dilation, rank)
    pads = _padding(padding, rank)
    wrapped = pads == "CIRCULAR"
    if isinstance(pads, str):
        extents = [(k - 1) * d + 1 for k, d in zip(size, dilation, strict=True)]
        pairs = zip(extents, steps, strict=True)
        pads = tuple(_transpose_pads(k, s, pads == "SAME") for k, s in pairs)
    call = ConvCall(
        size, (1,) * rank, pads, steps, dilation, 1, bias, transpose_kernel, wrapped=wrapped
    )
    places = tuple(range(rank))
    into, out = (rank + 1, rank) if transpose_kernel else (rank, rank + 1)
    features = kernel_shape[out]
    return (
        call,
        Layout(kernel_shape, (), (*places, into), (out,)),
        Layout((features,), (), (), (0,)) if bias else None,
    )


def local(
    kernel_shape: tuple[int, ...],
    kernel_size: Sequence[int],
    strides: int | Sequence[int] | None,
    padding: str | int | Sequence[int | tuple[int, int]],
    input_dilation: int | Sequence[int] | None,
    kernel_dilation: int | Sequence[int] | None,
    bias: bool,
) -> tuple[ConvCall, Layout, Layout | None]:
    """A locally connected layer: blocks are the output positions, each with its own kernel."""
    rank = len(kernel_size)
    call = ConvCall(
        tuple(kernel_size),
        _each(strides, rank),
        _padding(padding, rank),
        _each(input_dilation, rank),
        _each(kernel_dilation, rank),
        1,
        bias,
        local=True,
    )
    places = tuple(range(rank))
    elements = math.prod(kernel_size)
    *positions, rows, features = kernel_shape
    row = Layout((*positions, features), places, (), (rank,))
    split = (*positions, rows // elements, elements, features)  # its rows have channels first
    return call, Layout(split, places, (rank + 1, rank), (rank + 2,)), row if bias else None


def _each(value: int | Sequence[int] | None, rank: int) -> tuple[int, ...]:
    value = 1 if value is None else value
    return (value,) * rank if isinstance(value, int) else tuple(value)


def _padding(padding: str | int | Sequence[int | tuple[int, int]], rank: int) -> Padding:
    if isinstance(padding, str):
        return padding
    sides = [padding] * rank if isinstance(padding, int) else padding
    return tuple((p, p) if isinstance(p, int) else (p[0], p[1]) for p in sides)


def _transpose_pads(extent: int, stride: int, same: bool) -> tuple[int, int]:
    """What ``jax.lax.conv_transpose`` pads for SAME and for VALID."""
    if same:
        total = extent + stride - 2
        low = extent - 1 if stride > extent - 1 else -(-total // 2)
    else:
        total, low = extent + stride - 2 + max(extent - stride, 0), extent - 1
    return low, total - low


def _dilated(call: ConvCall) -> tuple[int, ...]:
    """The extent of the kernel with its dilation."""
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
    """What the kernel element at ``offset`` sees at every output position."""
    out = _output_size(call, x.shape[1:-1])
    start = [o * d for o, d in zip(offset, call.kernel_dilation, strict=True)]
    ends = zip(start, out, call.strides, strict=True)
    limit = [a + (n - 1) * s + 1 if n else a for a, n, s in ends]
    n, c = x.shape[0], x.shape[-1]
    return jax.lax.slice(x, (0, *start, 0), (n, *limit, c), (1, *call.strides, 1))


def _visits(call: ConvCall, padded: Sequence[int]) -> np.ndarray:
    """At how many pairs of kernel element and output position each padded pixel is seen."""
    counts = np.ones((), int)
    outputs = _output_size(call, padded)
    for n, out, k, stride, dilation in zip(
        padded, outputs, call.kernel_size, call.strides, call.kernel_dilation, strict=True
    ):
        seen = np.add.outer(np.arange(out) * stride, np.arange(k) * dilation)
        counts = np.multiply.outer(counts, np.bincount(seen.ravel(), minlength=n))
    return counts


def _wrap(patches: jax.Array, call: ConvCall, size: Sequence[int]) -> jax.Array:
    """What Flax does after a CIRCULAR ConvTranspose: add the map up over periods of its size."""
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
