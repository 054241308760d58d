"""EKFAC's second moments S: measured, averaged, and transported from basis to basis."""

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax

from natgrad_jax.curvature import factor_averages, loss_terms
from natgrad_jax.curvature.eigenbases import Eigenbasis, eigenbases, second_moments, transport
from natgrad_jax.curvature.inverses import keep_finite
from natgrad_jax.layers import gradients
from natgrad_jax.layers.bundles import gathered
from natgrad_jax.layers.collection import Layers
from natgrad_jax.layers.layer import Layer
from natgrad_jax.linalg.batched_solve import solve
from natgrad_jax.statistics.batch_statistics import Statistics
from natgrad_jax.transforms.common import estimators
from natgrad_jax.transforms.common.refresh_schedule import (
    RefreshSchedule,
    Renewed,
    refresh_due,
)
from natgrad_jax.utils.tree_paths import Path

State = TypeVar("State", bound=Any)
RENEWED = ("bases", "moments", "moment_weights")


def _averaged(
    state: State, path: Path, new: jax.Array, seen: jax.Array, decay: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """S and its weight with ``new`` averaged in, where there is a basis; and how many failed.

    ``seen``: whether there were examples, for each term if each has its own S.
    """
    weight = state.moment_weights[path]
    informative = seen & has_basis(state, path)
    finite = jnp.isfinite(new.sum(tuple(range(weight.ndim, new.ndim))))
    rate, later = factor_averages.rate(weight, decay, informative & finite)
    bad = jnp.sum(informative & ~finite, dtype=jnp.int32)
    return factor_averages.step(rate, state.moments[path], new), later, bad


def has_basis(state: State, path: Path) -> jax.Array:
    """Whether S of any term is known, ``(*stack,)``."""
    known = state.moment_weights[path] > 0
    return known.any(0) if _several(state, path) else known


def _several(state: Any, path: Path) -> bool:
    """Whether each term of the loss has its own S."""
    return state.moment_weights[path].ndim > state.weights[path].ndim


def total_moments(state: Any, path: Path) -> jax.Array:
    """S summed over the terms of the loss."""
    S = state.moments[path]
    return S.sum(0) if _several(state, path) else S


def measure(state: State, statistics: Statistics, layers: Layers, decay: jax.Array) -> State:
    """The state with this batch's squared gradients, in the current bases, averaged into S."""
    found = statistics.moments
    if found is None:
        raise ValueError(
            'scale_by_ekfac(moments="intra_batch") needs squared gradients in its current bases: '
            "call grad_fn(params, batch, rng=key, opt_state=opt_state), or choose "
            'moments="running_average".'
        )

    def measured() -> State:
        moments, weights, rejected = dict(state.moments), dict(state.moment_weights), state.rejected
        for path, layer in layers.items():
            if not all(member.path in found for member in layer.each):
                continue
            count = loss_terms.counts(statistics.examples, layer.terms)
            sums = gathered(layer, lambda own: found[own.path], int(count.ndim))
            new = factor_averages.divide(sums, jnp.where(count > 0, count, 1))
            seen = jnp.expand_dims(count > 0, tuple(range(count.ndim, weights[path].ndim)))
            moments[path], weights[path], bad = _averaged(state, path, new, seen, decay)
            rejected += bad
        return state._replace(moments=moments, moment_weights=weights, rejected=rejected)

    return jax.lax.cond(estimators.any_seen(statistics), measured, lambda: state)


def average_gradient(
    updates: optax.Updates,
    state: State,
    statistics: Statistics,
    layers: Layers,
    decay: jax.Array,
) -> State:
    """The state with N times the squared mini-batch gradient, in current bases, averaged into S.

    If a layer depends on several terms, N is the largest of theirs. A zero gradient, of a task that
    is not in this batch, is ignored.
    """
    examples = jnp.where(statistics.examples > 0, statistics.examples, state.examples)
    moments, weights, rejected = dict(state.moments), dict(state.moment_weights), state.rejected

    for path, gradient in gradients.packed(updates, layers).items():
        layer = layers[path]
        if layer.block != "kronecker":
            continue
        count = loss_terms.counts(examples, layer.terms).max()
        new = count * second_moments(layer, state.bases[path], gradient)
        seen = jnp.any(gradient != 0, axis=tuple(range(len(layer.stack), gradient.ndim)))
        # at the first step S is K-FAC's, and the basis is made from this batch
        seen &= state.clock.step > 0
        moments[path], weights[path], bad = _averaged(state, path, new, seen, decay)
        rejected += bad
    return state._replace(
        moments=moments, moment_weights=weights, rejected=rejected, examples=examples
    )


def _renewed(
    state: State, path: Path, layer: Layer, bases: Any, products: jax.Array
) -> tuple[Any, jax.Array, jax.Array, jax.Array]:
    """New bases, S in them, each term's portion of S, and the number of failures.

    S is transported from the old bases; without old bases it is K-FAC's, ``products``.
    """
    old, S = state.bases[path], state.moments[path]
    several = _several(state, path)
    portions = loss_terms.portions(layer, state.factors[path]) if several else jnp.ones(())
    wide = lambda x: jnp.expand_dims(x, tuple(range(x.ndim, products.ndim))).astype(products.dtype)
    old_S = list(S) if several else [S]
    new_S = [wide(p) * products for p in portions] if several else [products]
    if layer.block == "kronecker":
        known = wide(has_basis(state, path)) > 0
        new_S = [jnp.where(known, transport(layer, own, old, bases), first)
                 for own, first in zip(old_S, new_S, strict=True)]  # fmt: skip
    # S is computed from all bases: it is non-finite if one of them is
    (bases, new_S), bad = keep_finite(
        layer, (bases, new_S), (old, old_S), state.weights[path], checked=new_S
    )
    return bases, jnp.stack(new_S) if several else new_S[0], portions, bad


def refresh(
    state: State,
    layers: Layers,
    decay: jax.Array,
    first: jax.Array,
    how: Eigenbasis,
    when: RefreshSchedule,
) -> State:
    """The state with new bases, where due, and S transported to them; failures keep the old."""

    def renew(due: Mapping[Path, Layer], state: Any) -> Renewed:
        new: dict[str, dict[Path, Any]] = {name: {} for name in RENEWED}
        rejected = jnp.zeros((), jnp.int32)
        unseen = {p: ~has_basis(state, p) & (state.weights[p] > 0) for p in due}
        of = lambda path, layer: eigenbases(
            layer,
            factor_averages.in_full(layer, state.factors[path]),
            state.bases[path],
            unseen[path],
            how,
        )
        found = solve({path: of(path, layer) for path, layer in due.items()}, when.over)
        for path, layer in due.items():
            bases, S, portions, bad = _renewed(state, path, layer, *found[path])
            weight = state.moment_weights[path]
            started = unseen[path] & (portions > 0) & (bad == 0)
            later = jnp.where(started, 1 - decay, weight).astype(weight.dtype)
            for name, x in zip(RENEWED, (bases, S, later), strict=True):
                new[name][path] = x
            rejected += bad
        return new, rejected

    return refresh_due(layers, when, state, first, renew, RENEWED)
