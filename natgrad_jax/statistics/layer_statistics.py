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
from natgrad_jax.layers.kinds.subsampled import Thinned
from natgrad_jax.layers.layer import Layer
from natgrad_jax.layers.layer_call import LayerCall
from natgrad_jax.statistics.spec import stride_for


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

    def read(
        self, call: LayerCall, x: Any, g: jax.Array, bases: Any, weight: jax.Array | None
    ) -> LayerStatistics:
        """What one call with input ``x`` and output cotangent ``g`` adds; ``weight`` of its rows.

        With a stride: what the measured examples add, scaled up to all examples.
        """
        n = jax.eval_shape(call.outputs, g).shape[0]
        stride = stride_for(self.stride, n * self.parts)
        few = call if stride == 1 else Thinned(call, stride)
        some = None if weight is None else weight[::stride]
        times = n / len(range(0, n, stride))
        scaled = lambda found: jax.tree.map(lambda s: s * times if stride > 1 else s, found)
        sums = {
            sharing: measure_rows(layer, call, x, g, weight)
            if self.keeps_rows(sharing)
            else scaled(measure(layer, few, x, g, some))
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
        """Zero statistics, as a slot: ``(*stack, …)`` each."""
        layer = self.layer
        zeros = lambda shape: jnp.zeros((*layer.stack_sizes, *shape), layer.factor_dtype)
        return jax.tree.map(zeros, self.shapes(), is_leaf=_is_shape)

    def from_slot(self, slot: LayerStatistics, bases: Any) -> LayerStatistics:
        """A slot's cotangent, its :class:`Rows` multiplied."""
        lead = len(self.layer.stack) + (self.layer.uses > 1)
        forms = dict(self.forms)
        sums = {
            sharing: sums_of_rows(forms[sharing], x, lead) if isinstance(x, Rows) else x
            for sharing, x in slot.sums.items()
        }
        return slot._replace(sums=sums)


def _is_shape(x: Any) -> bool:
    return type(x) is tuple
