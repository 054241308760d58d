"""What a loss and its Fisher need to know about a predictive distribution: its outputs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Self

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, Shaped

from natgrad_jax.losses.output_fisher import Entries, root_of, solved
from natgrad_jax.utils.precision import at_least_float32

# Arrays by the names of a distribution's outputs.
Outputs = dict[str, Float[Array, "..."]]


@dataclass(frozen=True)
class Predictive:
    """Arrays that parametrize a predictive distribution: its *outputs*, those of the network.

    Each has the shape ``(*examples, *event, *features)``: the axes of ``event`` count the numbers
    of one example, the axes before them examples, and ``features`` (``features`` of the class, by
    name) are what one number needs, such as a logit for each class. Names in ``fixed`` are of
    arrays that depend on no parameter; the Fisher leaves them out.
    """

    event_ndims: int | None = field(default=None, kw_only=True, metadata={"static": True})
    fixed: tuple[str, ...] = field(default=(), kw_only=True, repr=False, metadata={"static": True})

    # by output the number of axes behind the event's; the axes of an event if nothing is said
    features: ClassVar[Mapping[str, int]] = {}
    usual_event_ndims: ClassVar[int] = 1

    def log_prob(self, targets: Shaped[Array, "..."]) -> Float[Array, "*examples_and_event"]:
        """``log p`` of each number of the targets; additive constants do not matter."""
        raise NotImplementedError

    def sample(self, key: PRNGKeyArray) -> Shaped[Array, "..."]:
        """Targets drawn from the distribution."""
        raise NotImplementedError

    def fisher(self) -> Entries:
        """The Fisher information of one number over the outputs, in the order of the fields: rows
        of arrays that broadcast to ``(*examples, *event)``; None where there is no formula."""
        raise NotImplementedError

    def possible(self, targets: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        """What can be a target, to stand in for those of masked examples."""
        return jnp.zeros((), targets.dtype)

    @property
    def parametrized(self) -> Outputs:
        """Every argument that is given, an output or fixed, by name."""
        given = {
            f.name: getattr(self, f.name) for f in fields(self) if not f.metadata.get("static")
        }
        return {name: x for name, x in given.items() if x is not None}

    @property
    def outputs(self) -> Outputs:
        """The arguments that depend on parameters, as far as is known."""
        return {name: x for name, x in self.parametrized.items() if name not in self.fixed}

    @property
    def first(self) -> str:
        """The name of the first output."""
        return next(iter(self.parametrized))

    def with_outputs(self, outputs: Outputs) -> Self:
        """The same distribution at other outputs of the network."""
        # under vmap over examples the event keeps its number of axes
        return replace(self._with(outputs), event_ndims=self.event_axes)

    def _with(self, arguments: Outputs) -> Self:
        given: dict[str, Any] = dict(arguments)
        return replace(self, **given)

    @property
    def numbers(self) -> tuple[int, ...]:
        """``(*examples, *event)``, to which all arguments broadcast."""
        shapes = [
            np.shape(x)[: np.ndim(x) - self.features.get(name, 0)]
            for name, x in self.parametrized.items()
        ]
        return jnp.broadcast_shapes(*shapes)

    @property
    def event_axes(self) -> int:
        """The number of axes whose numbers belong to one example."""
        # not checked at construction: JAX rebuilds pytrees with leaves that are no arrays
        given, ndim, name = self.event_ndims, len(self.numbers), type(self).__name__
        if given is None and ndim == 1 and self.usual_event_ndims:
            call, n = f"{name}({self.first}", self.numbers[0]
            raise ValueError(
                f"{call}) with {self.first} of shape ({n},) is ambiguous. Write "
                f"{call}, event_ndims=0) for {n} examples of one number each, or "
                f"{call}, event_ndims=1) for one example of {n} numbers, as inside vmap."
            )
        known = min(ndim, self.usual_event_ndims) if given is None else given
        if isinstance(known, bool) or not isinstance(known, int) or not 0 <= known <= ndim:
            raise ValueError(
                f"{name}: event_ndims is the number of trailing axes of {self.first} that are one "
                f"example: 0 to {ndim} for shape {self.numbers}; got {known!r}."
            )
        return known

    @property
    def examples(self) -> tuple[int, ...]:
        """The axes that count examples."""
        return self.numbers[: len(self.numbers) - self.event_axes]

    @property
    def event(self) -> tuple[int, ...]:
        """The axes of the numbers of one example."""
        return self.numbers[len(self.numbers) - self.event_axes :]

    def broadcast(self) -> Self:
        """Every output in its full shape, so that each example has its own; fixed arrays so, or
        the same for all examples."""
        numbers = self.numbers
        given: dict[str, Any] = {}
        for name, x in self.parametrized.items():
            if jnp.iscomplexobj(x):
                raise TypeError(
                    f"{type(self).__name__}: got complex {name}. Real and imaginary part are two "
                    "real numbers: jnp.stack([z.real, z.imag], axis=-1)."
                )
            features = self.features.get(name, 0)
            if name not in self.fixed or np.ndim(x) > self.event_axes + features:
                x = jnp.asarray(x)
                given[name] = jnp.broadcast_to(x, (*numbers, *x.shape[x.ndim - features :]))
        return self._with(given)

    @property
    def of_examples(self) -> Outputs:
        """The arrays that have the examples' axes."""
        least = {k: self.event_axes + self.features.get(k, 0) for k in self.parametrized}
        return {k: x for k, x in self.parametrized.items() if np.ndim(x) > least[k]}

    def wide(self) -> Self:
        """In at least float32: likelihoods are not summed in half precision."""
        widen = lambda x: x.astype(at_least_float32(x.dtype)) if hasattr(x, "astype") else x
        return self._with({name: widen(x) for name, x in self.parametrized.items()})

    def beside(self, name: str, x: Shaped[Array, "*examples"]) -> Shaped[Array, "..."]:
        """``x`` with trailing axes of length 1, so that it scales that output."""
        return jnp.expand_dims(x, tuple(range(-self.event_axes - self.features.get(name, 0), 0)))

    def over_event(self, x: Float[Array, "..."]) -> Float[Array, "*examples"]:
        """The sum of ``x`` over all axes behind the examples'."""
        return jnp.sum(x, axis=tuple(range(len(self.examples), x.ndim)))

    def nll_per_example(self, targets: Shaped[Array, "..."]) -> Float[Array, "*examples"]:
        """``−log p(target)`` of each example, without additive constants."""
        wide = self.wide()
        dtype = jnp.result_type(wide.parametrized[self.first])
        if jnp.issubdtype(targets.dtype, jnp.inexact):
            targets = targets.astype(dtype)
        return -self.over_event(wide.log_prob(targets))

    @property
    def columns(self) -> int:
        """The number of columns of R, the square root of one example's output Fisher ``R Rᵀ``."""
        return math.prod(self.event) * self.columns_of_number

    @property
    def columns_of_number(self) -> int:
        """The number of columns for one number."""
        return len(self.outputs)

    def root_column(self, column: Int[Array, ""] | int) -> Outputs:
        """One column of R for every example, by output; a row of an output's Fisher follows."""
        each = self.columns_of_number
        root = self.wide().root_of_numbers(column % each)
        zeros = {name: jnp.zeros_like(x) for name, x in self.wide().outputs.items()}
        at = jnp.asarray(column) // each == jnp.arange(math.prod(self.event))
        at = at.reshape(self.event)
        beside = lambda name: jnp.expand_dims(at, tuple(range(-self.features.get(name, 0), 0)))
        # zeros: sharded like the outputs
        return {name: zeros[name] + jnp.where(beside(name), x, 0) for name, x in root.items()}

    def coordinates(self, gradient: Outputs) -> Float[Array, "*examples columns"] | None:
        """``R⁺ g``, g a gradient over the outputs in the range of R; None if it is not known."""
        own, changed = type(self), ("root_column", "root_of_numbers")
        if any(getattr(own, name) is not getattr(Predictive, name) for name in changed):
            return None
        return self.coordinates_of_numbers(gradient)

    def coordinates_of_numbers(self, gradient: Outputs) -> Float[Array, "*examples columns"]:
        found = solved(self.wide()._root(), [gradient[name] for name in self.outputs])
        return jnp.stack(found, -1).reshape(*self.examples, self.columns)

    def root_of_numbers(self, column: Int[Array, ""] | int) -> Outputs:
        """Column ``column`` of the root of every number's own output Fisher."""
        rows = zip(self.outputs, self._root(), strict=True)
        return {name: _chosen(row, column) for name, row in rows}

    def _root(self) -> list[list[Any]]:
        """The root of every number's Fisher over the outputs."""
        own = [i for i, name in enumerate(self.parametrized) if name not in self.fixed]
        try:
            fisher = self.fisher()
        except NotImplementedError:
            fisher = [[None] * len(self.parametrized)] * len(self.parametrized)
        entries = [[fisher[i][j] for j in own] for i in own]
        return root_of(type(self).__name__, list(self.outputs), entries)

    def check(self, targets: Shaped[Array, "..."]) -> None:
        """Raise ValueError if these cannot be targets; their values are checked when concrete."""
        if targets.shape != self.numbers:
            shape, column = self.numbers, (*targets.shape, 1) == self.numbers
            raise ValueError(
                f"{type(self).__name__}.nll: targets must have the shape of {self.first}, "
                f"{shape}; got {targets.shape}." + " Write targets[..., None]." * column
            )


def _chosen(row: Sequence[Any], column: Int[Array, ""] | int) -> Float[Array, "..."]:
    if isinstance(column, int):
        return jnp.asarray(row[column])
    return jnp.take(jnp.stack(jnp.broadcast_arrays(*row)), column, axis=0)


def has_sampler(distribution: Predictive) -> bool:
    """Whether its class says how to sample."""
    return type(distribution).sample is not Predictive.sample
