"""Moving averages that every transformation keeps: of factors and of leftover diagonals."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax

from natgrad_jax.curvature import factor_averages, loss_terms
from natgrad_jax.curvature.factor_averages import Batch, FactorsLike
from natgrad_jax.curvature.layer_sums import Sums
from natgrad_jax.layers.bundles import gathered
from natgrad_jax.layers.collection import Layers
from natgrad_jax.layers.layer import Layer, Parameter
from natgrad_jax.statistics.batch_statistics import Statistics
from natgrad_jax.utils.precision import at_least_float32
from natgrad_jax.utils.tree_paths import Path, join


class Estimates(NamedTuple):
    """Dictionaries by layer path, or by parameter path for diagonals.

    ``factors``: bias-corrected averages. ``weights``: the accumulated weight of each,
    ``(*stack,)``, 0 before the first measurement. ``diagonal``: averaged squared gradients of
    leftover parameters, in their shapes; ``diagonal_weights``: ``()`` each. ``examples``: number of
    examples of the last measured batch, ``()``, or ``(terms,)`` for several terms of a loss.
    ``rejected``: number of non-finite measurements, bases, inverses and updates that were dropped,
    int32 ``()``.
    """

    factors: dict[Path, FactorsLike]
    weights: dict[Path, jax.Array]
    diagonal: dict[Path, jax.Array]
    diagonal_weights: dict[Path, jax.Array]
    examples: jax.Array
    rejected: jax.Array


State = TypeVar("State", bound=Any)
Rate = Callable[..., tuple[jax.Array, jax.Array]]

# Computes what is averaged: a layer's factors on one batch, from the statistics.
Estimator = Callable[[Layer, Statistics], Batch]


def start(layers: Layers, factor_dtype: Any = None) -> Estimates:
    """The estimates before the first measurement."""
    return Estimates(
        factors={path: loss_terms.initial(x, dtype=factor_dtype) for path, x in layers.items()},
        weights={path: jnp.zeros(x.stack_sizes, float) for path, x in layers.items()},
        diagonal={
            p.path: jnp.zeros(_terms(p) + p.shape, at_least_float32(p.dtype))
            for p in layers.diagonals
        },
        diagonal_weights={p.path: jnp.zeros(_terms(p), float) for p in layers.diagonals},
        examples=jnp.ones((len(layers.terms),) if len(layers.terms) > 1 else (), float),
        rejected=jnp.zeros((), jnp.int32),
    )


def _placeholder() -> Any:
    """The placeholder that ``optax.tree.map_params`` passes to ``init``."""
    seen: list[Any] = []
    optax.tree.map_params(lambda params: seen.append(params), lambda x: x, None)
    return seen[0]


def for_params(state: State, params: Any) -> State:
    """The initial state; its dictionaries as single leaves if ``params`` is a placeholder.

    ``optax.tree.map_params`` uses one to find the copies of the parameters in a state. It does not
    show which layers the state keeps under ``optax.masked``.
    """
    if type(params) is not type(_placeholder()):
        return state
    fields = state._asdict()
    return state._replace(**{name: 0 for name, x in fields.items() if isinstance(x, dict)})


def _terms(parameter: Parameter) -> tuple[int, ...]:
    """The shape of the leading axis of terms: empty unless there are several."""
    return (len(parameter.terms),) if len(parameter.terms) > 1 else ()


def fisher_factors(layer: Layer, statistics: Statistics) -> Batch:
    """The Fisher's Kronecker factors on one batch: ``E[ā āᵀ]`` and ``E[g gᵀ]``."""
    return loss_terms.batch_factors(layer, sums_for(layer, statistics), statistics.examples)


def input_factors(layer: Layer, statistics: Statistics) -> Batch:
    """The factor of the inputs alone, even if other transformations measured more."""
    sums = sums_for(layer, statistics)._replace(G=None)
    return loss_terms.batch_factors(layer, sums, statistics.examples)


def update(
    state: State,
    statistics: Statistics,
    layers: Layers,
    decay: jax.Array,
    estimator: Estimator = fisher_factors,
) -> tuple[State, Statistics]:
    """The state with this batch averaged in, unchanged if no example was measured; and what is left
    of the statistics (:meth:`Statistics.use`)."""

    def measured(statistics: Statistics) -> State:
        rate = partial(factor_averages.rate, decay=decay)
        new = update_factors(state, statistics, layers, rate, estimator)
        diagonal, diagonal_weights, bad = _diagonals(state, statistics, layers, decay)
        seen = jnp.where(statistics.examples > 0, statistics.examples, state.examples)
        return new._replace(
            diagonal=diagonal,
            diagonal_weights=diagonal_weights,
            examples=seen.astype(state.examples.dtype),
            rejected=new.rejected + bad,
        )

    return statistics.use(measured, lambda: state)


