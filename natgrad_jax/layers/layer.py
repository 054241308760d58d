"""A layer: a static record of which parameters form a block, and how.

A layer's parameters are seen as one homogeneous kernel ``K̄ = [K; b]`` of shape
``(*stack, *blocks, inputs + bias, outputs)``: ``stack`` are the axes that ``scan`` or ``vmap``
put on the parameters, ``blocks`` are independent products side by side (groups of a
convolution, batch dimensions of a DenseGeneral, units of a normalization). The factors are ``A``
over inputs (bias last) and ``G`` over outputs.
"""

import functools
import itertools
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax.layers.approximation import WHOLE, Approximation
from natgrad_jax.layers.factor_structure import FactorStructure
from natgrad_jax.layers.layout import Layout
from natgrad_jax.layers.limits import MAX_FULL_NORM, MAX_SKETCH
from natgrad_jax.layers.simple_structures import Dense, Diagonal, input_structure, output_structure
from natgrad_jax.layers.traits import Traits, traits_of
from natgrad_jax.utils.precision import at_least_float32
from natgrad_jax.utils.tree_paths import Path


class Parameter(NamedTuple):
    """One leaf of the parameter tree. ``terms``: the sorted indices of the loss's terms that depend
    on it; each has its own curvature."""

    path: Path
    shape: tuple[int, ...]
    dtype: jnp.dtype
    terms: tuple[int, ...] = (0,)

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class LossTerm(NamedTuple):
    """One likelihood in the loss: its distribution's name, and which axis of its outputs counts
    examples; None if all examples depend on one another."""

    distribution: str
    examples: int | None = 0


BLOCKS = ("kronecker", "unit", "full")


