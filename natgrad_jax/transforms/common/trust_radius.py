"""How far one step may go: the bound of a trust region, alone or in proportion to the batch."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax.utils.hyperparams import Scalar, at, check_positive


@dataclasses.dataclass(frozen=True)
class PerExample:
    """A trust radius in proportion to the number N of a batch's examples: ``min(rate · N, most)``.

    Over the first ``warmup`` steps it grows to that in equal parts.

    Where noise makes up the gradient, ``∇ᵀΔ`` is ``tr(F⁻¹Σ)/N``, in proportion to 1/N, and steps of
    a fixed κ keep a loss above its least by about ``√(κ tr(F⁻¹Σ)/N)``. In proportion to N, κ keeps
    that part the same for every batch. The default of :func:`~natgrad_jax.kfac`, with a warm-up of
    10 steps, and :func:`~natgrad_jax.ekfac`: 1e-3 for 125 examples, 5e-3 from 625 on.

    Args:
      rate: of κ per example; tokens count as examples if the loss is a mean over tokens.
      most: the largest κ.
      warmup: κ of step t = 0, 1, … is multiplied by ``min(1, (t + 1) / warmup)``: the first factors
        are of few examples and of parameters that move fast.

    Raises:
      ValueError: a number that is not positive.

    Source: Ba et al. 2016, section 5, for the trust region; the proportion is measured here
    (``benchmarks/RESULTS.md``).

    >>> import natgrad_jax as ng
    >>> tx = ng.kfac(0.1, ng.Layers({}), trust_radius=ng.PerExample(2e-5))
    """

    rate: float = 8e-6
    most: float = 5e-3
    warmup: int = 1

    def __post_init__(self) -> None:
        check_positive(rate=self.rate, most=self.most, warmup=self.warmup)


class OfUpdate(NamedTuple):
    """A trust radius κ of updates that a learning rate η will still scale: ``κ / η²`` before it."""

    radius: Scalar | PerExample
    learning_rate: Scalar = 1.0


TrustRadius = Scalar | PerExample | OfUpdate


def before_rate(radius: Scalar | PerExample | None, learning_rate: Scalar) -> OfUpdate | None:
    """The trust radius of an update before the learning rate scales it; raises ValueError for
    numbers out of range."""
    if radius is None:
        return None
    check_positive(learning_rate=learning_rate)
    return checked(OfUpdate(radius, learning_rate))


def checked(radius: TrustRadius | None) -> OfUpdate | None:
    """The same as a record; raises ValueError if it is not positive."""
    if radius is None:
        return None
    of_update = radius if isinstance(radius, OfUpdate) else OfUpdate(radius)
    if not isinstance(of_update.radius, PerExample):
        check_positive(trust_radius=of_update.radius)
    return of_update


def radius_at(of_update: OfUpdate, step: jax.Array, examples: jax.Array) -> jax.Array:
    """``κ / η²`` at a step, ``()``; ``examples``: those of the batch, in each term of the loss."""
    radius = of_update.radius
    if isinstance(radius, PerExample):
        kappa = jnp.minimum(radius.rate * jnp.max(examples), radius.most)
        kappa *= jnp.minimum((step + 1) / radius.warmup, 1)
    else:
        kappa = at(radius, step)
    return kappa / at(of_update.learning_rate, step) ** 2
