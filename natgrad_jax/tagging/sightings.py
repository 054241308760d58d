"""What a search saw: one sighting for each layer called, and how it becomes a record."""

import contextlib
import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from natgrad_jax.layers.geometry import Geometry, Layout
from natgrad_jax.layers.layer import Layer, LossTerm, Parameter
from natgrad_jax.tagging.axes import OWN, WHOLE, Along, Demand, Demands
from natgrad_jax.tagging.dependence import Taint, Walk
from natgrad_jax.utils.tree_paths import Path

# Names of calls in the traced program, by which they are counted there.
_MARK = "natgrad_call:"


# Why a layer has no block whose kernel does not train by itself.
HELD = "its {} is no parameter of its own: held fixed, or shared"


class Mark(NamedTuple):
    """One call: of which layer, the axes of its output that are rows, and its output's shape."""

    path: Path
    rows: tuple[int, ...]
    shape: tuple[int, ...]


class Sighting(NamedTuple):
    """A layer as one of its calls saw it: shapes are what is left after scans and vmaps sliced."""

    kind: str
    names: tuple[str, ...]
    layouts: tuple[Layout, ...]
    probe_shape: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(eq=False)
class Sightings:
    """Collected while ``loss_fn`` is traced abstractly.

    ``owners``: the type of the module at each tagged path; ``layers``: sightings; ``refused``:
    why a known layer has no block; ``positions``: the most of one call; ``uses``: in which ways
    the parameters are used; ``calls``: how often, 0 where that cannot be told; ``terms``: of the
    loss; ``reached``: for each parameter the terms that depend on it; ``example_axes``: of each
    layer the row axes that count examples, as its calls have them; ``row_sizes``: of its last call;
    ``zero``: terms that are known to be scaled by zero.
    """

    owners: dict[Path, type] = field(default_factory=dict)
    layers: dict[Path, Sighting] = field(default_factory=dict)
    refused: dict[Path, str] = field(default_factory=dict)
    positions: dict[Path, int] = field(default_factory=dict)
    uses: dict[Path, set[bool]] = field(default_factory=dict)
    calls: dict[Path, int] = field(default_factory=dict)
    terms: tuple[LossTerm, ...] = ()
    reached: dict[Path, tuple[int, ...]] = field(default_factory=dict)
    example_axes: dict[Path, set[int | None]] = field(default_factory=dict)
    row_sizes: dict[Path, tuple[int, ...]] = field(default_factory=dict)
    zero: list[str] = field(default_factory=list)
    _refusal: str | None = None
    _marks: list["Mark"] = field(default_factory=list)

    @contextlib.contextmanager
    def refusing(self, reason: str) -> Iterator[None]:
        """Layers called inside have no block, for this reason."""
        outer, self._refusal = self._refusal, reason
        try:
            yield
        finally:
            self._refusal = outer

    def record(
        self,
        path: Path,
        geometry: Geometry | str,
        probe: Any,
        x: Any,
        s: jax.Array,
    ) -> jax.Array:
        """Note one call; called twice, a layer must have the same geometry both times.

        ``geometry`` is why there is none, where it is a str. Returns ``s``, marked so that the call
        can be counted in the traced program.
        """
        if self._refusal is not None:
            self.refused[path] = self._refusal
        if isinstance(geometry, str):
            self.refused[path] = geometry
            return s
        names, shape = geometry.names, geometry.shape
        sighting = Sighting(geometry.kind, names, geometry.layouts, tuple(probe.shape), shape)
        if self.layers.setdefault(path, sighting) != sighting:
            self.refused[path] = f"it is called in two ways that read its {names[0]} differently"
        self.positions[path] = max(self.positions.get(path, 1), geometry.call.positions(x))
        self.uses.setdefault(path, set()).add(geometry.call.swapped)
        self.row_sizes[path] = tuple(s.shape[a] for a in geometry.call.row_axes(s.ndim))
        self._marks.append(Mark(path, geometry.call.row_axes(s.ndim), s.shape))
        return checkpoint_name(s, f"{_MARK}{len(self._marks) - 1}")

    def count(self, jaxpr: Any) -> None:
        """Read off the traced program how often it calls each layer."""
        self.calls.clear()
        for mark, times in _marks(jaxpr).items():
            path = self._marks[mark].path
            known = self.calls.get(path, 1) > 0 and times > 0
            self.calls[path] = self.calls.get(path, 0) + times if known else 0

    def follow(self, jaxpr: Any, given: Sequence[Path | None], losses: Sequence[Any]) -> None:
        """Read off the traced program which parameters each term of the loss depends on, and along
        which axis of its outputs lie examples that do not depend on one another.

        ``given``: the parameters among the program's inputs, None for the model's state; arguments
        come after them. Its outputs are those of ``losses``.
        """
        arguments = len(jaxpr.jaxpr.invars) - len(given)
        is_parameter = [path is not None for path in given] + [False] * arguments
        reached: dict[Path, list[int]] = {path: [] for path in self.reached}
        found = []
        for i, term in enumerate(losses):
            axis, walk, wanted = _examples_axis(
                jaxpr, is_parameter, len(given), i, term.distribution
            )
            found.append(LossTerm(type(term.distribution).__name__, axis))
            for path, demand in zip(given, wanted, strict=False):
                if path is not None and demand is not None:
                    reached[path].append(i)
            for name, demands in walk.marks.items():
                if name.startswith(_MARK):
                    mark = self._marks[int(name.removeprefix(_MARK))]
                    axes = {row_axis(mark, *demand) for demand in demands}
                    self.example_axes.setdefault(mark.path, set()).update(axes)
        every = tuple(range(len(found)))
        self.terms = tuple(found)
        self.reached = {path: tuple(terms) or every for path, terms in reached.items()}


