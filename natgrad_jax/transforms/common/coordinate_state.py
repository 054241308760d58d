"""The state of :func:`in_coordinates`, and how its coordinates follow the statistics."""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from natgrad_jax.curvature import factor_averages, loss_terms
from natgrad_jax.curvature.inverses import keep_finite
from natgrad_jax.layers.collection import Layers
from natgrad_jax.layers.layer import Layer
from natgrad_jax.linalg.batched_solve import solve
from natgrad_jax.reparametrization import coordinates as charts
from natgrad_jax.reparametrization.coordinates import Choice, Coordinates
from natgrad_jax.reparametrization.parameters import whiten
from natgrad_jax.state.clock import Clock, due, start, tick
from natgrad_jax.statistics.batch_statistics import Statistics
from natgrad_jax.statistics.spec import EncodedSpec, StatisticsSpec, encode
from natgrad_jax.transforms.common import estimators
from natgrad_jax.transforms.common.refresh_schedule import RefreshSchedule
from natgrad_jax.transforms.common.transport import transport
from natgrad_jax.utils.hyperparams import Scalar, at
from natgrad_jax.utils.short_repr import printed_short
from natgrad_jax.utils.tree_paths import Path


@printed_short
class InCoordinatesState(NamedTuple):
    """State of :func:`in_coordinates`; dictionaries by layer path.

    ``factors``: the averages that the coordinates are computed from; ``weights``: the accumulated
    weight of each, ``(*stack,)``. ``bases``: the current :class:`~natgrad_jax.Coordinates`.
    ``gathered``: number of examples averaged since the last refresh, ``examples``: that of the last
    measured batch, both ``()``. ``rejected``: number of non-finite measurements, coordinates and
    gradients that were dropped, int32 ``()``. ``clock``: steps so far. ``inner``: the inner
    transformation's state, in the coordinates. ``request``: which statistics the next backward
    pass must measure, without arrays.

    >>> import optax, natgrad_jax as ng
    >>> state = ng.in_coordinates(optax.sgd(0.1), ng.Layers({})).init({})
    >>> isinstance(state, ng.InCoordinatesState), int(state.clock.step), int(state.rejected)
    (True, 0, 0)
    """

    clock: Clock
    factors: dict[Path, Any]
    weights: dict[Path, jax.Array]
    bases: dict[Path, Coordinates]
    gathered: jax.Array
    examples: jax.Array
    rejected: jax.Array
    inner: Any
    request: EncodedSpec


class CoordinateConfig(NamedTuple):
    """The options of one :func:`in_coordinates`; static except for schedules and arrays."""

    choice: Choice
    epsilon: Scalar
    decay: Scalar
    statistics_period: Scalar
    refresh: RefreshSchedule
    samples: Scalar | None
    on_refresh: str


def initial_state(
    layers: Layers, choice: Choice, request: StatisticsSpec, rank: int | None
) -> InCoordinatesState:
    zero = jnp.zeros((), float)
    return InCoordinatesState(
        clock=start(len(layers.terms)),
        factors={path: loss_terms.initial(x, request.inputs_only) for path, x in layers.items()},
        weights={path: jnp.zeros(x.stack_sizes, float) for path, x in layers.items()},
        bases={path: charts.start(x, choice, rank) for path, x in layers.items()},
        gathered=zero,
        examples=zero,
        rejected=jnp.zeros((), jnp.int32),
        inner=None,
        request=encode(request),
    )


def average(
    state: InCoordinatesState,
    statistics: Statistics,
    layers: Mapping[Path, Layer],
    config: CoordinateConfig,
) -> InCoordinatesState:
    """The state with this batch averaged in, by decay or evenly since the last refresh."""
    step, examples = state.clock.step, jnp.max(statistics.examples)
    by_decay = partial(factor_averages.rate, decay=at(config.decay, step))

    def evenly(weight: jax.Array, informative: jax.Array) -> tuple[jax.Array, jax.Array]:
        share = examples / jnp.where(examples > 0, state.gathered + examples, 1)
        rate = jnp.where(weight > 0, share, 1)
        return jnp.where(informative, rate, 0), jnp.where(informative, 1, weight)

    def measured() -> InCoordinatesState:
        rate = by_decay if config.samples is None else evenly
        outputs = config.choice.outputs
        estimator = estimators.fisher_factors if outputs else estimators.input_factors
        new = estimators.update_factors(state, statistics, layers, rate, estimator)
        gathered = (state.gathered + examples).astype(state.gathered.dtype)
        return new._replace(gathered=gathered, examples=examples.astype(state.examples.dtype))

    wanted = examples > 0
    if config.samples is not None:
        wanted &= jnp.any(state.clock.statistics_due)
    return jax.lax.cond(wanted, measured, lambda: state)


