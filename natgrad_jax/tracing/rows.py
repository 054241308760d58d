"""Rows: zeros added to a parameter, one for each example, as equations carry them along."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax.tracing.examples import Axis


class Value(NamedTuple):
    """A variable's value; its ``rows``, one perturbation for each example, zero in value; and the
    scalar by which a parameter in it was multiplied."""

    value: Any
    rows: Any = None
    scale: Any = None


def bind(equation: Any, values: Sequence[Any]) -> list[Any]:
    """The results of an equation for other operands."""
    params = equation.primitive.get_bind_params(equation.params)
    out = equation.primitive.bind(*values, **params)
    return list(out) if equation.primitive.multiple_results else [out]


def along(rows: jax.Array, ndim: int, axis: Axis, equation: Any) -> jax.Array:
    """Rows beside an operand that has length one along the examples' axis, or is a scalar."""
    shape = equation.outvars[0].aval.shape
    if ndim == 0:
        rows = rows.reshape(-1, *[1] * (len(shape) - 1)).swapaxes(0, axis.axis)
    else:
        rows = jnp.moveaxis(jnp.squeeze(rows, axis.axis + 1), 0, axis.axis)
    return _repeated(rows, axis, shape)


def through_broadcast(rows: jax.Array, axis: Axis, equation: Any) -> jax.Array:
    """Rows through a broadcast that gives the examples their axis."""
    shape, dims = equation.params["shape"], equation.params["broadcast_dimensions"]
    each = (*shape[: axis.axis], 1, *shape[axis.axis + 1 :])
    rows = jax.vmap(lambda x: jax.lax.broadcast_in_dim(x, each, dims))(rows)
    rows = jnp.moveaxis(jnp.squeeze(rows, axis.axis + 1), 0, axis.axis)
    return _repeated(rows, axis, shape)


def _repeated(rows: jax.Array, axis: Axis, shape: tuple[int, ...]) -> jax.Array:
    """Rows along a merged axis: each for its ``inner`` neighbours, all of them again and again."""
    if axis.inner > 1:
        rows = jnp.repeat(rows, axis.inner, axis.axis)
    times = shape[axis.axis] // rows.shape[axis.axis]
    return jnp.concatenate([rows] * times, axis.axis) if times > 1 else rows


def rows_through(equation: Any, operands: Sequence[Value]) -> list[Any]:
    """Rows through an equation of parameters alone: their linear images, example by example."""
    own = [i for i, x in enumerate(operands) if x.rows is not None]
    if not own:
        return [None] * len(equation.outvars)
    values = [x.value for x in operands]

    def of(*chosen: Any) -> list[Any]:
        given = list(values)
        for i, x in zip(own, chosen, strict=True):
            given[i] = x
        return bind(equation, given)

    count = max(len(operands[i].rows) for i in own)
    fill = lambda r: jnp.pad(r, [(0, count - len(r))] + [(0, 0)] * (r.ndim - 1))
    rows = [fill(operands[i].rows) for i in own]
    image = lambda *r: jax.jvp(of, [values[i] for i in own], list(r))[1]
    return jax.vmap(image)(*rows)


def scale_through(equation: Any, operands: Sequence[Value]) -> Any:
    """The scalar factor of the parameter in the result, None for one."""
    name = equation.primitive.name
    scale = next((x.scale for x in operands if x.scale is not None), None)
    one = jnp.ones(()) if scale is None else scale
    if name == "neg":
        return -one
    if name in ("mul", "div"):
        other = (
            operands[1]
            if operands[0].value is not None and jnp.size(operands[1].value) == 1
            else operands[0]
        )
        if jnp.size(other.value) != 1:
            return scale
        factor = jnp.reshape(other.value, ())
        return one * factor if name == "mul" else one / factor
    return scale