@dataclass(frozen=True)
class Layer:
    """The kind and geometry of one layer; hashable, without arrays.

    ``parameters`` are the rows of ``K̄`` in order, each arranged by its ``layouts`` entry.
    ``stack`` holds (axis, size) for each axis of the parameters that a scan or vmap slices away
    before the layer gets them; −1 is the last axis of each. ``block``: ``"kronecker"`` (A ⊗ G),
    ``"full"`` (one matrix over all its parameters) or ``"unit"`` (one for each of ``blocks``).
    ``calls``: how often one forward pass calls it; ``positions``: how many positions of one call
    share the kernel. ``uses``: 2 for a kernel that is used forwards and transposed, as an embedding
    that is also attended to; ``matrices``: whether its factors come from the examples' own gradient
    matrices instead, where the loss differentiates its model.
    ``example_axis``: which of a call's row axes counts examples, −1 if none does. ``rows``: whether
    its parameters meet the examples elementwise, so that the examples' own gradients are measured.
    ``members``: the layers of equal geometry that this one stands for, in optimizers' states; the
    first axis of its stack, and of each of its parameters, is then theirs.

    >>> import flax.linen as nn, jax.numpy as jnp, natgrad_jax as ng
    >>> params, x = {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}, jnp.ones((8, 4))
    >>> loss_fn = lambda p, x: ng.Gaussian(nn.Dense(3).apply({"params": p}, x)).nll(x[:, :3])
    >>> layer = ng.find_layers(loss_fn, params, x)[()]
    >>> layer.kind, layer.input_factor_shape, layer.output_factor_shape
    ('dense', (5, 5), (3, 3))
    """

    path: Path
    kind: str
    parameters: tuple[Parameter, ...]
    layouts: tuple[Layout, ...]
    stack: tuple[tuple[int, int], ...] = ()
    block: str = "kronecker"
    calls: int = 1
    positions: int = 1
    uses: int = 1
    example_axis: int = 0
    rows: bool = False
    matrices: bool = False
    approximation: Approximation = WHOLE
    members: tuple["Layer", ...] = ()

    @functools.cached_property
    def traits(self) -> Traits:
        """Properties of its kind of layer."""
        return traits_of(self.kind)

    @property
    def each(self) -> tuple["Layer", ...]:
        """The layers that it stands for: its members, or itself."""
        return self.members or (self,)

    @property
    def kernel(self) -> Parameter:
        return self.parameters[0]

    @property
    def bias(self) -> Parameter | None:
        return self.parameters[1] if len(self.parameters) > 1 else None

    @property
    def terms(self) -> tuple[int, ...]:
        """The terms of the loss that depend on it."""
        return tuple(sorted({t for p in self.parameters for t in p.terms}))

    @property
    def stack_sizes(self) -> tuple[int, ...]:
        return tuple(size for _, size in self.stack)

    @property
    def blocks(self) -> tuple[int, ...]:
        """Sizes of the axes of the layer's own independent products."""
        layout = self.layouts[0]
        return layout.sizes(layout.blocks)

    @property
    def inputs(self) -> int:
        """Rows of the kernel matrix, without the bias."""
        return self._rows[0]

    @property
    def outputs(self) -> int:
        layout = self.layouts[0]
        return math.prod(layout.sizes(layout.outputs))

    @property
    def size(self) -> int:
        """Number of parameters in one element of the stack."""
        return math.prod(self.blocks) * sum(self._rows) * self.outputs

    @property
    def usual_block(self) -> str:
        """The default block of a layer of its kind and size."""
        if self.traits.has_sides:
            return "kronecker"
        return "full" if self.size <= MAX_FULL_NORM else "unit"

    @property
    def shares(self) -> bool:
        """Whether positions or calls share the kernel, so that expand and reduce differ."""
        return self.block == "kronecker" and (self.positions > 1 or self.calls != 1)

    @property
    def by_gradient(self) -> bool:
        """Whether single examples' gradients are unavailable, so that squared sums replace them."""
        if self.rows or self.matrices:
            return False
        return self.calls != 1 or not self.traits.has_sides

    @property
    def mixed(self) -> bool:
        """Whether A depends on gradients too: in a block with one matrix, or with several uses."""
        return self.block != "kronecker" or self.uses > 1 or self.matrices

    @functools.cached_property
    def input_side(self) -> FactorStructure:
        """How the factor A acts on the rows of a block."""
        if self.block != "kronecker":
            rows = sum(self._rows) * self.outputs
            return Dense(rows * math.prod(self.blocks) if self.block == "full" else rows)
        if self.traits.one_hot:
            return Diagonal(self.inputs, one_hot=True)
        layout, own = self.layouts[0], self.approximation
        channels = self.inputs
        if self.traits.has_receptive_field:
            channels = layout.split[layout.inputs[-1]]
        bias = self.bias is not None
        places = self.inputs // channels if channels else 1
        shared = own.convolution == "sua"
        return input_structure(
            places, channels, bias,
            own.group_size, shared, own.centred, own.max_size, self._columns,
        )  # fmt: skip

    @functools.cached_property
    def output_side(self) -> FactorStructure | None:
        """How the factor G acts on the columns of a block; None if the block has no G."""
        if self.block != "kronecker":
            return None
        own = self.approximation
        return output_structure(self.outputs, own.group_size, own.max_size, self._columns)

    @property
    def _columns(self) -> int:
        """Of the sketch of a side that has more than ``max_size`` rows; 0: its diagonal alone."""
        own = self.approximation
        if own.beyond == "diagonal" or own.max_size is None:
            return 0
        numbers = min(MAX_SKETCH, own.max_size, min(sum(self._rows), self.outputs))
        return max(numbers - 1, 0)  # beside the diagonal

    @property
    def factor_blocks(self) -> tuple[int, ...]:
        """Leading axes of the factors after those of the stack."""
        return () if self.block == "full" else self.blocks

    @property
    def input_factor_shape(self) -> tuple[int, ...]:
        """Shape of A for one element of the stack: ``(*blocks, inputs + bias, inputs + bias)``."""
        return (*self.factor_blocks, *self.input_side.shape)

    @property
    def output_factor_shape(self) -> tuple[int, ...] | None:
        """Shape of G for one element of the stack: ``(*blocks, outputs, outputs)``."""
        side = self.output_side
        return None if side is None else (*self.factor_blocks, *side.shape)

    @property
    def factor_dtype(self) -> jnp.dtype:
        """float32, or float64 for float64 parameters."""
        return at_least_float32(self.kernel.dtype)

    def to_matrix(self, *arrays: jax.Array) -> jax.Array:
        """``K̄ = [K; b]`` of shape ``(*stack, *blocks, inputs + bias, outputs)``."""
        lead = len(self.stack)
        rows = [
            layout.matrix(self._stack_first(x), lead)
            for layout, x in zip(self.layouts, arrays, strict=True)
        ]
        return rows[0] if len(rows) == 1 else jnp.concatenate(rows, axis=-2)

    def from_matrix(self, matrix: jax.Array) -> tuple[jax.Array, ...]:
        """The inverse of :meth:`to_matrix`: the parameters in their own shapes."""
        ends = itertools.accumulate(self._rows)
        parts = [matrix[..., end - n : end, :] for n, end in zip(self._rows, ends, strict=True)]
        return tuple(
            self._stack_last(layout.array(part, len(self.stack), self._unstacked(parameter)))
            for part, layout, parameter in zip(parts, self.layouts, self.parameters, strict=True)
        )

    def pack(self, matrix: jax.Array) -> jax.Array:
        """``K̄`` in the coordinates of its factors: ``(*stack, *factor_blocks, rows, columns)``."""
        if self.output_side is None:
            lead = matrix.shape[: len(self.stack) + len(self.factor_blocks)]
            return matrix.reshape(*lead, -1, 1)
        return self.output_side.pack(self.input_side.pack(matrix, -2), -1)

    def unpack(self, packed: jax.Array) -> jax.Array:
        """The inverse of :meth:`pack`."""
        if self.output_side is None:
            shape = (*packed.shape[: len(self.stack)], *self.blocks, sum(self._rows), self.outputs)
            return packed.reshape(shape)
        return self.output_side.unpack(self.input_side.unpack(packed, -2), -1)

    @property
    def _rows(self) -> tuple[int, ...]:
        return tuple(math.prod(layout.sizes(layout.inputs)) for layout in self.layouts)

    def _unstacked(self, parameter: Parameter) -> tuple[int, ...]:
        axes = {axis % len(parameter.shape) for axis, _ in self.stack}
        return tuple(n for i, n in enumerate(parameter.shape) if i not in axes)

    def _stack_first(self, x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, [axis for axis, _ in self.stack], range(len(self.stack)))

    def _stack_last(self, x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, range(len(self.stack)), [axis for axis, _ in self.stack])


def approximated(layer: Layer, approximation: Approximation) -> Layer:
    """The layer with that Kronecker approximation, as far as it applies to the layer."""
    own = approximation if layer.block == "kronecker" else WHOLE
    if not layer.traits.has_receptive_field:
        own = replace(own, convolution="kfc", centred=False)
    if not layer.shares:
        own = replace(own, weight_sharing="expand")
    return replace(layer, approximation=own)


def free_layer(parameter: Parameter) -> Layer:
    """A full block for one parameter of no known module."""
    axes = tuple(range(len(parameter.shape)))
    layout = Layout(parameter.shape, (), axes, ())
    return Layer(parameter.path, "free", (parameter,), (layout,), block="full")
