"""Dense layers in the wide sense: any contraction of an input with a kernel.

``@``, einsum, DenseGeneral, attention's projections, experts and ensembles are all alike: axes of
the kernel are contracted with the input (inputs), kept in the output only (outputs), or run along
both (blocks). All other axes of the input are rows: the first is the example axis, the rest are
positions that share the kernel.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Part(NamedTuple):
    """How an array's features lie among those of the whole kernel.

    ``cut``: (axis of the array, start, size) if only a part of the array meets this kernel.
    ``sizes``: the features, axis by axis; ``pads``: how many are missing (before, after) on each
    axis, since this call uses only a part of the kernel; empty if none are.
    """

    sizes: tuple[int, ...]
    cut: tuple[int, int, int] | None = None
    pads: tuple[tuple[int, int], ...] = ()

    def of(self, x: jax.Array) -> jax.Array:
        """The part of ``x`` that meets the kernel."""
        if self.cut is None:
            return x
        axis, start, size = self.cut
        return jax.lax.slice_in_dim(x, start, start + size, axis=axis)

    def filled(self, rows: jax.Array) -> jax.Array:
        """Rows ``(…, features)`` with zeros where features are missing."""
        if not self.pads:
            return rows
        lead = rows.shape[:-1]
        rows = jnp.pad(rows.reshape(*lead, *self.sizes), [(0, 0)] * len(lead) + list(self.pads))
        return rows.reshape(*lead, -1)


class DenseCall(NamedTuple):
    """Axes of the input ``x`` and of the output ``s`` in one call; rows in the same order.

    ``blocks``: sizes of the axes of blocks. ``bias``: what stands beside the input, 1 where a bias
    is added to this call's output, 0 where none is though the layer has one; None: no bias at all.
    ``swapped``: outputs index the kernel's rows and inputs its columns, ``s = x Kᵀ``.
    """

    x_rows: tuple[int, ...]
    x_blocks: tuple[int, ...]
    x_inputs: tuple[int, ...]
    s_rows: tuple[int, ...]
    s_blocks: tuple[int, ...]
    s_outputs: tuple[int, ...]
    blocks: tuple[int, ...]
    inputs_part: Part
    outputs_part: Part
    bias: float | None = None
    swapped: bool = False

    def examples(self, x: jax.Array) -> jax.Array:
        x = self.inputs_part.of(x)
        return normal_form(x, self.x_rows, self.x_blocks, self.x_inputs, self.blocks)

    def inputs(self, examples: jax.Array) -> jax.Array:
        return with_bias(self.inputs_part.filled(examples), None if self.swapped else self.bias)

    def row_axes(self, ndim: int) -> tuple[int, ...]:
        return self.s_rows

    def output_axes(self, ndim: int) -> tuple[int, ...]:
        return self.s_outputs

    @property
    def block_axes(self) -> tuple[int, ...]:
        return self.s_blocks

    def outputs(self, g: jax.Array) -> jax.Array:
        g = self.outputs_part.of(g)
        rows = normal_form(g, self.s_rows, self.s_blocks, self.s_outputs, self.blocks)
        return with_bias(self.outputs_part.filled(rows), self.bias if self.swapped else None)

    def width(self, x: jax.Array) -> int:
        return 0  # a view of an array that the gradient keeps anyway: chunks save nothing

    def positions(self, x: jax.Array) -> int:
        return math.prod(x.shape[a] for a in self.x_rows[1:])


class RaggedCall(NamedTuple):
    """``ragged_dot``: consecutive rows of the input belong to one block each.

    Its input is the pair of the rows and of the number of rows in each block.
    """

    blocks: int
    bias: float | None = None

    @property
    def swapped(self) -> bool:
        return False

    def examples(self, x: tuple[jax.Array, jax.Array]) -> jax.Array:
        rows, sizes = x
        ends = jnp.cumsum(sizes)
        index = jnp.arange(len(rows))[:, None]
        member = (index < ends) & (index >= ends - sizes)
        return (rows[:, None, :] * member[:, :, None].astype(rows.dtype))[:, None]

    def inputs(self, examples: jax.Array) -> jax.Array:
        return with_bias(examples, self.bias)

    def row_axes(self, ndim: int) -> tuple[int, ...]:
        return (0,)

    def output_axes(self, ndim: int) -> tuple[int, ...]:
        return (1,)

    @property
    def block_axes(self) -> tuple[int, ...]:
        return ()

    def outputs(self, g: jax.Array) -> jax.Array:
        return jnp.broadcast_to(g[:, None, None, :], (len(g), 1, self.blocks, g.shape[-1]))

    def width(self, x: tuple[jax.Array, jax.Array]) -> int:
        return 0

    def positions(self, x: tuple[jax.Array, jax.Array]) -> int:
        return 1


def with_bias(rows: jax.Array, bias: float | None) -> jax.Array:
    """Rows with the bias's input appended, if there is a bias."""
    if bias is None:
        return rows
    return jnp.concatenate([rows, jnp.full_like(rows[..., :1], bias)], axis=-1)


def normal_form(
    x: jax.Array,
    rows: Sequence[int],
    blocks: Sequence[int],
    features: Sequence[int],
    sizes: Sequence[int] | None = None,
) -> jax.Array:
    """``x`` as (examples, positions, *blocks, features); blocks of these ``sizes``."""
    shape = [x.shape[a] for a in rows]
    examples, positions = (shape or [1])[0], math.prod(shape[1:])
    kept = [x.shape[a] for a in blocks]
    own = [x.shape[a] for a in features]
    # in two steps: a sharded array cannot be reshaped by merging and adding axes at once
    x = x.transpose(*rows, *blocks, *features).reshape(examples, positions, *kept, *own)
    if sizes is not None and list(sizes) != kept:
        x = x.reshape(examples, positions, *sizes, *own)
        kept = list(sizes)
    return x.reshape(examples, positions, *kept, math.prod(own)) if len(own) != 1 else x
