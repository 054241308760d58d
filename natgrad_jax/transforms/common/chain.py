"""What each alias (:func:`natgrad_jax.kfac`, …) chains after its preconditioner."""

from typing import Any

import optax

from natgrad_jax.layers.collection import Layers
from natgrad_jax.utils import tree_paths
from natgrad_jax.utils.hyperparams import Scalar, check_fraction


def descent(
    preconditioner: optax.GradientTransformation,
    layers: Layers,
    learning_rate: Scalar,
    momentum: optax.GradientTransformation,
    weight_decay: Scalar,
) -> optax.GradientTransformationExtraArgs:
    """The preconditioner, then momentum, decoupled weight decay and the learning rate."""
    return optax.chain(
        preconditioner,
        momentum,
        _weight_decay(weight_decay, layers),
        optax.scale_by_learning_rate(learning_rate),
    )


def trace(decay: Scalar | None, nesterov: bool = False) -> optax.GradientTransformation:
    """``optax.trace`` with a decay that may be a schedule; the identity for None."""
    if decay is None:
        return optax.identity()
    check_fraction(momentum=decay)
    # optax.trace takes a number only; with inject_hyperparams it takes a schedule
    make = optax.inject_hyperparams(optax.trace) if callable(decay) else optax.trace
    return make(decay=decay, nesterov=nesterov)


def _weight_decay(rate: Scalar, layers: Layers) -> optax.GradientTransformation:
    # without decay the update needs no params
    if isinstance(rate, int | float) and rate == 0:
        return optax.identity()
    frozen = {x.path for x in layers.leftover if x.block == "frozen"}

    def decays(params: Any) -> Any:
        return tree_paths.replace(
            params, {path: path not in frozen for path in tree_paths.leaves(params)}
        )

    return optax.add_decayed_weights(rate, mask=decays if frozen else None)
