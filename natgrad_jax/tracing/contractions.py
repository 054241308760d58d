"""Equations that contract an input with a parameter: how their arrays are arranged as matrices.

The dimension numbers of ``dot_general``, ``ragged_dot``, ``conv_general_dilated`` and ``gather``
are the whole geometry of a layer.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from natgrad_jax.layers.kinds.conv import ConvCall
from natgrad_jax.layers.kinds.dense import DenseCall, Part, RaggedCall
from natgrad_jax.layers.kinds.embed import EmbedCall
from natgrad_jax.layers.layer_call import LayerCall
from natgrad_jax.layers.layout import Layout
from natgrad_jax.tracing.views import View, permuted, reshape


class Geometry(NamedTuple):
    """One use of a parameter by an equation.

    ``call``: how the equation's arrays are arranged; ``layout``: how the parameter is, without the
    axes in ``stack``. ``stack``: (axis, size) of the parameter's axes of which this use gets one
    element: the one ``at`` an index, or, if that is None, the one that a scan slices. ``lookup``:
    the call as a lookup, if the input is known to be one-hot rows.
    """

    kind: str
    call: LayerCall
    layout: Layout
    stack: tuple[tuple[int, int], ...]
    at: tuple[int | None, ...]
    lookup: EmbedCall | None = None

    @property
    def as_lookup(self) -> "Geometry":
        """A product with one-hot rows as the lookup that it is."""
        return self if self.lookup is None else self._replace(kind="embed", call=self.lookup)


class UnsupportedError(Exception):
    """A use that has no Kronecker factors; the message says why."""


def geometry(equation: Any, operand: int, view: View, shape: Sequence[int], hot: bool) -> Geometry:
    """The geometry of an equation that contracts the parameter ``view``, its ``operand``.

    ``shape``: the parameter's own; ``hot``: whether the other operand holds one-hot rows.
    """
    name = equation.primitive.name
    if view.weighted:
        raise UnsupportedError("it is multiplied element by element before its use")
    if view.flipped and name != "conv_general_dilated":
        raise UnsupportedError("an axis of it is reversed")
    return CONTRACTIONS[name](equation, operand, view, shape, hot)


def layout_of(
    view: View,
    shape: Sequence[int],
    blocks: Sequence[int],
    inputs: Sequence[int],
    outputs: Sequence[int],
) -> tuple[Layout, tuple[tuple[int, int], ...], tuple[int | None, ...]]:
    """The layout of a parameter of ``shape``, and its stack, from the roles of its split axes."""
    stack: list[tuple[int, int | None]] = [(a, None) for a in view.stack]
    units, starts = [], {a: start for a, start, _ in view.region}
    used = {*view.stack, *blocks, *inputs, *outputs}
    for atom in range(len(view.split)):
        if atom in used:
            continue
        if view.split[atom] == 1:
            units.append(atom)
        elif view.extent(atom) == 1:  # an element at a fixed index
            stack.append((atom, starts[atom]))
        else:
            raise UnsupportedError("a part of its axes is used")
    if any(view.extent(a) != view.split[a] for a in blocks):
        raise UnsupportedError("it is cut along an axis of blocks")
    sliced = {a for a, _ in stack}
    left = [a for a in range(len(view.split)) if a not in sliced]
    at = {a: i for i, a in enumerate(left)}
    number = lambda atoms: tuple(at[a] for a in atoms)
    layout = Layout(
        tuple(view.split[a] for a in left),
        number(blocks),
        number([*units, *inputs]),
        number(outputs),
    )
    axes = tuple((_axis_of(view, shape, a), view.split[a]) for a, _ in stack)
    return layout, axes, tuple(index for _, index in stack)


def _axis_of(view: View, shape: Sequence[int], atom: int) -> int:
    """The parameter's axis that a split axis is; raises if it is only a part of one."""
    before = math.prod(view.split[:atom])
    for axis, size in enumerate(shape):
        if math.prod(shape[:axis]) == before and size == view.split[atom]:
            return axis
    raise UnsupportedError("a scan runs over a part of an axis")


