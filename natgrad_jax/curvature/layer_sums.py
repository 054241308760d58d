"""What one call of a layer adds to its statistics: sums of products over examples and positions.

Every array here is a raw sum; those of calls, batches and devices are added.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from natgrad_jax.curvature import partial_eigenbasis
from natgrad_jax.layers.factor_structure import FactorStructure
from natgrad_jax.layers.layer import Layer
from natgrad_jax.layers.layer_call import LayerCall, OneHotCall
from natgrad_jax.linalg.gram import gram, one_axis
from natgrad_jax.utils.precision import HIGHEST
from natgrad_jax.utils.sharding import replicated, varying_like
from natgrad_jax.utils.short_repr import printed_short

# Patches, and gradients of single examples, take at most this many bytes at a time.
MAX_CHUNK_BYTES = 8 * 2**20


@printed_short
class Sums(NamedTuple):
    """Raw sums over the rows (examples × positions) of a layer; they can be added.

    ``A``: ``Σ ā āᵀ`` ``(*stack, *blocks, inputs + bias, inputs + bias)``; ``G``: ``Σ g gᵀ``
    ``(*stack, *blocks, outputs, outputs)``, or None if only inputs were measured; ``rows``: their
    number, ``(*stack,)``. A block that is no Kronecker product has ``A = Σ v vᵀ`` over examples, v
    their gradients, and no G. An embedding that is attended to has one more axis, of its uses.
    The shapes are those of whole dense factors; other structures have their own.
    """

    A: jax.Array
    G: jax.Array | None
    rows: jax.Array


class Rows(NamedTuple):
    """Rows of single examples, summed over positions and calls; "reduce" multiplies them later.

    ``a``: ``(*stack, N, *blocks, inputs + bias)``; ``g``: ``(*stack, N, *blocks, outputs)``;
    ``rows``: how many of each example, ``(*stack, N)``.
    """

    a: jax.Array
    g: jax.Array
    rows: jax.Array


def sums_shapes(layer: Layer) -> Any:
    """Shapes for one element of the stack, as a :class:`Sums`."""
    uses = (layer.uses,) if layer.uses > 1 else ()
    outputs = layer.output_factor_shape
    of: Any = Sums
    return of(uses + layer.input_factor_shape, None if outputs is None else uses + outputs, uses)


def rows_shapes(layer: Layer, examples: int) -> Any:
    """Shapes for one element of the stack, as a :class:`Rows`."""
    uses = (layer.uses,) if layer.uses > 1 else ()
    assert layer.output_side is not None
    a, g = layer.input_side.size, layer.output_side.size
    lead = (*uses, examples, *layer.blocks)
    of: Any = Rows
    return of((*lead, a), (*lead, g), (*uses, examples))


def measure(
    layer: Layer, call: LayerCall, x: Any, g: jax.Array, weight: jax.Array | None = None
) -> Sums:
    """The sums of one call of ``layer`` with input ``x`` and output cotangent ``g``.

    ``weight``: of each row, ``(N, T)`` or ``(N, 1)``; None: one. The cotangent has its root in it
    already.
    """
    outputs = call.outputs(g)
    rows = _count_rows(outputs, layer, weight)
    if layer.output_side is None:
        return Sums(_gradient_gram(layer, call, x, outputs), None, rows)
    if call.swapped:
        inputs = _weigh(call.inputs(call.examples(x)), weight)
        A, G = (_gram(layer, side, y) for side, y in ((layer.input_side, outputs),
                (layer.output_side, inputs)))  # fmt: skip
        return _in_use(layer, 1, Sums(A, G, rows))
    A, G = _input_gram(layer, call, x, weight), _output_gram(layer, outputs)
    return _in_use(layer, 0, Sums(A, G, rows))


def _weigh(rows: jax.Array, weight: jax.Array | None) -> jax.Array:
    """Rows ``(N, T, …)`` times the roots of their weights."""
    if weight is None:
        return rows
    roots = jnp.sqrt(weight).astype(rows.dtype)
    return rows * roots.reshape(*weight.shape, *[1] * (rows.ndim - 2))


def measure_rows(
    layer: Layer, call: LayerCall, x: Any, g: jax.Array, weight: jax.Array | None = None
) -> Rows:
    """One call's row for each example: activations and gradients summed over positions, without
    those of weight zero."""
    dtype = layer.factor_dtype
    examples, outputs = call.examples(x), call.outputs(g)
    first = outputs.reshape(*outputs.shape[:2], -1)[:, :, 0]
    counted = ((first == first) | True).astype(dtype)
    if weight is not None:
        counted = counted * (weight > 0).astype(dtype)

    def summed(examples: jax.Array, counted: jax.Array) -> jax.Array:
        rows = call.inputs(examples).astype(dtype)
        if weight is not None:
            rows = rows * jnp.expand_dims(counted, tuple(range(2, rows.ndim)))
        return rows.sum(1)

    inputs = over_chunks(summed, (examples, counted), call.width(x), add=False)
    use, pair = 0, (inputs, outputs.sum(1, dtype=dtype))
    if call.swapped:
        use, pair = 1, pair[::-1]
    return _in_use(layer, use, Rows(*pair, counted.sum(1)))


def sums_of_rows(layer: Layer, rows: Rows, lead: int) -> Sums:
    """The sums of "reduce" over examples, from mean activations and summed gradients.

    ``lead``: number of axes before that of the examples (stack and uses).
    """
    assert layer.output_side is not None
    positions = jnp.where(rows.rows > 0, rows.rows, 1)
    a = rows.a / jnp.expand_dims(positions, tuple(range(lead + 1, rows.a.ndim)))
    sides = (layer.input_side, layer.output_side)

    def one(*pair: jax.Array) -> list[jax.Array]:
        return [_gram(layer, side, r[:, None]) for side, r in zip(sides, pair, strict=True)]

    for _ in range(lead):
        one = jax.vmap(one)
    A, G = one(a, rows.g)
    return Sums(A, G, jnp.sum(rows.rows > 0, axis=-1, dtype=rows.rows.dtype))


def measure_moments(layer: Layer, call: LayerCall, x: Any, g: jax.Array, bases: Any) -> jax.Array:
    """``Σₙ (Q_Aᵀ ∇K̄ₙ Q_G)²``, elementwise, of one call: at the coordinates of the bases.

    The gradient of an example is summed over its positions before it is squared. Source: George et
    al. 2018, section 3.2.
    """
    assert layer.output_side is not None
    (left, A), (right, G) = (layer.input_side, bases.A), (layer.output_side, bases.G)
    of_coordinates = partial_eigenbasis.coordinate_moments
    examples, outputs = call.examples(x), call.outputs(g)
    if layer.traits.one_hot:
        rotated = _project(layer, right, G, outputs)
        along = cast(OneHotCall, call).second_moments(examples, rotated)
        return of_coordinates(right, G, along)

    def moments(x: jax.Array, g: jax.Array) -> jax.Array:
        a, g = _project(layer, left, A, call.inputs(x)), _project(layer, right, G, g)
        if a.shape[1] == 1:  # the square of one product is the product of the squares
            a, g = of_coordinates(left, A, jnp.square(a)), of_coordinates(right, G, jnp.square(g))
            return _einsum("n...i,n...o->...io", a[:, 0], g[:, 0], replicated(a, a.ndim - 1))
        found = jnp.sum(jnp.square(_einsum("nt...i,nt...o->n...io", a, g)), axis=0)
        return of_coordinates(left, A, of_coordinates(right, G, found), on_rows=True)

    width = call.width(x) * 2 + math.prod(outputs.shape[1:])
    if outputs.shape[1] > 1:
        pair = partial_eigenbasis.laid_out(left, A) * partial_eigenbasis.laid_out(right, G)
        width += math.prod(layer.factor_blocks) * pair
    return over_chunks(moments, (examples, outputs), width)


def _project(layer: Layer, side: FactorStructure, basis: jax.Array, rows: jax.Array) -> jax.Array:
    """``Qᵀ r`` of every row: ``(N, T, *blocks, packed)``."""
    packed = side.pack(rows.astype(layer.factor_dtype), -1)
    return partial_eigenbasis.project_rows(side, basis, packed)


def _gradient_gram(layer: Layer, call: LayerCall, x: Any, outputs: jax.Array) -> jax.Array:
    """``Σ v vᵀ`` over the examples, v the example's gradient of all parameters of a block."""
    dtype = layer.factor_dtype

    def of(x: jax.Array, g: jax.Array) -> jax.Array:
        pair = [r.astype(dtype) for r in (call.inputs(x), g)]
        if call.swapped:
            pair.reverse()
        v = _einsum("nt...i,nt...o->n...io", pair[0], pair[1])
        v = v.reshape(len(v), *layer.factor_blocks, -1)
        return gram(jnp.expand_dims(v, 1), dtype)

    return over_chunks(of, (call.examples(x), outputs), call.width(x) + 2 * layer.size)


