"""Dense layers in the wide sense: any contraction of an input with a kernel.

Dense, Linear, DenseGeneral, LinearGeneral and Einsum are all alike: axes of the kernel are
contracted with the input (inputs), kept in the output only (outputs), or run along both
(blocks). All other axes of the input are rows: the first is the example axis, the rest are
positions that share the kernel.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax.layers.geometry import Layout


class DenseCall(NamedTuple):
    """Axes of the input ``x`` and of the output ``s`` in one call; rows in the same order."""

    x_rows: tuple[int, ...]
    x_blocks: tuple[int, ...]
    x_inputs: tuple[int, ...]
    x_summed: tuple[int, ...]
    s_rows: tuple[int, ...]
    s_blocks: tuple[int, ...]
    s_outputs: tuple[int, ...]
    bias: bool

    @property
    def swapped(self) -> bool:
        return False

    def examples(self, x: jax.Array) -> jax.Array:
        if self.x_summed:
            x = x.sum(self.x_summed, keepdims=True)
        return normal_form(x, self.x_rows, self.x_blocks, self.x_inputs)

    def inputs(self, examples: jax.Array) -> jax.Array:
        if not self.bias:
            return examples
        return jnp.concatenate([examples, jnp.ones_like(examples[..., :1])], axis=-1)

    def row_axes(self, ndim: int) -> tuple[int, ...]:
        """The output's axes of examples and positions."""
        return self.s_rows

    def outputs(self, g: jax.Array) -> jax.Array:
        return normal_form(g, self.s_rows, self.s_blocks, self.s_outputs)

    def width(self, x: jax.Array) -> int:
        return 0  # a view of an array that the gradient keeps anyway: chunks save nothing

    def positions(self, x: jax.Array) -> int:
        return math.prod(x.shape[a] for a in self.x_rows[1:])


def normal_form(
    x: jax.Array, rows: Sequence[int], blocks: Sequence[int], features: Sequence[int]
) -> jax.Array:
    """``x`` as (examples, positions, *blocks, features); summed axes have size one."""
    rest = [a for a in range(x.ndim) if a not in (*rows, *blocks, *features)]
    shape = [x.shape[a] for a in rows]
    examples, positions = (shape or [1])[0], math.prod(shape[1:])
    kept = [x.shape[a] for a in blocks]
    own = [x.shape[a] for a in features]
    # in two steps: a sharded array cannot be reshaped by merging and adding axes at once
    x = x.transpose(*rest, *rows, *blocks, *features).reshape(examples, positions, *kept, *own)
    return x.reshape(examples, positions, *kept, math.prod(own)) if len(own) != 1 else x


def general(
    x_ndim: int,
    kernel_shape: tuple[int, ...],
    axis: Sequence[int],
    batch_dims: Sequence[int],
    bias: bool,
) -> tuple[DenseCall, Layout, Layout | None]:
    """The call and the layouts of a ``dot_general`` layer: Dense, Linear, (Dense|Linear)General.

    The kernel is ``(*batch, *in, *out)``; the output is ``(*batch, *rest of x, *out)``.
    """
    axis = tuple(a % x_ndim for a in axis)
    batch = tuple(a % x_ndim for a in batch_dims)
    n_batch, n_in = len(batch), len(axis)
    n_out = len(kernel_shape) - n_batch - n_in
    rows = tuple(a for a in range(x_ndim) if a not in axis and a not in batch)
    call = DenseCall(
        x_rows=rows,
        x_blocks=batch,
        x_inputs=axis,
        x_summed=(),
        s_rows=tuple(range(n_batch, n_batch + len(rows))),
        s_blocks=tuple(range(n_batch)),
        s_outputs=tuple(range(n_batch + len(rows), n_batch + len(rows) + n_out)),
        bias=bias,
    )
    axes = tuple(range(len(kernel_shape)))
    outs = n_batch + n_in
    kernel = Layout(kernel_shape, axes[:n_batch], axes[n_batch:outs], axes[outs:])
    bias_shape = kernel_shape[:n_batch] + kernel_shape[outs:]
    row = Layout(bias_shape, axes[:n_batch], (), axes[n_batch : n_batch + n_out])
    return call, kernel, row if bias else None


def einsum(
    equation: str, x_shape: tuple[int, ...], kernel_shape: tuple[int, ...], bias: bool
) -> tuple[DenseCall, Layout, Layout | None]:
    """The call and the layouts of an Einsum layer ``"x,kernel->s"``, ellipses included.

    Raises:
      ValueError: the equation is not a contraction that has Kronecker factors: an index repeated
        within one operand, or summed over in the kernel alone.
    """
    operands, s = equation.replace(" ", "").split("->")
    x, k = operands.split(",")
    # an ellipsis stands for as many axes as are left; capital Greek never collides with letters
    named = [chr(0x391 + i) for i in range(len(x_shape) + len(kernel_shape))]
    x_dots = named[: len(x_shape) - len(x.replace("...", ""))]
    k_dots = named[: len(kernel_shape) - len(k.replace("...", ""))]
    dots = max(x_dots, k_dots, key=len)
    x, k = (
        t.replace("...", "".join(dots[len(dots) - len(own) :]))
        for t, own in ((x, x_dots), (k, k_dots))
    )
    s = s.replace("...", "".join(dots))
    if any(len(set(t)) != len(t) for t in (x, k, s)):
        raise ValueError(f"einsum {equation!r} repeats an index within one operand")
    if any(c not in x and c not in s for c in k):
        raise ValueError(f"einsum {equation!r} sums over an axis of the kernel alone")
    blocks = [c for c in s if c in k and c in x]
    inputs = [c for c in k if c in x and c not in s]
    outputs = [c for c in s if c in k and c not in x]
    rows = [c for c in x if c not in k and c in s]

    def at(letters: Sequence[str], term: str) -> tuple[int, ...]:
        return tuple(term.index(c) for c in letters)

    call = DenseCall(
        x_rows=at(rows, x),
        x_blocks=at(blocks, x),
        x_inputs=at(inputs, x),
        x_summed=tuple(i for i, c in enumerate(x) if c not in k and c not in s),
        s_rows=at(rows, s),
        s_blocks=at(blocks, s),
        s_outputs=at(outputs, s),
        bias=bias,
    )
    layout = Layout(kernel_shape, at(blocks, k), at(inputs, k), at(outputs, k))
    if not bias:
        return call, layout, None
    kept = "".join(c for c in s if c in k)  # Flax lays the bias out in the output's order
    shape = tuple(kernel_shape[k.index(c)] for c in kept)
    return call, layout, Layout(shape, at(blocks, kept), (), at(outputs, kept))
