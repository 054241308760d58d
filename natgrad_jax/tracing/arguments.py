"""Which arguments of a loss hold its examples, so that fewer of them can be given.

Where element n of everything in the loss's terms is a function of element n of some arguments,
along an axis of each, and of the whole of the others, the loss of every k-th example is that of
every k-th element of the former. The walk back (:mod:`natgrad_jax.tracing.dependence`) follows
values here, whole numbers among them (labels, ids), not only what is differentiated.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from natgrad_jax.tracing.axes import WHOLE, Along, Demand, Demands
from natgrad_jax.tracing.dependence import Key, Taint, Walk
from natgrad_jax.tracing.examples import Examples
from natgrad_jax.tracing.trace import Traced


def sizes_of(traced: Traced, examples: Examples) -> tuple[int, ...] | None:
    """For each term of the loss its number of examples; None if some depend on one another."""
    terms = list(zip(traced.loss.terms, examples.terms, strict=True))
    found = [t.distribution.examples[x.axis] for t, x in terms if x.axis is not None]
    return tuple(found) if len(found) == len(terms) else None


def axes_of_examples(traced: Traced, examples: Examples) -> list[Along | None] | None:
    """For each argument that is an array the axis along which examples lie, None where it has none.
    None for all: examples depend on one another, or the loss itself holds something for each."""
    sizes = sizes_of(traced, examples)
    if sizes is None:
        return None
    jaxpr, walk = traced.jaxpr.jaxpr, _Values()
    outs: list[Demand] = [None] * len(jaxpr.outvars)
    for place, demand in enumerate(_demands(traced, examples)):
        outs[place] = demand
    wanted = walk.back(jaxpr, [Taint()] * len(jaxpr.invars), outs)
    along = [d if isinstance(d, Along) else None for d in wanted]
    pairs = [(v, d) for v, d in zip(jaxpr.invars, along, strict=True) if d is not None]
    whole = all(d.size in sizes and v.aval.shape[d.axis] == d.size * d.inner for v, d in pairs)
    if walk.held or any(along[: traced.arguments]) or not whole:
        return None
    return along[traced.arguments :]


def every(x: jax.Array, along: Along | None, stride: int) -> jax.Array:
    """Every ``stride``-th example of an argument."""
    if along is None:
        return x
    axis, size, inner = along
    if inner == 1:
        return jax.lax.slice_in_dim(x, 0, size, stride, axis)
    apart = x.reshape(*x.shape[:axis], size, inner, *x.shape[axis + 1 :])
    some = jax.lax.slice_in_dim(apart, 0, size, stride, axis)
    return some.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])


def _demands(traced: Traced, examples: Examples) -> list[Demand]:
    """Of the arrays in the loss's terms, which are the first that the trace gives."""
    found: list[Demand] = []
    for term, own in zip(traced.loss.terms, examples.terms, strict=True):
        axis, shape = own.axis or 0, term.distribution.examples
        of_each = lambda x, axis=axis, shape=shape: jnp.shape(x)[: axis + 1] == shape[: axis + 1]
        arrays = (x for x in jax.tree.leaves(term) if hasattr(x, "dtype"))
        found += [Along(axis, shape[axis]) if of_each(x) else WHOLE for x in arrays]
    return found


class _Values(Walk):
    """Follows every value, differentiated or not. The examples' numbers (``arange``) are held."""

    def __init__(self) -> None:
        super().__init__(lambda aval, argument: False)

    def follows(self, var: Any) -> bool:
        return True

    def through(
        self, equation: Any, taints: list[Taint], outs: Demands, key: Key
    ) -> Sequence[Demand]:
        name = equation.primitive.name
        if name == "stop_gradient":
            return outs
        if name == "iota":
            dimension = equation.params["dimension"]
            self.held |= any(isinstance(d, Along) and d.axis == dimension for d in outs)
        found = super().through(equation, taints, outs, key)
        return [WHOLE, *found[1:]] if name == "cond" else found
