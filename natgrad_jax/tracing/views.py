"""Arrays that hold the numbers of one parameter, only rearranged.

A :class:`View` says which axes of the parameter each axis of such an array runs along. The rules
below follow it through transposes, reshapes, slices, concatenations and the like.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class View(NamedTuple):
    """An array that is a rearrangement of one source: a parameter, or the output of an equation.

    ``source``: its number. ``split``: its shape, axes split as reshapes demand. ``axes``: for each
    axis of the array the split axes that it runs along, major first; a negative entry −n is a
    broadcast axis of size n. ``stack``: split axes that scans slice away, outermost first.
    ``region``: (split axis, start, stop) where only a part of an axis is there. ``flipped``: split
    axes in reverse order. ``place``: (axis of the array, start, size), where the view is a part of
    the array, which others fill. ``scaled``: whether it was multiplied by a constant scalar;
    ``weighted``: by a constant array, element by element.
    """

    source: int
    split: tuple[int, ...]
    axes: tuple[tuple[int, ...], ...]
    stack: tuple[int, ...] = ()
    region: tuple[tuple[int, int, int], ...] = ()
    flipped: frozenset[int] = frozenset()
    place: tuple[int, int, int] | None = None
    scaled: bool = False
    weighted: bool = False

    def extent(self, atom: int) -> int:
        """The size of one entry of ``axes``."""
        if atom < 0:
            return -atom
        return next((b - a for axis, a, b in self.region if axis == atom), self.split[atom])

    def size(self, axis: int) -> int:
        return math.prod(self.extent(a) for a in self.axes[axis])

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the part of the array that is this view."""
        return tuple(map(self.size, range(len(self.axes))))


def whole(source: int, shape: Sequence[int]) -> View:
    """The source itself."""
    return View(source, tuple(shape), tuple((i,) for i in range(len(shape))))


def split_atom(view: View, atom: int, sizes: tuple[int, int]) -> View:
    """The view with one split axis divided in two."""
    at = lambda a: a + 1 if a > atom else a
    double = lambda a: (a, a + 1) if a == atom else (at(a),)
    return view._replace(
        split=(*view.split[:atom], *sizes, *view.split[atom + 1 :]),
        axes=tuple(tuple(b for a in axis for b in double(a)) for axis in view.axes),
        stack=tuple(map(at, view.stack)),
        region=tuple((at(a), start, stop) for a, start, stop in view.region),
        flipped=frozenset(b for a in view.flipped for b in double(a)),
    )


