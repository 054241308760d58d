"""K-FAC: natural gradient with one Kronecker product a layer."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from natgrad_jax.averages import Factors, batch_factors, update, zero_factors
from natgrad_jax.clock import Clock, due, start, tick
from natgrad_jax.damping_rules import split
from natgrad_jax.layers import Layer, Layers, check_layers
from natgrad_jax.linalg.cholesky import damped_inverse
from natgrad_jax.paths import Path
from natgrad_jax.scalars import Scalar, at, check_fraction, check_period, check_positive
from natgrad_jax.statistics import Statistics
from natgrad_jax.transforms import blocks


class KFACState(NamedTuple):
    """State of :func:`scale_by_kfac`; dictionaries by layer path, or parameter path if leftover.

    ``damping``: λ of the last step, ``()``. ``factors``: bias-corrected averages. ``weights``: how
    much each average has seen, ``(*stack,)``, 0 before the first measurement. ``bases``: damped
    inverses of the factors as of the last refresh. ``diagonal``: averaged squared gradients of
    leftover parameters, in their shapes; ``diagonal_weights``: ``()`` each. ``rejected``: how many
    measurements and inverses were not finite and were dropped, int32 ``()``.
    """

    clock: Clock
    damping: jax.Array
    factors: dict[Path, Factors]
    weights: dict[Path, jax.Array]
    bases: dict[Path, Factors]
    diagonal: dict[Path, jax.Array]
    diagonal_weights: dict[Path, jax.Array]
    rejected: jax.Array


def scale_by_kfac(
    layers: Layers,
    damping: Scalar = 1e-2,
    *,
    decay: Scalar = 0.95,
    statistics_period: Scalar = 10,
    refresh_period: Scalar = 20,
    trust_radius: Scalar | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Precondition gradients by the Kronecker-factored Fisher of each layer.

    With ``K̄ = [K; b]`` of a layer and ``F ≈ A ⊗ G``, ``A = E[ā āᵀ]``, ``G = E[g gᵀ]``::

        Δ = (A + π√λ I)⁻¹ ∇K̄ (G + (√λ/π) I)⁻¹,   π² = (tr A / dim A) / (tr G / dim G)

    Parameters outside every layer are divided by the diagonal of their Fisher plus λ. Before
    anything was measured, gradients pass unchanged. Statistics, inverses or gradients that are not
    finite never enter the factors or the inverses: the last good ones stay, and
    ``state.rejected`` counts the events.

    Args:
      layers: from :func:`natgrad_jax.find_layers`.
      damping: λ > 0, in the units of the Fisher (loss per parameter squared).
      decay: of the factors: factor = decay · old + (1 − decay) · batch, bias-corrected; 0 is this
        batch alone.
      statistics_period: steps from one measurement to the next; the first step always measures.
      refresh_period: steps from one inversion to the next; the first step always inverts.
      trust_radius: κ; the update is scaled by ``min(1, √(κ / ΔᵀFΔ))`` with the damped F, for which
        ``ΔᵀFΔ = Δᵀ∇``. Here the learning rate is taken to be 1 (:func:`kfac` includes its own).

    All numbers may be floats, arrays or schedules (periods: whole numbers). Under
    ``optax.inject_hyperparams`` every number becomes a traced value.

    Returns:
      A transformation with ``update(grads, state, params, *, statistics)``.

    Raises:
      ValueError: damping or periods out of range; no ``statistics``; statistics or gradients of
        other layers; statistics without a Fisher pass (``fisher="none"``).

    Source: Martens & Grosse 2015, equations 3 to 6 and section 6.3; Grosse & Martens 2016 for
    convolutions; Ba et al. 2016 for the trust region.

    >>> import optax, natgrad_jax as ng
    >>> tx = optax.chain(ng.scale_by_kfac(ng.Layers({}), damping=1e-3), optax.sgd(0.1))
    """
    check_layers(layers)
    check_positive(damping=damping, trust_radius=1 if trust_radius is None else trust_radius)
    check_period(statistics_period=statistics_period, refresh_period=refresh_period)
    check_fraction(decay=decay)

    def init_fn(params: optax.Params) -> KFACState:
        del params  # shapes come from the layers: params may be placeholders
        # one compiled program: op by op, every shape would compile on its own
        return jax.jit(lambda: _initial_state(layers, damping))()

    def update_fn(
        updates: optax.Updates,
        state: KFACState,
        params: optax.Params | None = None,
        *,
        statistics: Statistics | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, KFACState]:
        del params, extra
        blocks.check_statistics(statistics, layers, "scale_by_kfac")
        assert statistics is not None
        step = state.clock.step
        lam = at(damping, step)
        before = state.weights
        state = _measure(state, statistics, layers, at(decay, step))
        # what was measured for the first time is inverted now, not a period later
        news = [jnp.any((before[path] == 0) & (state.weights[path] > 0)) for path in layers]
        refresh = functools.reduce(jnp.logical_or, news, due(step, at(refresh_period, step)))
        state = _refresh(state, layers, lam, refresh)
        updates, quadratic = _precondition(updates, state, layers, lam)
        if trust_radius is not None:
            updates = blocks.trust_region(updates, quadratic, at(trust_radius, step))
        clock = tick(state.clock, at(statistics_period, step + 1))
        return updates, state._replace(clock=clock, damping=lam)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def kfac(
    learning_rate: Scalar,
    layers: Layers,
    *,
    damping: Scalar = 1e-2,
    decay: Scalar = 0.95,
    statistics_period: Scalar = 10,
    refresh_period: Scalar = 20,
    momentum: Scalar | None = 0.9,
    weight_decay: Scalar = 0.0,
    trust_radius: Scalar | None = 1e-3,
) -> optax.GradientTransformationExtraArgs:
    """K-FAC with momentum, decoupled weight decay and a trust region.

    :func:`scale_by_kfac`, then ``optax.trace(momentum)``, then ``weight_decay · params`` added,
    then the learning rate; no momentum where ``momentum`` is None.

    Args:
      learning_rate: η, a float, an array or a schedule.
      layers: from :func:`natgrad_jax.find_layers`.
      damping, decay, statistics_period, refresh_period: as in :func:`scale_by_kfac`.
      momentum: decay of the heavy-ball trace of preconditioned gradients.
      weight_decay: decoupled, as in ``optax.adamw``; per step, times the learning rate.
      trust_radius: κ; before momentum the update is scaled by ``min(1, √(κ / (η² ΔᵀFΔ)))``; None
        for no bound.

    Returns:
      A transformation with ``update(grads, state, params, *, statistics)``.

    Raises:
      ValueError: as :func:`scale_by_kfac`.

    Source: Martens & Grosse 2015; Ba et al. 2016, section 5 (trust region).

    >>> import natgrad_jax as ng
    >>> tx = ng.kfac(0.1, ng.Layers({}))
    """
    check_layers(layers)
    radius = None if trust_radius is None else _per_squared_rate(trust_radius, learning_rate)
    return optax.chain(
        scale_by_kfac(
            layers,
            damping,
            decay=decay,
            statistics_period=statistics_period,
            refresh_period=refresh_period,
            trust_radius=radius,
        ),
        _momentum(momentum),
        _weight_decay(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def _momentum(decay: Scalar | None) -> optax.GradientTransformation:
    if decay is None:
        return optax.identity()
    # optax.trace takes a number; inject_hyperparams is optax's way from a number to a schedule
    return (
        optax.inject_hyperparams(optax.trace)(decay=decay)
        if callable(decay)
        else optax.trace(decay)
    )


def _weight_decay(rate: Scalar) -> optax.GradientTransformation:
    # without decay the update needs no params
    none = isinstance(rate, int | float) and rate == 0
    return optax.identity() if none else optax.add_decayed_weights(rate)


def _per_squared_rate(trust_radius: Scalar, learning_rate: Scalar) -> Scalar:
    if callable(trust_radius) or callable(learning_rate):
        return lambda step: at(trust_radius, step) / at(learning_rate, step) ** 2
    check_positive(trust_radius=trust_radius, learning_rate=learning_rate)
    return trust_radius / learning_rate**2


def _initial_state(layers: Layers, damping: Scalar) -> KFACState:
    return KFACState(
        clock=start(),
        damping=at(damping, jnp.zeros((), jnp.int32)),
        factors={path: zero_factors(layer) for path, layer in layers.items()},
        weights={path: jnp.zeros(x.stack_sizes, float) for path, x in layers.items()},
        bases={path: _identities(layer) for path, layer in layers.items()},
        diagonal=blocks.zero_diagonals(layers),
        diagonal_weights={path: jnp.zeros((), float) for path in layers.uncovered},
        rejected=jnp.zeros((), jnp.int32),
    )


def _identities(layer: Layer) -> Factors:
    def eye(x: jax.Array) -> jax.Array:
        return x + jnp.eye(x.shape[-1], dtype=x.dtype)

    return Factors(*map(eye, zero_factors(layer)))


def _measure(
    state: KFACState, statistics: Statistics, layers: Layers, decay: jax.Array
) -> KFACState:
    """Factors and diagonals after this batch; untouched where it brought no information."""

    def measured() -> KFACState:
        factors, weights, rejected = {}, {}, state.rejected
        for path, layer in layers.items():
            new, good = batch_factors(layer, statistics.layers[path], statistics.examples)
            weight = state.weights[path]
            averaged = [update(o, n, weight, decay, good) for o, n in zip(state.factors[path], new)]
            factors[path] = Factors(averaged[0][0], averaged[1][0])
            weights[path] = averaged[0][1]
            rejected += jnp.sum((statistics.layers[path].rows != 0) & ~good, dtype=jnp.int32)
        diagonal, diagonal_weights, bad = blocks.update_diagonals(
            state.diagonal, state.diagonal_weights, statistics, decay
        )
        return state._replace(
            factors=factors,
            weights=weights,
            diagonal=diagonal,
            diagonal_weights=diagonal_weights,
            rejected=rejected + bad,
        )

    return jax.lax.cond(statistics.examples > 0, measured, lambda: state)


def _refresh(
    state: KFACState, layers: Mapping[Path, Layer], lam: jax.Array, is_due: jax.Array
) -> KFACState:
    """Inverses of the current factors, where due; the last ones where that fails."""

    def refreshed() -> tuple[dict[Path, Factors], jax.Array]:
        bases, rejected = {}, state.rejected
        for path, layer in layers.items():
            A, G = state.factors[path]
            on_a, on_g = split(A, G, lam)
            inverses = damped_inverse(A, on_a), damped_inverse(G, on_g)
            finite = [jnp.isfinite(jnp.trace(x, axis1=-2, axis2=-1)) for x in inverses]
            ok = finite[0] & finite[1]
            known = jnp.expand_dims(
                state.weights[path] > 0, tuple(range(len(layer.stack), ok.ndim))
            )
            rejected += jnp.sum(known & ~ok, dtype=jnp.int32)
            bases[path] = Factors(
                *(
                    jnp.where((known & ok)[..., None, None], new, old)
                    for new, old in zip(inverses, state.bases[path])
                )
            )
        return bases, rejected

    bases, rejected = jax.lax.cond(is_due, refreshed, lambda: (state.bases, state.rejected))
    return state._replace(bases=bases, rejected=rejected)


def _precondition(
    updates: optax.Updates, state: KFACState, layers: Layers, lam: jax.Array
) -> tuple[optax.Updates, jax.Array]:
    """The natural gradient, and ``Δᵀ∇ = ΔᵀFΔ`` of the damped F."""

    def of_layer(path: Path, gradient: jax.Array) -> jax.Array:
        A, G = state.bases[path]
        precision = jax.lax.Precision.HIGHEST
        return jnp.matmul(jnp.matmul(A, gradient, precision=precision), G, precision=precision)

    def of_leftover(path: Path, gradient: jax.Array) -> jax.Array:
        scaled = gradient / (state.diagonal[path] + lam.astype(gradient.dtype))
        return jnp.where(state.diagonal_weights[path] > 0, scaled, gradient)

    return blocks.map_blocks(updates, layers, of_layer, of_leftover)
