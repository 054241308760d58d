"""How far one step may go: the bound of a trust region, alone or in proportion to the batch."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax.utils.hyperparams import Scalar, at, check_positive


@dataclasses.dataclass(frozen=True)
class PerExample:
    """A trust radius in proportion to the number N of a batch's examples, which may grow and decay.

    At step t = 0, 1, … it is::

        κ = min(rate N, most) · min(1, (t + 1) / warmup_steps) / √(1 + t / decay_steps)

    Where noise makes up the gradient, ``∇ᵀΔ`` is ``tr(F⁻¹Σ)/N``, in proportion to 1/N, and steps of
    a fixed κ keep a loss above its least by about ``√(κ tr(F⁻¹Σ)/N)``. In proportion to N, κ keeps
    that part the same for every batch; with a decay it vanishes, and steps shrink as ``t^(-1/4)``.
    The first factors are of few examples and of parameters that move fast, hence a warm-up.

    The default of :func:`~natgrad_jax.kfac` is ``PerExample(1.2e-5, 7.5e-3, 10, 100)``: at most
    1.5e-3 for 125 examples, 7.5e-3 from 625 on. That of :func:`~natgrad_jax.ekfac` is these.

    Args:
      rate: of κ per example; tokens count as examples if the loss is a mean over tokens.
      most: the largest κ.
      warmup_steps: number of steps over which κ grows, in equal parts.
      decay_steps: number of steps after which κ has fallen by ``1/√2``; None: no decay.

    Raises:
      ValueError: a number that is not positive.

    Source: Ba et al. 2016, section 5, for the trust region; proportion and decay are measured here
    (``benchmarks/RESULTS.md``).

    >>> import natgrad_jax as ng
    >>> tx = ng.kfac(0.1, ng.Layers({}), trust_radius=ng.PerExample(2e-5))
    """

    rate: float = 8e-6
    most: float = 5e-3
    warmup_steps: int = 1
    decay_steps: float | None = None

    def __post_init__(self) -> None:
        given = {k: x for k, x in dataclasses.asdict(self).items() if x is not None}
        check_positive(**given)

    def at(self, step: jax.Array, examples: jax.Array) -> jax.Array:
        """κ of a step."""
        kappa = jnp.minimum(self.rate * jnp.max(examples), self.most)
        kappa *= jnp.minimum((step + 1) / self.warmup_steps, 1)
        return kappa if self.decay_steps is None else kappa / jnp.sqrt(1 + step / self.decay_steps)


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
    radius, rate = of_update.radius, at(of_update.learning_rate, step)
    kappa = radius.at(step, examples) if isinstance(radius, PerExample) else at(radius, step)
    return kappa / rate**2
