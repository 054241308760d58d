"""What every alias chains after its own preconditioner."""

import optax

from natgrad_jax.scalars import Scalar, at, check_positive


def descent(
    preconditioner: optax.GradientTransformation,
    learning_rate: Scalar,
    momentum: Scalar | None,
    weight_decay: Scalar,
) -> optax.GradientTransformationExtraArgs:
    """The preconditioner, then momentum, decoupled weight decay and the learning rate."""
    return optax.chain(
        preconditioner,
        _momentum(momentum),
        _weight_decay(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def plain(
    learning_rate: Scalar, momentum: Scalar | None, weight_decay: Scalar
) -> optax.GradientTransformationExtraArgs:
    """Momentum, decoupled weight decay and the learning rate, of gradients as they come."""
    return descent(optax.identity(), learning_rate, momentum, weight_decay)


def _momentum(decay: Scalar | None) -> optax.GradientTransformation:
    if decay is None:
        return optax.identity()
    # optax.trace takes a number; inject_hyperparams is optax's way from a number to a schedule
    return (
        optax.inject_hyperparams(optax.trace)(decay=decay)
        if callable(decay)
        else optax.trace(decay)
    )


def _weight_decay(rate: Scalar) -> optax.GradientTransformation:
    # without decay the update needs no params
    none = isinstance(rate, int | float) and rate == 0
    return optax.identity() if none else optax.add_decayed_weights(rate)


def per_squared_rate(trust_radius: Scalar | None, learning_rate: Scalar) -> Scalar | None:
    """κ / η²: the trust region of a direction that the learning rate has yet to scale."""
    if trust_radius is None:
        return None
    if callable(trust_radius) or callable(learning_rate):
        return lambda step: at(trust_radius, step) / at(learning_rate, step) ** 2
    check_positive(trust_radius=trust_radius, learning_rate=learning_rate)
    return trust_radius / learning_rate**2
