"""Following each parameter through the traced loss to the equations that use it."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend import core

from natgrad_jax.tagging.nested import WITHIN
from natgrad_jax.tagging.uses import Addition, Use, Uses, behind
from natgrad_jax.tracing import views as viewing
from natgrad_jax.tracing.axes import ELEMENTWISE
from natgrad_jax.tracing.contractions import CONTRACTIONS, UnsupportedError, geometry
from natgrad_jax.tracing.dependence import Key
from natgrad_jax.tracing.examples import Axis, Examples
from natgrad_jax.tracing.instruments import Meeting
from natgrad_jax.tracing.views import View

LINEAR = ("add", "add_any", "sub", "mul")
ITS_OWN = "examples lie along an axis of its own"
COMPLEX = "its products are complex numbers, whose examples are not told apart"
PRODUCT = "it is multiplied by {}: such a product has no use of its own"


class State(NamedTuple):
    """What is known of one variable. ``views``: of parameters; ``depends``: the parameters that it
    is a function of, and of no example (:func:`behind` a use, negative); ``outputs``: views of
    uses' outputs, by the use's number; ``hot``: ``"iota"``, or ``"hot"`` if it holds one-hot rows.
    """

    views: tuple[View, ...] = ()
    depends: frozenset[int] = frozenset()
    outputs: tuple[View, ...] = ()
    hot: str = ""

    @property
    def parameters(self) -> frozenset[int]:
        return self.depends.union(v.source for v in self.views)


NOTHING = State()


class Scope(NamedTuple):
    """Where a walk stands: the key of the equation around it, how often it runs, the scans around
    it that slice some parameter, by parameter, and whether a shard_map is around it."""

    key: Key = ()
    times: int = 1
    scans: tuple[tuple[Key, int], ...] = ()
    sharded: bool = False


def follow(jaxpr: Any, shapes: Sequence[tuple[int, ...]], examples: Examples) -> Uses:
    """The uses of the parameters, the first inputs of ``jaxpr``, of these shapes."""
    follower = Follower(shapes, examples)
    states = [State((viewing.whole(i, s),), frozenset((i,))) for i, s in enumerate(shapes)]
    states += [NOTHING] * (len(jaxpr.invars) - len(shapes))
    follower.walk(jaxpr, states, Scope())
    return follower.found


class Follower:
    """One walk forward through a jaxpr; ``found`` grows on the way."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], examples: Examples):
        self.shapes, self.examples, self.found = shapes, examples, Uses()

    def walk(self, jaxpr: Any, states: Sequence[State], scope: Scope) -> list[State]:
        """The states of the outputs of ``jaxpr`` from those of its inputs."""
        env = dict(zip(jaxpr.invars, states, strict=True))
        is_var = lambda v: not isinstance(v, core.Literal)
        read = lambda v: env.get(v, NOTHING) if is_var(v) else NOTHING
        consumers = Counter(filter(is_var, jaxpr.outvars))
        for equation in jaxpr.eqns:
            consumers.update(filter(is_var, equation.invars))
        for number, equation in enumerate(jaxpr.eqns):
            key = (*scope.key, number)
            given = [
                s._replace(outputs=()) if s.outputs and consumers[v] > 1 else s
                for s, v in zip(map(read, equation.invars), equation.invars, strict=True)
            ]
            if equation.primitive.name == "iota":
                env[equation.outvars[0]] = _iota(equation)
            if not any(given):
                continue
            if any(s.parameters for s in given) and not self.examples.reached(key):
                continue  # no gradient comes from there
            results = self._through(equation, given, key, scope)
            env.update(zip(equation.outvars, results, strict=False))
        return [read(v) for v in jaxpr.outvars]

    def _through(self, equation: Any, given: list[State], key: Key, scope: Scope) -> list[State]:
        name = equation.primitive.name
        followed = frozenset[int]().union(*(s.parameters for s in given))
        if followed:
            self.found.chain.add(key)
        if name in WITHIN:
            return WITHIN[name](self, equation, given, key, scope)
        if name in CONTRACTIONS and followed:
            return self._contract(equation, given, key, scope)
        if name in viewing.RULES:
            return self._rearranged(equation, given, key)
        if name == "concatenate":
            return self._concatenated(equation, given)
        if name == "split":
            of = lambda views: viewing.parts(equation, views)
            pairs = zip(of(given[0].views), of(given[0].outputs), strict=True)
            return [State(views, given[0].depends, outputs) for views, outputs in pairs]
        if name in ELEMENTWISE:
            return self._elementwise(equation, given, key)
        self.found.lose(followed, f"it goes into {name}, which is not followed")
        return []

    def _rearranged(self, equation: Any, given: list[State], key: Key) -> list[State]:
        name, rule, found = equation.primitive.name, viewing.RULES[equation.primitive.name], []
        for state, var in zip(given, equation.outvars, strict=False):
            moved = lambda views: tuple(v for v in (rule(equation, x) for x in views) if v)
            views = moved(state.views)
            missing = state.parameters - state.depends.union(v.source for v in views)
            missing |= {v.source for v in state.views} - {v.source for v in views}
            self.found.end(missing, f"a {name} takes its axes apart")
            depends, hot = state.depends, state.hot if name != "transpose" else ""
            if depends and name == "broadcast_in_dim":
                depends = self._broadcast(equation, depends, key, var.aval.shape)
            found.append(State(views, depends, moved(state.outputs), hot))
        return found

    def _broadcast(
        self, equation: Any, depends: frozenset[int], key: Key, shape: tuple[int, ...]
    ) -> frozenset[int]:
        """What of ``depends`` has not met the examples after a broadcast."""
        pairs = zip(
            equation.params["broadcast_dimensions"], equation.invars[0].aval.shape, strict=True
        )
        taken = {at for at, n in pairs if n != 1}
        axis = self.examples.axis(key)
        if axis is None and 0 not in taken:
            axis = self.examples.guess(key, shape)
        if axis is None:
            return depends
        if axis.axis < 0 or axis.axis in taken:
            self.found.lose(depends, ITS_OWN)
        else:
            self.meet(0, depends, axis, key)
        return frozenset()

    def _concatenated(self, equation: Any, given: list[State]) -> list[State]:
        views = viewing.joined(equation, [s.views for s in given])
        outputs = viewing.joined(equation, [s.outputs for s in given])
        depends = frozenset[int]().union(*(s.depends for s in given))
        if all(s.depends for s in given):
            return [State(views, depends, outputs)]
        left = depends.difference(v.source for v in views)
        self.found.lose(left, "it is joined with what depends on examples")
        return [State(views, frozenset(), outputs)]

    def meet(self, operand: int, depends: frozenset[int], axis: Axis, key: Key) -> None:
        """A function of parameters meets what differs between examples, along that axis."""
        for p in depends:
            met = Meeting(key, operand, axis)
            self.found.meetings.setdefault(max(p, behind(p)), []).append(met)

    def _elementwise(self, equation: Any, given: list[State], key: Key) -> list[State]:
        name, out = equation.primitive.name, equation.outvars[0].aval
        if name == "eq" and any(s.hot == "iota" for s in given):
            return [State(hot="hot")]
        own = [i for i, s in enumerate(given) if s.parameters]
        outputs: tuple[View, ...] = ()
        if name in ("add", "add_any") or (name == "sub" and given[0].outputs):
            outputs = next((s.outputs for s in given if s.outputs), ())
        if not own:
            return [State(outputs=outputs)] if outputs else []
        depends = frozenset[int]().union(*(s.depends for s in given))
        avals = [equation.invars[i].aval for i in own if given[i].depends]
        axis = self.examples.axis(key)
        if axis is None and all(not a.ndim or a.shape[0] == 1 for a in avals):
            axis = self.examples.guess(key, out.shape)
        if name in ("add", "add_any") and len(own) == 1 and outputs:
            for view in given[own[0]].views:
                self.found.additions.append(Addition(view, outputs, key))
        if axis is not None:
            for i in own:
                self._met(equation, i, given[i], axis, key)
            return [State(outputs=outputs)]
        if depends and all(equation.invars[i].aval.size < out.size for i in own):
            self.found.lose(depends, "which examples it acts on cannot be told")
            return [State(outputs=outputs)]
        return [State(self._combined(equation, given, own), depends, outputs)]

    def _met(self, equation: Any, i: int, state: State, axis: Axis, key: Key) -> None:
        """Note that the operand ``i`` meets the examples in an elementwise operation."""
        name, aval = equation.primitive.name, equation.invars[i].aval
        for p in state.parameters:
            how = name if state.views and name in LINEAR else "other"
            self.found.elementwise.setdefault(p, set()).add(how)
        if state.depends and (axis.axis < 0 or (aval.ndim and aval.shape[axis.axis] != 1)):
            self.found.lose(state.depends, ITS_OWN)
            return
        self.meet(i, state.depends, axis, key)
        self.found.end(state.parameters, f"it is used by {name}, elementwise")
        self.found.events.update(state.parameters)

    def _combined(self, equation: Any, given: list[State], own: list[int]) -> tuple[View, ...]:
        """The views of the result of an elementwise operation on parameters and constants."""
        name, shape = equation.primitive.name, equation.outvars[0].aval.shape
        if name in ("add", "add_any", "sub"):
            kept = own if name != "sub" else own[: own[0] == 0]
            return tuple(
                v for i in kept for v in given[i].views if equation.invars[i].aval.shape == shape
            )
        if name == "neg":
            return tuple(v._replace(scaled=True) for v in given[0].views)
        if len(own) == 1 and (name == "mul" or (name == "div" and own == [0])):
            scalar = equation.invars[1 - own[0]].aval.size == 1
            return tuple(
                v._replace(scaled=True) if scalar else v._replace(weighted=True)
                for v in given[own[0]].views
            )
        for i in own:
            others = frozenset[int]().union(*(given[j].depends for j in own if j != i))
            sources = frozenset(v.source for v in given[i].views)
            whose = "another parameter" if others - sources else "a function of itself"
            reason = PRODUCT.format(whose) if name == "mul" and others else f"it goes into {name}"
            self.found.end(sources, reason)
        return ()

    def _contract(self, equation: Any, given: list[State], key: Key, scope: Scope) -> list[State]:
        name, out = equation.primitive.name, equation.outvars[0].aval
        constant = self.examples.axis(key) is None and self.examples.guess(key, (2,)) is None
        depends = frozenset[int]().union(*(s.depends for s in given))
        own = [i for i, s in enumerate(given) if s.views or any(p >= 0 for p in s.depends)]
        if len(own) != 1:
            self.found.end(depends, PRODUCT.format("another parameter"))
            return [State((), depends if constant else frozenset())]
        (i,) = own
        hot, outputs = any(s.hot == "hot" for s in given), []
        sources = frozenset(v.source for v in given[i].views)
        self.found.lose(given[i].depends - sources, f"a function of it goes into {name}")
        if jnp.issubdtype(out.dtype, jnp.complexfloating):
            self.found.lose(sources, COMPLEX)
            return [State((), given[i].depends if constant else frozenset())]
        if not constant:
            self.found.contracted |= sources
        for view in given[i].views:
            p = view.source
            try:
                found = geometry(equation, i, view, self.shapes[p], hot)
            except UnsupportedError as e:
                self.found.lose(frozenset((p,)), f"{e} ({name})")
                continue
            scanned = [n for (_, n), at in zip(found.stack, found.at, strict=True) if at is None]
            calls = scope.times // math.prod(scanned)
            scans = tuple(k for k, source in scope.scans if source == p)
            axis = self.examples.axis(key)
            self.found.uses.append(
                Use(key, p, i, found, calls, scans, axis, out.shape, view.scaled, scope.sharded)
            )
            outputs.append(_output(len(self.found.uses) - 1, self.found.uses[-1]))
        left = depends - given[i].depends | frozenset(map(behind, sources))
        return [State((), left if constant else frozenset(), tuple(outputs))]


def _output(number: int, use: Use) -> View:
    """The view of a use's own output, a part of the equation's if others share it."""
    whole = viewing.whole(number, use.own_out)
    return whole if use.cut is None else whole._replace(place=use.cut)


def _iota(equation: Any) -> State:
    """One-hot rows are made by comparing ids with a row of numbers along the last axis."""
    shape, axis = equation.params["shape"], equation.params["dimension"]
    return State(hot="iota") if axis == len(shape) - 1 else NOTHING
