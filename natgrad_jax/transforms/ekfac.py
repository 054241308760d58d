"""EKFAC: the diagonal of the Fisher in each layer's Kronecker-factored eigenbasis."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import DTypeLike

from natgrad_jax.curvature.eigenbases import Eigenbasis, initial, scaled
from natgrad_jax.curvature.factor_averages import FactorsLike, stored_as
from natgrad_jax.curvature.inverse_methods import LowRank
from natgrad_jax.layers.approximation import Approximation
from natgrad_jax.layers.collection import Layers, check_layers
from natgrad_jax.layers.layer import Layer
from natgrad_jax.state.clock import Clock
from natgrad_jax.state.members import Members
from natgrad_jax.statistics.spec import MEASURED, EncodedSpec, StatisticsSpec, stride_of
from natgrad_jax.transforms.common import second_moments
from natgrad_jax.transforms.common.chain import descent, trace
from natgrad_jax.transforms.common.options import (
    approximation_of,
    eigenbasis_method,
    renamed_keywords,
)
from natgrad_jax.transforms.common.preconditioner import (
    Method,
    Now,
    PreconditionerConfig,
    preconditioner,
)
from natgrad_jax.transforms.common.refresh_schedule import (
    USUAL,
    Refresh,
    early_if_bounded,
    refresh_schedule,
)
from natgrad_jax.transforms.common.trust_radius import (
    PerExample,
    TrustRadius,
    before_rate,
)
from natgrad_jax.utils.hyperparams import Scalar, check_positive
from natgrad_jax.utils.short_repr import printed_short
from natgrad_jax.utils.tree_paths import Path

MOMENTS = ("intra_batch", "running_average")


@printed_short
class EKFACState(NamedTuple):
    """State of :func:`scale_by_ekfac`; dictionaries by layer path, or parameter path if leftover.

    ``damping``: λ of the last step, ``()``. ``bases``: eigenvectors of the factors at the last
    refresh, as columns: all, or the leading ones. ``moments``: S in the packed coordinates of the
    bases, ``(*stack, *blocks, rows, columns)``, or in those of the leading directions, followed by
    the mean of all others; ``moment_weights``: the accumulated weight of each S, ``(*stack,)``. If
    several terms of the loss each have their own S, both have a leading axis of terms.
    ``request``: which statistics the next backward pass must measure, and ``members``: which layers
    are stacked, at the path of the first, both without arrays.

    The other fields are those of
    :class:`~natgrad_jax.transforms.common.estimators.Estimates`.

    >>> import natgrad_jax as ng
    >>> state = ng.scale_by_ekfac(ng.Layers({})).init({})
    >>> isinstance(state, ng.EKFACState), int(state.clock.step), int(state.rejected)
    (True, 0, 0)
    """

    clock: Clock
    damping: jax.Array
    factors: dict[Path, FactorsLike]
    weights: dict[Path, jax.Array]
    bases: dict[Path, FactorsLike]
    moments: dict[Path, jax.Array]
    moment_weights: dict[Path, jax.Array]
    diagonal: dict[Path, jax.Array]
    diagonal_weights: dict[Path, jax.Array]
    examples: jax.Array
    rejected: jax.Array
    request: EncodedSpec
    members: Members


@renamed_keywords
def scale_by_ekfac(
    layers: Layers, damping: Scalar = 1e-2, *, decay: Scalar = 0.8,
    statistics_period: Scalar = MEASURED, refresh_period: Scalar | None = None,
    trust_radius: TrustRadius | None = None, moments: str = "intra_batch",
    basis: LowRank | Eigenbasis | str = "low_rank", approximation: Approximation | str = "kfc",
    refresh: Refresh | str | None = None, statistics_fraction: float | None = None,
    factor_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:  # fmt: skip
    """Precondition gradients by the Fisher's diagonal in each layer's Kronecker eigenbasis.

    With ``A = Q_A D_A Q_Aᵀ``, ``G = Q_G D_G Q_Gᵀ`` the factors of K-FAC and ∇K̄ₙ the gradient of one
    example, summed over its positions::

        S = E[(Q_Aᵀ ∇K̄ₙ Q_G)²],   Δ = Q_A [(Q_Aᵀ ∇K̄ Q_G) / (S + λ)] Q_Gᵀ

    Among all diagonals in that basis, K-FAC's ``d_A d_Gᵀ`` included, S is nearest to the Fisher.
    The first step computes the bases and starts from ``S = d_A d_Gᵀ``, which counts as one
    measurement. At each later refresh S is transported to the new basis,
    ``S ← (Q'_AᵀQ_A)² S (Q_GᵀQ'_G)²`` (squares elementwise): the diagonal, in the new basis, of the
    same approximate Fisher, so that a step changes as little as the basis does.

    By default, of a factor of more than 128 rows only the 64 leading eigenvectors V are kept, and
    all directions orthogonal to them share one coordinate (``basis``). Its S is the mean of their
    second moments, ``E[‖∇K̄ₙ‖² − ‖Vᵀ∇K̄ₙ‖²] / (n − 64)``, and likewise on the other side: the
    diagonal nearest to the Fisher among those that are equal in these directions.

    For a block with one matrix F, ``Δ = (F + λ I)⁻¹ ∇``; gradients of leftover parameters are
    divided by the diagonal of their Fisher plus λ. Before the first measurement, gradients pass
    unchanged. Non-finite values never enter the state; ``state.rejected`` counts them.

    Args:
      layers: from :func:`natgrad_jax.find_layers`.
      damping: λ > 0, in the units of the Fisher (loss per parameter squared); unlike K-FAC's
        it is not divided between the factors.
      decay: of factors and of S, at each measurement: new = decay · old + (1 − decay) · batch,
        bias-corrected; 0 uses this batch alone. Use a value closer to 1 when measuring more often.
      statistics_period: steps between measurements; the first step always measures.
      refresh_period: steps between refreshes of the bases; the first step always computes them.
        None: 20, staggered (see ``refresh``).
      trust_radius: κ; the update is scaled by ``min(1, √(κ / ΔᵀFΔ))`` with the damped F, for which
        ``ΔᵀFΔ = Δᵀ∇``. The learning rate is taken as 1 here (:func:`ekfac` uses its own).
      moments: ``"intra_batch"``: squares of the examples' gradients in the current bases, each time
        statistics are measured; value_and_grad needs this state as ``opt_state``. (For a layer
        called several times in a forward pass the square of the summed Fisher gradients is used
        instead, the same in expectation.) ``"running_average"``: N times the squared mini-batch
        gradient, on every step, without further measurements; larger than the Fisher by
        ``N E[∇]²``.
      basis: ``"low_rank"`` or :class:`~natgrad_jax.LowRank`: of a dense factor of more than twice
        the rank only the leading eigenvectors, and all other directions as one. (Factors over
        channels under ``"sua"`` and factors of groups keep all.) ``"eigh"``, ``"qr"`` or
        :class:`~natgrad_jax.Eigenbasis`: all eigenvectors of every factor.
      approximation: ``"kfc"``, ``"sua"`` or an :class:`~natgrad_jax.Approximation`: how factors
        of convolutions are simplified, groups of channels, how positions are treated. It
        determines the basis; S is always measured with positions summed.
      refresh: :func:`~natgrad_jax.every` or :func:`~natgrad_jax.staggered`: whether all layers are
        refreshed in one step or at different steps, and which devices share the work. None:
        staggered if no ``refresh_period`` is given, else all in one step.
      statistics_fraction: fraction of the batch that statistics are measured on, in (0, 1]: every
        k-th example, k the nearest whole number to its inverse. None: the smallest of 1/2,
        1/4 and 1/8 that still has 128 examples (t positions of an example count as √t), else all;
        all if ``statistics_period`` is 1.
      factor_dtype: of stored factors; they are averaged and inverted in float32 regardless.
        ``jnp.bfloat16`` halves their memory; None: float32 (float64 with float64 parameters).

    All numbers may be floats, arrays or schedules (periods: whole numbers). Under
    ``optax.inject_hyperparams`` every number becomes a traced value.

    Returns:
      A transformation with ``update(grads, state, params, *, statistics)``.

    Raises:
      ValueError: numbers or choices out of range; missing ``statistics``; statistics or gradients
        of other layers; statistics without a Fisher pass, or without moments if they are needed.

    Source: George et al. 2018, sections 3 and 4; Laurent et al. 2018 for SUA and groups.

    >>> import optax, natgrad_jax as ng
    >>> tx = optax.chain(ng.scale_by_ekfac(ng.Layers({}), damping=1e-3), optax.sgd(0.1))
    """
    check_layers(layers)
    check_positive(damping=damping)
    if moments not in MOMENTS:
        raise ValueError(f"moments must be {' or '.join(map(repr, MOMENTS))}; got {moments!r}.")
    how = eigenbasis_method(basis)
    config = PreconditionerConfig(
        "scale_by_ekfac",
        StatisticsSpec(
            approximation_of(approximation),
            moments=moments == "intra_batch",
            stride=stride_of(statistics_fraction, statistics_period),
        ),
        damping,
        decay,
        statistics_period,
        refresh_schedule(refresh, refresh_period, USUAL),
        trust_radius,
        stored_as(factor_dtype),
    )
    if isinstance(how, LowRank):
        return _in_eigenbases(layers, config, Eigenbasis(), how.rank)
    return _in_eigenbases(layers, config, how, None)


def _in_eigenbases(
    layers: Layers, config: PreconditionerConfig, how: Eigenbasis, rank: int | None
) -> optax.GradientTransformationExtraArgs:
    """Precondition by the Fisher's diagonal in each layer's Kronecker eigenbasis.

    ``rank``: number of eigenvectors in partial bases; None: all eigenvectors.
    """
    intra_batch = config.request.moments

    def start(layers: Layers) -> dict[str, Any]:
        starts = {path: initial(layer, rank) for path, layer in layers.items()}
        several = {path: (len(x.terms),) * (len(x.terms) > 1 and x.block == "kronecker")
                   for path, x in layers.items() if intra_batch}  # fmt: skip
        zeros = lambda path, shape, dtype: jnp.zeros(several.get(path, ()) + shape, dtype)
        return {
            "bases": {path: bases for path, (bases, _) in starts.items()},
            "moments": {path: zeros(path, S.shape, S.dtype) for path, (_, S) in starts.items()},
            "moment_weights": {
                path: zeros(path, x.stack_sizes, float) for path, x in layers.items()
            },
        }

    def follow(state: EKFACState, layers: Layers, now: Now) -> EKFACState:
        if intra_batch:
            state = second_moments.measure(state, now.statistics, layers, now.decay)
        state = second_moments.refresh(state, layers, now.decay, now.first, how, config.refresh)
        if intra_batch:
            return state
        return second_moments.average_gradient(
            now.updates, state, now.statistics, layers, now.decay
        )

    return preconditioner(layers, config, Method(EKFACState, start, follow, _apply))


def _apply(
    layer: Layer, state: EKFACState, path: Path, gradient: jax.Array, damping: jax.Array
) -> jax.Array:
    S, known = second_moments.total_moments(state, path), second_moments.has_basis(state, path)
    known = jnp.expand_dims(known, tuple(range(known.ndim, S.ndim)))
    gains = 1 / jnp.where(known, S + damping.astype(S.dtype), 1)
    return scaled(layer, state.bases[path], gains, gradient)


@renamed_keywords
def ekfac(
    learning_rate: Scalar, layers: Layers, *, damping: Scalar = 1e-2, decay: Scalar = 0.8,
    statistics_period: Scalar | None = None, refresh_period: Scalar | None = None,
    momentum: Scalar | None = 0.8, nesterov: bool = True, weight_decay: Scalar = 0.0,
    trust_radius: Scalar | PerExample | None = PerExample(), moments: str = "intra_batch",
    basis: LowRank | Eigenbasis | str = "low_rank", approximation: Approximation | str = "kfc",
    refresh: Refresh | str | None = None, statistics_fraction: float | None = None,
    factor_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:  # fmt: skip
    """EKFAC with momentum, decoupled weight decay and a trust region.

    :func:`scale_by_ekfac`, then ``optax.trace(momentum, nesterov)``, then ``weight_decay · params``
    added, then the learning rate; no momentum if ``momentum`` is None.

    Args:
      learning_rate: η, a float, an array or a schedule.
      layers: from :func:`natgrad_jax.find_layers`.
      damping, decay, refresh_period, moments, basis, approximation, refresh,
        statistics_fraction, factor_dtype: as in :func:`scale_by_ekfac`.
      statistics_period: as there; None: 10. With a trust radius, and if refreshes too are left at
        their defaults, steps 1, 2, 4 and 8 measure and refresh all layers as well
        (``ng.staggered(early=…)``).
      momentum, nesterov, weight_decay, trust_radius: as in :func:`natgrad_jax.kfac`.

    Returns:
      A transformation with ``update(grads, state, params, *, statistics)``.

    Raises:
      ValueError: as :func:`scale_by_ekfac`.

    Source: George et al. 2018; Ba et al. 2016, section 5 (trust region).

    >>> import natgrad_jax as ng
    >>> tx = ng.ekfac(0.1, ng.Layers({}))
    """
    check_layers(layers)
    preconditioner = scale_by_ekfac(
        layers,
        damping,
        decay=decay,
        statistics_period=MEASURED if statistics_period is None else statistics_period,
        refresh_period=refresh_period,
        trust_radius=before_rate(trust_radius, learning_rate),
        moments=moments,
        basis=basis,
        approximation=approximation,
        refresh=early_if_bounded(trust_radius, refresh, refresh_period, statistics_period),
        statistics_fraction=statistics_fraction,
        factor_dtype=factor_dtype,
    )
    velocity = trace(momentum, nesterov)
    return descent(preconditioner, layers, learning_rate, velocity, weight_decay)
