"""Convolutions of any rank: the calls and layouts of Flax's layers.

Transposed and locally connected ones are convolutions too, with other patches; ``patches.py``
defines these.
"""

import math
from collections.abc import Sequence

from natgrad_jax.layers.geometry import Layout
from natgrad_jax.layers.kinds.patches import ConvCall, Padding


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

    With ``transpose_kernel`` the kernel is that of the forward convolution, ``(…, out, in)``, with
    its spatial axes reversed.
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