def any_seen(statistics: Statistics) -> jax.Array:
    """Whether any example was measured."""
    return jnp.any(statistics.examples > 0)


def update_factors(
    state: State,
    statistics: Statistics,
    layers: Mapping[Path, Layer],
    rate: Rate,
    estimator: Estimator = fisher_factors,
) -> State:
    """The state with this batch's factors averaged in; non-finite ones are counted as rejected.

    ``rate(weight, informative=good)`` → how far an average moves to the new value, and its new
    weight.
    """
    factors, weights, rejected = {}, {}, state.rejected
    for path, layer in layers.items():
        batch = estimator(layer, statistics)
        factors[path], weights[path] = loss_terms.moved(
            layer, state.factors[path], batch, state.weights[path], rate
        )
        rejected += jnp.sum(batch.seen & ~batch.good, dtype=jnp.int32)
    return state._replace(factors=factors, weights=weights, rejected=rejected)


def sums_for(layer: Layer, statistics: Statistics) -> Sums:
    """The sums that this layer's factors are computed from."""
    found = statistics.sums[layer.approximation.weight_sharing]

    def of(layer: Layer) -> Sums:
        if layer.path not in found:
            raise ValueError(
                f"statistics of layer {join(layer.path)} were measured for another weight_sharing "
                f"than {layer.approximation.weight_sharing!r}: pass value_and_grad the state of "
                "this transformation as opt_state."
            )
        return found[layer.path]

    # an axis of terms comes first
    on_g = None if of(layer.each[0]).G is None else int(len(layer.terms) > 1)
    on_a = int(len(layer.terms) > 1 and layer.mixed)
    axes: Any = Sums
    return gathered(layer, of, axes(on_a, on_g, on_a))


def _diagonals(
    state: Any, statistics: Statistics, layers: Layers, decay: jax.Array
) -> tuple[dict[Path, jax.Array], dict[Path, jax.Array], jax.Array]:
    """The averages after this batch, their weights, and how many non-finite values were dropped."""
    assert statistics.leftover is not None  # by check_statistics
    new, later, rejected = {}, {}, jnp.zeros((), jnp.int32)
    for parameter in layers.diagonals:
        path = parameter.path
        count = loss_terms.counts(statistics.examples, parameter.terms)
        weight = state.diagonal_weights[path]
        measured = count > 0
        value = factor_averages.divide(statistics.leftover[path], jnp.where(measured, count, 1))
        good = jnp.isfinite(value.sum(tuple(range(weight.ndim, value.ndim)))) & measured
        rate, later[path] = factor_averages.rate(weight, decay, good)
        new[path] = factor_averages.step(rate, state.diagonal[path], value)
        rejected += jnp.sum(measured & ~good, dtype=jnp.int32)
    return new, later, rejected


def diagonal_of(state: Any, path: Path) -> jax.Array:
    """The diagonal of a leftover parameter's Fisher, summed over the terms of the loss."""
    diagonal = state.diagonal[path]
    return diagonal.sum(0) if state.diagonal_weights[path].ndim else diagonal


def over_diagonal(state: Any, damping: jax.Array) -> Any:
    """``(path, gradient) → gradient / (diagonal + λ)``, 0 where that divides by 0; unchanged before
    the first measurement."""

    def scale(path: Path, gradient: jax.Array) -> jax.Array:
        known = jnp.any(state.diagonal_weights[path] > 0)
        curvature = diagonal_of(state, path) + damping.astype(gradient.dtype)
        scaled = jnp.where(curvature > 0, gradient / jnp.where(curvature > 0, curvature, 1), 0)
        return jnp.where(known, scaled, gradient)

    return scale


def first_seen(before: Any, after: Any) -> jax.Array:
    """Whether any average, of any term, got its first measurement between two states."""
    pairs = zip(_weights(before), _weights(after), strict=True)
    news = [jnp.any((old == 0) & (new > 0)) for old, new in pairs]
    return jnp.any(jnp.stack(news)) if news else jnp.zeros((), bool)


def _weights(state: Any) -> list[jax.Array]:
    own = [f.weights for f in state.factors.values() if isinstance(f, loss_terms.FactorsOfTerms)]
    return [*state.weights.values(), *own]
