"""Factors where a loss has several terms: each has a share of its own in what gradients make.

A term that a batch has no examples of so keeps its share, and terms may come in any batches.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax.curvature.factor_averages import (
    Batch,
    bias_of,
    of_one_term,
    partial_traces,
    step,
    zero_factors,
)
from natgrad_jax.curvature.layer_sums import Sums
from natgrad_jax.layers.layer import Layer


class Shares(NamedTuple):
    """What each term of the loss has of a layer's factors, ``(terms, *stack, …)``."""

    A: jax.Array | None
    G: jax.Array | None


class FactorsOfTerms(NamedTuple):
    """Factors of a layer that several terms of the loss depend on: of all terms, and term by term.

    ``A``, ``G``, ``bias``: as in the others, G (or whatever is made of gradients) summed over the
    terms. ``shares``: each term's own, with an axis of terms in front; None what has no term.
    ``weights``: how much each share has seen, ``(terms, *stack)``.
    """

    A: jax.Array
    G: jax.Array | None
    bias: jax.Array | None
    shares: Shares
    weights: jax.Array


def initial(layer: Layer, inputs_only: bool = False, dtype: Any = None) -> Any:
    """A state's factors before anything was measured, with shares where several terms have them."""
    zeros, terms = zero_factors(layer, inputs_only, dtype), len(layer.terms)
    if terms == 1 or inputs_only:
        return zeros
    repeated = lambda x: None if x is None else jnp.zeros((terms, *x.shape), x.dtype)
    own = Shares(repeated(zeros.A) if layer.mixed else None, repeated(zeros.G))
    weights = jnp.zeros((terms, *layer.stack_sizes), float)
    return FactorsOfTerms(zeros.A, zeros.G, bias_of(zeros), own, weights)


def counts(examples: jax.Array, terms: tuple[int, ...]) -> jax.Array:
    """The examples of those terms: ``()`` of one term, else ``(terms,)``."""
    if not examples.ndim:
        return examples
    return examples[terms[0]] if len(terms) == 1 else examples[jnp.array(terms)]


def batch_factors(layer: Layer, sums: Sums, examples: jax.Array) -> Batch:
    """What one batch says of a layer's factors; ``examples``: of each term of the loss."""
    count = counts(examples, layer.terms)
    if not count.ndim:
        return of_one_term(layer, sums, count)
    if layer.mixed:
        own = [jax.tree.map(lambda x, i=i: x[i], sums) for i in range(len(count))]
        found = [of_one_term(layer, s, n) for s, n in zip(own, count, strict=True)]
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *found)
        shares = Shares(stacked.factors.A, stacked.factors.G)
        return Batch(_of_shares(layer, stacked.factors, shares), stacked.seen, stacked.good)
    # one factor of inputs for all terms, over all examples that the layer saw
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
    """A batch's factors: what they weigh is told apart from them."""
    A, G = summed(layer, inputs.A, shares)
    return FactorsOfTerms(A, G, bias_of(inputs), shares, jnp.zeros(()))


def summed(layer: Layer, A: jax.Array, shares: Shares) -> tuple[jax.Array, jax.Array | None]:
    """The factors of all terms from those of each; ``A``: of the inputs, where no term has one."""
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
    """Factors after one more batch, and their weight: ``rate(weight, informative=…)`` tells how far
    an average moves. Each term's share moves by itself, the rest where any term has examples."""
    new = batch.factors
    if not isinstance(old, FactorsOfTerms):
        moves, later = rate(weight, informative=batch.good)
        return jax.tree.map(functools.partial(step, moves), old, new), later
    moves, weights = rate(old.weights, informative=batch.good)
    shares = jax.tree.map(functools.partial(step, moves), old.shares, new.shares)
    moves, later = rate(weight, informative=batch.good.any(0))
    A = old.A if layer.mixed else step(moves, old.A, new.A)
    bias = None if old.bias is None else step(moves, old.bias, new.bias)
    A, G = summed(layer, A, shares)
    return FactorsOfTerms(A, G, bias, shares, weights), later
