"""What K-FAC and NGD share: damped inverses of one Kronecker product per layer."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from natgrad_jax.curvature import factor_averages
from natgrad_jax.curvature.factor_averages import FactorsLike
from natgrad_jax.curvature.inverse_methods import InverseMethod
from natgrad_jax.curvature.inverses import (
    identities,
    inverses,
    keep_finite,
    operate,
    updated,
)
from natgrad_jax.layers.collection import Layers
from natgrad_jax.layers.layer import Layer
from natgrad_jax.linalg.batched_solve import solve
from natgrad_jax.state.clock import Clock
from natgrad_jax.state.members import Members
from natgrad_jax.statistics.spec import EncodedSpec
from natgrad_jax.transforms.common import estimators
from natgrad_jax.transforms.common.preconditioner import (
    Method,
    Now,
    PreconditionerConfig,
    preconditioner,
)
from natgrad_jax.transforms.common.refresh_schedule import Renewed, refresh_due
from natgrad_jax.utils.short_repr import printed_short
from natgrad_jax.utils.tree_paths import Path


@printed_short
class KFACState(NamedTuple):
    """State of :func:`scale_by_kfac`; dictionaries by layer path, or parameter path if leftover.

    Layers of equal geometry are kept at the path of the first, stacked; :func:`natgrad_jax.factors`
    and :func:`natgrad_jax.bases` give each at its own.

    ``damping``: λ of the last step, ``()``. ``bases``: damped inverses of the factors at the last
    refresh. ``request``: which statistics the next backward pass must measure, and ``members``:
    which layers are stacked, both without arrays. The other fields are those of
    :class:`~natgrad_jax.transforms.common.estimators.Estimates`.
    """

    clock: Clock
    damping: jax.Array
    factors: dict[Path, FactorsLike]
    weights: dict[Path, jax.Array]
    bases: dict[Path, FactorsLike]
    diagonal: dict[Path, jax.Array]
    diagonal_weights: dict[Path, jax.Array]
    examples: jax.Array
    rejected: jax.Array
    request: EncodedSpec
    members: Members


def kronecker(
    layers: Layers, config: PreconditionerConfig, method: InverseMethod
) -> optax.GradientTransformationExtraArgs:
    """Precondition by damped inverses of Kronecker factors; ``config`` names how λ is split."""

    def start(layers: Layers) -> dict[str, Any]:
        return {"bases": {path: identities(layer, method) for path, layer in layers.items()}}

    def follow(state: KFACState, layers: Layers, now: Now) -> KFACState:
        if method.update_rank:
            state = _absorb(state, layers, now, method.update_rank)
        return _refresh(state, layers, now, method, config)

    apply = lambda layer, state, path, x, damping: operate(layer, state.bases[path], x)
    own = Method(KFACState, start, follow, apply, follows_sums=method.update_rank > 0)
    return preconditioner(layers, config, own)


def _absorb(state: KFACState, layers: Layers, now: Now, rank: int) -> KFACState:
    """The state with this batch absorbed into the inverses, by low-rank updates.

    The G of a layer that several terms depend on changes only at the next refresh.
    """
    statistics = now.statistics

    def absorbed() -> dict[Path, FactorsLike]:
        bases = {}
        for path, layer in layers.items():
            old = state.bases[path]
            if layer.output_side is None:
                bases[path] = old
                continue
            batch = estimators.fisher_factors(layer, statistics)
            factors, good, before = batch.factors, batch.good, now.weights[path]
            if good.ndim > before.ndim:  # one share per term, each with its own rate
                own = None if layer.mixed else factors.A
                factors, good = factors._replace(A=own, G=None), good.any(0)
            rate, _ = factor_averages.rate(before, now.decay, good & (before > 0))
            new = updated(layer, old, factors, rate, rank)
            bases[path], _ = keep_finite(layer, new, old, state.weights[path])
        return bases

    bases = jax.lax.cond(estimators.any_seen(statistics), absorbed, lambda: state.bases)
    return state._replace(bases=bases)


def _refresh(
    state: KFACState,
    layers: Layers,
    now: Now,
    method: InverseMethod,
    config: PreconditionerConfig,
) -> KFACState:
    """The state with inverses of the current factors, where due; failures keep the old ones."""

    def renew(due: Mapping[Path, Layer], state: KFACState) -> Renewed:
        bases, rejected = {}, jnp.zeros((), jnp.int32)
        of = lambda path, layer: inverses(
            layer,
            factor_averages.in_full(layer, state.factors[path]),
            now.damping,
            state.bases[path],
            method,
            config.request.split,
        )
        found = solve({path: of(path, layer) for path, layer in due.items()}, config.refresh.over)
        for path, layer in due.items():
            old, weights = state.bases[path], state.weights[path]
            new, failures = found[path]
            bases[path], bad = keep_finite(layer, new, old, weights)
            rejected += bad + jnp.where(jnp.any(weights > 0), failures, 0)
        return {"bases": bases}, rejected

    return refresh_due(layers, config.refresh, state, now.first, renew)
