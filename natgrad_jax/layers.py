"""What a layer is: static records of which parameters form a block, and how.

A layer's parameters are seen as one homogeneous kernel ``K̄ = [K; b]`` of shape
``(*stack, *blocks, inputs + bias, outputs)``: ``stack`` are the axes that ``scan`` or ``vmap``
put on the parameters, ``blocks`` are independent products side by side (groups of a
convolution, batch dimensions of a DenseGeneral). The factors are ``A`` over inputs (bias last)
and ``G`` over outputs.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax.paths import Path, join


class Parameter(NamedTuple):
    """One leaf of the parameter tree."""

    path: Path
    shape: tuple[int, ...]
    dtype: jnp.dtype

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class Uncovered(NamedTuple):
    """A parameter that no block covers, and why."""

    parameter: Parameter
    reason: str


class Layout(NamedTuple):
    """How one array (without stack axes) reads as a matrix ``(blocks, rows, columns)``.

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


@dataclass(frozen=True)
class Layer:
    """The kind and geometry of one layer; hashable, without arrays.

    ``stack`` holds (axis, size) for each axis of the parameters that a scan or vmap slices away
    before the layer sees it; −1 is the last axis of each.
    """

    path: Path
    kind: str
    kernel: Parameter
    bias: Parameter | None
    kernel_layout: Layout
    bias_layout: Layout | None
    stack: tuple[tuple[int, int], ...] = ()

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return (self.kernel,) if self.bias is None else (self.kernel, self.bias)

    @property
    def stack_sizes(self) -> tuple[int, ...]:
        return tuple(size for _, size in self.stack)

    @property
    def blocks(self) -> tuple[int, ...]:
        return self.kernel_layout.sizes(self.kernel_layout.blocks)

    @property
    def inputs(self) -> int:
        """Rows of the kernel matrix, the bias not counted."""
        return math.prod(self.kernel_layout.sizes(self.kernel_layout.inputs))

    @property
    def outputs(self) -> int:
        return math.prod(self.kernel_layout.sizes(self.kernel_layout.outputs))

    @property
    def input_factor_shape(self) -> tuple[int, ...]:
        """Shape of A for one element of the stack: ``(*blocks, inputs + bias, inputs + bias)``."""
        n = self.inputs + (self.bias is not None)
        return (*self.blocks, n, n)

    @property
    def output_factor_shape(self) -> tuple[int, ...]:
        """Shape of G for one element of the stack: ``(*blocks, outputs, outputs)``."""
        return (*self.blocks, self.outputs, self.outputs)

    @property
    def factor_dtype(self) -> jnp.dtype:
        """float32, or float64 for float64 parameters."""
        return jnp.promote_types(jnp.float32, self.kernel.dtype)

    def to_matrix(self, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
        """``K̄ = [K; b]`` of shape ``(*stack, *blocks, inputs + bias, outputs)``."""
        lead = len(self.stack)
        matrix = self.kernel_layout.matrix(self._stack_first(kernel), lead)
        if self.bias_layout is None or bias is None:
            return matrix
        row = self.bias_layout.matrix(self._stack_first(bias), lead)
        return jnp.concatenate([matrix, row], axis=-2)

    def from_matrix(self, matrix: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """The inverse of :meth:`to_matrix`: the kernel and the bias in their own shapes."""
        lead = len(self.stack)
        n = self.inputs
        kernel = self.kernel_layout.array(matrix[..., :n, :], lead, self._unstacked(self.kernel))
        kernel = self._stack_last(kernel)
        if self.bias is None or self.bias_layout is None:
            return kernel, None
        bias = self.bias_layout.array(matrix[..., n:, :], lead, self._unstacked(self.bias))
        return kernel, self._stack_last(bias)

    def _unstacked(self, parameter: Parameter) -> tuple[int, ...]:
        axes = {axis % len(parameter.shape) for axis, _ in self.stack}
        return tuple(n for i, n in enumerate(parameter.shape) if i not in axes)

    def _stack_first(self, x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, [axis for axis, _ in self.stack], range(len(self.stack)))

    def _stack_last(self, x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, range(len(self.stack)), [axis for axis, _ in self.stack])


class Layers(Mapping[Path, Layer]):
    """The layers of a model by path, and the parameters that no layer covers.

    Immutable and hashable. ``print(layers)`` shows every parameter once: the kind of block that
    covers it with its factor sizes, or why none does.
    """

    def __init__(self, layers: Mapping[Path, Layer], leftover: tuple[Uncovered, ...] = ()):
        self._layers = MappingProxyType(dict(layers))
        self._leftover = tuple(leftover)
        self._key = (tuple(self._layers.values()), self._leftover)

    def __getitem__(self, path: Path) -> Layer:
        try:
            return self._layers[path]
        except KeyError:
            known = ", ".join(repr(p) for p in self._layers)
            raise KeyError(
                f"no layer at path {path!r}. A path is a tuple of str; the layers here are: {known}"
            ) from None

    def __contains__(self, path: object) -> bool:
        return path in self._layers

    def __iter__(self) -> Iterator[Path]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layers) and self._key == other._key

    @property
    def leftover(self) -> tuple[Uncovered, ...]:
        """The parameters outside every layer's block, each with the reason."""
        return self._leftover

    @property
    def uncovered(self) -> tuple[Path, ...]:
        """Paths of the parameters that no block covers; empty for a model wholly covered."""
        return tuple(u.parameter.path for u in self._leftover)

    def select(self, predicate: Callable[[Path, Layer], bool]) -> "Layers":
        """The layers for which ``predicate(path, layer)`` holds; the others become leftover.

        >>> import natgrad_jax as ng
        >>> len(ng.Layers({}).select(lambda path, layer: "head" not in path))
        0
        """
        kept, dropped = {}, []
        for path, layer in self._layers.items():
            if predicate(path, layer):
                kept[path] = layer
            else:
                dropped += [Uncovered(p, "left out by select") for p in layer.parameters]
        return Layers(kept, self._leftover + tuple(dropped))

    def __repr__(self) -> str:
        return f"Layers({len(self)} layers, {len(self._leftover)} uncovered parameters)\n{self}"

    def __str__(self) -> str:
        return coverage_table(self)


def check_layers(layers: Any) -> None:
    """Raise unless ``layers`` is a :class:`Layers`."""
    if not isinstance(layers, Layers):
        raise TypeError(
            "layers must be what find_layers(loss_fn, params, batch) returns; got "
            f"{type(layers).__name__}. The order of arguments is value_and_grad(loss_fn, layers), "
            "scale_by_kfac(layers) and kfac(learning_rate, layers)."
        )


def coverage_table(layers: Layers) -> str:
    """Every parameter once, with the block that covers it: what ``print(layers)`` shows."""
    total = sum(p.size for layer in layers.values() for p in layer.parameters)
    total += sum(u.parameter.size for u in layers.leftover)
    rows = [("parameter", "block", "shape", "factors", "parameters", "share")]

    def add(parameter: Parameter, block: str, factors: str) -> None:
        share = f"{100 * parameter.size / max(total, 1):.1f} %"
        shape = "×".join(map(str, parameter.shape)) or "scalar"
        rows.append((join(parameter.path), block, shape, factors, f"{parameter.size:,}", share))

    for layer in layers.values():
        add(layer.kernel, layer.kind, _factor_sizes(layer))
        if layer.bias is not None:
            add(layer.bias, layer.kind, "with the kernel")
    for parameter, reason in layers.leftover:
        add(parameter, "diagonal", reason)
    covered = total - sum(u.parameter.size for u in layers.leftover)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(_cell(c, w, i) for i, (c, w) in enumerate(zip(r, widths, strict=True)))
             for r in rows]  # fmt: skip
    lines.insert(1, "  ".join("─" * w for w in widths))
    share = 100 * covered / max(total, 1)
    cover = "layer covers" if len(layers) == 1 else "layers cover"
    lines.append(
        f"{len(layers)} {cover} {covered:,} of {total:,} parameters ({share:.1f} %); "
        f"{len(layers.leftover)} left over."
    )
    return "\n".join(line.rstrip() for line in lines)


def _cell(text: str, width: int, column: int) -> str:
    return text.rjust(width) if column >= 4 else text.ljust(width)


def _factor_sizes(layer: Layer) -> str:
    copies = math.prod(layer.stack_sizes) * math.prod(layer.blocks)
    prefix = f"{copies} × " if copies > 1 else ""
    return f"{prefix}A {layer.input_factor_shape[-1]}², G {layer.output_factor_shape[-1]}²"
