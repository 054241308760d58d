"""K-FAC: natural gradient with one Kronecker product per layer."""

import optax
from jaxtyping import DTypeLike

from natgrad_jax.curvature.factor_averages import stored_as
from natgrad_jax.curvature.inverse_methods import Inverse
from natgrad_jax.layers.approximation import Approximation
from natgrad_jax.layers.collection import Layers, check_layers
from natgrad_jax.statistics.spec import MEASURED, StatisticsSpec, stride_of
from natgrad_jax.transforms.common.chain import descent, trace
from natgrad_jax.transforms.common.kronecker import kronecker
from natgrad_jax.transforms.common.options import (
    approximation_of,
    inverse_method,
    renamed_keywords,
)
from natgrad_jax.transforms.common.preconditioner import PreconditionerConfig
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


@renamed_keywords
def scale_by_kfac(
    layers: Layers, damping: Scalar = 1e-2, *, decay: Scalar = 0.7,
    statistics_period: Scalar = MEASURED, refresh_period: Scalar | None = None,
    trust_radius: TrustRadius | None = None, inverse: Inverse | str = "low_rank",
    approximation: Approximation | str = "kfc", refresh: Refresh | str | None = None,
    statistics_fraction: float | None = None, factor_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:  # fmt: skip
    """Precondition gradients by the Kronecker-factored Fisher of each layer.

    With ``K̄ = [K; b]`` of a layer and ``F ≈ A ⊗ G``, ``A = E[ā āᵀ]``, ``G = E[g gᵀ]``::

        Δ = (A + π√λ I)⁻¹ ∇K̄ (G + (√λ/π) I)⁻¹,   π² = (tr A / dim A) / (tr G / dim G)

    For a block with one matrix F (normalizations, small free parameters), ``Δ = (F + λ I)⁻¹ ∇``,
    exactly, whatever its size. By default a factor A or G of more than 64 rows is inverted from
    its 32 leading eigenpairs alone (``inverse``). Gradients of leftover parameters are divided by
    the diagonal of their Fisher plus λ. Before the first measurement, gradients pass unchanged.
    Non-finite statistics, inverses or gradients never enter the factors or the inverses: the last
    good ones are kept, and ``state.rejected`` counts the failures.

    Args:
      layers: from :func:`natgrad_jax.find_layers`.
      damping: λ > 0, in the units of the Fisher (loss per parameter squared).
      decay: of the factors, at each measurement: factor = decay · old + (1 − decay) · batch,
        bias-corrected; 0 uses this batch alone. Use a value closer to 1 when measuring more often.
      statistics_period: steps between measurements; the first step always measures.
      refresh_period: steps between inversions; the first step always inverts. None: 20, staggered
        (see ``refresh``).
      trust_radius: κ; the update is scaled by ``min(1, √(κ / ΔᵀFΔ))`` with the damped F, for which
        ``ΔᵀFΔ = Δᵀ∇``. The learning rate is taken as 1 here (:func:`kfac` uses its own).
        :class:`~natgrad_jax.PerExample`: in proportion to the batch.
      inverse: how factors are inverted: ``"low_rank"``, or ``"cholesky"``, ``"eigh"`` or
        ``"newton_schulz"``, which are exact; or a record: :class:`~natgrad_jax.LowRank`,
        :class:`~natgrad_jax.Cholesky`, :class:`~natgrad_jax.Eigh`,
        :class:`~natgrad_jax.NewtonSchulz`, :class:`~natgrad_jax.Woodbury`.
      approximation: ``"kfc"``, ``"sua"`` or an :class:`~natgrad_jax.Approximation`: how factors
        of convolutions are simplified, groups of channels, how positions are treated.
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
      ValueError: damping or periods out of range; missing ``statistics``; statistics or gradients
        of other layers; statistics without a Fisher pass (``fisher="none"``).

    Source: Martens & Grosse 2015, equations 3 to 6 and section 6.3; Grosse & Martens 2016 for
    convolutions; Laurent et al. 2018, section 2, for SUA and groups; Eschenhagen et al. 2023 for
    expand and reduce; Ba et al. 2016 for the trust region.

    >>> import optax, natgrad_jax as ng
    >>> tx = optax.chain(ng.scale_by_kfac(ng.Layers({}), damping=1e-3), optax.sgd(0.1))
    """
    check_layers(layers)
    check_positive(damping=damping)
    config = PreconditionerConfig(
        "scale_by_kfac",
        StatisticsSpec(
            approximation_of(approximation),
            stride=stride_of(statistics_fraction, statistics_period),
        ),
        damping,
        decay,
        statistics_period,
        refresh_schedule(refresh, refresh_period, USUAL),
        trust_radius,
        stored_as(factor_dtype),
    )
    return kronecker(layers, config, inverse_method(inverse))


@renamed_keywords
def kfac(
    learning_rate: Scalar, layers: Layers, *, damping: Scalar = 1e-2, decay: Scalar = 0.7,
    statistics_period: Scalar | None = None, refresh_period: Scalar | None = None,
    momentum: Scalar | None = 0.8, nesterov: bool = True, weight_decay: Scalar = 0.0,
    trust_radius: Scalar | PerExample | None = PerExample(1.2e-5, 7.5e-3, 10, 100),
    inverse: Inverse | str = "low_rank", approximation: Approximation | str = "kfc",
    refresh: Refresh | str | None = None, statistics_fraction: float | None = None,
    factor_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:  # fmt: skip
    """K-FAC with momentum, decoupled weight decay and a trust region.

    :func:`scale_by_kfac`, then ``optax.trace(momentum, nesterov)``, then ``weight_decay · params``
    added, then the learning rate; no momentum if ``momentum`` is None.

    Args:
      learning_rate: η, a float, an array or a schedule.
      layers: from :func:`natgrad_jax.find_layers`.
      damping, decay, refresh_period, inverse, approximation, refresh,
        statistics_fraction, factor_dtype: as in :func:`scale_by_kfac`.
      statistics_period: as there; None: 10. With a trust radius, and if refreshes too are left at
        their defaults, steps 1, 2, 4 and 8 measure and refresh all layers as well
        (``ng.staggered(early=…)``).
      momentum: decay of the trace of preconditioned gradients. Preconditioned curvature is near
        the identity, so that larger momentum tends to oscillate.
      nesterov: Nesterov's momentum, as in ``optax.sgd``.
      weight_decay: decoupled, as in ``optax.adamw``; per step, times the learning rate.
      trust_radius: κ; before momentum the update is scaled by ``min(1, √(κ / (η² ΔᵀFΔ)))``. None:
        no bound. :class:`~natgrad_jax.PerExample`: in proportion to the batch, and decaying.
        Smaller ones suit noisier gradients and rougher factors; an autoencoder at batch 512 gains
        from 1e-2.

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
        statistics_period=MEASURED if statistics_period is None else statistics_period,
        refresh_period=refresh_period,
        trust_radius=before_rate(trust_radius, learning_rate),
        inverse=inverse,
        approximation=approximation,
        refresh=early_if_bounded(trust_radius, refresh, refresh_period, statistics_period),
        statistics_fraction=statistics_fraction,
        factor_dtype=factor_dtype,
    )
    velocity = trace(momentum, nesterov)
    return descent(preconditioner, layers, learning_rate, velocity, weight_decay)