def _input_gram(
    layer: Layer, call: LayerCall, x: Any, weight: jax.Array | None = None
) -> jax.Array:
    """The factor's sum over input rows, a bounded number of examples at a time."""
    side, reduce = layer.input_side, layer.approximation.weight_sharing == "reduce"
    examples = call.examples(x)
    if not reduce:
        direct = side.gram_without_rows(call, examples, layer.factor_dtype, weight)
        if direct is not None:
            return direct

    def of(examples: jax.Array, *weight: jax.Array) -> jax.Array:
        rows = call.inputs(examples)
        if reduce and weight:
            rows = _weighted_mean(rows.astype(layer.factor_dtype), *weight)
        elif reduce:
            rows = rows.mean(1, keepdims=True, dtype=layer.factor_dtype)
        else:
            rows = _weigh(rows, *(weight or (None,)))
        return _gram(layer, side, rows)

    arrays = (examples,) if weight is None else (examples, weight)
    return over_chunks(of, arrays, call.width(x))


def _weighted_mean(rows: jax.Array, weight: jax.Array) -> jax.Array:
    """The mean over the positions that count, times the root of the example's weight."""
    of = jnp.expand_dims(jnp.broadcast_to(weight, rows.shape[:2]), tuple(range(2, rows.ndim)))
    total = of.sum(1, keepdims=True)
    mean = (rows * of).sum(1, keepdims=True) / jnp.where(total > 0, total, 1)
    return mean * jnp.sqrt(of.max(1, keepdims=True))


