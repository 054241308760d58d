"""The diagonal of the Fisher in Kronecker eigenbases: how EKFAC's state starts and steps."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from natgrad_jax.averages import Factors
from natgrad_jax.clock import Clock, start, tick
from natgrad_jax.eigenbases import Refresh, initial, scaled
from natgrad_jax.layers import Layers
from natgrad_jax.paths import Path
from natgrad_jax.requests import Request, Spelled, spell
from natgrad_jax.scalars import Scalar, at
from natgrad_jax.statistics import Statistics
from natgrad_jax.transforms import blocks, estimates, squares
from natgrad_jax.transforms.refreshing import Turns


class EKFACState(NamedTuple):
    """State of :func:`scale_by_ekfac`; dictionaries by layer path, or parameter path if leftover.

    ``damping``: λ of the last step, ``()``. ``bases``: eigenvectors of the factors as of the last
    refresh, in their columns: all, or the leading ones. ``moments``: S, at the packed coordinates
    of the bases, ``(*stack, *blocks, rows, columns)``, or at those of the leading directions and
    then the mean of all others; ``moment_weights``: how much each has seen, ``(*stack,)``.
    ``examples``: of the last measured batch, ``()``. ``request``: what it asks of the backward
    pass, without arrays. The other fields are those of
    :class:`~natgrad_jax.transforms.estimates.Estimates`.

    >>> import natgrad_jax as ng
    >>> state = ng.scale_by_ekfac(ng.Layers({})).init({})
    >>> isinstance(state, ng.EKFACState), int(state.clock.step), int(state.rejected)
    (True, 0, 0)
    """

    clock: Clock
    damping: jax.Array
    factors: dict[Path, Factors]
    weights: dict[Path, jax.Array]
    bases: dict[Path, Factors]
    moments: dict[Path, jax.Array]
    moment_weights: dict[Path, jax.Array]
    diagonal: dict[Path, jax.Array]
    diagonal_weights: dict[Path, jax.Array]
    examples: jax.Array
    rejected: jax.Array
    request: Spelled


class Rules(NamedTuple):
    """What one preconditioner in eigenbases is made of; ``rank``: of partial bases, if any are."""

    request: Request
    refresh: Refresh
    rank: int | None
    damping: Scalar
    decay: Scalar
    statistics_period: Scalar
    turns: Turns
    trust_radius: Scalar | None
    factor_dtype: Any


def in_eigenbases(layers: Layers, rules: Rules) -> optax.GradientTransformationExtraArgs:
    """Precondition by the Fisher's diagonal in each layer's Kronecker eigenbasis."""
    request, radius = rules.request, rules.trust_radius
    layers = layers.approximate(request.approximation)

    def init_fn(params: optax.Params) -> EKFACState:
        del params  # shapes come from the layers: params may be placeholders
        # one compiled program: op by op, every shape would compile on its own
        return jax.jit(lambda: _initial_state(layers, rules))()

    def update_fn(
        updates: optax.Updates,
        state: EKFACState,
        params: optax.Params | None = None,
        *,
        statistics: Statistics | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, EKFACState]:
        del params, extra
        blocks.check_statistics(statistics, layers, "scale_by_ekfac")
        assert statistics is not None
        step = state.clock.step
        lam, keep = at(rules.damping, step), at(rules.decay, step)
        before = state.weights
        state = estimates.update(state, statistics, layers, keep)
        if request.moments:
            state = squares.measure(state, statistics, keep)
        # what was measured for the first time has its basis now, not a period later
        first = estimates.first_seen(before, state.weights)
        state = squares.refresh(state, layers, keep, first, rules.refresh, rules.turns)
        if not request.moments:
            state = squares.average_gradient(updates, state, statistics, layers, keep)
        updates, quadratic = _precondition(updates, state, layers, lam)
        if radius is not None:
            updates = blocks.trust_region(updates, layers, quadratic, at(radius, step))
        clock = tick(state.clock, at(rules.statistics_period, step + 1))
        rejected = state.rejected + jnp.isnan(quadratic)
        return updates, state._replace(clock=clock, damping=lam, rejected=rejected)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _initial_state(layers: Layers, rules: Rules) -> EKFACState:
    starts = {path: initial(layer, rules.rank) for path, layer in layers.items()}
    return EKFACState(
        clock=start(),
        damping=at(rules.damping, jnp.zeros((), jnp.int32)),
        bases={path: bases for path, (bases, _) in starts.items()},
        moments={path: moments for path, (_, moments) in starts.items()},
        moment_weights={path: jnp.zeros(x.stack_sizes, float) for path, x in layers.items()},
        examples=jnp.ones((), float),
        request=spell(rules.request),
        **estimates.start(layers, rules.factor_dtype)._asdict(),
    )


def _precondition(
    updates: optax.Updates, state: EKFACState, layers: Layers, lam: jax.Array
) -> tuple[optax.Updates, jax.Array]:
    """The natural gradient, and ``Δᵀ∇ = ΔᵀFΔ`` of the damped F."""

    def of_layer(path: Path, gradient: jax.Array) -> jax.Array:
        weight, S = state.moment_weights[path], state.moments[path]
        known = jnp.expand_dims(weight > 0, tuple(range(weight.ndim, S.ndim)))
        gains = 1 / jnp.where(known, S + lam.astype(S.dtype), 1)
        return scaled(layers[path], state.bases[path], gains, gradient)

    return blocks.map_blocks(updates, layers, of_layer, estimates.over_diagonal(state, lam))
