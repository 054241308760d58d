"""From uses to layers: which parameters form one block, and how its calls are measured."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from natgrad_jax.layers.kinds.dense import DenseCall
from natgrad_jax.layers.layer import Layer, Parameter
from natgrad_jax.layers.layer_call import LayerCall
from natgrad_jax.layers.layout import Layout
from natgrad_jax.layers.limits import MAX_FACTOR, MAX_ROWS
from natgrad_jax.tagging.biases import Bias, common_stack, find_biases
from natgrad_jax.tagging.uses import Use, Uses
from natgrad_jax.tracing.contractions import Geometry, UnsupportedError
from natgrad_jax.utils.tree_paths import Path


class Call(NamedTuple):
    """One use, as the calls of its layer are measured. ``call``: with its bias; ``sizes``: of its
    row axes, a merged one divided; ``axis``: which of these counts examples, −1 if none does."""

    use: Use
    call: LayerCall
    sizes: tuple[int, ...]
    axis: int

    @property
    def examples(self) -> int:
        return self.sizes[self.axis] if self.sizes and self.axis >= 0 else 1


class Kernel(NamedTuple):
    """A parameter whose uses all have the same Kronecker factors, with its bias, if it has one."""

    kernel: int
    bias: int | None
    kind: str
    layouts: tuple[Layout, ...]
    stack: tuple[tuple[int, int], ...]
    calls: tuple[Call, ...]


class Assembled(NamedTuple):
    """``kernels``: by the kernel's number. ``rows``: groups of parameters that meet the examples,
    whose own gradients can be had then. ``reasons``: why a parameter is in no kernel."""

    kernels: Mapping[int, Kernel]
    rows: tuple[tuple[int, ...], ...]
    reasons: Mapping[int, str]


def assemble(uses: Uses, parameters: Sequence[Parameter]) -> Assembled:
    """The kernels and the groups of parameters among the uses."""
    reasons = {p: found[0] for p, found in uses.ends.items()}
    biases = find_biases(uses, parameters)
    kernels: dict[int, Kernel] = {}
    for p in dict.fromkeys(use.parameter for use in uses.uses):
        if p in reasons and p not in uses.marked:
            continue
        try:
            kernels[p] = _kernel(p, uses, biases, parameters)
        except UnsupportedError as e:
            reasons[p] = str(e)
    # rows of what is contracted too would be of a part of its uses
    others = {k.bias for k in kernels.values()} | {*kernels} | {*uses.lost} | uses.contracted
    free = [p for p in uses.meetings if p not in others]
    return Assembled(kernels, _groups(free, uses, parameters), reasons)


def _kernel(
    p: int, uses: Uses, biases: Mapping[int, Bias], parameters: Sequence[Parameter]
) -> Kernel:
    """The uses of one parameter as calls of one layer; raises where they do not agree."""
    own = {i: use for i, use in enumerate(uses.uses) if use.parameter == p}
    bias = biases.get(p)
    added = [i in bias.layouts if bias else False for i in own]
    found = _agreed([use.geometry for use in own.values()], added.index(True) if any(added) else 0)
    first = found[0][0]
    if not all(hasattr(now.call, "bias") for now, _ in found):  # a lookup has none
        bias = None
    stack = first.stack
    if bias is not None:
        both = common_stack(stack, parameters[p], bias.stack, parameters[bias.parameter])
        bias, stack = (None, stack) if both is None else (bias, both)
    calls = []
    for (i, use), (now, turned) in zip(own.items(), found, strict=True):
        call: Any = now.call._replace(swapped=True) if turned else now.call  # type: ignore[attr-defined]
        if bias is not None:
            call = call._replace(bias=1.0 if i in bias.layouts else 0.0)
        calls.append(Call(use, call, *_row_sizes(use, call.row_axes(len(use.out)))))
    kind = next(now.kind for now, turned in found if not turned)
    layout = next(now.layout for now, turned in found if not turned)
    if bias is None:
        return Kernel(p, None, kind, (layout,), stack, tuple(calls))
    layouts = (layout, next(iter(bias.layouts.values())))
    return Kernel(p, bias.parameter, kind, layouts, stack, tuple(calls))


def _agreed(found: Sequence[Geometry], forward_one: int) -> list[tuple[Geometry, bool]]:
    """The uses of one parameter, each with whether it is transposed; as lookups if the others are
    lookups. Raises where they cannot be one layer's. ``forward_one``: a use that is not transposed.
    """
    first = next((now for now in found if now.kind == "embed"), found[forward_one])
    of = lambda layout, turned: _normal(layout, turned) == _normal(first.layout, False)
    turned = [not of(now.layout, False) for now in found]
    if any(t and not of(now.layout, True) for now, t in zip(found, turned, strict=True)):
        raise UnsupportedError("it is used in two ways that arrange it differently")
    if any(now.stack != first.stack for now in found):
        raise UnsupportedError("it is used as a whole and by elements")
    forward = [now for now, t in zip(found, turned, strict=True) if not t]
    if any(t and not isinstance(now.call, DenseCall) for now, t in zip(found, turned, strict=True)):
        raise UnsupportedError("it is used forwards and transposed, and one use is no product")
    lookups = [now.as_lookup for now in forward]
    if all(now.kind == "embed" for now in lookups):
        return [(now if t else now.as_lookup, t) for now, t in zip(found, turned, strict=True)]
    if any(now.kind == "embed" for now in forward):
        raise UnsupportedError("its rows are looked up, and it is multiplied by other inputs")
    return list(zip(found, turned, strict=True))


def _row_sizes(use: Use, rows: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """The sizes of the rows' axes, and which of them counts examples: the first if unknown."""
    sizes, axis = [use.out[a] for a in rows], use.axis
    if axis is None or (axis.axis >= 0 and axis.axis not in rows):
        return tuple(sizes), 0
    if axis.axis < 0:
        return tuple(sizes), -1
    at = rows.index(axis.axis)
    outer = sizes[at] // (axis.examples * axis.inner)
    parts = ((outer, outer > 1), (axis.examples, True), (axis.inner, axis.inner > 1))
    sizes[at : at + 1] = [n for n, kept in parts if kept]
    return tuple(sizes), at + (outer > 1)


