"""SOAP: Adam in the eigenbases of Shampoo's factors."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from natgrad_jax.curvature import factor_averages
from natgrad_jax.curvature.eigenbases import (
    Eigenbasis,
    entered,
    initial,
    left,
    moments_inside,
    scaled_inside,
    transport,
    turned,
)
from natgrad_jax.curvature.factor_averages import FactorsLike, zero_factors
from natgrad_jax.curvature.inverse_methods import LowRank
from natgrad_jax.layers.bundles import members_of
from natgrad_jax.layers.collection import Layers
from natgrad_jax.layers.gradients import map_layers, packed
from natgrad_jax.layers.layer import Layer
from natgrad_jax.layers.limits import MAX_FACTOR
from natgrad_jax.state.clock import Clock
from natgrad_jax.state.divided import divided
from natgrad_jax.state.members import Members
from natgrad_jax.transforms.common import gradient_factors
from natgrad_jax.transforms.common.chain import descent
from natgrad_jax.transforms.common.estimators import for_params
from natgrad_jax.transforms.common.options import eigenbasis_method
from natgrad_jax.transforms.common.refresh_schedule import (
    Refresh,
    RefreshSchedule,
    Renewed,
    refresh_due,
    refresh_schedule,
    staggered,
)
from natgrad_jax.utils import tree_paths
from natgrad_jax.utils.finite import all_finite
from natgrad_jax.utils.hyperparams import Scalar, at, check_fraction, check_positive
from natgrad_jax.utils.short_repr import printed_short
from natgrad_jax.utils.tree_paths import Path

USUAL = staggered(10)


@printed_short
class SOAPState(NamedTuple):
    """State of :func:`scale_by_soap`, dictionaries by the path of a kernel.

    Kernels of equal shape are stacked at the path of the first (``members``, without arrays, names
    them); :func:`natgrad_jax.factors` and :func:`natgrad_jax.bases` give each at its own.

    ``factors``: ``E[∇∇ᵀ]`` and ``E[∇ᵀ∇]``; ``weights``: the accumulated weight of each. ``bases``:
    their eigenvectors. ``momentum``: averaged gradients as matrices, in the bases (on the side of a
    partial basis in their own coordinates). ``moments``: averaged squares in the bases;
    ``moment_weights``: their weights. ``rest``: Adam's state for all other parameters, whose count
    is that of accepted gradients. ``rejected``: number of non-finite gradients and bases that were
    dropped, int32 ``()``.

    >>> import natgrad_jax as ng
    >>> state = ng.scale_by_soap().init({})
    >>> isinstance(state, ng.SOAPState), int(state.clock.step), int(state.rejected)
    (True, 0, 0)
    """

    clock: Clock
    factors: dict[Path, FactorsLike]
    weights: dict[Path, jax.Array]
    bases: dict[Path, FactorsLike]
    momentum: dict[Path, jax.Array]
    moments: dict[Path, jax.Array]
    moment_weights: dict[Path, jax.Array]
    rest: optax.ScaleByAdamState
    rejected: jax.Array
    members: Members


def scale_by_soap(
    b1: Scalar = 0.95, b2: Scalar = 0.95, eps: float = 1e-8, *, decay: Scalar | None = None,
    basis: LowRank | Eigenbasis | str = "qr", refresh: Refresh | str | None = None,
    max_size: int | None = MAX_FACTOR,
) -> optax.GradientTransformationExtraArgs:  # fmt: skip
    """Adam in the eigenbases of ``E[∇∇ᵀ]`` and ``E[∇ᵀ∇]`` of each kernel; no loss, no layers.

    With ``Q_L, Q_R`` the eigenvectors of ``L = E[∇∇ᵀ]`` and ``R = E[∇ᵀ∇]``, m the averaged gradient
    and ``S = E[(Q_Lᵀ ∇ Q_R)²]``, all averages bias-corrected::

        Δ = Q_L [(Q_Lᵀ m Q_R) / (√S + ε)] Q_Rᵀ

    where the rounding errors of the largest √S are added to ε. Any pytree: arrays of at least two
    axes are kernels, divided into rows and columns where the two sides are the most equal; all
    others get Adam. When bases are renewed S is transported to the new ones, so that their order
    and signs do not matter. The first step computes the bases and uses them. Non-finite gradients
    change nothing; ``state.rejected`` counts them.

    Args:
      b1: decay of the averaged gradient.
      b2: decay of S.
      eps: ε, in the units of the gradient.
      decay: of L and R; None: ``b2``.
      basis: ``"qr"``: after the first basis one step of orthogonal iteration a refresh; ``"eigh"``,
        ``"low_rank"``, or a record: :class:`~natgrad_jax.Eigenbasis`,
        :class:`~natgrad_jax.LowRank`.
      refresh: :func:`~natgrad_jax.every` or :func:`~natgrad_jax.staggered`; None: staggered over 10
        steps.
      max_size: a side of more rows keeps its own coordinates (one-sided SOAP); None: no limit.

    Returns:
      A transformation with ``update(grads, state, params=None)``.

    Raises:
      ValueError: numbers or choices out of range.

    Source: Vyas et al. 2024, algorithm 3; George et al. 2018 for the same with a Fisher's factors.

    >>> import jax.numpy as jnp, optax, natgrad_jax as ng
    >>> params = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
    >>> tx = optax.chain(ng.scale_by_soap(), optax.scale_by_learning_rate(3e-3))
    >>> updates, _ = tx.update(params, tx.init(params))
    """
    check_fraction(b1=b1, b2=b2, decay=b2 if decay is None else decay)
    check_positive(eps=eps)
    how, rank = gradient_factors.method(eigenbasis_method(basis))
    when = refresh_schedule(refresh, None, USUAL)

    def init_fn(params: optax.Params) -> SOAPState:
        layers = gradient_factors.kernels_of(params, max_size)
        starts = {path: initial(layer, rank) for path, layer in layers.items()}
        weights = {path: jnp.zeros(x.stack_sizes, float) for path, x in layers.items()}
        state = SOAPState(
            clock=Clock(jnp.zeros((), jnp.int32), jnp.zeros((), bool)),
            factors={path: zero_factors(x) for path, x in layers.items()},
            weights=weights,
            bases={path: bases for path, (bases, _) in starts.items()},
            momentum=packed(optax.tree.zeros_like(params), layers),
            moments={path: S for path, (_, S) in starts.items()},
            moment_weights=jax.tree.map(jnp.copy, weights),
            rest=optax.scale_by_adam().init(gradient_factors.split(params, layers)[1]),
            rejected=jnp.zeros((), jnp.int32),
            members=members_of(layers),
        )
        return for_params(state, params)

    def update_fn(
        updates: optax.Updates, state: SOAPState, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, SOAPState]:
        del params, extra
        layers, step = gradient_factors.kernels_of(updates, max_size), state.clock.step
        good = all_finite(updates)
        on_m, on_s = at(b1, step), at(b2, step)
        given, on_factors = packed(updates, layers), on_s if decay is None else at(decay, step)
        state = gradient_factors.averaged(state, given, layers, on_factors, good)
        state = _refreshed(state, layers, how, when)
        state = _moments(state, given, layers, on_m, on_s, good)
        of = lambda path, x: _direction(layers[path], state, path, eps)
        _, others = gradient_factors.split(updates, layers)
        rest, adam_state = optax.scale_by_adam(on_m, on_s, eps).update(others, state.rest)
        found = tree_paths.replace(map_layers(updates, layers, of), rest)
        found = jax.tree.map(lambda x, g: jnp.where(good, x, 0).astype(g.dtype), found, updates)
        keep = lambda new, old: jnp.where(good, new, old).astype(old.dtype)
        return found, state._replace(
            clock=state.clock._replace(step=step + 1),
            rest=jax.tree.map(keep, adam_state, state.rest),
            rejected=state.rejected + ~good,
        )

    return divided(init_fn, update_fn)


def _unknown(state: SOAPState) -> jax.Array:
    """Whether a kernel with factors has no basis yet."""
    pairs = ((state.weights[p], state.moment_weights[p]) for p in state.weights)
    news = [jnp.any((w > 0) & (s == 0)) for w, s in pairs]
    return jnp.any(jnp.stack(news)) if news else jnp.zeros((), bool)


def _refreshed(
    state: SOAPState, layers: Layers, how: Eigenbasis, when: RefreshSchedule
) -> SOAPState:
    """The state with new bases, where due, and m and S transported to them."""

    def renew(due: Mapping[Path, Layer], state: Any) -> Renewed:
        known = lambda path: state.moment_weights[path] > 0
        found = gradient_factors.renewed(due, state, how, when.over, known)
        to_new = lambda move, fields: {
            path: move(layer, fields[path], state.bases[path], found.bases[path])
            for path, layer in due.items()
        }
        m, S = to_new(turned, state.momentum), to_new(transport, state.moments)
        return {"bases": found.bases, "momentum": m, "moments": S}, found.failures

    renewed = ("bases", "momentum", "moments")
    return refresh_due(layers, when, state, _unknown(state), renew, renewed)


def _moments(
    state: SOAPState,
    given: Mapping[Path, jax.Array],
    layers: Layers,
    b1: jax.Array,
    b2: jax.Array,
    good: jax.Array,
) -> SOAPState:
    """The state with this gradient in the averages m and S."""
    count = state.rest.count + 1
    on_m = jnp.where(good, (1 - b1) / (1 - b1**count), 0)
    momentum, moments, weights = (
        dict(x) for x in (state.momentum, state.moments, state.moment_weights)
    )
    for path, x in given.items():
        x = entered(layers[path], state.bases[path], x)
        momentum[path] = factor_averages.step(on_m, momentum[path], x)
        squares = moments_inside(layers[path], state.bases[path], x)
        informative = jnp.broadcast_to(good, weights[path].shape)
        rate, weights[path] = factor_averages.rate(weights[path], b2, informative)
        moments[path] = factor_averages.step(rate, moments[path], squares)
    return state._replace(momentum=momentum, moments=moments, moment_weights=weights)


def _direction(layer: Layer, state: SOAPState, path: Path, eps: float) -> jax.Array:
    roots = jnp.sqrt(state.moments[path])
    # what is zero but for rounding, as outside a first gradient's span, is not made as large as it
    least = jnp.finfo(roots.dtype).eps * max(roots.shape[-2:])
    gains = 1 / (roots + eps + least * roots.max((-2, -1), keepdims=True))
    bases = state.bases[path]
    return left(layer, bases, scaled_inside(layer, bases, gains, state.momentum[path]))


def soap(
    learning_rate: Scalar, b1: Scalar = 0.95, b2: Scalar = 0.95, eps: float = 1e-8, *,
    weight_decay: Scalar = 0.0, decay: Scalar | None = None,
    basis: LowRank | Eigenbasis | str = "qr", refresh: Refresh | str | None = None,
    max_size: int | None = MAX_FACTOR,
) -> optax.GradientTransformationExtraArgs:  # fmt: skip
    """SOAP with decoupled weight decay.

    :func:`scale_by_soap`, then ``weight_decay · params`` added, then the learning rate.

    Args:
      learning_rate: η, a float, an array or a schedule.
      weight_decay: decoupled, as in ``optax.adamw``; per step, times the learning rate.
      b1, b2, eps, decay, basis, refresh, max_size: as in :func:`scale_by_soap`.

    Returns:
      A transformation with ``update(grads, state, params)``.

    Raises:
      ValueError: as :func:`scale_by_soap`.

    Source: Vyas et al. 2024.

    >>> import natgrad_jax as ng
    >>> tx = ng.soap(3e-3, weight_decay=1e-2)
    """
    preconditioner = scale_by_soap(
        b1, b2, eps, decay=decay, basis=basis, refresh=refresh, max_size=max_size
    )
    return descent(preconditioner, Layers({}), learning_rate, optax.identity(), weight_decay)
