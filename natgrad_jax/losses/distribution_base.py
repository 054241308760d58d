"""What a loss and its Fisher need to know about a predictive distribution."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, Shaped


@dataclass(frozen=True)
class Distribution:
    """A predictive distribution over targets, one for each example.

    The first field of a subclass is the network's output (logits, or a mean), of shape
    ``(*examples, *event)``: the last ``event_axes`` axes belong to one example, the axes before
    them count examples. Below, "outputs" stands for that shape.
    """

    natural_name: ClassVar[str]

    @property
    def natural(self) -> Float[Array, "*outputs"]:
        """The network's output, ``(*examples, *event)``."""
        return getattr(self, self.natural_name)

    def with_natural(self, natural: Float[Array, "*outputs"]) -> "Distribution":
        """The same distribution at another output of the network."""
        return replace(self, **{self.natural_name: natural})

    @property
    def event_axes(self) -> int:
        """The number of trailing axes that belong to one example."""
        return 1

    @property
    def examples(self) -> tuple[int, ...]:
        """The axes that count examples: the shape of the output without the event's axes."""
        return self.natural.shape[: self.natural.ndim - self.event_axes]

    @property
    def event(self) -> tuple[int, ...]:
        """The shape of the output for one example."""
        return self.natural.shape[self.natural.ndim - self.event_axes :]

    @property
    def columns(self) -> int:
        """The number of columns of R, the square root of one example's output Hessian ``R Rᵀ``."""
        return math.prod(self.event)

    def beside_event(self, x: Shaped[Array, "*examples"]) -> Shaped[Array, "*examples_and_ones"]:
        """``x`` with a trailing axis of length 1 for every event axis: it scales the outputs."""
        return jnp.expand_dims(x, tuple(range(-self.event_axes, 0)))

    def over_event(
        self, x: Float[Array, "*outputs"], keepdims: bool = False
    ) -> Float[Array, "..."]:
        """The sum of ``x`` over the event's axes: one number for each example."""
        return jnp.sum(x, axis=tuple(range(-self.event_axes, 0)), keepdims=keepdims)

    def nll_per_example(self, targets: Shaped[Array, "..."]) -> Float[Array, "*examples"]:
        """``−log p(target)`` of each example, without additive constants."""
        raise NotImplementedError

    def sample(self, key: PRNGKeyArray) -> Shaped[Array, "..."]:
        """Targets drawn from the distribution."""
        raise NotImplementedError

    def root_column(self, column: Int[Array, ""] | int) -> Float[Array, "*outputs"]:
        """One column of R for every example, where ``R Rᵀ`` is the example's output Hessian."""
        raise NotImplementedError

    def check(self, targets: Shaped[Array, "..."]) -> None:
        """Raise ValueError if these cannot be targets; their values are checked when concrete."""