def _normal(layout: Layout, turned: bool) -> tuple[tuple[tuple[int, int], ...], ...]:
    """The order of the parameter's elements in the matrix, in a form that does not depend on how
    finely its axes are split."""
    inputs, outputs = layout.inputs, layout.outputs
    roles = (layout.blocks, *((outputs, inputs) if turned else (inputs, outputs)))
    found = []
    for axes in roles:
        own: list[tuple[int, int]] = []
        for a in axes:
            if layout.split[a] == 1:
                continue
            stride = math.prod(layout.split[a + 1 :])
            if own and own[-1][0] == stride * layout.split[a]:
                own[-1] = (stride, own[-1][1] * layout.split[a])
            else:
                own.append((stride, layout.split[a]))
        found.append(tuple(own))
    return tuple(found)


def _groups(
    free: Sequence[int], uses: Uses, parameters: Sequence[Parameter]
) -> tuple[tuple[int, ...], ...]:
    """Parameters that meet the examples elementwise, each scale with the shift of its shape that
    lies beside it."""
    of = lambda p: uses.elementwise.get(p, {"other"})
    scales = [p for p in free if of(p) & {"mul"} and of(p) <= {"mul", "sub", "add", "add_any"}]
    shifts = [p for p in free if of(p) <= {"add", "add_any", "sub"}]
    found: list[tuple[int, ...]] = []
    taken: set[int] = set()
    for p in scales:
        mine = parameters[p]
        beside = [q for q in shifts if q not in taken and parameters[q].path[:-1] == mine.path[:-1]
                  and parameters[q].shape == mine.shape]  # fmt: skip
        found.append((p, *beside) if len(beside) == 1 else (p,))
        taken |= set(found[-1])
    return (*found, *((p,) for p in free if p not in taken))


