"""EKFAC's second moments S: measured, averaged, and carried from basis to basis."""

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax

from natgrad_jax import averages
from natgrad_jax.eigenbases import Refresh, carried, eigenbases, squares
from natgrad_jax.layer import Layer
from natgrad_jax.layers import Layers
from natgrad_jax.linalg.stacking import solve
from natgrad_jax.operators import keep_finite
from natgrad_jax.paths import Path
from natgrad_jax.statistics import Statistics
from natgrad_jax.transforms import blocks
from natgrad_jax.transforms.refreshing import Turns, in_turn

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
        for path, added in found.items():
            new = added / statistics.examples
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
        new = examples * squares(layer, state.bases[path], gradient)
        # at the first step S is K-FAC's, and this gradient has made the basis
        seen = jnp.broadcast_to(state.clock.step > 0, weights[path].shape)
        moments[path], weights[path], bad = _averaged(state, path, new, seen, decay)
        rejected += bad
    return state._replace(
        moments=moments, moment_weights=weights, rejected=rejected, examples=examples
    )


def refresh(
    state: State, layers: Layers, decay: jax.Array, first: jax.Array, how: Refresh, when: Turns
) -> State:
    """Bases of the current factors, where due, with S carried over; the last where that fails."""

    def unseen(path: Path) -> jax.Array:
        return (state.moment_weights[path] == 0) & (state.weights[path] > 0)

    def renew(due: Mapping[Path, Layer]) -> tuple[dict[Path, Any], jax.Array]:
        new, rejected = {}, jnp.zeros((), jnp.int32)
        of = lambda path, layer: eigenbases(
            layer,
            averages.in_full(layer, state.factors[path]),
            state.bases[path],
            unseen(path),
            how,
        )
        found = solve({path: of(path, layer) for path, layer in due.items()}, when.over)
        for path, layer in due.items():
            (bases, products), (old, S, weight) = found[path], kept[path]
            known = jnp.expand_dims(weight > 0, tuple(range(weight.ndim, products.ndim)))
            turned = products
            if layer.block == "kronecker":
                turned = jnp.where(known, carried(layer, S, old, bases), products)
            weights = state.weights[path]
            # the moments are made of all bases
            pair, bad = keep_finite(layer, (bases, turned), (old, S), weights, told_by=turned)
            started = unseen(path) & (bad == 0)
            new[path] = (*pair, jnp.where(started, 1 - decay, weight).astype(weight.dtype))
            rejected += bad
        return new, rejected

    kept = {
        path: (state.bases[path], state.moments[path], state.moment_weights[path])
        for path in layers
    }
    found, bad = in_turn(layers, when, state.clock.step, first, kept, renew)
    bases, moments, weights = ({path: x[i] for path, x in found.items()} for i in range(3))
    return state._replace(
        bases=bases, moments=moments, moment_weights=weights, rejected=state.rejected + bad
    )
