"""Statistics of layers whose factors come from the examples' own gradient matrices."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax.curvature.eigenbases import second_moments
from natgrad_jax.curvature.example_matrices import outer_products, sums_of_matrices
from natgrad_jax.layers.layer import Layer
from natgrad_jax.layers.layer_call import LayerCall
from natgrad_jax.statistics.layer_statistics import LayerStatistics


class MatricesReader(NamedTuple):
    """Static: the gradient matrices of one layer for each of ``examples`` examples, summed over its
    uses. ``forms``, ``moments``: as in :class:`LayerReader`. ``constant``: whether the kernel is
    also used on constants, in functions that meet the examples later: then it has rows too."""

    forms: tuple[tuple[str, Layer], ...]
    moments: Layer | None
    examples: int
    constant: bool

    @property
    def layer(self) -> Layer:
        return self.forms[0][1]

    def keeps_rows(self, sharing: str) -> bool:
        return False

    def read(
        self, call: LayerCall, x: Any, g: jax.Array, bases: Any, weight: jax.Array | None
    ) -> jax.Array:
        """What one use with input ``x`` and output cotangent ``g`` adds to the matrices."""
        pair = (call.inputs(call.examples(x)), call.outputs(g))
        M = outer_products(self.layer, *(pair[::-1] if call.swapped else pair))
        return jnp.pad(M, [(0, self.examples - len(M))] + [(0, 0)] * (M.ndim - 1))

    def zeros(self) -> tuple[jax.Array, ...]:
        """``(*stack, examples, *blocks, inputs + bias, outputs)``, and rows of the kernel."""
        layer = self.layer
        shape = (layer.inputs + (layer.bias is not None), layer.outputs)
        lead = (*layer.stack_sizes, self.examples, *layer.blocks)
        shapes = [(*lead, *shape)] + [(self.examples, *layer.kernel.shape)] * self.constant
        return tuple(jnp.zeros(s, layer.factor_dtype) for s in shapes)

    def from_slot(self, slots: tuple[jax.Array, ...], bases: Any) -> LayerStatistics:
        """The sums, and the moments in ``bases``."""
        slot, *rows = slots
        lead = len(self.layer.stack)
        for own in rows:
            bias = self.layer.parameters[1:]
            others = [jnp.zeros((self.examples, *p.shape), own.dtype) for p in bias]
            matrices = jax.vmap(self.layer.to_matrix)(own, *others)
            slot = slot + jnp.moveaxis(matrices, 0, lead)

        def of(one: Any) -> Any:
            for _ in range(lead):
                one = jax.vmap(one)
            return one

        sums = {k: of(lambda M, x=x: sums_of_matrices(x, M))(slot) for k, x in self.forms}
        if self.moments is None:
            return LayerStatistics(sums)
        layer = self.moments
        each = jnp.moveaxis(slot, lead, 0)
        moments = jax.vmap(lambda M: second_moments(layer, bases, layer.pack(M)))(each).sum(0)
        return LayerStatistics(sums, moments)
