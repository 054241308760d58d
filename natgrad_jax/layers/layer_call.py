"""The interface of a layer's call: how one call becomes rows of inputs and of outputs.

N are examples, T positions that share the kernel (pixels of the output map, tokens). The sums over
them are in ``natgrad_jax/curvature/layer_sums.py``, and the same for every kind of layer.
"""

from typing import Any, Protocol

import jax
import jax.numpy as jnp


class LayerCall(Protocol):
    """One call of a layer: a hashable record of how it arranges its arrays."""

    @property
    def swapped(self) -> bool:
        """Whether outputs index the kernel's rows and inputs its columns: ``s = h Eᵀ``."""

    def examples(self, x: Any) -> jax.Array:
        """The layer's input with the example axis first, without copies."""

    def inputs(self, examples: jax.Array) -> jax.Array:
        """``ā`` of shape ``(N, T, *blocks, inputs + bias)``."""

    def outputs(self, g: jax.Array) -> jax.Array:
        """The output cotangent as ``(N, T, *blocks, outputs)``."""

    def row_axes(self, ndim: int) -> tuple[int, ...]:
        """The output's axes of examples and positions, in that order."""

    def output_axes(self, ndim: int) -> tuple[int, ...]:
        """The output's axes of features, groups of channels included."""

    @property
    def block_axes(self) -> tuple[int, ...]:
        """The output's axes of blocks."""

    def width(self, x: Any) -> int:
        """How many numbers :meth:`inputs` returns for one example, to bound memory."""

    def positions(self, x: Any) -> int:
        """T."""


class OneHotCall(LayerCall, Protocol):
    """A call whose inputs are one-hot rows: ``examples`` are ids, ``(N, T)``."""

    def frequencies(
        self, examples: jax.Array, dtype: jnp.dtype, weight: jax.Array | None
    ) -> jax.Array:
        """How often each id occurs, by weight: the diagonal of ``Σ ā āᵀ``."""

    def second_moments(self, examples: jax.Array, rotated: jax.Array) -> jax.Array:
        """``Σₙ (Σₜ āₙₜ g̃ₙₜᵀ)²``, elementwise, for rows ``g̃ (N, T, columns)``."""


class PatchCall(LayerCall, Protocol):
    """A call whose inputs are patches, ``places × channels`` each; places are kernel offsets."""

    def channel_rows(self, examples: jax.Array, with_one: bool = False) -> jax.Array:
        """Rows ``(N, ·, *groups, channels)`` whose sum of products is that of the patches over all
        places. ``with_one``: append a channel of ones."""


class Wrapped:
    """A call with some methods replaced: a subclass overrides them, all others are the call's."""

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
        return getattr(self.call, name)  # methods that only some kinds have
