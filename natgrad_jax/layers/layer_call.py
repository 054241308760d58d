"""What every layer kind's call offers: how one call becomes rows of inputs and of outputs.

N are examples, T positions that share the kernel (pixels of the output map, tokens). What is summed
over them stands in ``natgrad_jax/curvature/layer_sums.py`` and is the same for every kind.
"""

from typing import Any, Protocol

import jax
import jax.numpy as jnp


class LayerCall(Protocol):
    """One call of a layer: a hashable record of how it arranges its arrays."""

    @property
    def swapped(self) -> bool:
        """Whether outputs lie on the rows of the kernel and inputs on its columns: ``s = h Eᵀ``."""

    def examples(self, x: Any) -> jax.Array:
        """The layer's input with the example axis first, nothing copied."""

    def inputs(self, examples: jax.Array) -> jax.Array:
        """``ā`` of shape ``(N, T, *blocks, inputs + bias)``."""

    def outputs(self, g: jax.Array) -> jax.Array:
        """The output cotangent as ``(N, T, *blocks, outputs)``."""

    def row_axes(self, ndim: int) -> tuple[int, ...]:
        """The output's axes of examples and positions, in the order of N and T."""

    def width(self, x: Any) -> int:
        """Numbers that one example takes in :meth:`inputs`, for bounding memory."""

    def positions(self, x: Any) -> int:
        """T."""


class OneHotCall(LayerCall, Protocol):
    """A call whose inputs are one-hot rows: ``examples`` are ids, ``(N, T)``."""

    def frequencies(self, examples: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """How often each id came: the diagonal of ``Σ ā āᵀ``."""

    def second_moments(self, examples: jax.Array, rotated: jax.Array) -> jax.Array:
        """``Σₙ (Σₜ āₙₜ g̃ₙₜᵀ)²``, elementwise, for rows ``g̃ (N, T, columns)``."""


class PatchCall(LayerCall, Protocol):
    """A call whose inputs are patches: ``places × channels`` numbers each."""

    def channel_rows(self, examples: jax.Array, with_one: bool = False) -> jax.Array | None:
        """Rows ``(N, ·, *groups, channels)`` whose products add up to those of all places of the
        patches; None where there are none. ``with_one``: with one more channel, of ones."""


class Wrapped:
    """A call that is seen differently in part: what a subclass leaves alone is the call's own."""

    def __init__(self, call: LayerCall):
        self.call = call

    @property
    def swapped(self) -> bool:
        return self.call.swapped

    def examples(self, x: Any) -> jax.Array:
        return self.call.examples(x)

    def inputs(self, examples: jax.Array) -> jax.Array:
        return self.call.inputs(examples)

    def outputs(self, g: jax.Array) -> jax.Array:
        return self.call.outputs(g)

    def row_axes(self, ndim: int) -> tuple[int, ...]:
        return self.call.row_axes(ndim)

    def width(self, x: Any) -> int:
        return self.call.width(x)

    def positions(self, x: Any) -> int:
        return self.call.positions(x)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.call, name)  # what only some kinds have
