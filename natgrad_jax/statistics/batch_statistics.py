"""What one backward pass measured: sums over the examples of a batch, which can be added."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from natgrad_jax.curvature.layer_sums import Sums
from natgrad_jax.tracing.convolutions import for_control_flow
from natgrad_jax.utils.hyperparams import is_concrete
from natgrad_jax.utils.short_repr import short_text
from natgrad_jax.utils.tree_paths import Path

T = TypeVar("T")


class Parts(NamedTuple):
    """The fields of :class:`Statistics` that a backward pass computes, or their shapes."""

    sums: dict[str, dict[Path, Sums]]
    leftover: dict[Path, jax.Array] | None = None
    moments: dict[Path, jax.Array] | None = None


class Statistics:
    """Raw sums over examples; ``jax.tree.map(jnp.add, s1, s2)`` gives those of both batches.

    ``examples``: their number, weighted, ``()``; zero means that nothing was measured. ``sums``: by
    weight sharing, ``"expand"`` and ``"reduce"``, the sums of each layer by path; for layers with
    positions "reduce" is measured if a transformation needs it, or without ``opt_state``.
    ``leftover``: for each parameter with a diagonal block the squared sum of the examples'
    gradients, in the parameter's shape (None without a Fisher pass). ``moments``: for each layer
    ``Σₙ (Q_Aᵀ ∇K̄ₙ Q_G)²`` in the bases of ``opt_state``, if its transformation needs them.

    In a loss of several terms each counts its own examples, ``(terms,)``. What is computed from
    gradients then has a leading axis of terms for layers and parameters that more than one term
    depends on (``layer.terms``): their G is ``(terms, *stack, *blocks, outputs, outputs)``.

    With ``opt_state`` the backward pass is a branch of the compiled program, taken on some steps.
    It stands where the statistics are used: in ``tx.update`` within the same ``jit``, so that the
    steps that do not measure write no zeros; else where they are read or leave the ``jit``.

    >>> import jax, jax.numpy as jnp, natgrad_jax as ng
    >>> half = ng.Statistics(jnp.asarray(4.0), {"expand": {}, "reduce": {}}, {}, None)
    >>> float(jax.tree.map(jnp.add, half, half).examples)
    8.0
    """

    def __init__(
        self,
        examples: jax.Array,
        sums: dict[str, dict[Path, Sums]],
        leftover: dict[Path, jax.Array] | None = None,
        moments: dict[Path, jax.Array] | None = None,
    ) -> None:
        self.examples = examples
        self.shapes = Parts(sums, leftover, moments)  # the arrays, where they are there already
        self._measure: Callable[[], Parts] | None = None

    @classmethod
    def deferred(cls, examples: jax.Array, measure: Callable[[], Parts]) -> "Statistics":
        """Measured where they are used, if there are ``examples``; else zeros."""
        run, shapes = for_control_flow(measure)
        self = cls(examples, *shapes)
        self._measure = run
        return self

    @property
    def sums(self) -> dict[str, dict[Path, Sums]]:
        """By weight sharing and layer path."""
        return self._parts().sums

    @property
    def leftover(self) -> dict[Path, jax.Array] | None:
        """By parameter path."""
        return self._parts().leftover

    @property
    def moments(self) -> dict[Path, jax.Array] | None:
        """By layer path."""
        return self._parts().moments

    @property
    def layers(self) -> dict[Path, Sums]:
        """The sums by layer path, positions counted as examples (``"expand"``)."""
        return self.sums["expand"]

    @property
    def reduced(self) -> dict[Path, Sums]:
        """The sums by layer path, positions summed first (``"reduce"``)."""
        return self.sums["reduce"]

    def ready(self) -> "Statistics":
        """The same, measured here."""
        return Statistics(self.examples, *self._parts())

    def use(
        self, then: Callable[["Statistics"], T], otherwise: Callable[[], T]
    ) -> tuple[T, "Statistics"]:
        """``then(statistics)`` if there are examples, else ``otherwise()``; and what may be used
        later: where these were deferred, ``moments`` alone."""
        if self._measure is None:
            return self._branch(lambda: then(self), otherwise), self
        measure = self._measure

        def measured() -> tuple[T, Any]:
            parts = measure()
            return then(Statistics(self.examples, *parts)), parts.moments

        result, moments = self._branch(measured, lambda: (otherwise(), _zeros(self.shapes.moments)))
        return result, Statistics(self.examples, {}, None, moments)

    def _parts(self) -> Parts:
        if self._measure is None:
            return self.shapes
        found = self._branch(self._measure, lambda: _zeros(self.shapes))
        if all(map(is_concrete, jax.tree.leaves(found))):  # a tracer may be of an inner trace
            self.shapes, self._measure = found, None
        return found

    def _branch(self, yes: Callable[[], T], no: Callable[[], T]) -> T:
        return jax.lax.cond(jnp.any(self.examples > 0), yes, no)

    def _replace(self, **fields: Any) -> "Statistics":
        """With other values, as of a NamedTuple."""
        return Statistics(**({"examples": self.examples} | self._parts()._asdict() | fields))

    def __repr__(self) -> str:
        return short_text("Statistics", {"examples": self.examples} | self.shapes._asdict())


def _flatten(statistics: Statistics) -> tuple[list[tuple[Any, Any]], None]:
    fields = {"examples": statistics.examples} | statistics._parts()._asdict()
    return [(jax.tree_util.GetAttrKey(name), x) for name, x in fields.items()], None


jax.tree_util.register_pytree_with_keys(Statistics, _flatten, lambda _, own: Statistics(*own))


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
