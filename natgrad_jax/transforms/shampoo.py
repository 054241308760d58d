"""Shampoo: gradients times the inverse roots of their own Kronecker factors."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from natgrad_jax.curvature.eigenbases import Eigenbasis, initial, scaled
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
from natgrad_jax.transforms.common.chain import descent, trace
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

USUAL = staggered(20)


@printed_short
class ShampooState(NamedTuple):
    """State of :func:`scale_by_shampoo`, dictionaries by the path of a kernel.

    Kernels of equal shape are stacked at the path of the first (``members``, without arrays, names
    them); :func:`natgrad_jax.factors` and :func:`natgrad_jax.bases` give each at its own.

    ``factors``: ``E[∇∇ᵀ]`` and ``E[∇ᵀ∇]``; ``weights``: the accumulated weight of each. ``bases``:
    their eigenvectors at the last refresh. ``products``: ``d_L d_Rᵀ`` of their eigenvalues there.
    ``graft``: the state of what gives the steps their size. ``rejected``: number of non-finite
    gradients and bases that were dropped, int32 ``()``.

    >>> import natgrad_jax as ng
    >>> state = ng.scale_by_shampoo().init({})
    >>> isinstance(state, ng.ShampooState), int(state.clock.step), int(state.rejected)
    (True, 0, 0)
    """

    clock: Clock
    factors: dict[Path, FactorsLike]
    weights: dict[Path, jax.Array]
    bases: dict[Path, FactorsLike]
    products: dict[Path, jax.Array]
    graft: Any
    rejected: jax.Array
    members: Members


def scale_by_shampoo(
    decay: Scalar = 0.95, *, epsilon: float = 1e-6, power: float = 0.25,
    graft: optax.GradientTransformation | None = None,
    basis: LowRank | Eigenbasis | str = "eigh", refresh: Refresh | str | None = None,
    max_size: int | None = MAX_FACTOR,
) -> optax.GradientTransformationExtraArgs:  # fmt: skip
    """Multiply each kernel's gradient by inverse roots of ``E[∇∇ᵀ]`` and ``E[∇ᵀ∇]``.

    With ``L = E[∇∇ᵀ] = Q_L diag(d_L) Q_Lᵀ``, R likewise, ``p`` the power, ε relative to the
    largest ``d_L d_Rᵀ``, and ``Δ_g`` the grafted step::

        Δ = L^{-p} ∇ R^{-p} = Q_L [(Q_Lᵀ ∇ Q_R) / (d_L d_Rᵀ + ε)^p] Q_Rᵀ,   Δ ← Δ ‖Δ_g‖ / ‖Δ‖

    Any pytree, no loss and no layers: arrays of at least two axes are kernels, divided into rows
    and columns where the two sides are the most equal; all others take the grafted step itself.
    Non-finite gradients change nothing; ``state.rejected`` counts them.

    Args:
      decay: of L and R.
      epsilon: ε, relative, positive.
      power: 1/4 as published; 1/2 gives the natural gradient of the Kronecker product ``L ⊗ R``
        (up to its scale), for which the factors are closest to a Fisher's.
      graft: an optax transformation before its learning rate, whose norm, array by array, the steps
        get; None: ``optax.scale_by_adam()``.
      basis, max_size: as in :func:`natgrad_jax.scale_by_soap`; a side that is too wide is its
        diagonal.
      refresh: :func:`~natgrad_jax.every` or :func:`~natgrad_jax.staggered`; None: staggered over 20
        steps.

    Returns:
      A transformation with ``update(grads, state, params=None)``.

    Raises:
      ValueError: numbers or choices out of range.

    Source: Gupta, Koren & Singer 2018, algorithm 1; Anil et al. 2020 (averages, grafting);
    Morwani et al. 2024 for the power 1/2.

    >>> import jax.numpy as jnp, optax, natgrad_jax as ng
    >>> params = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
    >>> tx = optax.chain(ng.scale_by_shampoo(), optax.scale_by_learning_rate(3e-3))
    >>> updates, _ = tx.update(params, tx.init(params))
    """
    check_fraction(decay=decay)
    check_positive(epsilon=epsilon, power=power)
    how, rank = gradient_factors.method(eigenbasis_method(basis))
    when = refresh_schedule(refresh, None, USUAL)
    sized = optax.scale_by_adam() if graft is None else graft

    def init_fn(params: optax.Params) -> ShampooState:
        layers = gradient_factors.kernels_of(params, max_size)
        starts = {path: initial(layer, rank) for path, layer in layers.items()}
        state = ShampooState(
            clock=Clock(jnp.zeros((), jnp.int32), jnp.zeros((), bool)),
            factors={path: zero_factors(x) for path, x in layers.items()},
            weights={path: jnp.zeros(x.stack_sizes, float) for path, x in layers.items()},
            bases={path: bases for path, (bases, _) in starts.items()},
            products={path: S for path, (_, S) in starts.items()},
            graft=sized.init(params),
            rejected=jnp.zeros((), jnp.int32),
            members=members_of(layers),
        )
        return for_params(state, params)

    def update_fn(
        updates: optax.Updates,
        state: ShampooState,
        params: optax.Params | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, ShampooState]:
        del extra
        layers, step = gradient_factors.kernels_of(updates, max_size), state.clock.step
        good = all_finite(updates)
        given = packed(updates, layers)
        news = [jnp.any(state.weights[path] == 0) for path in given]
        first = good & jnp.any(jnp.stack(news)) if news else jnp.zeros((), bool)
        state = gradient_factors.averaged(state, given, layers, at(decay, step), good)
        state = _refreshed(state, layers, first, how, when)
        steps, graft_state = sized.update(updates, state.graft, params)
        of = lambda path, x: _direction(layers[path], state, path, x, epsilon, power)
        found = _with_norms(map_layers(updates, layers, of), steps, layers)
        found = jax.tree.map(lambda x, g: jnp.where(good, x, 0).astype(g.dtype), found, updates)
        keep = lambda new, old: jnp.where(good, new, old).astype(old.dtype)
        return found, state._replace(
            clock=state.clock._replace(step=step + 1),
            graft=jax.tree.map(keep, graft_state, state.graft),
            rejected=state.rejected + ~good,
        )

    return divided(init_fn, update_fn)


def _refreshed(
    state: ShampooState, layers: Layers, first: jax.Array, how: Eigenbasis, when: RefreshSchedule
) -> ShampooState:
    """The state with new bases and products of eigenvalues, where due; failures keep the old."""

    def renew(due: Mapping[Path, Layer], state: Any) -> Renewed:
        known = lambda path: jnp.any(state.products[path] > 0, axis=(-2, -1))
        found = gradient_factors.renewed(due, state, how, when.over, known)
        finite = lambda x: jnp.isfinite(x.sum((-2, -1), keepdims=True))
        products = {
            p: jnp.where(finite(x), x, state.products[p]) for p, x in found.products.items()
        }
        return {"bases": found.bases, "products": products}, found.failures

    return refresh_due(layers, when, state, first, renew, ("bases", "products"))


def _direction(
    layer: Layer, state: ShampooState, path: Path, x: jax.Array, epsilon: float, power: float
) -> jax.Array:
    products = state.products[path]
    largest = products.max((-2, -1), keepdims=True)
    known = largest > jnp.finfo(products.dtype).tiny  # fourth powers of gradients may underflow
    # relative to the largest: the norm is another step's
    relative = products / jnp.where(known, largest, 1)
    return scaled(layer, state.bases[path], jnp.where(known, relative + epsilon, 1) ** -power, x)


def _with_norms(updates: Any, steps: Any, layers: Layers) -> Any:
    """Each kernel's update with the norm of its step; the step itself of all others."""
    directions, _ = gradient_factors.split(updates, layers)
    found = tree_paths.leaves(steps)
    for path, direction in directions.items():
        own, wanted = (optax.tree.norm(x) for x in (direction, found[path]))
        found[path] = direction * (wanted / jnp.where(own > 0, own, 1))
    return tree_paths.replace(updates, found)


