"""EKFAC's second moments S: measured, averaged, and carried from basis to basis."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax

from natgrad_jax import averages
from natgrad_jax.eigenbases import Refresh, carried, eigenbases, to_basis
from natgrad_jax.layers import Layers
from natgrad_jax.operators import keep_finite
from natgrad_jax.paths import Path
from natgrad_jax.statistics import Statistics
from natgrad_jax.transforms import blocks

State = TypeVar("State", bound=Any)


def _averaged(
    state: State, path: Path, new: jax.Array, seen: jax.Array, decay: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """S and its weight after ``new``, where there is a basis; and how many were not finite."""
    weight = state.moment_weights[path]
    informative = seen & (weight > 0)
    finite = jnp.isfinite(new.sum(tuple(range(weight.ndim, new.ndim))))
    rate, later = averages.rate(weight, decay, informative & finite)
    bad = jnp.sum(informative & ~finite, dtype=jnp.int32)
    return averages.step(rate, state.moments[path], new), later, bad


def measure(state: State, statistics: Statistics, decay: jax.Array) -> State:
    """S after the squares of this batch's examples, measured in the current bases."""
    found = statistics.moments
    if found is None:
        raise ValueError(
            'scale_by_ekfac(moments="intra_batch") needs squares measured in its current bases: '
            "call grad_fn(params, batch, rng=key, opt_state=opt_state), or choose "
            'moments="running_average".'
        )

    def measured() -> State:
        moments, weights, rejected = dict(state.moments), dict(state.moment_weights), state.rejected
        for path, squares in found.items():
            new = squares / statistics.examples
            moments[path], weights[path], bad = _averaged(
                state, path, new, jnp.ones(weights[path].shape, bool), decay
            )
            rejected += bad
        return state._replace(moments=moments, moment_weights=weights, rejected=rejected)

    return jax.lax.cond(statistics.examples > 0, measured, lambda: state)


def average_gradient(
    updates: optax.Updates,
    state: State,
    statistics: Statistics,
    layers: Layers,
    decay: jax.Array,
) -> State:
    """S after N times the squared mini-batch gradient, in the current bases."""
    examples = jnp.where(statistics.examples > 0, statistics.examples, state.examples)
    moments, weights, rejected = dict(state.moments), dict(state.moment_weights), state.rejected

    for path, gradient in blocks.packed(updates, layers).items():
        layer = layers[path]
        if layer.block != "kronecker":
            continue
        new = examples * jnp.square(to_basis(layer, state.bases[path], gradient))
        # at the first step S is K-FAC's, and this gradient has made the basis
        seen = jnp.broadcast_to(state.clock.step > 0, weights[path].shape)
        moments[path], weights[path], bad = _averaged(state, path, new, seen, decay)
        rejected += bad
    return state._replace(
        moments=moments, moment_weights=weights, rejected=rejected, examples=examples
    )


def refresh(
    state: State, layers: Layers, decay: jax.Array, is_due: jax.Array, how: Refresh
) -> State:
    """Bases of the current factors, where due, with S carried over; the last where that fails."""

    def refreshed() -> tuple[Any, ...]:
        bases, moments, rejected = {}, {}, state.rejected
        weights = {}
        for path, layer in layers.items():
            old, weight = state.bases[path], state.moment_weights[path]
            first = jnp.any((weight == 0) & (state.weights[path] > 0))
            new, products = eigenbases(layer, state.factors[path], old, first, how)
            known = jnp.expand_dims(weight > 0, tuple(range(weight.ndim, products.ndim)))
            turned = products
            if layer.block == "kronecker":
                turned = jnp.where(known, carried(layer, state.moments[path], old, new), products)
            both, bad = keep_finite(
                layer, (new, turned), (old, state.moments[path]), state.weights[path]
            )
            bases[path], moments[path] = both
            started = (weight == 0) & (state.weights[path] > 0) & (bad == 0)
            weights[path] = jnp.where(started, 1 - decay, weight).astype(weight.dtype)
            rejected += bad
        return bases, moments, weights, rejected

    kept = lambda: (state.bases, state.moments, state.moment_weights, state.rejected)
    bases, moments, weights, rejected = jax.lax.cond(is_due, refreshed, kept)
    return state._replace(bases=bases, moments=moments, moment_weights=weights, rejected=rejected)
