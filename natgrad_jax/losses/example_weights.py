"""Masks and weights of examples, and the checks of a loss's values."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Real, Shaped

from natgrad_jax.losses.distribution_base import Predictive
from natgrad_jax.losses.terms import Loss, value_range
from natgrad_jax.utils.hyperparams import is_concrete

# Whether likelihoods only hand on their outputs: targets and masks that loss_fn holds itself are
# then not looked at, as where it runs on one example of its batch.
OUTPUTS_ALONE = ContextVar("outputs_alone", default=False)


@contextmanager
def outputs_alone() -> Iterator[None]:
    """Inside, losses have outputs and no targets and weights."""
    token = OUTPUTS_ALONE.set(True)
    try:
        yield
    finally:
        OUTPUTS_ALONE.reset(token)


def example_weights(
    distribution: Predictive,
    where: Shaped[ArrayLike, "*#examples"] | None,
    weights: Real[ArrayLike, "*#examples"] | None,
) -> Float[Array, "*examples"] | None:
    """The product of mask and weights, or None if there are neither."""
    examples = distribution.examples
    if where is None and weights is None:
        return None
    weight = jnp.ones((), float)
    for name, given in (("where", where), ("weights", weights)):
        if given is None:
            continue
        value = jnp.asarray(given)
        aligned = zip(reversed(value.shape), reversed(examples), strict=False)
        if value.ndim > len(examples) or any(n not in (1, m) for n, m in aligned):
            whole = value.shape == distribution.parametrized[distribution.first].shape
            raise ValueError(
                f"nll: {name} must broadcast to the examples' shape {examples}; got {value.shape}."
                + _for_each_output(name, distribution) * whole
            )
        weight = weight * (value if value.dtype == bool else _not_negative(name, value))
    return jax.lax.stop_gradient(jnp.broadcast_to(weight, examples))


def _for_each_output(name: str, distribution: Predictive) -> str:
    """What to write instead of a mask over single outputs."""
    reduced = f"{name}.any(-1)" if name == "where" else f"{name}.mean(-1)"
    told = f" It is one number for each example, such as {reduced}."
    if not distribution.event_axes:
        return told
    kind, natural = type(distribution).__name__, distribution.first
    return told + (
        " To mask or weight single outputs, make every number an example of its own: "
        f"ng.{kind}({natural}, event_ndims=0).nll(targets, {name}={name}); its mean is over "
        "numbers."
    )


def _not_negative(name: str, value: Real[Array, "..."]) -> Real[Array, "..."]:
    """``value``, checked if it is concrete; traced values become NaN where they are negative."""
    if not is_concrete(value):
        return jnp.where(value < 0, jnp.nan, value)
    low, high = value_range(value) if value.size else (0, 0)
    if not low >= 0:
        raise ValueError(NEGATIVE.format(name, f"got values from {low:g} to {high:g}"))
    return value


NEGATIVE = (
    "nll: {} must not be negative (nor NaN); {}. They say how often an example counts: 0, or "
    "where=mask, leaves one out. With signed weights (advantages, policy gradients) the sum is not "
    "a likelihood and has no Fisher: write ng.loss(surrogate, distribution)."
)


def check_values(loss: Loss) -> None:
    """Raise ValueError for targets or weights out of range, if they are concrete: ``loss_fn`` was
    traced, and could not see them."""
    for term in loss.terms:
        if term.targets is not None:
            term.distribution.check(term.targets)
        weighted = term.weight is not None and is_concrete(term.weight)
        if weighted and np.isnan(np.asarray(term.weight)).any():
            raise ValueError(NEGATIVE.format("weights", "some are"))