def part(view: View, atoms: Sequence[int], cut: tuple[int, int, int] | None) -> Part:
    """The part of the kernel's features that a use has, for split axes in order."""
    starts = {a: (start, view.split[a] - stop) for a, start, stop in view.region}
    pads = tuple(starts.get(a, (0, 0)) for a in atoms)
    sizes = tuple(view.extent(a) for a in atoms)
    return Part(sizes, cut, pads if any(map(any, pads)) else ())


def _atoms(view: View, axes: Sequence[int]) -> tuple[int, ...]:
    atoms = tuple(a for axis in axes for a in view.axes[axis])
    if any(a < 0 for a in atoms):
        raise UnsupportedError("it is broadcast along an axis that is contracted or kept")
    return atoms


def _dot(equation: Any, operand: int, view: View, shape: Sequence[int], hot: bool) -> Geometry:
    contracted, batched = equation.params["dimension_numbers"]
    own, other = operand, 1 - operand
    w, x = (equation.invars[i].aval for i in (own, other))
    batch = len(batched[0])
    free = [
        [a for a in range(v.aval.ndim) if a not in (*contracted[i], *batched[i])]
        for i, v in enumerate(equation.invars[:2])
    ]
    start = [batch, batch + len(free[0])]
    s_of = lambda i, axis: start[i] + free[i].index(axis)
    is_block = [any(a >= 0 for a in view.axes[axis]) for axis in batched[own]]
    for axis, block in zip(batched[own], is_block, strict=True):
        if block and any(a < 0 for a in view.axes[axis]):
            raise UnsupportedError("an axis of blocks is merged with a broadcast one")
    at_blocks = [i for i, block in enumerate(is_block) if block]
    at_rows = [i for i, block in enumerate(is_block) if not block]
    blocks = _atoms(view, [batched[own][i] for i in at_blocks])
    inputs, outputs = _atoms(view, contracted[own]), _atoms(view, free[own])
    x_cut = s_cut = None
    if view.place is not None:
        axis, start_at, size = view.place
        if axis in contracted[own]:
            x_cut = (contracted[other][contracted[own].index(axis)], start_at, size)
        elif axis in free[own]:
            s_cut = (s_of(own, axis), start_at, size)
        else:
            raise UnsupportedError("it is joined with others along an axis of blocks")
    s_outputs = tuple(s_of(own, a) for a in free[own])
    rows = tuple(free[other])
    layout, stack, index = layout_of(view, shape, blocks, inputs, outputs)
    call: LayerCall = DenseCall(
        x_rows=(*(batched[other][i] for i in at_rows), *rows),
        x_blocks=tuple(batched[other][i] for i in at_blocks),
        x_inputs=tuple(contracted[other]),
        s_rows=(*at_rows, *(s_of(other, a) for a in rows)),
        s_blocks=tuple(at_blocks),
        s_outputs=s_outputs,
        blocks=tuple(view.split[a] for a in blocks),
        inputs_part=part(view, inputs, x_cut),
        outputs_part=part(view, outputs, s_cut),
    )
    plain = not batch and own == 1 and len(contracted[1]) == len(outputs) == w.ndim - 1 == 1
    if hot and plain and contracted[0] == (x.ndim - 1,) and not view.region and not view.place:
        lookup = EmbedCall(w.shape[contracted[1][0]], one_hot=True)
        return Geometry("dense", call, layout, stack, index, lookup)
    return Geometry("dense", call, layout, stack, index)


def _ragged(equation: Any, operand: int, view: View, shape: Sequence[int], hot: bool) -> Geometry:
    numbers = equation.params["ragged_dot_dimension_numbers"]
    dims, usual = numbers.dot_dimension_numbers, (((1,), (1,)), ((), ()))
    as_tuples = tuple(tuple(map(tuple, pair)) for pair in dims)
    if operand != 1 or as_tuples != usual or tuple(numbers.rhs_group_dimensions) != (0,):
        raise UnsupportedError("a ragged_dot of other than rows, blocks × inputs × outputs")
    if view.place or view.region:
        raise UnsupportedError("a part of it is used by ragged_dot")
    roles = [_atoms(view, (axis,)) for axis in range(3)]
    layout, stack, index = layout_of(view, shape, *roles)
    call = RaggedCall(math.prod(view.split[a] for a in roles[0]))
    return Geometry("dense", call, layout, stack, index)


