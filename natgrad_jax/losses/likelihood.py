"""From a distribution and observed targets to a loss: masks, weights, and their checks."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Real, Shaped

from natgrad_jax.losses.distribution_base import Distribution
from natgrad_jax.losses.loss import Loss, Term, value_range
from natgrad_jax.utils.hyperparams import is_concrete


@dataclass(frozen=True)
class Likelihood(Distribution):
    """A distribution whose negative log-likelihood is a :class:`Loss`."""

    def nll(
        self,
        targets: ArrayLike,
        where: Shaped[ArrayLike, "*#examples"] | None = None,
        weights: Real[ArrayLike, "*#examples"] | None = None,
    ) -> Loss:
        """The mean negative log-likelihood over examples, as a :class:`Loss`.

        ``Σ w (−log p) / Σ w`` over all examples, with ``w = where · weights``; a missing mask or
        weight counts as 1. No gradient flows into ``w``. Masked examples contribute nothing to the
        loss and to its curvature: a batch gives the factors that it gives without them. So do
        masked positions (tokens), in layers whose rows lie along the mask's axes.

        Multiplied by a negative number, a loss keeps its gradient and loses its curvature.

        Args:
          targets: the observed targets. For :class:`Categorical` class indices ``(*examples,)`` or
            probabilities ``(*examples, C)``; otherwise an array of the output's shape.
          where: a mask that broadcasts to ``(*examples,)``.
          weights: nonnegative weights that broadcast to ``(*examples,)``. Under ``jit`` their
            values cannot be checked; negative ones then make the loss and its gradients NaN.

        Raises:
          ValueError: targets of the wrong shape; targets or weights out of range, if concrete.
        """
        targets = jnp.asarray(targets)
        weight = example_weights(self, where, weights)
        if weight is not None and targets.shape[: len(self.examples)] == self.examples:
            # targets of masked examples may be anything, for example −1 or NaN
            counts = weight > 0
            if targets.ndim > counts.ndim:
                counts = self.beside_event(counts)
            targets = jnp.where(counts, targets, jnp.zeros((), targets.dtype))
        self.check(targets)
        if not math.prod(self.natural.shape):
            raise ValueError(
                f"{type(self).__name__}.nll got an empty batch: its {self.natural_name} have "
                f"shape {self.natural.shape}. Skip empty batches before the loss."
            )
        return Loss((Term(self, targets, weight),))


def example_weights(
    distribution: Distribution,
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
            whole = value.shape == distribution.natural.shape
            raise ValueError(
                f"nll: {name} must broadcast to the examples' shape {examples}; got {value.shape}."
                + _for_each_output(name, distribution) * whole
            )
        weight = weight * (value if value.dtype == bool else _not_negative(name, value))
    return jax.lax.stop_gradient(jnp.broadcast_to(weight, examples))


def _for_each_output(name: str, distribution: Distribution) -> str:
    """What to write instead of a mask over single outputs."""
    reduced = f"{name}.any(-1)" if name == "where" else f"{name}.mean(-1)"
    told = f" It is one number for each example, such as {reduced}."
    if not hasattr(distribution, "event_ndims"):
        return told
    kind, natural = type(distribution).__name__, distribution.natural_name
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
    "a likelihood and has no Fisher."
)


def check_values(loss: Loss) -> None:
    """Raise ValueError for targets or weights out of range, if they are concrete: ``loss_fn`` was
    traced, and could not see them."""
    for term in loss.terms:
        term.distribution.check(term.targets)
        weighted = term.weight is not None and is_concrete(term.weight)
        if weighted and np.isnan(np.asarray(term.weight)).any():
            raise ValueError(NEGATIVE.format("weights", "some are"))
