"""EKFAC: the diagonal of the Fisher in each layer's Kronecker-factored eigenbasis."""

from typing import Any

import optax
from jaxtyping import DTypeLike

from natgrad_jax.curvature.eigenbases import Refresh
from natgrad_jax.curvature.factor_averages import stored_as
from natgrad_jax.curvature.inverses import checked_rank
from natgrad_jax.layers.approximation import approximation
from natgrad_jax.layers.collection import Layers, check_layers
from natgrad_jax.linalg.distributed import DeviceAxes
from natgrad_jax.statistics.spec import Request, stride_of
from natgrad_jax.transforms.common.chain import descent, per_squared_rate, trace
from natgrad_jax.transforms.common.eigenbasis_diagonal import in_eigenbases
from natgrad_jax.transforms.common.preconditioner import Rules
from natgrad_jax.transforms.common.schedule import turns
from natgrad_jax.utils.hyperparams import Scalar, check_positive

MOMENTS = ("intra_batch", "running_average")
BASES = ("eigh", "qr", "low_rank")


def scale_by_ekfac(
    layers: Layers,
    damping: Scalar = 1e-2,
    *,
    decay: Scalar = 0.8,
    statistics_period: Scalar = 10,
    statistics_fraction: float | None = None,
    refresh_period: Scalar | None = None,
    spread: bool | None = None,
    refresh_over: DeviceAxes = None,
    factor_dtype: DTypeLike | None = None,
    moments: str = "intra_batch",
    basis: str = "low_rank",
    rank: int | None = None,
    basis_tolerance: float | None = None,
    convolution: str = "kfc",
    group_size: int | None = None,
    weight_sharing: str = "expand",
    trust_radius: Scalar | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Precondition gradients by the Fisher's diagonal in each layer's Kronecker eigenbasis.

    With ``A = Q_A D_A Q_Aᵀ``, ``G = Q_G D_G Q_Gᵀ`` the factors of K-FAC and ∇K̄ₙ the gradient of one
    example, summed over its positions::

        S = E[(Q_Aᵀ ∇K̄ₙ Q_G)²],   Δ = Q_A [(Q_Aᵀ ∇K̄ Q_G) / (S + λ)] Q_Gᵀ

    Of all diagonals in that basis S is the one nearest to the Fisher, K-FAC's ``d_A d_Gᵀ`` among
    them. Scaling before S is known and after a refresh: the first step finds the bases and takes
    ``S = d_A d_Gᵀ``, which counts as one measurement. At each later refresh S is carried over,
    ``S ← (Q'_AᵀQ_A)² S (Q_GᵀQ'_G)²`` (squares elementwise): the diagonal, in the new basis, of the
    same approximate Fisher, so that a step changes as little as the basis does.

    By default a factor of more than 128 rows has 64 leading eigenvectors V, and all directions that
    are orthogonal to them are one coordinate (``basis``). There S is the mean of what each of them
    has, ``E[‖∇K̄ₙ‖² − ‖Vᵀ∇K̄ₙ‖²] / (n − 64)`` and likewise on the other side: of all diagonals that
    are equal in those directions the one nearest to the Fisher.

    A block with one matrix F has ``Δ = (F + λ I)⁻¹ ∇``; leftover parameters are divided by the
    diagonal of their Fisher plus λ. Before anything was measured, gradients pass unchanged. What is
    not finite never enters the state; ``state.rejected`` counts the events.

    Args:
      layers: from :func:`natgrad_jax.find_layers`.
      damping: λ > 0, in the units of the Fisher (loss per parameter squared); not divided between
        factors as K-FAC's.
      decay: of factors and of S, at each measurement: new = decay · old + (1 − decay) · batch,
        bias-corrected. With a shorter ``statistics_period`` nearer to 1.
      statistics_period: steps from one measurement to the next; the first step always measures.
      statistics_fraction: part of a batch that statistics are measured on, in (0, 1]: every k-th
        example of each layer's, k the nearest whole number to its inverse. None: a half of 512
        examples and more, all of fewer, and all where ``statistics_period`` is 1.
      refresh_period: steps from one basis to the next; the first step always finds one. None: 20,
        the layers in turn.
      spread: refresh each layer at its own step of the period, by cost, instead of all in one step.
        None: so where no ``refresh_period`` is given.
      refresh_over: the devices that divide a refresh among them: the name of the axis inside
        shard_map or pmap, ``"data"``, or a mesh and its axis under jit, ``(mesh, "data")``; None
        where each device does all of it.
      factor_dtype: of stored factors, which are averaged and inverted in float32 all the same;
        ``jnp.bfloat16`` halves their memory; None for float32 (float64 with float64 parameters).
      moments: ``"intra_batch"``: squares of the examples' gradients in the current bases, each time
        statistics are measured; value_and_grad needs this state as ``opt_state``. (A layer called
        several times in a forward pass takes the square of the summed Fisher gradients instead,
        the same in expectation.) ``"running_average"``: N times the squared mini-batch gradient, on
        every step, nothing more measured; larger than the Fisher by ``N E[∇]²``.
      basis: ``"low_rank"``: of a dense factor of more than 2 · ``rank`` rows the ``rank`` leading
        eigenvectors, warm-started, and all other directions as one. Memory, refresh and step cost
        what those of K-FAC's ``inverse="low_rank"`` do. (Channels' matrices under ``"sua"`` and
        those of groups stay whole.) Whole everywhere: ``"eigh"``; ``"qr"``, after the first basis
        one step of orthogonal iteration.
      rank: for ``low_rank`` (None: 64).
      basis_tolerance: keep a whole basis Q while ``B = QᵀFQ`` has
        ``‖B − diag B‖ ≤ tolerance · ‖B‖``; None to renew it at every refresh.
      convolution, group_size, weight_sharing: as in :func:`natgrad_jax.scale_by_kfac`; they choose
        the basis. S is measured with positions summed in any case.
      trust_radius: κ; the update is scaled by ``min(1, √(κ / ΔᵀFΔ))`` with the damped F, for which
        ``ΔᵀFΔ = Δᵀ∇``. Here the learning rate is taken to be 1 (:func:`ekfac` includes its own).

    All numbers may be floats, arrays or schedules (periods: whole numbers), but for
    ``basis_tolerance``, ``rank`` and ``group_size``.

    Returns:
      A transformation with ``update(grads, state, params, *, statistics)``.

    Raises:
      ValueError: numbers or choices out of range; no ``statistics``; statistics or gradients of
        other layers; statistics without a Fisher pass, or without moments where they are needed.

    Source: George et al. 2018, sections 3 and 4; Laurent et al. 2018 for SUA and groups.

    >>> import optax, natgrad_jax as ng
    >>> tx = optax.chain(ng.scale_by_ekfac(ng.Layers({}), damping=1e-3), optax.sgd(0.1))
    """
    check_layers(layers)
    check_positive(damping=damping)
    if moments not in MOMENTS:
        raise ValueError(f"moments must be {' or '.join(map(repr, MOMENTS))}; got {moments!r}.")
    how, rank = _basis(basis, rank, basis_tolerance)
    rules = Rules(
        "scale_by_ekfac",
        Request(
            approximation(convolution, group_size, weight_sharing),
            moments=moments == "intra_batch",
            stride=stride_of(statistics_fraction, statistics_period),
        ),
        damping,
        decay,
        statistics_period,
        turns(refresh_period, spread, refresh_over),
        trust_radius,
        stored_as(factor_dtype),
    )
    return in_eigenbases(layers, rules, how, rank)


def _basis(basis: str, rank: Any, tolerance: float | None) -> tuple[Refresh, int | None]:
    """The checked choice of bases, and how many directions a partial one has."""
    if basis not in BASES:
        raise ValueError(f"basis must be {' or '.join(map(repr, BASES))}; got {basis!r}.")
    if basis != "low_rank":
        if rank is not None:
            raise ValueError(f'rank={rank!r} goes with basis="low_rank".')
        return Refresh(basis, tolerance), None
    if tolerance is not None:
        raise ValueError('basis_tolerance goes with whole bases: basis="eigh" or "qr".')
    return Refresh(), checked_rank(rank, basis)


def ekfac(
    learning_rate: Scalar,
    layers: Layers,
    *,
    damping: Scalar = 1e-2,
    decay: Scalar = 0.8,
    statistics_period: Scalar = 10,
    statistics_fraction: float | None = None,
    refresh_period: Scalar | None = None,
    spread: bool | None = None,
    refresh_over: DeviceAxes = None,
    factor_dtype: DTypeLike | None = None,
    moments: str = "intra_batch",
    basis: str = "low_rank",
    rank: int | None = None,
    basis_tolerance: float | None = None,
    convolution: str = "kfc",
    group_size: int | None = None,
    weight_sharing: str = "expand",
    momentum: Scalar | None = 0.8,
    nesterov: bool = True,
    weight_decay: Scalar = 0.0,
    trust_radius: Scalar | None = 2e-3,
) -> optax.GradientTransformationExtraArgs:
    """EKFAC with momentum, decoupled weight decay and a trust region.

    :func:`scale_by_ekfac`, then ``optax.trace(momentum, nesterov)``, then ``weight_decay · params``
    added, then the learning rate; no momentum where ``momentum`` is None.

    Args:
      learning_rate: η, a float, an array or a schedule.
      layers: from :func:`natgrad_jax.find_layers`.
      damping, decay, statistics_period, statistics_fraction, refresh_period, spread,
        refresh_over, factor_dtype, moments, basis, rank, basis_tolerance, convolution,
        group_size, weight_sharing: as in :func:`scale_by_ekfac`.
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
        statistics_period=statistics_period,
        statistics_fraction=statistics_fraction,
        refresh_period=refresh_period,
        spread=spread,
        refresh_over=refresh_over,
        factor_dtype=factor_dtype,
        moments=moments,
        basis=basis,
        rank=rank,
        basis_tolerance=basis_tolerance,
        convolution=convolution,
        group_size=group_size,
        weight_sharing=weight_sharing,
        trust_radius=per_squared_rate(trust_radius, learning_rate),
    )
    velocity = trace(momentum, nesterov)
    return descent(preconditioner, layers, learning_rate, velocity, weight_decay)