def _conv(equation: Any, operand: int, view: View, shape: Sequence[int], hot: bool) -> Geometry:
    given = equation.params
    numbers, groups = given["dimension_numbers"], given["feature_group_count"]
    if operand != 1 or given["batch_group_count"] != 1:
        raise UnsupportedError(
            "it is the input of a convolution, or convolved in groups of batches"
        )
    if view.place or view.region:
        raise UnsupportedError("a part of it is convolved")
    out, into, *spatial = numbers.rhs_spec
    kernel = permuted(view, [*spatial, into, out])
    size = kernel.shape
    grouped = reshape(kernel, (*size[:-1], groups, size[-1] // groups), size)
    if grouped is None:
        raise UnsupportedError("its groups are no axis of it")
    rank = len(spatial)
    blocks, inputs = _atoms(grouped, (rank + 1,)), _atoms(grouped, range(rank + 1))
    if not grouped.axes[rank]:  # one channel: an axis of its own
        grouped = grouped._replace(split=(*grouped.split, 1))
        inputs = (*inputs, len(grouped.split) - 1)
    if len(grouped.axes[rank]) > 1 or len(blocks) > 1:
        raise UnsupportedError("its channels or groups are several axes")
    turned = [{a in grouped.flipped for a in grouped.axes[i]} for i in range(rank)]
    if any(len(t) > 1 for t in turned) or grouped.flipped & {*blocks, *grouped.axes[rank + 2]}:
        raise UnsupportedError("an axis of it is reversed")
    outputs = _atoms(grouped, (rank + 2,))
    layout, stack, index = layout_of(grouped, shape, blocks, inputs, outputs)
    call = ConvCall(
        size[:rank],
        tuple(given["window_strides"]),
        tuple(map(tuple, given["padding"])),
        tuple(given["lhs_dilation"]),
        tuple(given["rhs_dilation"]),
        groups if blocks else 1,
        (numbers.lhs_spec[0], *numbers.lhs_spec[2:], numbers.lhs_spec[1]),
        (numbers.out_spec[0], *numbers.out_spec[2:], numbers.out_spec[1]),
        tuple(True in t for t in turned),
    )
    return Geometry("conv", call, layout, stack, index)


def _gather(equation: Any, operand: int, view: View, shape: Sequence[int], hot: bool) -> Geometry:
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    w, s = equation.invars[0].aval, equation.outvars[0].aval
    tokens = tuple(numbers.collapsed_slice_dims)
    features = [a for a in range(w.ndim) if a not in tokens]
    lookup = len(tokens) == 1 and tuple(numbers.start_index_map) == tokens
    lookup &= not numbers.operand_batching_dims
    lookup &= all(sizes[a] == w.shape[a] for a in features)
    lookup &= tuple(numbers.offset_dims) == tuple(range(s.ndim - len(features), s.ndim))
    if operand or not lookup or view.place or view.region:
        raise UnsupportedError("it is indexed other than row by row")
    inputs, outputs = _atoms(view, tokens), _atoms(view, features)
    layout, stack, index = layout_of(view, shape, (), inputs, outputs)
    call = EmbedCall(w.shape[tokens[0]], features=len(features), clipped="CLIP" in str(
        equation.params["mode"]))  # fmt: skip
    return Geometry("embed", call, layout, stack, index)


CONTRACTIONS: dict[str, Callable[..., Geometry]] = {
    "dot_general": _dot,
    "ragged_dot": _ragged,
    "ragged_dot_general": _ragged,
    "conv_general_dilated": _conv,
    "gather": _gather,
}
