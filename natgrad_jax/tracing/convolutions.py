"""Convolutions in the one layout that XLA's CPU backend leaves to its library within a branch.

In the program's main part XLA transposes operands to that layout itself; within branches and loops
it does not, and then runs plain loops: the gradient of an input takes thirty times as long.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.extend import core

from natgrad_jax.tracing.rows import bind

T = TypeVar("T")

CALLS = ("jit", "pjit")
CONVOLUTION = "conv_general_dilated"


def for_control_flow(function: Callable[[], T]) -> tuple[Callable[[], T], T]:
    """The function, traced once for all of its uses, and the shapes of what it returns.

    Its convolutions are over ``(N, *spatial, channels)`` with kernels ``(*spatial, inputs,
    outputs)``, except within loops of its own and checkpoints.
    """
    closed, shapes = jax.make_jaxpr(function, return_shape=True)()
    structure = jax.tree.structure(shapes)
    run = lambda: jax.tree.unflatten(structure, _run(closed.jaxpr, closed.consts, ()))
    return run, shapes


def _run(jaxpr: Any, consts: Sequence[Any], values: Sequence[Any]) -> list[Any]:
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *values), strict=True))
    read = lambda v: v.val if isinstance(v, core.Literal) else env[v]
    for equation in jaxpr.eqns:
        operands, name = list(map(read, equation.invars)), equation.primitive.name
        with equation.ctx.manager, jax.named_scope(str(equation.source_info.name_stack)):
            if name == CONVOLUTION:
                out = [_convolved(equation, *operands)]
            elif name in CALLS and _has_convolutions(equation):
                inner = equation.params["jaxpr"]
                out = _run(inner.jaxpr, inner.consts, operands)
            else:
                out = bind(equation, operands)
        env.update(zip(equation.outvars, out, strict=True))
    return list(map(read, jaxpr.outvars))


def _has_convolutions(equation: Any) -> bool:
    name = equation.primitive.name
    if name in CALLS:
        return any(map(_has_convolutions, equation.params["jaxpr"].jaxpr.eqns))
    return bool(name == CONVOLUTION)


def _convolved(equation: Any, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The convolution, its operands and its result transposed."""
    numbers = equation.params["dimension_numbers"]
    x_order, kernel_order, out_order = numbers  # (N, channels, *spatial), (outputs, inputs, …)
    n = x.ndim - 2
    usual = type(numbers)(
        (0, n + 1, *range(1, n + 1)), (n + 1, n, *range(n)), (0, n + 1, *range(1, n + 1))
    )
    last = lambda order: (order[0], *order[2:], order[1])
    turned = kernel.transpose((*kernel_order[2:], *kernel_order[1::-1]))
    params = equation.params | {"dimension_numbers": usual}
    out = equation.primitive.bind(x.transpose(last(x_order)), turned, **params)
    return out.transpose(tuple(np.argsort(last(out_order))))
