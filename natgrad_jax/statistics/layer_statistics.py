"""One layer's statistics: what each call adds in the backward pass, and their initial zeros."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax.curvature.layer_sums import (
    Rows,
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
from natgrad_jax.layers.layer_call import LayerCall
from natgrad_jax.statistics.spec import usual_stride


class LayerStatistics(NamedTuple):
    """``sums``: :class:`Sums` by weight sharing, ``"expand"`` or ``"reduce"``; inside a slot the
    ``"reduce"`` sums of a layer that is called several times are :class:`Rows`. ``moments``:
    squares of examples' gradients in the current eigenbasis, or None."""

    sums: dict[str, Any]
    moments: jax.Array | None = None


class LayerReader(NamedTuple):
    """Static: which statistics the backward pass takes from each call of a layer.

    ``forms``: the layer in the form of each weight sharing. ``moments``: the layer whose moments
    are measured, an array of ``moments_shape``; None: no moments. ``examples``: their number in one
    call, for ``"reduce"`` of a layer that is called several times. ``stride``: k, to measure every
    k-th example; None: the number of examples in the batch decides. For that, ``parts`` is the
    number of equal parts (devices, micro-batches) into which the batch is divided.
    """

    forms: tuple[tuple[str, Layer], ...]
    moments: Layer | None = None
    moments_shape: tuple[int, ...] = ()
    examples: int = 0
    stride: int | None = 1
    parts: int = 1

    @property
    def layer(self) -> Layer:
        return self.forms[0][1]

    def keeps_rows(self, sharing: str) -> bool:
        """Whether the rows of one example are added up over calls before products are taken."""
        return sharing == "reduce" and self.layer.calls != 1

    def read(self, call: LayerCall, x: Any, g: jax.Array, bases: Any) -> LayerStatistics:
        """What one call with input ``x`` and output cotangent ``g`` adds.

        With a stride: what the measured examples add, scaled up to all examples.
        """
        call = regrouped(call, self.layer.example_axis, g)
        n = jax.eval_shape(call.outputs, g).shape[0]
        stride = usual_stride(n * self.parts) if self.stride is None else self.stride
        few = call if stride == 1 else Thinned(call, stride)
        times = n / len(range(0, n, stride))
        scaled = lambda found: jax.tree.map(lambda s: s * times if stride > 1 else s, found)
        sums = {
            sharing: measure_rows(layer, call, x, g)
            if self.keeps_rows(sharing)
            else scaled(measure(layer, few, x, g))
            for sharing, layer in self.forms
        }
        if self.moments is None:
            return LayerStatistics(sums)
        return LayerStatistics(sums, scaled(measure_moments(self.moments, few, x, g, bases)))

    def shapes(self) -> LayerStatistics:
        """Shapes of the statistics of one element of the stack."""
        sums = {
            sharing: rows_shapes(layer, self.examples)
            if self.keeps_rows(sharing)
            else sums_shapes(layer)
            for sharing, layer in self.forms
        }
        return LayerStatistics(sums, None if self.moments is None else self.moments_shape)  # type: ignore[arg-type]

    def zeros(self) -> LayerStatistics:
        """Zero statistics, as a slot: stack axes are where the layer's parameters have them."""
        layer = self.layer
        return jax.tree.map(
            lambda shape: to_slot(
                jnp.zeros((*layer.stack_sizes, *shape), layer.factor_dtype), layer
            ),
            self.shapes(),
            is_leaf=_is_shape,
        )

    def from_slot(self, slot: LayerStatistics) -> LayerStatistics:
        """A slot's cotangent with its stack axes in front, and :class:`Rows` multiplied."""
        layer = self.layer
        axes = [axis for axis, _ in layer.stack]

        def leaf(shape: tuple[int, ...], x: jax.Array) -> jax.Array:
            return jnp.moveaxis(x, axes, range(len(axes))).reshape(*layer.stack_sizes, *shape)

        plain = jax.tree.map(leaf, self.shapes(), slot, is_leaf=_is_shape)
        lead = len(layer.stack) + (layer.uses > 1)
        forms = dict(self.forms)
        sums = {
            sharing: sums_of_rows(forms[sharing], x, lead) if isinstance(x, Rows) else x
            for sharing, x in plain.sums.items()
        }
        return plain._replace(sums=sums)

    def own_bases(self, bases: Any) -> Any:
        """Bases in their own shapes, without the unit axes that a slot's arrays may have."""
        if bases is None or self.moments is None:
            return bases
        outputs = self.moments.output_factor_shape
        assert outputs is not None
        shapes = (self.moments.input_factor_shape, outputs)
        own = (x.reshape(*s[:-1], x.shape[-1]) for x, s in zip(bases, shapes, strict=True))
        return type(bases)(*own)


class ExamplesCount:
    """Used in place of a reader: records the number of examples in each call of a layer."""

    def __init__(self, layer: Layer):
        self.layer, self.examples = layer, set[int]()

    def note(self, call: LayerCall, s: jax.Array) -> None:
        call = regrouped(call, self.layer.example_axis, s)
        self.examples.add(jax.eval_shape(call.outputs, s).shape[0])


def to_slot(x: jax.Array, layer: Layer) -> jax.Array:
    """``(*stack, …)`` with the stack axes where the layer's parameters have them.

    Unit axes are inserted if an array has fewer axes than the parameters.
    """
    lead = len(layer.stack)
    room = max((axis for axis, _ in layer.stack), default=0) + 1 - x.ndim
    x = x.reshape(*x.shape[:lead], *[1] * max(room, 0), *x.shape[lead:])
    return jnp.moveaxis(x, range(lead), [axis for axis, _ in layer.stack])


def _is_shape(x: Any) -> bool:
    return type(x) is tuple