def _examples_axis(
    jaxpr: Any, is_parameter: Sequence[bool], state: int, output: int, distribution: Any
) -> tuple[int | None, Walk, Demands]:
    """The axis of an output along which nothing is mixed, and the walk back that shows it; None and
    the last walk where there is no such axis.

    Of several axes the first that runs through data and not through parameters (members of an
    ensemble are no examples), or through neither (tokens look up parameters).
    """
    examples, free = distribution.examples, []
    for axis, size in enumerate(examples or (0,)):
        walk = Walk(functools.partial(_holds_examples, size))
        taints = [
            Taint(own, i >= state and _holds_examples(size, var.aval, True))
            for i, (own, var) in enumerate(zip(is_parameter, jaxpr.jaxpr.invars, strict=True))
        ]
        outs: list[Demand] = [None] * len(jaxpr.jaxpr.outvars)
        outs[output] = Along(axis, size) if examples else WHOLE
        wanted = walk.back(jaxpr.jaxpr, taints, outs)
        if examples and not walk.mixed:
            along = [own for own, x in zip(is_parameter, wanted, strict=True)
                     if isinstance(x, Along)]  # fmt: skip
            free.append(((any(along), not along), axis, walk, wanted))
    return min(free, key=lambda found: found[0])[1:] if free else (None, walk, wanted)


def _holds_examples(size: int, aval: Any, argument: bool) -> bool:
    """Whether what goes into the loss is data: an array that has ``size`` elements along some axis,
    or an argument of several axes; not keys, nor whole numbers that the loss itself holds."""
    raw_key = getattr(aval, "dtype", None) == np.uint32 and aval.ndim == 1
    if raw_key or not hasattr(aval, "shape"):
        return False
    if argument:
        return size in aval.shape or aval.ndim > 1
    return size in aval.shape and jnp.issubdtype(aval.dtype, jnp.inexact)


def row_axis(mark: Mark, demand: Demand, shape: tuple[int, ...]) -> int | None:
    """Which of a call's row axes counts examples, from what the loss demands of its output; −1
    where ``vmap`` put that axis there or a scan runs over it, None where all of the output is
    needed.

    ``shape``: of the output in the traced program.
    """
    if demand == OWN:
        return -1
    if not isinstance(demand, Along) or demand.inner != 1 or demand.size != shape[demand.axis]:
        return None
    for mapped in stack_candidates(shape, mark.shape):
        if demand.axis in mapped:
            return -1
        axis = demand.axis - sum(a < demand.axis for a in mapped)
        return mark.rows.index(axis) if axis in mark.rows else None
    return None


