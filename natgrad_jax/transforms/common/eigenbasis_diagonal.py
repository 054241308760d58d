"""The diagonal of the Fisher in Kronecker eigenbases: EKFAC's state and its update."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from natgrad_jax.curvature.eigenbases import Eigenbasis, initial, scaled
from natgrad_jax.curvature.factor_averages import Factors
from natgrad_jax.layers.collection import Layers
from natgrad_jax.layers.layer import Layer
from natgrad_jax.state.clock import Clock
from natgrad_jax.statistics.spec import EncodedSpec
from natgrad_jax.transforms.common import second_moments
from natgrad_jax.transforms.common.preconditioner import (
    Method,
    Now,
    PreconditionerConfig,
    preconditioner,
)
from natgrad_jax.utils.tree_paths import Path


class EKFACState(NamedTuple):
    """State of :func:`scale_by_ekfac`; dictionaries by layer path, or parameter path if leftover.

    ``damping``: λ of the last step, ``()``. ``bases``: eigenvectors of the factors at the last
    refresh, as columns: all, or the leading ones. ``moments``: S in the packed coordinates of the
    bases, ``(*stack, *blocks, rows, columns)``, or in those of the leading directions, followed by
    the mean of all others; ``moment_weights``: the accumulated weight of each S, ``(*stack,)``. If
    several terms of the loss each have their own S, both have a leading axis of terms.
    ``examples``: number of examples of the last measured batch, ``()`` or ``(terms,)``.
    ``request``: which statistics the next backward pass must measure, without arrays.

    The other fields are those of
    :class:`~natgrad_jax.transforms.common.estimators.Estimates`.

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
    request: EncodedSpec


def in_eigenbases(
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
            "examples": jnp.ones((len(layers.terms),) if len(layers.terms) > 1 else (), float),
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