def shampoo(
    learning_rate: Scalar, decay: Scalar = 0.95, *, momentum: Scalar | None = 0.9,
    nesterov: bool = False, weight_decay: Scalar = 0.0, epsilon: float = 1e-6,
    power: float = 0.25, graft: optax.GradientTransformation | None = None,
    basis: LowRank | Eigenbasis | str = "eigh", refresh: Refresh | str | None = None,
    max_size: int | None = MAX_FACTOR,
) -> optax.GradientTransformationExtraArgs:  # fmt: skip
    """Shampoo with momentum and decoupled weight decay.

    :func:`scale_by_shampoo`, then ``optax.trace(momentum, nesterov)``, then
    ``weight_decay · params`` added, then the learning rate; no momentum if ``momentum`` is None.

    Args:
      learning_rate: η, a float, an array or a schedule.
      momentum: decay of the trace of preconditioned gradients.
      nesterov: Nesterov's momentum, as in ``optax.sgd``.
      weight_decay: decoupled, as in ``optax.adamw``; per step, times the learning rate.
      decay, epsilon, power, graft, basis, refresh, max_size: as in :func:`scale_by_shampoo`.

    Returns:
      A transformation with ``update(grads, state, params)``.

    Raises:
      ValueError: as :func:`scale_by_shampoo`.

    Source: Gupta, Koren & Singer 2018; Anil et al. 2020.

    >>> import natgrad_jax as ng
    >>> tx = ng.shampoo(1e-3, weight_decay=1e-2)
    """
    preconditioner = scale_by_shampoo(
        decay, epsilon=epsilon, power=power, graft=graft, basis=basis, refresh=refresh,
        max_size=max_size,
    )  # fmt: skip
    velocity = trace(momentum, nesterov)
    return descent(preconditioner, Layers({}), learning_rate, velocity, weight_decay)
