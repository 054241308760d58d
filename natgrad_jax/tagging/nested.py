"""Following parameters into the equations that hold others: calls, branches and scans."""

from collections.abc import Callable, Sequence
from typing import Any

from natgrad_jax.tracing import views as viewing
from natgrad_jax.tracing.dependence import Key
from natgrad_jax.tracing.evaluate import CALLS, is_marked, program_of
from natgrad_jax.tracing.examples import Axis
from natgrad_jax.utils.compat import scan_groups


def _call(follower: Any, equation: Any, given: list[Any], key: Key, scope: Any) -> list[Any]:
    if is_marked(equation):
        return _marked(follower, equation, given, key, scope)
    sharded = scope.sharded or equation.primitive.name == "shard_map"
    return follower.walk(program_of(equation), given, scope._replace(key=key, sharded=sharded))


def _marked(follower: Any, equation: Any, given: list[Any], key: Key, scope: Any) -> list[Any]:
    """What a user says that the first operand is: examples lie in all of it as in that."""
    follower.found.marked |= {v.source for s in given for v in s.views}
    examples = follower.examples
    follower.examples = examples.everywhere(key)
    out = follower.walk(program_of(equation), given, scope._replace(key=key))
    follower.examples = examples
    return [given[0], out[1]]


def _cond(follower: Any, equation: Any, given: list[Any], key: Key, scope: Any) -> list[Any]:
    branches = [
        follower.walk(b.jaxpr, given[1:], scope._replace(key=(*key, i)))
        for i, b in enumerate(equation.params["branches"])
    ]
    return [_either(states) for states in zip(*branches, strict=True)]


def _either(states: Sequence[Any]) -> Any:
    """What holds whichever branch runs."""
    depends = frozenset[int]().union(*(s.depends for s in states))
    same = all(s.views == states[0].views for s in states)
    return states[0]._replace(
        views=states[0].views if same else (), depends=depends, outputs=(), hot=""
    )


def _scan(follower: Any, equation: Any, given: list[Any], key: Key, scope: Any) -> list[Any]:
    constants, carried = scan_groups(equation.params)
    length, found = equation.params["length"], follower.found
    over_examples = follower.examples.over(key)
    inside, scans = list(given), list(scope.scans)
    for i, state in enumerate(given):
        if i < constants and over_examples and state.depends:
            follower.meet(i, state.depends, Axis(0, length), key)
            inside[i] = state._replace(depends=frozenset())
        elif constants <= i < constants + carried:
            found.lose(state.parameters, "a scan carries it from step to step")
            inside[i] = type(state)()
        elif i >= constants:
            cut = tuple(v for v in map(viewing.unstacked, state.views) if v)
            missing = {v.source for v in state.views} - {v.source for v in cut}
            found.end(frozenset(missing), "a scan runs over a part of an axis")
            inside[i] = type(state)(cut, state.depends)
            scans += [(key, v.source) for v in cut]
    own = scope._replace(key=key, times=scope.times * length, scans=tuple(scans))
    out = follower.walk(equation.params["jaxpr"].jaxpr, inside, own)
    found.lose(frozenset[int]().union(*(s.depends for s in out)), "a scan hands it on")
    return []


def _opaque(follower: Any, equation: Any, given: list[Any], key: Key, scope: Any) -> list[Any]:
    parameters = frozenset[int]().union(*(s.parameters for s in given))
    follower.found.lose(parameters, f"it goes into {OPAQUE[equation.primitive.name]}")
    return []


# Operations that are not followed, as the coverage table calls them.
OPAQUE = {
    "custom_vjp_call": "a function with a custom_vjp, whose equations are its own affair",
    "while": "a while loop",
    "pallas_call": "a Pallas kernel",
    "ffi_call": "a foreign call",
    "pure_callback": "a callback",
    "io_callback": "a callback",
    "custom_linear_solve": "a linear solve",
}

Within = Callable[[Any, Any, list[Any], Key, Any], list[Any]]
WITHIN: dict[str, Within] = {
    **dict.fromkeys(CALLS, _call),
    "cond": _cond,
    "scan": _scan,
    **dict.fromkeys(OPAQUE, _opaque),
}
