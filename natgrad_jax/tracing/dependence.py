"""Which examples an output depends on: a walk back through the traced loss, axis by axis.

Asked about one axis of one output, the walk gives each value that it comes to a *demand*: for the
output's element n along the axis, element n of the value along an axis of its own suffices
(``Along``), or all of the value is needed (``WHOLE``). Where everything that depends on parameters
and on data is demanded along an axis, the elements are examples that do not depend on one another.
An unknown operation demands the whole of its operands: the answer errs towards dependence.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.extend import core

from natgrad_jax.tracing import axes
from natgrad_jax.tracing.axes import OWN, RULES, WHOLE, Along, Demand, Demands, join
from natgrad_jax.utils import compat

# Where an equation stands: its number, after those of the equations (and branches) around it.
Key = tuple[int, ...]


class Taint(NamedTuple):
    """What a value depends on."""

    params: bool = False
    data: bool = False

    def __or__(self, other: Any) -> "Taint":
        return Taint(self.params or other.params, self.data or other.data)


class Walk:
    """One walk. ``is_data(aval, argument)`` tells whether a value that goes in holds examples.

    ``mixed``: whether examples depend on one another. ``at``: the demands of the results of each
    equation that the walk came to, by the equation's key. ``over_examples``: scans that take one
    example after another. ``held``: whether the loss itself holds an array that has an element for
    each example.
    """

    def __init__(self, is_data: Callable[[Any, bool], bool]):
        self.is_data = is_data
        self.mixed = False
        self.held = False
        self.at: dict[Key, Demands] = {}
        self.over_examples: set[Key] = set()

    def back(self, jaxpr: Any, taints: Sequence[Taint], outs: Demands, key: Key = ()) -> Demands:
        """The demands of the inputs of ``jaxpr`` from those of its outputs; ``key`` is that of the
        equation that it stands in."""
        taint = self._taints(jaxpr, taints)
        wanted: dict[Any, Demand] = {}

        def want(var: Any, demand: Demand) -> None:
            if isinstance(var, core.Literal) or not self.follows(var):
                return
            wanted[var] = join(wanted.get(var), demand)

        for var, demand in zip(jaxpr.outvars, outs, strict=True):
            want(var, demand)
        for number, equation in reversed(list(enumerate(jaxpr.eqns))):
            own = [wanted.get(v) for v in equation.outvars]
            if not any(own):
                continue
            here = (*key, number)
            self.at[here] = own
            for var, demand in zip(equation.outvars, own, strict=True):
                self.mixed |= demand == WHOLE and all(taint[var])
            given = [taint.get(v, Taint()) if _is_var(v) else Taint() for v in equation.invars]
            for var, demand in zip(
                equation.invars, self.through(equation, given, own, here), strict=True
            ):
                want(var, demand)
        self.held |= any(isinstance(wanted.get(v), Along) for v in jaxpr.constvars)
        return [wanted.get(v) for v in jaxpr.invars]

    def follows(self, var: Any) -> bool:
        """Whether the walk goes through this variable: what is differentiated."""
        return jnp.issubdtype(getattr(var.aval, "dtype", np.int32), jnp.inexact)

    def _taints(self, jaxpr: Any, taints: Sequence[Taint]) -> dict[Any, Taint]:
        found = dict(zip(jaxpr.invars, taints, strict=True))
        for var in jaxpr.constvars:
            found[var] = Taint(data=self.is_data(var.aval, False))
        for equation in jaxpr.eqns:
            taint = _all(found[v] for v in equation.invars if _is_var(v))
            found |= dict.fromkeys(equation.outvars, taint)
        return found

    def through(self, equation: Any, taints: list[Taint], outs: Demands, key: Key) -> Demands:
        name, params = equation.primitive.name, equation.params
        if name == "stop_gradient":
            return [None]
        if name == "scan":
            return self._scan(equation, taints, outs, key)
        if name == "cond":
            branches = enumerate(params["branches"])
            inner = [self._inside(b, taints[1:], outs, (*key, i)) for i, b in branches]
            return [None, *(functools.reduce(join, each) for each in zip(*inner, strict=True))]
        inside = [] if name in RULES else list(programs(params))
        if name == "while" or len(inside) > 1 or (inside and not _same_inputs(equation)):
            for i, program in enumerate(inside):
                jaxpr = getattr(program, "jaxpr", program)
                within = (*key, i) if len(inside) > 1 else key
                tainted = [_all(taints)] * len(jaxpr.invars)
                self._inside(program, tainted, [WHOLE] * len(jaxpr.outvars), within)
            return [WHOLE] * len(equation.invars)
        if inside:
            return self._inside(inside[0], taints, outs, key)
        return axes.through(equation, outs)

    def _inside(self, program: Any, taints: Sequence[Taint], outs: Demands, key: Key) -> Demands:
        return self.back(getattr(program, "jaxpr", program), taints, outs, key)

    def _scan(self, equation: Any, taints: list[Taint], outs: Demands, key: Key) -> Demands:
        constants, carried = compat.scan_groups(equation.params)
        program, length = equation.params["jaxpr"], equation.params["length"]
        # what is carried may come to depend on all that goes in
        through_carry = _all(taints)
        inside = [
            t | through_carry if constants <= i < constants + carried else t
            for i, t in enumerate(taints)
        ]
        carry, along = outs[:carried], outs[carried:]
        if Along(0, length) in along and not any(carry):  # perhaps one example after another
            before = dict(self.at)
            each = [OWN if d == Along(0, length) else d for d in along]
            found = self._inside(program, inside, [*carry, *each], key)
            if not any(found[constants : constants + carried]):
                self.over_examples.add(key)
                shared = [WHOLE if d == OWN else d for d in found[:constants]]
                own = [Along(0, length) if d == OWN else d for d in found[constants + carried :]]
                return [*shared, *carry, *own]
            self.at = before
        stacked = [_unstacked(d) for d in along]
        while True:
            found = self._inside(program, inside, [*carry, *stacked], key)
            again = [join(a, b) for a, b in zip(carry, found[constants:], strict=False)]
            if again == carry:
                break
            carry = again
        return [*found[:constants], *carry, *map(_stacked, found[constants + carried :])]


def _all(taints: Iterable[Taint]) -> Taint:
    return functools.reduce(Taint.__or__, taints, Taint())


def _unstacked(demand: Demand) -> Demand:
    if not isinstance(demand, Along):
        return demand
    return demand._replace(axis=demand.axis - 1) if demand.axis else WHOLE


def _stacked(demand: Demand) -> Demand:
    return demand._replace(axis=demand.axis + 1) if isinstance(demand, Along) else demand


def _is_var(x: Any) -> bool:
    return not isinstance(x, core.Literal)


def programs(params: dict[str, Any]) -> Iterator[Any]:
    """The programs inside an equation; of a custom derivative only what it computes."""
    for value in params.values():
        for x in value if isinstance(value, list | tuple) else [value]:
            if hasattr(getattr(x, "jaxpr", x), "eqns"):
                yield x


def _same_inputs(equation: Any) -> bool:
    (program,) = programs(equation.params)
    jaxpr = getattr(program, "jaxpr", program)
    shapes = lambda variables: [getattr(v.aval, "shape", None) for v in variables]
    return shapes(jaxpr.invars) == shapes(equation.invars) and shapes(jaxpr.outvars) == shapes(
        equation.outvars
    )