def _marks(jaxpr: Any) -> dict[int, int]:
    """How often each mark runs in a traced program; 0 where a loop's length is not known."""
    found: dict[int, int] = {}

    def add(more: Mapping[int, int], times: int) -> None:
        for mark, count in more.items():
            known = found.get(mark, 1) > 0 and count * times > 0
            found[mark] = found.get(mark, 0) + count * times if known else 0

    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        primitive, params = equation.primitive.name, equation.params
        name = params.get("name")
        if primitive == "name" and name.startswith(_MARK):
            add({int(name.removeprefix(_MARK)): 1}, 1)
        times = {"scan": params.get("length", 1), "while": 0}.get(primitive, 1)
        inner = [_marks(x) for value in params.values() for x in _programs(value)]
        if primitive == "cond":  # one of the branches runs
            every = {mark for branch in inner for mark in branch}
            inner = [{mark: max(branch.get(mark, 1) for branch in inner) for mark in every}]
        for marks in inner:
            add(marks, times)
    return found


def _programs(value: Any) -> list[Any]:
    """The programs inside a parameter of an equation."""
    if isinstance(value, list | tuple):
        return [x for v in value for x in _programs(v)]
    return [value] if hasattr(getattr(value, "jaxpr", value), "eqns") else []


def stack_candidates(whole: tuple[int, ...], seen: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Every choice of axes whose removal turns shape ``whole`` into ``seen``, leading first."""
    removed = len(whole) - len(seen)
    return [
        axes
        for axes in itertools.combinations(range(len(whole)), max(removed, 0))
        if tuple(n for i, n in enumerate(whole) if i not in axes) == seen
    ]


def to_layer(
    path: Path, seen: Sightings, parameters: Mapping[Path, Parameter], axes: tuple[int, ...]
) -> Layer:
    """The record of a sighted layer whose parameters are stacked over ``axes``.

    A bias that is no parameter is a constant: the layer then counts as one without.
    """
    sighting = seen.layers[path]
    kept = [
        (parameters[full], layout)
        for name, layout in zip(sighting.names, sighting.layouts, strict=True)
        if (full := parameter_path(path, name)) in parameters
    ]
    first = kept[0][0]
    axis, sizes = _only(seen.example_axes.get(path, set()) - {None}), seen.row_sizes[path]
    # positions were counted beside the leading axis
    examples = sizes[axis] if 0 <= axis < len(sizes) else 1
    positions = seen.positions[path] * (sizes or (1,))[0] // max(examples, 1)
    # the last axis of a kernel is the last one of its bias too, and no other counts alike there
    last = len(first.shape) - 1
    stack = tuple((-1 if axis == last else axis, first.shape[axis]) for axis in axes)
    layer = Layer(
        path=path,
        kind=sighting.kind,
        parameters=tuple(p for p, _ in kept),
        layouts=tuple(layout for _, layout in kept),
        stack=stack,
        calls=_calls_of_one(seen.calls.get(path, 0), stack),
        positions=max(positions, 1),
        uses=len(seen.uses[path]),
        example_axis=axis,
    )
    return replace(layer, block=layer.usual_block)


def parameter_path(path: Path, name: str) -> Path:
    """Where a layer's parameter lies; each matrix of a LoRA pair is a layer and its parameter."""
    return path if path[-1:] in (("lora_a",), ("lora_b",)) else (*path, name)


def _only(axes: set[Any]) -> int:
    """The axis of examples, the leading one where calls have different ones or none."""
    return next(iter(axes)) if len(axes) == 1 else 0


def _calls_of_one(calls: int, stack: tuple[tuple[int, int], ...]) -> int:
    """Calls of one element of a stack: a scan over it counts every element."""
    elements = math.prod(size for _, size in stack)
    return calls // elements if calls % elements == 0 else calls
