"""Which axis of each array counts examples, and which parameters each term of the loss depends on.

Found by walks back through the traced loss (:mod:`natgrad_jax.tracing.dependence`), one for each
axis of a term's outputs.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from natgrad_jax.tracing.axes import OWN, WHOLE, Along, Demand, Demands
from natgrad_jax.tracing.dependence import Key, Taint, Walk
from natgrad_jax.tracing.trace import Traced


class Term(NamedTuple):
    """One term of the loss: ``axis`` of its outputs that counts examples, None where they depend on
    one another; ``wanted``: of which inputs the outputs are a function; ``walks``: one for each
    axis of the outputs."""

    axis: int | None
    wanted: Demands
    walks: tuple[Walk, ...]

    @property
    def walk(self) -> Walk:
        return self.walks[self.axis or 0]


class Examples(NamedTuple):
    """What the walks from every term found."""

    terms: tuple[Term, ...]

    def reached(self, key: Key) -> bool:
        """Whether some term depends on the results of the equation at ``key``."""
        return any(key in term.walk.at for term in self.terms)

    def over(self, key: Key) -> bool:
        """Whether the scan at ``key`` takes one example after another."""
        return any(key in term.walk.over_examples for term in self.terms)

    def axis(self, key: Key, result: int = 0) -> "Axis | None":
        """Where the examples are in a result of an equation; None if that is not known."""
        found = set[Axis | None]()
        for term in self.terms:
            if key in term.walk.at:
                found.add(_axis(term.walk.at[key][result]))
        found.discard(None)
        return next(iter(found)) if len(found) == 1 else None

    def everywhere(self, key: Key) -> "Examples":
        """As if every result had the examples where that of the equation at ``key`` has them."""
        return _Everywhere(self.terms, key)

    def guess(self, key: Key, shape: tuple[int, ...]) -> "Axis | None":
        """The leading axis, where all examples are needed at once: they depend on one another."""
        whole = any(term.axis is None and WHOLE in term.walk.at.get(key, ()) for term in self.terms)
        return Axis(0, shape[0]) if whole and shape and shape[0] > 1 else None


class _Everywhere(Examples):
    """See :meth:`Examples.everywhere`."""

    def __new__(cls, terms: tuple[Term, ...], at: Key) -> "_Everywhere":
        own = super().__new__(cls, terms)
        own.at = at
        return own

    at: Key

    def reached(self, key: Key) -> bool:
        return super().reached(self.at)

    def axis(self, key: Key, result: int = 0) -> "Axis | None":
        return super().axis(self.at)


class Axis(NamedTuple):
    """The axis of an array along which the ``examples`` lie, each of ``inner`` neighbours, where a
    reshape has merged axes. −1: a scan runs over them."""

    axis: int
    examples: int = 1
    inner: int = 1


def _axis(demand: Demand) -> Axis | None:
    if demand == OWN:
        return Axis(-1)
    if isinstance(demand, Along):
        return Axis(demand.axis, demand.size, demand.inner)
    return None


def find_examples(traced: Traced) -> Examples:
    """The walks of a traced loss; examples that meet in the outputs' mean alone are independent."""
    terms = zip(traced.loss.terms, traced.raw, strict=True)
    return Examples(tuple(_term(traced, places, term.distribution) for term, places in terms))


def _term(traced: Traced, outputs: dict[str, int], distribution: Any) -> Term:
    """Of several axes along which nothing is mixed the first that runs through data and not through
    parameters (members of an ensemble are no examples), or through neither (tokens look up
    parameters)."""
    jaxpr, given = traced.jaxpr.jaxpr, len(traced.paths)
    examples, free, walks = distribution.examples, [], []
    for axis, size in enumerate(examples or (0,)):
        walk = Walk(functools.partial(_holds_examples, size))
        taints = [
            Taint(i < given, i >= traced.arguments and _holds_examples(size, var.aval, True))
            for i, var in enumerate(jaxpr.invars)
        ]
        outs: list[Demand] = [None] * len(jaxpr.outvars)
        for place in outputs.values():
            outs[place] = Along(axis, size) if examples else WHOLE
        wanted = walk.back(jaxpr, taints, outs)
        walks.append(walk)
        if examples and not walk.mixed:
            along = [i < given for i, x in enumerate(wanted) if isinstance(x, Along)]
            free.append(((any(along), not along), axis, wanted))
    found = min(free, key=lambda each: each[0])[1:] if free else (None, wanted)
    return Term(found[0], found[1], tuple(walks))


def _holds_examples(size: int, aval: Any, argument: bool) -> bool:
    """Whether what goes into the loss is data: an array that has ``size`` elements along some axis,
    or an argument of several axes; not keys, nor whole numbers that the loss itself holds."""
    raw_key = getattr(aval, "dtype", None) == np.uint32 and aval.ndim == 1
    if raw_key or not hasattr(aval, "shape"):
        return False
    if argument:
        return size in aval.shape or aval.ndim > 1
    return size in aval.shape and jnp.issubdtype(aval.dtype, jnp.inexact)


def reached_terms(examples: Examples, parameters: Sequence[Any]) -> list[tuple[int, ...]]:
    """For each parameter the terms that depend on it; all terms if none does."""
    every = tuple(range(len(examples.terms)))
    of = lambda i: tuple(t for t, term in enumerate(examples.terms) if term.wanted[i] is not None)
    return [of(i) or every for i in range(len(parameters))]
