"""Factors of a loss with several terms: each has its own share of what gradients contribute.

A term without examples in a batch so keeps its share, and batches may have any of the terms.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax.curvature.factor_averages import (
    Batch,
    FactorsLike,
    bias_of,
    of_one_term,
    partial_traces,
    step,
    zero_factors,
)
from natgrad_jax.curvature.layer_sums import Sums
from natgrad_jax.layers.layer import Layer
from natgrad_jax.utils.short_repr import printed_short


class Shares(NamedTuple):
    """Each term's share of a layer's factors, ``(terms, *stack, …)``."""

    A: jax.Array | None
    G: jax.Array | None


@printed_short
class FactorsOfTerms(NamedTuple):
    """Factors of a layer that several terms of the loss depend on: of all terms, and term by term.

    ``A``, ``G``, ``bias``: as in other factors, G (or whatever depends on gradients) summed over
    the terms. ``shares``: each term's own, with a leading axis of terms; None for a factor that all
    terms share. ``weights``: the accumulated weight of each share, ``(terms, *stack)``.
    """

    A: jax.Array
    G: jax.Array | None
    bias: jax.Array | None
    shares: Shares
    weights: jax.Array


def initial(layer: Layer, inputs_only: bool = False, dtype: Any = None) -> FactorsLike:
    """A state's factors before the first measurement, with shares if there are several terms."""
    zeros, terms = zero_factors(layer, inputs_only, dtype), len(layer.terms)
    if terms == 1 or inputs_only:
        return zeros
    repeated = lambda x: None if x is None else jnp.zeros((terms, *x.shape), x.dtype)
    own = Shares(repeated(zeros.A) if layer.mixed else None, repeated(zeros.G))
    weights = jnp.zeros((terms, *layer.stack_sizes), float)
    return FactorsOfTerms(zeros.A, zeros.G, bias_of(zeros), own, weights)


def counts(examples: jax.Array, terms: tuple[int, ...]) -> jax.Array:
    """The numbers of examples of those terms: ``()`` for one term, else ``(terms,)``."""
    if not examples.ndim:
        return examples
    return examples[terms[0]] if len(terms) == 1 else examples[jnp.array(terms)]


def batch_factors(layer: Layer, sums: Sums, examples: jax.Array) -> Batch:
    """A layer's factors on one batch; ``examples``: their number in each term of the loss."""
    count = counts(examples, layer.terms)
    if not count.ndim:
        return of_one_term(layer, sums, count)
    if layer.mixed:
        own = [jax.tree.map(lambda x, i=i: x[i], sums) for i in range(len(count))]
        found = [of_one_term(layer, s, n) for s, n in zip(own, count, strict=True)]
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *found)
        shares = Shares(stacked.factors.A, stacked.factors.G)
        return Batch(_of_shares(layer, stacked.factors, shares), stacked.seen, stacked.good)
    # one input factor for all terms, over all examples of the layer
    saw = jnp.where(sums.rows > 0, sums.rows, 1) / layer.positions
    inputs = of_one_term(layer, sums._replace(G=None), count.max(), saw)
    if sums.G is None:
        return inputs
    each = zip(sums.G, count, strict=True)
    found = [of_one_term(layer, sums._replace(G=G), n, saw) for G, n in each]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *found)
    shares = Shares(None, stacked.factors.G)
    return Batch(_of_shares(layer, inputs.factors, shares), stacked.seen, stacked.good)


def _of_shares(layer: Layer, inputs: Any, shares: Shares) -> FactorsOfTerms:
    """A batch's factors with shares; their weights are not stored here."""
    A, G = summed(layer, inputs.A, shares)
    return FactorsOfTerms(A, G, bias_of(inputs), shares, jnp.zeros(()))


def summed(layer: Layer, A: jax.Array, shares: Shares) -> tuple[jax.Array, jax.Array | None]:
    """The factors of all terms from those of each; ``A``: the input factor if all share it."""
    if shares.A is None:
        assert shares.G is not None
        return A, shares.G.sum(0)
    if shares.G is None:
        return shares.A.sum(0), None
    return partial_traces(layer, shares.A, shares.G, 0)


def portions(layer: Layer, factors: FactorsOfTerms) -> jax.Array:
    """Each term's part of the layer's curvature, by traces: ``(terms, *stack)``, summing to 1."""
    A, G = factors.shares
    traces = jnp.ones((), float)
    if A is not None:
        traces = traces * layer.input_side.trace(A, None)
    if G is not None:
        assert layer.output_side is not None
        traces = traces * layer.output_side.trace(G, None)
    traces = traces.sum(tuple(range(factors.weights.ndim, traces.ndim)))
    total = traces.sum(0)
    return traces / jnp.where(total > 0, total, 1)


def moved(layer: Layer, old: Any, batch: Batch, weight: jax.Array, rate: Any) -> tuple[Any, Any]:
    """Factors after one more batch, and their weight: ``rate(weight, informative=…)`` gives how far
    an average moves. Each term's share moves by itself, the rest if any term has examples; with
    one term a finite A moves even where G is not, and the weight then stays."""
    new = batch.factors
    if not isinstance(old, FactorsOfTerms):
        moves, later = rate(weight, informative=batch.good)
        # A on its own: its sums need not be kept until the backward pass has those of G
        early = batch.good if batch.good_inputs is None else batch.good_inputs
        A = step(rate(weight, informative=early)[0], old.A, new.A)
        rest = old._replace(A=None), new._replace(A=None)
        return jax.tree.map(functools.partial(step, moves), *rest)._replace(A=A), later
    moves, weights = rate(old.weights, informative=batch.good)
    shares = jax.tree.map(functools.partial(step, moves), old.shares, new.shares)
    moves, later = rate(weight, informative=batch.good.any(0))
    A = old.A if layer.mixed else step(moves, old.A, new.A)
    bias = None if old.bias is None else step(moves, old.bias, new.bias)
    A, G = summed(layer, A, shares)
    return FactorsOfTerms(A, G, bias, shares, weights), later
