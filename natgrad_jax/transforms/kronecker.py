"""What K-FAC and exact natural gradient share: damped inverses of one Kronecker product a layer."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from natgrad_jax import averages
from natgrad_jax.averages import Factors
from natgrad_jax.clock import Clock, start, tick
from natgrad_jax.layer import Layer
from natgrad_jax.layers import Layers
from natgrad_jax.linalg.stacking import solve
from natgrad_jax.operators import Inversion, followed, identities, inverses, keep_finite, operate
from natgrad_jax.paths import Path
from natgrad_jax.requests import Request, Spelled, spell
from natgrad_jax.scalars import Scalar, at, check_fraction, check_period, check_positive
from natgrad_jax.statistics import Statistics
from natgrad_jax.transforms import blocks, estimates
from natgrad_jax.transforms.refreshing import Turns, in_turn


class KFACState(NamedTuple):
    """State of :func:`scale_by_kfac`; dictionaries by layer path, or parameter path if leftover.

    ``damping``: λ of the last step, ``()``. ``bases``: damped inverses of the factors as of the
    last refresh. ``request``: what it asks of the backward pass, without arrays. The other fields
    are those of :class:`~natgrad_jax.transforms.estimates.Estimates`.
    """

    clock: Clock
    damping: jax.Array
    factors: dict[Path, Factors]
    weights: dict[Path, jax.Array]
    bases: dict[Path, Factors]
    diagonal: dict[Path, jax.Array]
    diagonal_weights: dict[Path, jax.Array]
    rejected: jax.Array
    request: Spelled


class Rules(NamedTuple):
    """What one Kronecker-factored preconditioner is made of; ``divide``: λ between the factors."""

    name: str
    request: Request
    inversion: Inversion
    divide: Callable[..., tuple[jax.Array, jax.Array]]
    damping: Scalar
    decay: Scalar
    statistics_period: Scalar
    turns: Turns
    trust_radius: Scalar | None
    factor_dtype: Any = None


def kronecker(layers: Layers, rules: Rules) -> optax.GradientTransformationExtraArgs:
    """Precondition by damped inverses of Kronecker factors: what K-FAC and NGD share."""
    radius = rules.trust_radius
    check_positive(trust_radius=1 if radius is None else radius)
    check_period(statistics_period=rules.statistics_period)
    check_fraction(decay=rules.decay)
    layers = layers.approximate(rules.request.approximation)

    def init_fn(params: optax.Params) -> KFACState:
        del params  # shapes come from the layers: params may be placeholders
        # one compiled program: op by op, every shape would compile on its own
        return jax.jit(lambda: _initial_state(layers, rules))()

    def update_fn(
        updates: optax.Updates,
        state: KFACState,
        params: optax.Params | None = None,
        *,
        statistics: Statistics | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, KFACState]:
        del params, extra
        blocks.check_statistics(statistics, layers, rules.name)
        assert statistics is not None
        step = state.clock.step
        lam = at(rules.damping, step)
        before = state.weights
        state = estimates.update(state, statistics, layers, at(rules.decay, step))
        if rules.inversion.method == "woodbury":
            state = _follow(state, before, statistics, layers, rules)
        # what was measured for the first time is inverted now, not a period later
        first = estimates.first_seen(before, state.weights)
        state = _refresh(state, layers, lam, first, rules)
        updates, quadratic = _precondition(updates, state, layers, lam)
        if radius is not None:
            updates = blocks.trust_region(updates, layers, quadratic, at(radius, step))
        clock = tick(state.clock, at(rules.statistics_period, step + 1))
        rejected = state.rejected + jnp.isnan(quadratic)
        return updates, state._replace(clock=clock, damping=lam, rejected=rejected)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _initial_state(layers: Layers, rules: Rules) -> KFACState:
    return KFACState(
        clock=start(),
        damping=at(rules.damping, jnp.zeros((), jnp.int32)),
        bases={path: identities(layer, rules.inversion) for path, layer in layers.items()},
        request=spell(rules.request),
        **estimates.start(layers, rules.factor_dtype)._asdict(),
    )


def _follow(
    state: KFACState,
    before: dict[Path, jax.Array],
    statistics: Statistics,
    layers: Mapping[Path, Layer],
    rules: Rules,
) -> KFACState:
    """Inverses that have seen this batch too, by updates of low rank."""
    rank = rules.inversion.rank
    assert rank is not None

    def seen() -> dict[Path, Factors]:
        bases = {}
        for path, layer in layers.items():
            old = state.bases[path]
            if layer.output_side is None:
                bases[path] = old
                continue
            sums = estimates.sums_for(layer, statistics)
            batch, good = averages.batch_factors(layer, sums, statistics.examples)
            decay = at(rules.decay, state.clock.step)
            rate, _ = averages.rate(before[path], decay, good & (before[path] > 0))
            new = followed(layer, old, batch, rate, rank)
            bases[path], _ = keep_finite(layer, new, old, state.weights[path])
        return bases

    bases = jax.lax.cond(statistics.examples > 0, seen, lambda: state.bases)
    return state._replace(bases=bases)


def _refresh(
    state: KFACState,
    layers: Mapping[Path, Layer],
    lam: jax.Array,
    first: jax.Array,
    rules: Rules,
) -> KFACState:
    """Inverses of the current factors, where due; the last ones where that fails."""

    def renew(due: Mapping[Path, Layer]) -> tuple[dict[Path, Factors], jax.Array]:
        bases, rejected = {}, jnp.zeros((), jnp.int32)
        of = lambda path, layer: inverses(
            layer,
            averages.in_full(layer, state.factors[path]),
            lam,
            state.bases[path],
            rules.inversion,
            rules.divide,
        )
        found = solve({path: of(path, layer) for path, layer in due.items()}, rules.turns.over)
        for path, layer in due.items():
            old, weights = state.bases[path], state.weights[path]
            new, failures = found[path]
            bases[path], bad = keep_finite(layer, new, old, weights)
            rejected += bad + jnp.where(jnp.any(weights > 0), failures, 0)
        return bases, rejected

    bases, bad = in_turn(layers, rules.turns, state.clock.step, first, state.bases, renew)
    return state._replace(bases=bases, rejected=state.rejected + bad)


def _precondition(
    updates: optax.Updates, state: KFACState, layers: Layers, lam: jax.Array
) -> tuple[optax.Updates, jax.Array]:
    """The natural gradient, and ``Δᵀ∇ = ΔᵀFΔ`` of the damped F."""
    of_layer = lambda path, gradient: operate(layers[path], state.bases[path], gradient)
    return blocks.map_blocks(updates, layers, of_layer, estimates.over_diagonal(state, lam))
