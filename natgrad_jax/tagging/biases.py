"""Biases: parameters that are added to the output of a kernel's use, one number for each output."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from natgrad_jax.layers.layer import Parameter
from natgrad_jax.layers.layout import Layout
from natgrad_jax.tagging.uses import Addition, Use, Uses
from natgrad_jax.tracing.contractions import UnsupportedError, layout_of
from natgrad_jax.tracing.views import View

Stack = tuple[tuple[int, int], ...]


class Bias(NamedTuple):
    """A bias: for each use that it is added to the layout that it has there."""

    parameter: int
    layouts: Mapping[int, Layout]
    stack: Stack


def find_biases(uses: Uses, parameters: Sequence[Parameter]) -> dict[int, Bias]:
    """By the parameter of a kernel its bias: all that the bias does is to be added to outputs of
    that kernel."""
    added: dict[int, list[Addition]] = {}
    for addition in uses.additions:
        added.setdefault(addition.bias.source, []).append(addition)
    found: dict[int, Bias] = {}
    for bias, additions in added.items():
        alone = uses.elementwise.get(bias, set()) <= {"add", "add_any"}
        marked = bias in uses.marked
        if not marked and (not alone or uses.events[bias] != len(additions)):
            continue
        layouts: dict[int, Layout] = {}
        stacks = set()
        for addition in additions:
            at = _aligned(addition, uses, parameters[bias].shape)
            if at is not None and at[0] not in layouts:
                layouts[at[0]] = at[1]
                stacks.add(at[2])
        kernels = {uses.uses[u].parameter for u in layouts}
        if len(layouts) == len(additions) and len(kernels) == len(stacks) == 1:
            found.setdefault(kernels.pop(), Bias(bias, layouts, stacks.pop()))
    return found


def _aligned(
    addition: Addition, uses: Uses, shape: tuple[int, ...]
) -> tuple[int, Layout, Stack] | None:
    """The use to whose output a bias is added, one number for each of the kernel's outputs; and the
    bias's layout. None if it is added in another way."""
    bias = addition.bias
    output = next((v for v in addition.outputs if v.place == bias.place), None)
    if output is None or bias.scaled or output.scaled or bias.flipped or output.region:
        return None
    use = uses.uses[output.source]
    call = use.geometry.call
    blocks, features = call.block_axes, call.output_axes(len(use.out))
    rows = {a for a in range(len(use.out)) if a not in (*blocks, *features)}
    found: dict[int, tuple[int, ...]] = {}  # split axes of the bias by the output's axis
    everywhere = ((),) * len(output.axes)  # a single number without axes is added as it is
    for own, theirs in zip(bias.axes or everywhere, output.axes, strict=True):
        outputs = [_axis(output, a, use.own_out) for a in theirs if output.extent(a) != 1]
        mine = tuple(a for a in own if bias.extent(a) != 1)
        if all(a < 0 for a in mine):  # none, or a broadcast
            if any(a not in rows for a in outputs):
                return None
            continue
        sizes = {
            math.prod(v.extent(a) for a in atoms) for v, atoms in ((bias, own), (output, theirs))
        }
        if len({*outputs}) != 1 or outputs[0] in rows or len(sizes) != 1 or min(mine) < 0:
            return None
        found[outputs[0]] = (*found.get(outputs[0], ()), *mine)
    if any(a not in found and use.out[a] != 1 for a in (*blocks, *features)):
        return None
    groups = use.geometry.layout.blocks
    if groups and not blocks:  # of a convolution: its groups are the major part of its channels
        return _grouped(output.source, use, bias, found, shape)
    order = [a for a in features if a in found]
    try:
        layout, stack, _ = layout_of(
            bias,
            shape,
            [a for axis in blocks for a in found.get(axis, ())],
            (),
            [a for axis in order for a in found[axis]],
        )
    except UnsupportedError:
        return None
    return output.source, _of_blocks(layout, [len(found.get(axis, ())) for axis in blocks]), stack


def _of_blocks(layout: Layout, axes: Sequence[int]) -> Layout:
    """A bias's layout with all of its kernel's axes of blocks; ``axes``: how many axes of the bias
    each has. What has none is of length 1, and gets a new one."""
    split, own, blocks = layout.split, iter(layout.blocks), list[int]()
    for n in axes:
        blocks += [next(own) for _ in range(n)] or [len(split)]
        split = split if n else (*split, 1)
    return layout._replace(split=split, blocks=tuple(blocks))


def _grouped(
    source: int, use: Use, bias: View, found: Mapping[int, tuple[int, ...]], shape: tuple[int, ...]
) -> tuple[int, Layout, Stack] | None:
    kernel = use.geometry.layout
    groups = math.prod(kernel.sizes(kernel.blocks))
    if bias.stack or bias.region or len(found) != 1:
        return None
    (size,) = (math.prod(bias.extent(a) for a in atoms) for atoms in found.values())
    return source, Layout((groups, size // groups), (0,), (), (1,)), ()


def _axis(view: View, atom: int, shape: tuple[int, ...]) -> int:
    """The axis of the source, of that shape, that a split axis is a part of."""
    after = math.prod(view.split[: atom + 1])
    size = 1
    for axis, n in enumerate(shape):
        size *= n
        if after <= size:
            return axis
    raise AssertionError("a split axis beyond its source")


def common_stack(
    kernel: Stack,
    of: Parameter,
    bias: Stack,
    by: Parameter,
) -> Stack | None:
    """The stack of a kernel and its bias, whose axes must be called alike: −1 for the last."""
    if kernel == bias:
        return kernel
    last = lambda stack, p: tuple((-1 if a == len(p.shape) - 1 else a, n) for a, n in stack)
    both = last(kernel, of), last(bias, by)
    return both[0] if both[0] == both[1] else None
