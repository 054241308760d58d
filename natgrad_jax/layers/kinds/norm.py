"""Normalizations: each unit has a scale and a bias, and its own normalized input.

``s = γ x̂ + β`` unit by unit: a dense layer with one input and one output in each of its blocks.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax.layers.geometry import Layout
from natgrad_jax.layers.kinds.dense import normal_form


class NormCall(NamedTuple):
    """``features``: the axes of the units; ``scale``, ``bias``: whether it has that parameter."""

    ndim: int
    features: tuple[int, ...]
    scale: bool
    bias: bool

    @property
    def swapped(self) -> bool:
        return False

    def examples(self, x: jax.Array) -> jax.Array:
        return normal_form(x, self._rows, self.features, ())

    def inputs(self, examples: jax.Array) -> jax.Array:
        columns = [examples] * self.scale + [jnp.ones_like(examples)] * self.bias
        return jnp.concatenate(columns, axis=-1)

    def row_axes(self, ndim: int) -> tuple[int, ...]:
        return self._rows

    def outputs(self, g: jax.Array) -> jax.Array:
        return normal_form(g, self._rows, self.features, ())

    def width(self, x: jax.Array) -> int:
        return 0

    def positions(self, x: jax.Array) -> int:
        return math.prod(x.shape[a] for a in self._rows[1:])

    @property
    def _rows(self) -> tuple[int, ...]:
        return tuple(a for a in range(self.ndim) if a not in self.features)


def norm(
    ndim: int, shape: tuple[int, ...], features: int | Sequence[int], scale: bool, bias: bool
) -> tuple[Any, ...]:
    """The call of a normalization over an input of ``ndim`` axes, and the layouts of its arrays."""
    axes = (features,) if isinstance(features, int) else tuple(features)
    # Flax puts the axes of its parameters in ascending order
    call = NormCall(ndim, tuple(sorted(a % ndim for a in axes)), scale, bias)
    layout = Layout((*shape, 1), tuple(range(len(shape))), (len(shape),), ())
    return call, *[layout] * (scale + bias)