def reshape(view: View, shape: Sequence[int], before: Sequence[int]) -> View | None:
    """The view after a reshape of an array of shape ``before``; None if it is none any more."""
    shape, place = tuple(shape), view.place
    if place is not None:
        ahead = math.prod(before[: place[0]])
        kept = [i for i, n in enumerate(shape)
                if n == before[place[0]] and math.prod(shape[:i]) == ahead]  # fmt: skip
        if not kept:
            return None
        shape = (*shape[: kept[0]], place[2], *shape[kept[0] + 1 :])
        place = (kept[0], *place[1:])
    left = [a for axis in view.axes for a in axis if view.extent(a) != 1]
    axes: list[tuple[int, ...]] = []
    while len(axes) < len(shape):
        want, own = shape[len(axes)], list[int]()
        while math.prod(view.extent(a) for a in own) != want:
            if not left:
                return None
            atom = left.pop(0)
            missing = want // math.prod(view.extent(a) for a in own)
            extent = view.extent(atom)
            if extent > missing:  # split it
                if extent % max(missing, 1) or missing <= 1:
                    return None
                sizes = (missing, extent // missing)
                if atom < 0:
                    own, left = [*own, -sizes[0]], [-sizes[1], *left]
                    continue
                if any(atom == a for a, *_ in view.region):
                    return None
                view = split_atom(view._replace(axes=(*axes, tuple(own), (atom,), tuple(left))),
                                  atom, sizes)  # fmt: skip
                *done, begun, (first, second), rest = view.axes
                axes, own, left = list(done), [*begun, first], [second, *rest]
            else:
                own.append(atom)
        axes.append(tuple(own))
    return view._replace(axes=tuple(axes), place=place)


def permuted(view: View, order: Sequence[int]) -> View:
    """The view after a transpose."""
    place = view.place and (list(order).index(view.place[0]), *view.place[1:])
    return view._replace(axes=tuple(view.axes[a] for a in order), place=place)


def broadcast(view: View, shape: Sequence[int], dims: Sequence[int]) -> View | None:
    """The view after ``broadcast_in_dim``."""
    axes: list[tuple[int, ...]] = [(-n,) if n != 1 else () for n in shape]
    for axis, (at, own) in enumerate(zip(dims, view.axes, strict=True)):
        joined = view.place is not None and view.place[0] == axis
        if view.size(axis) == shape[at] or joined:
            axes[at] = own
        elif view.size(axis) != 1:
            return None
    place = view.place and (dims[view.place[0]], *view.place[1:])
    return view._replace(axes=tuple(axes), place=place)


def sliced(
    view: View, starts: Sequence[int], stops: Sequence[int], strides: Any, whole: Sequence[int]
) -> View | None:
    """The view after a slice of an array of shape ``whole``; None if nothing of it is left."""
    if strides is not None and any(s != 1 for s in strides):
        return None
    for axis, (start, stop, n) in enumerate(zip(starts, stops, whole, strict=True)):
        if (start, stop) == (0, n):
            continue
        low = 0
        if view.place is not None and view.place[0] == axis:
            _, low, size = view.place
            begin, end = max(start, low), min(stop, low + size)
            if begin >= end:
                return None
            place = None if (begin, end) == (start, stop) else (axis, begin - start, end - begin)
            view = view._replace(place=place)
            start, stop = begin - low, end - low
            if (start, stop) == (0, size):
                continue
        cut = _cut(view, axis, start, stop)
        if cut is None:
            return None
        view = cut
    return view


def _cut(view: View, axis: int, start: int, stop: int) -> View | None:
    """The view with one axis cut down to a range."""
    real = [a for a in view.axes[axis] if view.extent(a) != 1]
    if len(real) != 1 or real[0] in view.flipped:
        return None
    (atom,) = real
    axes = list(view.axes)
    if atom < 0:
        axes[axis] = (-(stop - start),) if stop - start != 1 else ()
        return view._replace(axes=tuple(axes))
    begin = next((a for i, a, _ in view.region if i == atom), 0)
    rest = tuple(r for r in view.region if r[0] != atom)
    return view._replace(region=(*rest, (atom, begin + start, begin + stop)))


def unstacked(view: View) -> View | None:
    """One element of the view along its first axis, as a scan gets it."""
    if view.place is not None and view.place[0] == 0:
        return None
    real = [a for a in view.axes[0] if view.extent(a) != 1] or list(view.axes[0][:1])
    if len(real) != 1 or real[0] < 0 or real[0] in view.flipped:
        return None
    if any(real[0] == a for a, *_ in view.region):
        return None
    place = view.place and (view.place[0] - 1, *view.place[1:])
    return view._replace(axes=view.axes[1:], stack=(*view.stack, real[0]), place=place)


# Rules: from an equation, and the views of its first operand, to those of its result.
Rule = Callable[[Any, View], View | None]


def _same(equation: Any, view: View) -> View | None:
    return view


def _transpose(equation: Any, view: View) -> View | None:
    return permuted(view, equation.params["permutation"])


def _reshape(equation: Any, view: View) -> View | None:
    return reshape(view, equation.outvars[0].aval.shape, equation.invars[0].aval.shape)


def _broadcast(equation: Any, view: View) -> View | None:
    return broadcast(view, equation.params["shape"], equation.params["broadcast_dimensions"])


def _slice(equation: Any, view: View) -> View | None:
    given = equation.params
    shape = equation.invars[0].aval.shape
    return sliced(view, given["start_indices"], given["limit_indices"], given["strides"], shape)


def _rev(equation: Any, view: View) -> View | None:
    axes = equation.params["dimensions"]
    turned = {a for axis in axes for a in view.axes[axis] if a >= 0 and view.extent(a) > 1}
    whole = view.place is None or view.place[0] not in axes
    return view._replace(flipped=view.flipped ^ turned) if whole else None


RULES: dict[str, Rule] = {
    **dict.fromkeys(
        ("convert_element_type", "copy", "copy_p", "sharding_constraint", "pvary", "pcast", "name",
         "reduce_precision", "mesh_cast", "reshard", "optimization_barrier", "device_put"),
        _same,
    ),
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _reshape,
    "expand_dims": _reshape,
    "broadcast_in_dim": _broadcast,
    "slice": _slice,
    "rev": _rev,
}  # fmt: skip


def joined(equation: Any, operands: Sequence[tuple[View, ...]]) -> tuple[View, ...]:
    """The views after a concatenation, each at its place."""
    axis, start, found = equation.params["dimension"], 0, []
    for var, views in zip(equation.invars, operands, strict=True):
        size = var.aval.shape[axis]
        for view in views:
            if view.place is None:
                found.append(view._replace(place=(axis, start, size)))
            elif view.place[0] == axis:
                _, low, own = view.place
                found.append(view._replace(place=(axis, start + low, own)))
        start += size
    return tuple(found)


def parts(equation: Any, views: tuple[View, ...]) -> list[tuple[View, ...]]:
    """The views of each result of a split."""
    axis, shape = equation.params["axis"], equation.invars[0].aval.shape
    found, start = [], 0
    for size in equation.params["sizes"]:
        starts, stops = [0] * len(shape), list(shape)
        starts[axis], stops[axis] = start, start + size
        cut = (sliced(view, starts, stops, None, shape) for view in views)
        found.append(tuple(v for v in cut if v is not None))
        start += size
    return found
