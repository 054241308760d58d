"""The sums over rows that every layer kind shares: ``Σ ā āᵀ``, ``Σ g gᵀ`` and the row count."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax.layers import Layer
from natgrad_jax.parallel import replicated, varying_like

# Patches of a convolution are laid out for at most this many bytes of examples at a time.
MAX_PATCH_BYTES = 64 * 2**20


class Sums(NamedTuple):
    """Raw sums over the rows (examples × positions) that a layer has seen; they add.

    ``A``: ``Σ ā āᵀ`` ``(*stack, *blocks, inputs + bias, inputs + bias)``; ``G``: ``Σ g gᵀ``
    ``(*stack, *blocks, outputs, outputs)``, or None where only inputs were measured;
    ``rows``: how many rows, ``(*stack,)``.
    """

    A: jax.Array
    G: jax.Array | None
    rows: jax.Array


def zero_sums(layer: Layer) -> Sums:
    """The slot of one layer, stack axes where its parameters have them."""
    dtype = layer.factor_dtype
    return Sums(
        A=jnp.zeros(_with_stack(layer.input_factor_shape, layer), dtype),
        G=jnp.zeros(_with_stack(layer.output_factor_shape, layer), dtype),
        rows=jnp.zeros(_with_stack(_rows_shape(layer), layer), dtype),
    )


def stack_first(sums: Sums, layer: Layer) -> Sums:
    """A slot's cotangent with its stack axes moved to the front."""
    axes = [axis for axis, _ in layer.stack]
    moved = jax.tree.map(lambda x: jnp.moveaxis(x, axes, range(len(axes))), sums)
    return moved._replace(rows=moved.rows.reshape(layer.stack_sizes))


def measure(layer: Layer, call: Any, x: jax.Array, g: jax.Array) -> Sums:
    """The sums of one call of ``layer`` with input ``x`` and output cotangent ``g``."""
    outputs = call.outputs(g)
    return Sums(
        A=input_gram(layer, call, x),
        G=gram(outputs, layer.factor_dtype),
        rows=_count_rows(outputs, layer.factor_dtype).reshape(_rows_shape(layer)),
    )


def input_gram(layer: Layer, call: Any, x: jax.Array) -> jax.Array:
    """``Σ ā āᵀ`` over every row, a bounded number of examples at a time."""
    examples = call.examples(x)
    dtype = layer.factor_dtype
    chunks = _chunks(len(examples), call.width(x) * x.dtype.itemsize)
    if chunks == 1:
        return gram(call.inputs(examples), dtype)
    even = len(examples) - len(examples) % chunks
    # the chunk axis is the minor one: a batch sharded over devices stays where it is
    stacked = examples[:even].reshape(even // chunks, chunks, *examples.shape[1:])
    stacked = jnp.moveaxis(stacked, 1, 0)
    zero = varying_like(jnp.zeros(layer.input_factor_shape, dtype), x)
    body = lambda total, chunk: (total + gram(call.inputs(chunk), dtype), None)
    total = jax.lax.scan(body, zero, stacked)[0]
    if even < len(examples):
        total += gram(call.inputs(examples[even:]), dtype)
    return total


def gram(rows: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """``Σ r rᵀ`` over the two leading axes, accumulated in ``dtype``."""
    return jnp.einsum(
        "nt...i,nt...j->...ij",
        rows,
        rows,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=dtype,
        out_sharding=replicated(rows, rows.ndim - 1),
    ).astype(dtype)


def _count_rows(outputs: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Examples × positions, as a value that depends on the data: vmap and shard_map must see it."""
    first = outputs.reshape(*outputs.shape[:2], -1)[:, :, 0]
    return jnp.sum((first == first) | True, dtype=dtype)


def _chunks(examples: int, bytes_per_example: int) -> int:
    """About the fewest chunks whose patches stay within the bound; equal ones where possible."""
    needed = max(-(-examples * bytes_per_example // MAX_PATCH_BYTES), 1)
    needed = min(needed, examples)
    return next((c for c in range(needed, 2 * needed) if examples % c == 0), needed)


def _rows_shape(layer: Layer) -> tuple[int, ...]:
    """Enough unit axes that a stack axis of any position can be inserted."""
    return (1,) * max((axis for axis, _ in layer.stack), default=0)


def _with_stack(shape: tuple[int, ...], layer: Layer) -> tuple[int, ...]:
    for axis, size in layer.stack:
        at = len(shape) if axis == -1 else axis
        shape = (*shape[:at], size, *shape[at:])
    return shape
