"""Examples' own gradients of the parameters that meet the examples elementwise."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax.curvature.layer_sums import Sums
from natgrad_jax.layers.layer import Layer
from natgrad_jax.linalg.gram import gram
from natgrad_jax.statistics.layer_statistics import LayerStatistics


class RowsReader(NamedTuple):
    """Static: the rows of one layer, of ``examples`` examples."""

    layer: Layer
    examples: int
    moments: None = None

    @property
    def forms(self) -> tuple[tuple[str, Layer], ...]:
        return (("expand", self.layer),)

    def keeps_rows(self, sharing: str) -> bool:
        return False

    def zeros(self) -> tuple[jax.Array, ...]:
        """Zero rows for each parameter, ``(examples, *parameter)``."""
        dtype = self.layer.factor_dtype
        return tuple(jnp.zeros((self.examples, *p.shape), dtype) for p in self.layer.parameters)

    def from_slot(self, slot: tuple[jax.Array, ...], bases: None) -> LayerStatistics:
        """``Σ v vᵀ`` over the examples, v the example's gradient of all parameters of a block."""
        layer = self.layer
        v = jax.vmap(lambda *arrays: layer.pack(layer.to_matrix(*arrays)))(*slot)
        v = jnp.expand_dims(v.reshape(v.shape[:-1]), 1)
        first = v.reshape(len(v), -1)[:, 0]
        count = jnp.sum((first == first) | True, dtype=layer.factor_dtype)
        rows = jnp.broadcast_to(count, layer.stack_sizes)
        return LayerStatistics({"expand": Sums(gram(v, layer.factor_dtype), None, rows)})
