"""What is read off a layer in the backward pass: which statistics, and their empty forms."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax.curvature.layer_sums import (
    Rows,
    Sums,
    measure,
    measure_moments,
    measure_rows,
    rows_shapes,
    sums_of_rows,
    sums_shapes,
)
from natgrad_jax.layers.kinds.regrouped import regrouped
from natgrad_jax.layers.kinds.subsampled import Thinned
from natgrad_jax.layers.layer import Layer
from natgrad_jax.statistics.spec import usual_stride


class Wanted(NamedTuple):
    """The layer as each kind of statistics sees it, None where that kind is not wanted.

    ``sums``: positions as examples; ``reduced``: positions summed first; ``moments``: squares of
    examples' gradients in the current eigenbasis, an array of ``moments_shape``. ``examples``: of
    one call, for ``reduced`` of a layer that is called several times. ``stride``: of the examples
    that are looked at, None where their number decides; for which ``parts`` is of how many equal
    parts of a batch, on other devices or in other micro-batches, a call sees one.
    """

    sums: Layer | None
    reduced: Layer | None = None
    moments: Layer | None = None
    moments_shape: tuple[int, ...] = ()
    examples: int = 0
    stride: int | None = 1
    parts: int = 1

    @property
    def layer(self) -> Layer:
        layer = self.sums or self.reduced
        assert layer is not None
        return layer


class Readings(NamedTuple):
    """One layer's statistics in the forms of :class:`Wanted`; as a slot, zeros of their shapes."""

    sums: Sums | None = None
    reduced: Any = None  # Sums; Rows inside a slot
    moments: jax.Array | None = None


def read(wanted: Wanted, call: Any, x: Any, g: jax.Array, bases: Any) -> Readings:
    """What one call with input ``x`` and output cotangent ``g`` adds.

    With a stride, what every such example adds, times all examples over those.
    """
    call = regrouped(call, wanted.layer.example_axis, g)
    n = jax.eval_shape(call.outputs, g).shape[0]
    stride = usual_stride(n * wanted.parts) if wanted.stride is None else wanted.stride
    few = call if stride == 1 else Thinned(call, stride)
    sums = reduced = moments = None
    if wanted.sums is not None:
        sums = measure(wanted.sums, few, x, g)
    if wanted.reduced is not None and wanted.reduced.calls == 1:
        reduced = measure(wanted.reduced, few, x, g)
    if wanted.moments is not None:
        moments = measure_moments(wanted.moments, few, x, g, bases)
    found = Readings(sums, reduced, moments)
    if stride > 1:
        found = jax.tree.map(lambda s: s * (n / len(range(0, n, stride))), found)
    if wanted.reduced is not None and wanted.reduced.calls > 1:  # rows of every example
        found = found._replace(reduced=measure_rows(wanted.reduced, call, x, g))
    return found


def shapes(wanted: Wanted) -> Any:
    """Shapes of the readings for one element of the stack, in a ``Readings``."""
    reduced, moments = wanted.reduced, wanted.moments
    of: Any = Readings
    return of(
        None if wanted.sums is None else sums_shapes(wanted.sums),
        None
        if reduced is None
        else sums_shapes(reduced)
        if reduced.calls == 1
        else rows_shapes(reduced, wanted.examples),
        None if moments is None else wanted.moments_shape,
    )


def empty_slot(wanted: Wanted) -> Readings:
    """Zeros, with stack axes where the layer's parameters have them."""
    layer = wanted.layer
    return jax.tree.map(
        lambda shape: to_slot(jnp.zeros((*layer.stack_sizes, *shape), layer.factor_dtype), layer),
        shapes(wanted),
        is_leaf=_is_shape,
    )


def from_slot(wanted: Wanted, slot: Readings) -> Readings:
    """A slot's cotangent with its stack axes in front, and rows of examples multiplied."""
    layer = wanted.layer
    axes = [axis for axis, _ in layer.stack]

    def leaf(shape: tuple[int, ...], x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, axes, range(len(axes))).reshape(*layer.stack_sizes, *shape)

    plain = jax.tree.map(leaf, shapes(wanted), slot, is_leaf=_is_shape)
    if isinstance(plain.reduced, Rows):
        assert wanted.reduced is not None
        lead = len(layer.stack) + (layer.uses > 1)
        return plain._replace(reduced=sums_of_rows(wanted.reduced, plain.reduced, lead))
    return plain


def to_slot(x: jax.Array, layer: Layer) -> jax.Array:
    """``(*stack, …)`` with the stack axes where the layer's parameters have them.

    Unit axes make room where an array has fewer axes than the parameters.
    """
    lead = len(layer.stack)
    room = max((axis for axis, _ in layer.stack), default=0) + 1 - x.ndim
    x = x.reshape(*x.shape[:lead], *[1] * max(room, 0), *x.shape[lead:])
    return jnp.moveaxis(x, range(lead), [axis for axis, _ in layer.stack])


def _is_shape(x: Any) -> bool:
    return type(x) is tuple
