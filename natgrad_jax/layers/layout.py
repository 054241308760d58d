"""How a parameter is arranged as a matrix."""

import math
from typing import NamedTuple

import jax


class Layout(NamedTuple):
    """How one array (without stack axes) is arranged as a matrix ``(blocks, rows, columns)``.

    ``split`` is the shape after splitting axes (a grouped convolution splits its output axis
    into groups and features); the other three are axes of that split shape.
    """

    split: tuple[int, ...]
    blocks: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    def sizes(self, axes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(self.split[a] for a in axes)

    def matrix(self, x: jax.Array, lead: int) -> jax.Array:
        """``x`` (with ``lead`` leading stack axes) as ``(*lead, *blocks, inputs, outputs)``."""
        x = x.reshape(x.shape[:lead] + self.split)
        order = (*self.blocks, *self.inputs, *self.outputs)
        x = x.transpose(*range(lead), *(lead + a for a in order))
        rows, columns = (math.prod(self.sizes(axes)) for axes in (self.inputs, self.outputs))
        return x.reshape(*x.shape[: lead + len(self.blocks)], rows, columns)

    def array(self, m: jax.Array, lead: int, shape: tuple[int, ...]) -> jax.Array:
        """The inverse of :meth:`matrix`; ``shape`` is the array's own, without stack axes."""
        order = (*self.blocks, *self.inputs, *self.outputs)
        m = m.reshape(m.shape[:lead] + self.sizes(order))
        inverse = sorted(range(len(order)), key=order.__getitem__)
        return m.transpose(*range(lead), *(lead + a for a in inverse)).reshape(
            m.shape[:lead] + shape
        )