def _output_gram(layer: Layer, outputs: jax.Array) -> jax.Array:
    if layer.approximation.weight_sharing == "reduce":
        outputs = outputs.sum(1, keepdims=True, dtype=layer.factor_dtype)
    return _gram(layer, layer.output_side, outputs)


def _gram(layer: Layer, side: Any, rows: jax.Array) -> jax.Array:
    """One factor's sum over rows ``(N, T, *blocks, size)``."""
    rows = side.rows(rows)
    if layer.traits.has_receptive_field:  # not for a sequence's axis, which devices may share
        rows = one_axis(rows)
    return side.gram(rows, layer.factor_dtype)


def over_chunks(
    of: Callable[..., jax.Array], arrays: tuple[Any, ...], width: int, add: bool = True
) -> jax.Array:
    """``of(*arrays)``, a bounded number of examples at a time; results are summed or stacked.

    ``width``: how many numbers ``of`` needs in memory for one example.
    """
    n = len(jax.tree.leaves(arrays)[0])
    chunks = _chunks(n, width * 4)
    if chunks == 1:
        return of(*arrays)
    even = n - n % chunks
    # the chunk axis is the minor one, so that a sharded batch is not moved
    stacked = jax.tree.map(
        lambda x: jnp.moveaxis(x[:even].reshape(even // chunks, chunks, *x.shape[1:]), 1, 0), arrays
    )
    if not add:
        done = jax.lax.map(lambda c: of(*c), stacked)
        done = jnp.moveaxis(done, 0, 1).reshape(even, *done.shape[2:])
        rest = [of(*jax.tree.map(lambda x: x[even:], arrays))] if even < n else []
        return jnp.concatenate([done, *rest])
    shape = jax.eval_shape(lambda s: of(*jax.tree.map(lambda x: x[0], s)), stacked)
    zero = varying_like(jnp.zeros(shape.shape, shape.dtype), jax.tree.leaves(arrays)[-1])
    body = lambda total, chunk: (total + of(*chunk), None)
    total = jax.lax.scan(body, zero, stacked)[0]
    return total if even == n else total + of(*jax.tree.map(lambda x: x[even:], arrays))


def _chunks(examples: int, bytes_per_example: int) -> int:
    """About the fewest chunks that respect the bound, of equal size if possible."""
    needed = max(-(-examples * bytes_per_example // MAX_CHUNK_BYTES), 1)
    needed = min(needed, max(examples, 1))
    return next((c for c in range(needed, 2 * needed) if examples % c == 0), needed)


def _count_rows(outputs: jax.Array, layer: Layer, weight: jax.Array | None = None) -> jax.Array:
    """Examples × positions, as a value that depends on the data, as vmap and shard_map require."""
    reduce = layer.approximation.weight_sharing == "reduce" and layer.calls == 1
    one = reduce or layer.output_side is None
    counted = outputs[:, :1] if one else outputs
    first = counted.reshape(*counted.shape[:2], -1)[:, :, 0]
    ones = ((first == first) | True).astype(layer.factor_dtype)
    if weight is not None:
        ones = ones * (weight.max(1, keepdims=True) if one else weight).astype(ones.dtype)
    return ones.sum()


def _in_use(layer: Layer, use: int, sums: Any) -> Any:
    """``sums`` at index ``use`` of the axis of uses, if the layer has several."""
    if layer.uses == 1:
        return sums
    return jax.tree.map(lambda x: jnp.zeros((layer.uses, *x.shape), x.dtype).at[use].set(x), sums)


def _einsum(equation: str, a: jax.Array, b: jax.Array, out_sharding: Any = None) -> jax.Array:
    precision = HIGHEST
    return jnp.einsum(equation, a, b, precision=precision, out_sharding=out_sharding)
