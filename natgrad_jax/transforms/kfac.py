"""K-FAC: natural gradient with one Kronecker product a layer."""

from typing import Any

import optax

from natgrad_jax.curvature.factor_averages import stored_as
from natgrad_jax.curvature.inverses import inversion
from natgrad_jax.layers.approximation import approximation
from natgrad_jax.layers.collection import Layers, check_layers
from natgrad_jax.statistics.spec import Request, stride_of
from natgrad_jax.transforms.common.chain import descent, per_squared_rate, trace
from natgrad_jax.transforms.common.kronecker import kronecker
from natgrad_jax.transforms.common.preconditioner import Rules
from natgrad_jax.transforms.common.schedule import turns
from natgrad_jax.utils.hyperparams import Scalar, check_positive


def scale_by_kfac(
    layers: Layers,
    damping: Scalar = 1e-2,
    *,
    decay: Scalar = 0.8,
    statistics_period: Scalar = 10,
    statistics_fraction: float | None = None,
    refresh_period: Scalar | None = None,
    spread: bool | None = None,
    refresh_over: Any = None,
    factor_dtype: Any = None,
    convolution: str = "kfc",
    group_size: int | None = None,
    weight_sharing: str = "expand",
    inverse: str = "low_rank",
    rank: int | None = None,
    trust_radius: Scalar | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Precondition gradients by the Kronecker-factored Fisher of each layer.

    With ``K̄ = [K; b]`` of a layer and ``F ≈ A ⊗ G``, ``A = E[ā āᵀ]``, ``G = E[g gᵀ]``::

        Δ = (A + π√λ I)⁻¹ ∇K̄ (G + (√λ/π) I)⁻¹,   π² = (tr A / dim A) / (tr G / dim G)

    A block with one matrix F (normalizations, small free parameters) has ``Δ = (F + λ I)⁻¹ ∇``,
    exactly, of whatever size. By default a factor A or G of more than 128 rows is inverted from its
    64 leading eigenpairs alone (``inverse``). Leftover parameters are divided by the diagonal of
    their Fisher plus λ. Before anything was measured, gradients pass unchanged. Statistics,
    inverses or gradients that are not finite never enter the factors or the inverses: the last good
    ones stay, and ``state.rejected`` counts the events.

    Args:
      layers: from :func:`natgrad_jax.find_layers`.
      damping: λ > 0, in the units of the Fisher (loss per parameter squared).
      decay: of the factors, at each measurement: factor = decay · old + (1 − decay) · batch,
        bias-corrected; 0 is this batch alone. With a shorter ``statistics_period`` nearer to 1.
      statistics_period: steps from one measurement to the next; the first step always measures.
      statistics_fraction: part of a batch that statistics are measured on, in (0, 1]: every k-th
        example of each layer's, k the nearest whole number to its inverse. None: a half of 512
        examples and more, all of fewer, and all where ``statistics_period`` is 1.
      refresh_period: steps from one inversion to the next; the first step always inverts. None:
        20, the layers in turn.
      spread: refresh each layer at its own step of the period, by cost, instead of all in one step.
        None: so where no ``refresh_period`` is given.
      refresh_over: the devices that divide a refresh among them: the name of the axis inside
        shard_map or pmap, ``"data"``, or a mesh and its axis under jit, ``(mesh, "data")``; None
        where each device does all of it.
      factor_dtype: of stored factors, which are averaged and inverted in float32 all the same;
        ``jnp.bfloat16`` halves their memory; None for float32 (float64 with float64 parameters).
      convolution: ``"kfc"``, the covariance of whole patches, or ``"sua"``, of channels alone:
        ``A ≈ I ⊗ C``, C averaged over the places of a patch, the bias apart.
      group_size: channels in a group, for factors without correlations across groups (and the bias
        apart); None for whole factors. A last group that is not full is filled up with zeros.
      weight_sharing: ``"expand"`` treats positions and calls as examples; ``"reduce"`` averages
        activations and sums gradients over them first. Give value_and_grad the ``opt_state``: it
        then measures the one that is asked for, and no more.
      inverse: ``"low_rank"``: the ``rank`` leading eigenpairs of each factor A and G, warm-started,
        and the others at their mean; whole, by Cholesky, where twice the rank is not less than the
        factor, and in blocks with one matrix.
        Exact: ``"cholesky"``; ``"eigh"``; ``"newton_schulz"``, by matrix products alone from the
        last inverse. ``"woodbury"``: by Cholesky at a refresh, and between refreshes each measured
        batch is absorbed by an update of that ``rank``, under which the damping of the refresh
        fades with the factors' decay.
      rank: for ``low_rank`` (None: 64; :func:`natgrad_jax.rank_for` tells what is needed) and
        ``woodbury``.
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
    request = Request(
        approximation(convolution, group_size, weight_sharing),
        stride=stride_of(statistics_fraction, statistics_period),
    )
    rules = Rules(
        "scale_by_kfac",
        request,
        damping,
        decay,
        statistics_period,
        turns(refresh_period, spread, refresh_over),
        trust_radius,
        stored_as(factor_dtype),
    )
    return kronecker(layers, rules, inversion(inverse, rank))


def kfac(
    learning_rate: Scalar,
    layers: Layers,
    *,
    damping: Scalar = 1e-2,
    decay: Scalar = 0.8,
    statistics_period: Scalar = 10,
    statistics_fraction: float | None = None,
    refresh_period: Scalar | None = None,
    spread: bool | None = None,
    refresh_over: Any = None,
    factor_dtype: Any = None,
    convolution: str = "kfc",
    group_size: int | None = None,
    weight_sharing: str = "expand",
    inverse: str = "low_rank",
    rank: int | None = None,
    momentum: Scalar | None = 0.8,
    nesterov: bool = True,
    weight_decay: Scalar = 0.0,
    trust_radius: Scalar | None = 2e-3,
) -> optax.GradientTransformationExtraArgs:
    """K-FAC with momentum, decoupled weight decay and a trust region.

    :func:`scale_by_kfac`, then ``optax.trace(momentum, nesterov)``, then ``weight_decay · params``
    added, then the learning rate; no momentum where ``momentum`` is None.

    Args:
      learning_rate: η, a float, an array or a schedule.
      layers: from :func:`natgrad_jax.find_layers`.
      damping, decay, statistics_period, statistics_fraction, refresh_period, spread,
        refresh_over, factor_dtype, convolution, group_size, weight_sharing, inverse, rank: as in
        :func:`scale_by_kfac`.
      momentum: decay of the trace of preconditioned gradients, to which curvature is near 1
        everywhere: a heavier ball oscillates.
      nesterov: Nesterov's momentum, as in ``optax.sgd``.
      weight_decay: decoupled, as in ``optax.adamw``; per step, times the learning rate.
      trust_radius: κ; before momentum the update is scaled by ``min(1, √(κ / (η² ΔᵀFΔ)))``; None
        for no bound. Smaller for noisier gradients and rougher factors (1e-3 for small batches or
        ``"sua"``); an autoencoder at batch 512 gains up to 1e-2.

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
        statistics_fraction=statistics_fraction,
        refresh_period=refresh_period,
        spread=spread,
        refresh_over=refresh_over,
        factor_dtype=factor_dtype,
        convolution=convolution,
        group_size=group_size,
        weight_sharing=weight_sharing,
        inverse=inverse,
        rank=rank,
        trust_radius=per_squared_rate(trust_radius, learning_rate),
    )
    velocity = trace(momentum, nesterov)
    return descent(preconditioner, layers, learning_rate, velocity, weight_decay)
