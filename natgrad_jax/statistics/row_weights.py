"""The loss's masks and weights on the rows of a layer's calls.

A weight belongs to an example, or to a position of one (a token). Where a call's rows lie along the
same axes, they get the weights; what is masked out then does not enter A. Along axes that the rows
do not have, the largest weight counts: an example of which nothing is masked in has weight zero.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from natgrad_jax.layers.layer import Layer
from natgrad_jax.tagging.assemble import Call
from natgrad_jax.tagging.tagged import Tagged
from natgrad_jax.tracing.axes import Along
from natgrad_jax.tracing.evaluate import values_of


def term_weights(tagged: Tagged, inputs: Sequence[jax.Array]) -> dict[int, jax.Array]:
    """The weights of each term of the loss that has some, from the inputs of the trace."""
    places = {t: at for t, at in enumerate(tagged.traced.weights) if at is not None}
    stopped = [jax.lax.stop_gradient(x) for x in inputs] if places else inputs
    return dict(
        zip(places, values_of(tagged.traced.jaxpr, stopped, [*places.values()]), strict=True)
    )


def row_weights(
    tagged: Tagged, layer: Layer, call: Call, weights: dict[int, jax.Array]
) -> jax.Array | None:
    """The weights of a call's rows, ``(examples, positions)`` or ``(examples, 1)``; None if all are
    one. Of several terms that depend on the layer the largest weight counts."""
    if any(term not in weights for term in layer.terms) or call.axis < 0 or not call.sizes:
        return None
    if layer.block != "kronecker" or call.use.inside_shard_map:
        return None
    each = [_aligned(tagged, call, term, weights[term]) for term in layer.terms]
    whole = each[0]
    for other in each[1:]:
        whole = jnp.maximum(whole, other)
    whole = jnp.moveaxis(whole, call.axis, 0)
    whole = jnp.broadcast_to(whole, (call.sizes[call.axis], *whole.shape[1:]))
    if math.prod(whole.shape[1:]) == 1:
        return whole.reshape(-1, 1)
    others = [n for i, n in enumerate(call.sizes) if i != call.axis]
    return jnp.broadcast_to(whole, (len(whole), *others)).reshape(len(whole), -1)


def _aligned(tagged: Tagged, call: Call, term: int, weight: jax.Array) -> jax.Array:
    """A term's weights, an axis for each of the call's row axes; of length one where they have no
    such axis."""
    walks = tagged.examples.terms[term].walks
    at: dict[int, int] = {}
    for axis, walk in enumerate(walks[: weight.ndim]):
        demand = walk.at.get(call.use.key, (None,))[0]
        if isinstance(demand, Along):
            row = _row_of(call, demand)
            if row is not None and row not in at.values():
                at[axis] = row
    weight = weight.max(tuple(a for a in range(weight.ndim) if a not in at), keepdims=True)
    order = sorted(range(weight.ndim), key=lambda a: at.get(a, -1))
    weight = weight.transpose(order).reshape([weight.shape[a] for a in order if a in at])
    rows = sorted(at.values())
    return jnp.expand_dims(weight, [i for i in range(len(call.sizes)) if i not in rows])


def _row_of(call: Call, demand: Along) -> int | None:
    """Which of the call's row axes, a merged one divided, a demand is along."""
    rows = call.call.row_axes(len(call.use.out))
    start = 0
    for axis in rows:
        size = 1
        parts: list[int] = []
        while size < call.use.out[axis] or not parts:
            size *= call.sizes[start + len(parts)]
            parts.append(start + len(parts))
        if axis == demand.axis:
            for i, part in enumerate(parts):
                inner = math.prod(call.sizes[p] for p in parts[i + 1 :])
                if (call.sizes[part], inner) == (demand.size, demand.inner):
                    return part
        start += len(parts)
    return None
