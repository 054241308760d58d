"""K-FAC: natural gradient with one Kronecker product a layer."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from natgrad_jax import averages
from natgrad_jax.approximations import approximation
from natgrad_jax.averages import Factors
from natgrad_jax.clock import Clock, due, start, tick
from natgrad_jax.damping_rules import split
from natgrad_jax.layer import Layer
from natgrad_jax.layers import Layers, check_layers
from natgrad_jax.operators import (
    Inversion,
    followed,
    identities,
    inverses,
    inversion,
    keep_finite,
    operate,
)
from natgrad_jax.paths import Path
from natgrad_jax.requests import Request, Spelled, spell
from natgrad_jax.scalars import Scalar, at, check_fraction, check_period, check_positive
from natgrad_jax.statistics import Statistics
from natgrad_jax.transforms import blocks, estimates
from natgrad_jax.transforms.alias import descent, per_squared_rate


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


def scale_by_kfac(
    layers: Layers,
    damping: Scalar = 1e-2,
    *,
    decay: Scalar = 0.95,
    statistics_period: Scalar = 10,
    refresh_period: Scalar = 20,
    convolution: str = "kfc",
    group_size: int | None = None,
    weight_sharing: str = "expand",
    inverse: str = "cholesky",
    rank: int | None = None,
    trust_radius: Scalar | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Precondition gradients by the Kronecker-factored Fisher of each layer.

    With ``K̄ = [K; b]`` of a layer and ``F ≈ A ⊗ G``, ``A = E[ā āᵀ]``, ``G = E[g gᵀ]``::

        Δ = (A + π√λ I)⁻¹ ∇K̄ (G + (√λ/π) I)⁻¹,   π² = (tr A / dim A) / (tr G / dim G)

    A block with one matrix F (normalizations, small free parameters) has ``Δ = (F + λ I)⁻¹ ∇``.
    Leftover parameters are divided by the diagonal of their Fisher plus λ. Before
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
      convolution: ``"kfc"``, the covariance of whole patches, or ``"sua"``, of channels alone:
        ``A ≈ I ⊗ C``, C averaged over the places of a patch, the bias apart.
      group_size: channels in a group, for factors without correlations across groups (and the bias
        apart); None for whole factors. A last group that is not full is filled up with zeros.
      weight_sharing: ``"expand"`` treats positions and calls as examples; ``"reduce"`` averages
        activations and sums gradients over them first. Give value_and_grad the ``opt_state``: it
        then measures the one that is asked for, and no more.
      inverse: ``"cholesky"``; ``"eigh"``; ``"low_rank"``: the ``rank`` leading eigenpairs of each
        factor, warm-started, and the others at their mean (whole where twice the rank is not less
        than the factor); ``"woodbury"``: by Cholesky at a refresh, and between refreshes each
        measured batch is absorbed by an update of that ``rank``, under which the damping of the
        refresh fades with the factors' decay.
      rank: for the last two.
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
    convolutions; Laurent et al. 2018, section 2, for SUA and groups; Eschenhagen et al. 2023 for
    expand and reduce; Ba et al. 2016 for the trust region.

    >>> import optax, natgrad_jax as ng
    >>> tx = optax.chain(ng.scale_by_kfac(ng.Layers({}), damping=1e-3), optax.sgd(0.1))
    """
    check_layers(layers)
    check_positive(damping=damping)
    request = Request(approximation(convolution, group_size, weight_sharing))
    rules = Rules(
        "scale_by_kfac",
        request,
        inversion(inverse, rank),
        split,
        damping,
        decay,
        statistics_period,
        refresh_period,
        trust_radius,
    )
    return kronecker(layers, rules)


class Rules(NamedTuple):
    """What one Kronecker-factored preconditioner is made of; ``divide``: λ between the factors."""

    name: str
    request: Request
    inversion: Inversion
    divide: Callable[..., tuple[jax.Array, jax.Array]]
    damping: Scalar
    decay: Scalar
    statistics_period: Scalar
    refresh_period: Scalar
    trust_radius: Scalar | None


def kronecker(layers: Layers, rules: Rules) -> optax.GradientTransformationExtraArgs:
    """Precondition by damped inverses of Kronecker factors: what K-FAC and NGD share."""
    radius = rules.trust_radius
    check_positive(trust_radius=1 if radius is None else radius)
    check_period(statistics_period=rules.statistics_period, refresh_period=rules.refresh_period)
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
        refresh = due(step, at(rules.refresh_period, step))
        refresh |= estimates.first_seen(before, state.weights)
        state = _refresh(state, layers, lam, refresh, rules)
        updates, quadratic = _precondition(updates, state, layers, lam)
        if radius is not None:
            updates = blocks.trust_region(updates, layers, quadratic, at(radius, step))
        clock = tick(state.clock, at(rules.statistics_period, step + 1))
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
    convolution: str = "kfc",
    group_size: int | None = None,
    weight_sharing: str = "expand",
    inverse: str = "cholesky",
    rank: int | None = None,
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
      damping, decay, statistics_period, refresh_period, convolution, group_size, weight_sharing,
        inverse, rank: as in :func:`scale_by_kfac`.
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
    preconditioner = scale_by_kfac(
        layers,
        damping,
        decay=decay,
        statistics_period=statistics_period,
        refresh_period=refresh_period,
        convolution=convolution,
        group_size=group_size,
        weight_sharing=weight_sharing,
        inverse=inverse,
        rank=rank,
        trust_radius=per_squared_rate(trust_radius, learning_rate),
    )
    return descent(preconditioner, learning_rate, momentum, weight_decay)


def _initial_state(layers: Layers, rules: Rules) -> KFACState:
    return KFACState(
        clock=start(),
        damping=at(rules.damping, jnp.zeros((), jnp.int32)),
        bases={path: identities(layer, rules.inversion) for path, layer in layers.items()},
        request=spell(rules.request),
        **estimates.start(layers)._asdict(),
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
    is_due: jax.Array,
    rules: Rules,
) -> KFACState:
    """Inverses of the current factors, where due; the last ones where that fails."""

    def refreshed() -> tuple[dict[Path, Factors], jax.Array]:
        bases, rejected = {}, state.rejected
        for path, layer in layers.items():
            old = state.bases[path]
            new = inverses(layer, state.factors[path], lam, old, rules.inversion, rules.divide)
            bases[path], bad = keep_finite(layer, new, old, state.weights[path])
            rejected += bad
        return bases, rejected

    bases, rejected = jax.lax.cond(is_due, refreshed, lambda: (state.bases, state.rejected))
    return state._replace(bases=bases, rejected=rejected)


def _precondition(
    updates: optax.Updates, state: KFACState, layers: Layers, lam: jax.Array
) -> tuple[optax.Updates, jax.Array]:
    """The natural gradient, and ``Δᵀ∇ = ΔᵀFΔ`` of the damped F."""
    of_layer = lambda path, gradient: operate(layers[path], state.bases[path], gradient)
    return blocks.map_blocks(updates, layers, of_layer, estimates.over_diagonal(state, lam))
