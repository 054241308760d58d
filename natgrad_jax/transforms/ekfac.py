"""EKFAC: the diagonal of the Fisher in each layer's Kronecker-factored eigenbasis."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from natgrad_jax.approximations import approximation
from natgrad_jax.averages import Factors, stored_as
from natgrad_jax.clock import Clock, start, tick
from natgrad_jax.eigenbases import Refresh, from_basis, to_basis
from natgrad_jax.layer import Layer
from natgrad_jax.layers import Layers, check_layers
from natgrad_jax.operators import identities
from natgrad_jax.paths import Path
from natgrad_jax.requests import Request, Spelled, spell, stride_of
from natgrad_jax.scalars import Scalar, at, check_fraction, check_period, check_positive
from natgrad_jax.statistics import Statistics
from natgrad_jax.transforms import blocks, estimates, squares
from natgrad_jax.transforms.alias import descent, per_squared_rate, trace
from natgrad_jax.transforms.refreshing import turns

MOMENTS = ("intra_batch", "running_average")
BASES = ("eigh", "qr")


class EKFACState(NamedTuple):
    """State of :func:`scale_by_ekfac`; dictionaries by layer path, or parameter path if leftover.

    ``damping``: λ of the last step, ``()``. ``bases``: eigenvectors of the factors as of the last
    refresh, in their columns. ``moments``: S, in the packed coordinates of the bases,
    ``(*stack, *blocks, rows, columns)``; ``moment_weights``: how much each has seen, ``(*stack,)``.
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


def scale_by_ekfac(
    layers: Layers,
    damping: Scalar = 1e-2,
    *,
    decay: Scalar = 0.8,
    statistics_period: Scalar = 10,
    statistics_fraction: float | None = None,
    refresh_period: Scalar = 20,
    spread: bool = False,
    refresh_over: Any = None,
    factor_dtype: Any = None,
    moments: str = "intra_batch",
    basis: str = "eigh",
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
        example of each layer's, k the nearest whole number to its inverse; None for all.
      refresh_period: steps from one basis to the next; the first step always finds one.
      spread: refresh each layer at its own step of the period, by cost, instead of all in one step.
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
      basis: ``"eigh"``, or ``"qr"``: after the first, one step of orthogonal iteration.
      basis_tolerance: keep a basis Q while ``B = QᵀFQ`` has ``‖B − diag B‖ ≤ tolerance · ‖B‖``;
        None to renew it at every refresh.
      convolution, group_size, weight_sharing: as in :func:`natgrad_jax.scale_by_kfac`; they choose
        the basis. S is measured with positions summed in any case.
      trust_radius: κ; the update is scaled by ``min(1, √(κ / ΔᵀFΔ))`` with the damped F, for which
        ``ΔᵀFΔ = Δᵀ∇``. Here the learning rate is taken to be 1 (:func:`ekfac` includes its own).

    All numbers may be floats, arrays or schedules (periods: whole numbers), but for
    ``basis_tolerance`` and ``group_size``.

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
    check_positive(damping=damping, trust_radius=1 if trust_radius is None else trust_radius)
    check_period(statistics_period=statistics_period)
    check_fraction(decay=decay)
    for name, value, known in (("moments", moments, MOMENTS), ("basis", basis, BASES)):
        if value not in known:
            raise ValueError(f"{name} must be {' or '.join(map(repr, known))}; got {value!r}.")
    chosen = approximation(convolution, group_size, weight_sharing)
    request = Request(chosen, moments == "intra_batch", stride=stride_of(statistics_fraction))
    layers = layers.approximate(chosen)
    how, when = Refresh(basis, basis_tolerance), turns(refresh_period, spread, refresh_over)
    storage = stored_as(factor_dtype)

    def init_fn(params: optax.Params) -> EKFACState:
        del params  # shapes come from the layers: params may be placeholders
        # one compiled program: op by op, every shape would compile on its own
        return jax.jit(lambda: _initial_state(layers, damping, request, storage))()

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
        lam, keep = at(damping, step), at(decay, step)
        before = state.weights
        state = estimates.update(state, statistics, layers, keep)
        if request.moments:
            state = squares.measure(state, statistics, keep)
        # what was measured for the first time has its basis now, not a period later
        first = estimates.first_seen(before, state.weights)
        state = squares.refresh(state, layers, keep, first, how, when)
        if not request.moments:
            state = squares.average_gradient(updates, state, statistics, layers, keep)
        updates, quadratic = _precondition(updates, state, layers, lam)
        if trust_radius is not None:
            updates = blocks.trust_region(updates, layers, quadratic, at(trust_radius, step))
        clock = tick(state.clock, at(statistics_period, step + 1))
        rejected = state.rejected + jnp.isnan(quadratic)
        return updates, state._replace(clock=clock, damping=lam, rejected=rejected)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def ekfac(
    learning_rate: Scalar,
    layers: Layers,
    *,
    damping: Scalar = 1e-2,
    decay: Scalar = 0.8,
    statistics_period: Scalar = 10,
    statistics_fraction: float | None = None,
    refresh_period: Scalar = 20,
    spread: bool = False,
    refresh_over: Any = None,
    factor_dtype: Any = None,
    moments: str = "intra_batch",
    basis: str = "eigh",
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
        refresh_over, factor_dtype, moments, basis, basis_tolerance, convolution,
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
        basis_tolerance=basis_tolerance,
        convolution=convolution,
        group_size=group_size,
        weight_sharing=weight_sharing,
        trust_radius=per_squared_rate(trust_radius, learning_rate),
    )
    velocity = trace(momentum, nesterov)
    return descent(preconditioner, layers, learning_rate, velocity, weight_decay)


def _initial_state(layers: Layers, damping: Scalar, request: Request, storage: Any) -> EKFACState:
    def zeros(layer: Layer) -> jax.Array:
        return jnp.zeros(layer.stack_sizes + layer.packed_shape, layer.factor_dtype)

    return EKFACState(
        clock=start(),
        damping=at(damping, jnp.zeros((), jnp.int32)),
        bases={path: identities(layer) for path, layer in layers.items()},
        moments={path: zeros(layer) for path, layer in layers.items()},
        moment_weights={path: jnp.zeros(x.stack_sizes, float) for path, x in layers.items()},
        examples=jnp.ones((), float),
        request=spell(request),
        **estimates.start(layers, storage)._asdict(),
    )


def _precondition(
    updates: optax.Updates, state: EKFACState, layers: Layers, lam: jax.Array
) -> tuple[optax.Updates, jax.Array]:
    """The natural gradient, and ``Δᵀ∇ = ΔᵀFΔ`` of the damped F."""

    def of_layer(path: Path, gradient: jax.Array) -> jax.Array:
        layer, bases, S = layers[path], state.bases[path], state.moments[path]
        x = to_basis(layer, bases, gradient)
        weight = state.moment_weights[path]
        known = jnp.expand_dims(weight > 0, tuple(range(weight.ndim, x.ndim)))
        return from_basis(layer, bases, x / jnp.where(known, S + lam.astype(S.dtype), 1))

    return blocks.map_blocks(updates, layers, of_layer, estimates.over_diagonal(state, lam))