def paths_of(
    mains: Sequence[Parameter], kernels: int, parameters: Sequence[Parameter]
) -> list[Path]:
    """The path of each layer: of what holds its first parameter, if that holds no other layer's.

    The first ``kernels`` of ``mains`` are kernels; what holds another layer's must hold no more
    than one shape.
    """
    holders = [p.path[:-1] for p in mains]
    shapes = lambda h: {p.shape for p in parameters if p.path[: len(h)] == h}
    taken = lambda i, h: holders.count(h) > 1 or (i >= kernels and len(shapes(h)) > 1)
    return [
        p.path if taken(i, h) else h for i, (p, h) in enumerate(zip(mains, holders, strict=True))
    ]


def _sides(kernel: Kernel) -> tuple[int, int]:
    layout = kernel.layouts[0]
    return math.prod(layout.sizes(layout.inputs)), math.prod(layout.sizes(layout.outputs))


def kernel_layer(
    kernel: Kernel, parameters: Sequence[Parameter], path: Path, differentiated: bool
) -> Layer:
    """The record of a kernel's layer; ``differentiated``: whether the loss differentiates its model
    somewhere."""
    own = (kernel.kernel,) if kernel.bias is None else (kernel.kernel, kernel.bias)
    positions = max(*map(_positions, kernel.calls), 1)
    constant = any(c.use.axis is None for c in kernel.calls)
    shared = positions > 1 or len(kernel.calls) > 1 or constant
    numbers = max(c.examples for c in kernel.calls) * sum(parameters[p].size for p in own)
    narrow = max(_sides(kernel)) <= MAX_FACTOR  # such matrices have whole factors on the way
    few = numbers <= MAX_ROWS and narrow
    matrices = differentiated and shared and kernel.kind == "dense" and few
    axes = {c.axis for c in kernel.calls}
    layer = Layer(
        path=path,
        kind=kernel.kind,
        parameters=tuple(parameters[p] for p in own),
        layouts=kernel.layouts,
        stack=kernel.stack,
        calls=sum(c.use.calls for c in kernel.calls),
        positions=positions,
        uses=1 if matrices else len({c.call.swapped for c in kernel.calls}),
        matrices=matrices,
        example_axis=next(iter(axes)) if len(axes) == 1 else 0,
    )
    return replace(layer, block=layer.usual_block)


def is_differentiated(kernel: Kernel) -> bool:
    """Whether a loss differentiates this layer: its uses differ in direction or in whether the bias
    is added, as a function's and its derivative's do. The factors of all that is used several times
    for an example come from the examples' own gradient matrices then."""
    ways = {(c.call.swapped, getattr(c.call, "bias", None)) for c in kernel.calls}
    return kernel.kind == "dense" and len(ways) > 1


def _positions(call: Call) -> int:
    """How many rows one example has."""
    out, axes = call.use.out, (*call.call.block_axes, *call.call.output_axes(len(call.use.out)))
    return math.prod(n for a, n in enumerate(out) if a not in axes) // max(call.examples, 1)


def rows_layer(group: Sequence[int], uses: Uses, parameters: Sequence[Parameter]) -> Layer:
    """The record of parameters that meet the examples elementwise: a scale and a shift, or one."""
    axes = {m.axis.axis for p in group for m in uses.meetings[p]}
    axis = next(iter(axes)) if len(axes) == 1 else 0
    own = tuple(parameters[p] for p in group)
    shape = own[0].shape
    unitwise = all("other" not in uses.elementwise.get(p, {"other"}) for p in group)
    if not unitwise:
        layout = Layout(shape, (), tuple(range(len(shape))), ())
        return Layer(
            own[0].path, "free", own, (layout,), block="full", rows=True, example_axis=axis
        )
    layout = Layout((*shape, 1), tuple(range(len(shape))), (len(shape),), ())
    scales = any("mul" in uses.elementwise[p] for p in group)
    layer = Layer(own[0].path, "norm" if scales else "bias", own, (layout,) * len(own),
                  rows=True, example_axis=axis)  # fmt: skip
    return replace(layer, block=layer.usual_block)
