"""Evaluating a jaxpr again with taps: the same numbers, and ways for statistics to leave it.

Two kinds of slots are read. A *tap* stands after an equation that contracts an input with a
parameter (:mod:`natgrad_jax.tracing.slots`). *Rows* ``(examples, *parameter)`` of zeros are added
to a parameter, one for each example, where it meets the examples: their cotangents are the
examples' own gradients. Equations inside others (jit, scan, …) are rebuilt with slots among their
inputs.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from natgrad_jax.tracing.dependence import Key
from natgrad_jax.tracing.instruments import Instruments
from natgrad_jax.tracing.mark import MARK
from natgrad_jax.tracing.rows import (
    Value,
    along,
    bind,
    rows_through,
    scale_through,
    through_broadcast,
)
from natgrad_jax.utils.compat import scan_groups

# Equations that only call one jaxpr, whose equations can be evaluated in their place.
CALLS = ("jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint",
         "custom_jvp_call", "shard_map")  # fmt: skip


def is_marked(equation: Any) -> bool:
    """Whether it is a user's word for what a result is; see :func:`natgrad_jax.as_layer`."""
    return equation.params.get("name") == MARK


def program_of(equation: Any) -> Any:
    """The jaxpr that an equation in ``CALLS`` calls."""
    params = equation.params
    program = params["call_jaxpr"] if "call_jaxpr" in params else params["jaxpr"]
    return getattr(program, "jaxpr", program)


def evaluate(
    closed: Any, values: Sequence[Any], rows: Mapping[int, Any], plan: Instruments, slots: Any
) -> list[Any]:
    """The outputs of a jaxpr; ``rows``: of the inputs that have them."""
    given = [Value(x, rows.get(i)) for i, x in enumerate(values)]
    consts = [Value(x) for x in closed.consts]
    return [x.value for x in _run(closed.jaxpr, consts, given, plan, slots, ())]


def needed_for(jaxpr: Any, places: Sequence[int], known: Sequence[int] = ()) -> tuple[Any, Any]:
    """The equations, from the last, and the variables that the outputs at ``places`` need, where
    those at the ``known`` places are given."""
    given = {v for i in known if isinstance(v := jaxpr.outvars[i], core.Var)}
    needed = {v for i in places if isinstance(v := jaxpr.outvars[i], core.Var)}
    chosen = []
    for equation in reversed(jaxpr.eqns):
        if (needed - given) & set(equation.outvars):
            chosen.append(equation)
            needed |= {v for v in equation.invars if isinstance(v, core.Var)}
    return chosen, needed - given


def values_of(
    closed: Any,
    values: Sequence[Any],
    places: Sequence[int],
    known: Mapping[int, Any] | None = None,
) -> list[Any]:
    """The outputs at ``places`` alone, by the equations that they need; ``known``: the values of
    other outputs by their places, in place of what they are."""
    jaxpr, known = closed.jaxpr, known or {}
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*closed.consts, *values), strict=True))
    chosen, _ = needed_for(jaxpr, places, tuple(known))
    fixed = {
        jaxpr.outvars[i]: x for i, x in known.items() if isinstance(jaxpr.outvars[i], core.Var)
    }
    env |= fixed
    read = lambda v: v.val if isinstance(v, core.Literal) else env[v]
    for equation in reversed(chosen):
        with equation.ctx.manager:
            env.update(zip(equation.outvars, bind(equation, list(map(read, equation.invars)))))
            env |= fixed
    return [read(jaxpr.outvars[i]) for i in places]


def _run(
    jaxpr: Any,
    consts: Sequence[Value],
    given: Sequence[Value],
    plan: Instruments,
    slots: Any,
    key: Key,
) -> list[Value]:
    env = dict(zip(jaxpr.constvars, consts, strict=True))
    env |= zip(jaxpr.invars, given, strict=True)
    read = lambda v: Value(v.val) if isinstance(v, core.Literal) else env[v]
    last = _last_uses(jaxpr)
    for number, equation in enumerate(jaxpr.eqns):
        here = (*key, number)
        operands = [read(v) for v in equation.invars]
        with equation.ctx.manager, jax.named_scope(str(equation.source_info.name_stack)):
            if here not in plan.touched:
                results = [Value(x) for x in bind(equation, [x.value for x in operands])]
            else:
                through = REBUILT.get(equation.primitive.name, _tapped)
                through = _marked if is_marked(equation) else through
                results = through(equation, operands, plan, slots, here)
        env.update(zip(equation.outvars, results, strict=True))
        for v in last[number]:
            env.pop(v, None)
    return [read(v) for v in jaxpr.outvars]