def refresh(
    state: InCoordinatesState,
    layers: Mapping[Path, Layer],
    config: CoordinateConfig,
    is_due: jax.Array,
) -> InCoordinatesState:
    """The state with coordinates of the current factors, if due; failures keep the old ones."""
    epsilon, find = at(config.epsilon, state.clock.step), config.choice.find
    assert find is not None

    def refreshed() -> tuple[dict[Path, Coordinates], jax.Array]:
        bases, rejected = {}, state.rejected
        found = solve(
            {
                path: find(layer, state.factors[path], epsilon, state.bases[path])
                for path, layer in layers.items()
            },
            config.refresh.over,
        )
        for path, layer in layers.items():
            new, old = found[path], state.bases[path]
            bases[path], bad = keep_finite(layer, new, old, state.weights[path])
            rejected += bad
        return bases, rejected

    bases, rejected = jax.lax.cond(is_due, refreshed, lambda: (state.bases, state.rejected))
    gathered = jnp.where(is_due, 0, state.gathered)  # the next averaging window begins
    return state._replace(bases=bases, rejected=rejected, gathered=gathered)


def rescaled(
    state: InCoordinatesState,
    statistics: Statistics,
    layers: Mapping[Path, Layer],
    config: CoordinateConfig,
) -> InCoordinatesState:
    """The state with this batch's variances as scales, in the current bases."""
    epsilon = at(config.epsilon, state.clock.step)

    def measured() -> tuple[dict[Path, Coordinates], jax.Array]:
        bases, rejected = {}, state.rejected
        for path, layer in layers.items():
            batch, old = estimators.input_factors(layer, statistics), state.bases[path]
            new = charts.rescaled(layer, old, batch.factors, epsilon)
            bases[path], bad = keep_finite(layer, new, old, batch.good.astype(float))
            rejected += bad
        return bases, rejected

    bases, rejected = jax.lax.cond(
        estimators.any_seen(statistics), measured, lambda: (state.bases, state.rejected)
    )
    return state._replace(bases=bases, rejected=rejected)


def transported(
    state: InCoordinatesState,
    updates: optax.Updates,
    params: optax.Params | None,
    inner: optax.GradientTransformation,
    layers: Mapping[Path, Layer],
    old: dict[Path, Coordinates],
    config: CoordinateConfig,
    is_due: jax.Array,
) -> InCoordinatesState:
    """The state with its inner state treated as ``on_refresh`` says, after a refresh."""
    if config.on_refresh == "keep":
        return state
    if config.on_refresh == "reset":
        if params is None:
            raise ValueError(
                'on_refresh="reset" starts the inner transformation again from the parameters: '
                "call tx.update(grads, opt_state, params, statistics=statistics)."
            )
        anew = lambda: inner.init(whiten(params, layers, state.bases))
    else:
        anew = lambda: transport(state.inner, updates, layers, old, state.bases)
    return state._replace(inner=jax.lax.cond(is_due, anew, lambda: state.inner))


def advance(
    state: InCoordinatesState, config: CoordinateConfig, examples: jax.Array
) -> InCoordinatesState:
    """The state after the step; a step that refreshes always measures its own batch."""
    step = state.clock.step + 1
    period = at(config.refresh.period, step).astype(jnp.int32)
    if config.samples is None:
        wanted = due(step, at(config.statistics_period, step)) | due(step, period)
    else:  # measure in as many steps before the next refresh as give `samples` examples
        left = (-step) % period
        wanted = left * state.examples < at(config.samples, step)
    return state._replace(clock=tick(state.clock, wanted, examples))
