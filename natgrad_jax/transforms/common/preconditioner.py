"""The step of a curvature preconditioner, shared by K-FAC, NGD and EKFAC."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from natgrad_jax.layers.bundles import bundled, members_of
from natgrad_jax.layers.collection import Layers
from natgrad_jax.layers.gradients import check_paths
from natgrad_jax.layers.layer import Layer
from natgrad_jax.state.clock import due, start, tick
from natgrad_jax.state.divided import divided
from natgrad_jax.statistics.batch_statistics import Statistics
from natgrad_jax.statistics.checks import check_statistics
from natgrad_jax.statistics.spec import StatisticsSpec, encode, is_one
from natgrad_jax.transforms.common import apply, estimators
from natgrad_jax.transforms.common.refresh_schedule import RefreshSchedule
from natgrad_jax.transforms.common.trust_radius import TrustRadius, checked, radius_at
from natgrad_jax.utils import tree_paths
from natgrad_jax.utils.hyperparams import Scalar, at, check_fraction, check_period
from natgrad_jax.utils.tree_paths import Path


class PreconditionerConfig(NamedTuple):
    """The options that all have; ``name``: for errors; ``refresh``: when bases are renewed."""

    name: str
    request: StatisticsSpec
    damping: Scalar
    decay: Scalar
    statistics_period: Scalar
    refresh: RefreshSchedule
    trust_radius: TrustRadius | None
    factor_dtype: Any = None


class Now(NamedTuple):
    """One step: its inputs, the current damping and decay, the weights of the factors before this
    batch, and whether anything was measured for the first time."""

    updates: optax.Updates
    statistics: Statistics
    damping: jax.Array
    decay: jax.Array
    weights: dict[Path, jax.Array]
    first: jax.Array


class Method(NamedTuple):
    """How one preconditioner uses the factors.

    ``state``: a NamedTuple with the fields of Estimates, ``clock``, ``damping``, ``request``,
    ``members`` and its own, which ``start(layers)`` returns. ``follow(state, layers, now)`` → the
    state with this step's inverses or bases, where the factors are up to date already.
    ``apply(layer, state, path, gradient, damping)`` → the layer's natural gradient, packed as the
    gradient. ``estimator``: computes the factors that are averaged. ``follows_sums``: whether
    ``follow`` reads the sums of the statistics, which the averages use up otherwise. All see layers
    of equal geometry as one (:mod:`~natgrad_jax.layers.bundles`).
    """

    state: Callable[..., Any]
    start: Callable[[Layers], dict[str, Any]]
    follow: Callable[[Any, Layers, Now], Any]
    apply: Callable[[Layer, Any, Path, jax.Array, jax.Array], jax.Array]
    estimator: estimators.Estimator = estimators.fisher_factors
    follows_sums: bool = False


def preconditioner(
    layers: Layers, config: PreconditionerConfig, method: Method
) -> optax.GradientTransformationExtraArgs:
    """The transformation; raises ValueError for numbers out of range."""
    radius = checked(config.trust_radius)
    check_period(statistics_period=config.statistics_period)
    check_fraction(decay=config.decay)
    all_layers = layers.approximate(config.request.approximation)

    def init_fn(params: optax.Params) -> Any:
        # params only say which layers to keep; shapes come from the layers
        own = bundled(all_layers.of(params))
        # one compiled program: op by op, every shape would compile on its own
        state = jax.jit(lambda: _initial_state(own, config, method))()
        return estimators.for_params(state, params)

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        statistics: Statistics | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, Any]:
        del params, extra
        kept = {path for own in state.members.values() for path in own}
        layers = all_layers.within(kept, state.diagonal)
        check_statistics(statistics, layers, config.name)
        check_paths(tree_paths.leaves(updates), all_layers)
        layers = bundled(layers)
        assert statistics is not None
        step = state.clock.step
        damping, decay = at(config.damping, step), at(config.decay, step)
        before = state
        statistics = statistics.ready() if method.follows_sums else statistics
        state, statistics = estimators.update(state, statistics, layers, decay, method.estimator)
        # layers measured for the first time are refreshed now, not a period later
        first = estimators.first_seen(before, state)
        now = Now(updates, statistics, damping, decay, before.weights, first)
        state = method.follow(state, layers, now)
        of_layer = lambda path, x: method.apply(layers[path], state, path, x, damping)
        over_diagonal = estimators.over_diagonal(state, damping)
        # the natural gradient, and Δᵀ∇ = ΔᵀFΔ of the damped F
        updates, quadratic = apply.map_blocks(updates, layers, of_layer, over_diagonal)
        if radius is not None:
            kappa = radius_at(radius, step, state.examples)
            updates = apply.trust_region(updates, layers, quadratic, kappa)
        wanted = due(step + 1, at(config.statistics_period, step + 1))
        wanted |= config.refresh.is_early(step + 1)
        clock = tick(state.clock, wanted, statistics.examples)
        rejected = state.rejected + jnp.isnan(quadratic)
        return updates, state._replace(clock=clock, damping=damping, rejected=rejected)

    return divided(init_fn, update_fn)


def _initial_state(layers: Layers, config: PreconditionerConfig, method: Method) -> Any:
    return method.state(
        clock=start(len(layers.terms)),
        damping=at(config.damping, jnp.zeros((), jnp.int32)),
        request=encode(config.request._replace(every_step=is_one(config.statistics_period))),
        members=members_of(layers),
        **method.start(layers),
        **estimators.start(layers, config.factor_dtype)._asdict(),
    )