def _last_uses(jaxpr: Any) -> list[list[Any]]:
    """For each equation the variables that none needs after it, so that their memory is free."""
    kept = {v for v in jaxpr.outvars if not isinstance(v, core.Literal)}
    found: list[list[Any]] = []
    for equation in reversed(jaxpr.eqns):
        own = {v for v in (*equation.invars, *equation.outvars) if not isinstance(v, core.Literal)}
        found.append([v for v in own if v not in kept])
        kept |= own
    return found[::-1]


def _tapped(
    equation: Any, operands: list[Value], plan: Instruments, slots: Any, key: Key
) -> list[Value]:
    """One equation, its taps after it."""
    values, meetings = [x.value for x in operands], plan.meetings.get(key, ())
    is_broadcast = equation.primitive.name == "broadcast_in_dim"
    beside: Any = 0
    for meeting in meetings:
        rows = operands[meeting.operand].rows
        if rows is None:
            continue
        if is_broadcast:
            beside = through_broadcast(rows[: meeting.examples], meeting.axis, equation)
        else:
            values[meeting.operand] += along(
                rows[: meeting.examples], values[meeting.operand].ndim, meeting.axis, equation
            )
    out = bind(equation, values)
    if is_broadcast:
        out = [out[0] + beside]
    for tap in plan.taps.get(key, ()):
        own = [i for i, _ in enumerate(values) if i != tap.operand]
        slot = slots[tap.slot]
        own_at = tuple(i for i in tap.at if i is not None)
        slot = jax.tree.map(lambda x, at=own_at: x[at] if at else x, slot)
        given, scale = [values[i] for i in own], operands[tap.operand].scale
        out = [tap.read(slot, slots.get(tap.weight), given, scale, out[0])]
    if key not in plan.chain:
        return [Value(x) for x in out]
    rows = rows_through(equation, operands) if not meetings else [None] * len(out)
    scale = scale_through(equation, operands)
    return [Value(x, r, scale) for x, r in zip(out, rows, strict=True)]


def _marked(
    equation: Any, operands: list[Value], plan: Instruments, slots: Any, key: Key
) -> list[Value]:
    """A result, and beside it, for the slots alone, what the user says that it is."""
    inside = jax.tree.map(jax.lax.stop_gradient, [x.value for x in operands[1:]])
    given = [x._replace(value=v) for x, v in zip(operands[1:], inside, strict=True)]
    _, same = _call(equation, [operands[0], *given], plan, slots, key)
    return [Value(_beside(operands[0].value, same.value)), same]


def _call(
    equation: Any, operands: list[Value], plan: Instruments, slots: Any, key: Key
) -> list[Value]:
    program = equation.params.get("jaxpr")
    consts = [Value(x) for x in getattr(program, "consts", ())]
    return _run(program_of(equation), consts, operands, plan, slots, key)


def _remat(
    equation: Any, operands: list[Value], plan: Instruments, slots: Any, key: Key
) -> list[Value]:
    keep = {k: equation.params[k] for k in ("policy", "prevent_cse")}
    inside = lambda x, s: _run(program_of(equation), (), x, plan, s, key)
    return jax.checkpoint(inside, **keep)(operands, slots)


def _custom_jvp(
    equation: Any, operands: list[Value], plan: Instruments, slots: Any, key: Key
) -> list[Value]:
    """The function with its own derivative; beside it, for the slots alone, its equations."""
    out = bind(equation, [x.value for x in operands])
    inside = jax.tree.map(jax.lax.stop_gradient, [x.value for x in operands])
    given = [x._replace(value=v) for x, v in zip(operands, inside, strict=True)]
    consts = [Value(x) for x in equation.params["call_jaxpr"].consts]
    beside = _run(program_of(equation), consts, given, plan, slots, key)
    return [Value(_beside(x, y.value)) for x, y in zip(out, beside, strict=True)]


