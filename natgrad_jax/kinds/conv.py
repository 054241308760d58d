"""Convolutions of any rank: rows are patches, one for each position of the output map.

``ā_t`` is the patch under output position t, flattened (kernel axes, channels), plus 1.
Strides, both dilations, every padding of Flax and groups change what a patch is; all are read
off the layer. Source: Grosse & Martens 2016 (KFC).
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax.layers import Layout

Padding = str | tuple[tuple[int, int], ...]


class ConvCall(NamedTuple):
    """Geometry of one call: channels last, any number of batch axes before the spatial ones."""

    kernel_size: tuple[int, ...]
    strides: tuple[int, ...]
    padding: Padding
    input_dilation: tuple[int, ...]
    kernel_dilation: tuple[int, ...]
    groups: int
    bias: bool

    def examples(self, x: jax.Array) -> jax.Array:
        """``x`` with its batch axes (none, one or many) flattened into one."""
        rank = len(self.kernel_size)
        return x.reshape(-1, *x.shape[x.ndim - rank - 1 :])

    def inputs(self, examples: jax.Array) -> jax.Array:
        """The patches: ``(N, T, *groups, kernel·channels/groups + bias)``."""
        x = _pad(examples, self)
        starts = itertools.product(*(range(k) for k in self.kernel_size))
        slices = [_slice(x, self, start) for start in starts]
        n, *positions, channels = slices[0].shape
        patches = jnp.stack(slices, axis=-2).reshape(n, math.prod(positions), -1, channels)
        if self.groups > 1:
            patches = patches.reshape(*patches.shape[:3], self.groups, channels // self.groups)
            patches = jnp.moveaxis(patches, 3, 2)
        patches = patches.reshape(*patches.shape[:-2], -1)
        if not self.bias:
            return patches
        return jnp.concatenate([patches, jnp.ones_like(patches[..., :1])], axis=-1)

    def outputs(self, g: jax.Array) -> jax.Array:
        g = self.examples(g)
        n, *positions, channels = g.shape
        groups = (self.groups, channels // self.groups) if self.groups > 1 else (channels,)
        return g.reshape(n, math.prod(positions), *groups)

    def width(self, x: jax.Array) -> int:
        rank = len(self.kernel_size)
        padded = jax.eval_shape(lambda x: _pad(self.examples(x), self), x).shape[1 : rank + 1]
        positions = math.prod(_output_size(self, padded))
        return positions * (math.prod(self.kernel_size) * x.shape[-1] + self.groups * self.bias)


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

    def each(value: int | Sequence[int] | None) -> tuple[int, ...]:
        value = 1 if value is None else value
        return (value,) * rank if isinstance(value, int) else tuple(value)

    if not isinstance(padding, str):
        sides = [padding] * rank if isinstance(padding, int) else padding
        padding = tuple((p, p) if isinstance(p, int) else (p[0], p[1]) for p in sides)
    call = ConvCall(
        size, each(strides), padding, each(input_dilation), each(kernel_dilation), groups, bias
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


def _dilated(call: ConvCall) -> tuple[int, ...]:
    """The extent of the kernel with its dilation."""
    return tuple(
        (k - 1) * d + 1 for k, d in zip(call.kernel_size, call.kernel_dilation, strict=True)
    )


def _pad(x: jax.Array, call: ConvCall) -> jax.Array:
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