@jax.custom_vjp
def _beside(x: jax.Array, same: jax.Array) -> jax.Array:
    """``x``, whose cotangent is also that of ``same``."""
    return x


_beside.defvjp(lambda x, same: (x, None), lambda _, g: (g, g))


def _cond(
    equation: Any, operands: list[Value], plan: Instruments, slots: Any, key: Key
) -> list[Value]:
    index, *rest = operands

    def branch(number: int, program: Any) -> Callable[..., Any]:
        consts = [Value(x) for x in program.consts]

        def run(given: list[Value], slots: Any) -> list[Any]:
            out = _run(program.jaxpr, consts, given, plan, slots, (*key, number))
            return [x.value for x in out]

        return run

    branches = [branch(i, b) for i, b in enumerate(equation.params["branches"])]
    return [Value(x) for x in jax.lax.switch(index.value, branches, rest, slots)]


def _scan(
    equation: Any, operands: list[Value], plan: Instruments, slots: Any, key: Key
) -> list[Value]:
    params = equation.params
    constants, carried = scan_groups(params)
    fixed, first, along = (
        operands[:constants],
        operands[constants : constants + carried],
        operands[constants + carried :],
    )
    inside = [t for taps in plan.taps.values() for t in taps if key in t.scans]
    own = {t.slot: slots[t.slot] for t in inside}
    consts = [Value(x) for x in params["jaxpr"].consts]
    # rows have the examples' axis in front, the scan's after it
    stacked = [
        x._replace(rows=None if x.rows is None else jnp.moveaxis(x.rows, 1, 0)) for x in along
    ]
    of_examples = {m.operand for m in plan.meetings.get(key, ())}
    rows = {i: fixed[i].rows[: params["length"]] for i in of_examples if fixed[i].rows is not None}
    scales = [x.scale for x in along]
    stacked = [x._replace(scale=None) for x in stacked]

    def body(carry: list[Any], now: Any) -> Any:
        xs, own, now_rows = now
        xs = [x._replace(scale=s) for x, s in zip(xs, scales, strict=True)]
        met = [x._replace(value=x.value + now_rows[i], rows=None) if i in now_rows else x
               for i, x in enumerate(fixed)]  # fmt: skip
        given = [*met, *map(Value, carry), *xs]
        out = _run(params["jaxpr"].jaxpr, consts, given, plan, {**slots, **own}, key)
        values = [x.value for x in out]
        return values[:carried], values[carried:]

    keep = {k: params[k] for k in ("length", "reverse", "unroll")}
    last, ys = jax.lax.scan(body, [x.value for x in first], (stacked, own, rows), **keep)
    return [Value(x) for x in (*last, *ys)]


def _shard_map(
    equation: Any, operands: list[Value], plan: Instruments, slots: Any, key: Key
) -> list[Value]:
    """The user's own map over devices: slots are the same on all of them."""
    params = equation.params
    nothing = jax.sharding.PartitionSpec()

    def run(values: Sequence[Any], slots: Any) -> tuple[Any, ...]:
        out = _run(params["jaxpr"], (), [Value(x) for x in values], plan, slots, key)
        return tuple(x.value for x in out)

    mapped = jax.shard_map(
        run,
        mesh=params["mesh"],
        in_specs=(tuple(params["in_specs"]), nothing),
        out_specs=tuple(params["out_specs"]),
        check_vma=params["check_vma"],
        axis_names=set(params["newly_manual_axes"]),
    )
    return [Value(x) for x in mapped(tuple(x.value for x in operands), slots)]


REBUILT = {
    **dict.fromkeys(("jit", "pjit", "closed_call", "core_call"), _call),
    **dict.fromkeys(("remat", "remat2", "checkpoint"), _remat),
    "custom_jvp_call": _custom_jvp,
    "cond": _cond,
    "scan": _scan,
    "shard_map": _shard_map,
}
