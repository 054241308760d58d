"""The coverage table: every parameter once, with the block that covers it."""

import math
from typing import Any

from natgrad_jax.layers.layer import Layer, Parameter
from natgrad_jax.utils.short_repr import bytes_text
from natgrad_jax.utils.tree_paths import join

# Below this many parameters it does not matter which block they have.
SMALL = 10_000


def coverage_table(layers: Any) -> str:
    """Every parameter once, with the block that covers it: what ``print(layers)`` shows."""
    total = sum(p.size for layer in layers.values() for p in layer.parameters)
    total += sum(x.parameter.size for x in layers.leftover)
    rows = [("parameter", "block", "shape", "factors", "parameters", "share", "memory")]

    def add(parameter: Parameter, block: str, factors: str, memory: str = "") -> None:
        share = f"{100 * parameter.size / max(total, 1):.1f} %"
        shape = "×".join(map(str, parameter.shape)) or "scalar"
        size = f"{parameter.size:,}"
        rows.append((join(parameter.path), block, shape, factors, size, share, memory))

    for layer in layers.values():
        block = layer.kind if layer.block == "kronecker" else f"{layer.kind}, {layer.block}"
        first, *rest = layer.parameters
        add(first, block, _factor_sizes(layer), bytes_text(_memory(layer)))
        for parameter in rest:
            add(parameter, block, f"with the {first.path[-1]}")
    for leftover in layers.leftover:
        add(leftover.parameter, leftover.block, leftover.reason)
    covered = total - sum(x.parameter.size for x in layers.leftover)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(_cell(c, w, i) for i, (c, w) in enumerate(zip(r, widths, strict=True)))
             for r in rows]  # fmt: skip
    lines.insert(1, "  ".join("─" * w for w in widths))
    share = 100 * covered / max(total, 1)
    cover = "layer covers" if len(layers) == 1 else "layers cover"
    memory = bytes_text(sum(map(_memory, layers.values())))
    lines.append(
        f"{len(layers)} {cover} {covered:,} of {total:,} parameters ({share:.1f} %); "
        f"{len(layers.leftover)} left over. Factors take {memory}."
        f"{_terms(layers.terms)}"
    )
    kronecker = [x for x in layers.values() if x.block == "kronecker"]
    outside = total - sum(p.size for layer in kronecker for p in layer.parameters)
    if outside > total / 2 and total > SMALL:
        lines.insert(0, f"{100 * outside / total:.0f} % of the parameters have no Kronecker block.")
    return "\n".join(line.rstrip() for line in lines)


def _terms(terms: Any) -> str:
    """The terms of the loss, unless it is a single one with examples on axis 0."""
    if len(terms) == 1 and terms[0].examples == 0:
        return ""
    axis_text = lambda axis: (
        "no axis of independent examples" if axis is None else f"examples on axis {axis}"
    )
    named = (f"{i}: {t.distribution}, {axis_text(t.examples)}" for i, t in enumerate(terms))
    return f" Terms of the loss: {'; '.join(named)}."


def _memory(layer: Layer) -> int:
    """The bytes of a layer's factors."""
    shapes = [layer.input_factor_shape, layer.output_factor_shape or (0,)]
    numbers = math.prod(layer.stack_sizes) * sum(map(math.prod, shapes))
    return numbers * layer.factor_dtype.itemsize


def _cell(text: str, width: int, column: int) -> str:
    return text.rjust(width) if column >= 4 else text.ljust(width)


def _factor_sizes(layer: Layer) -> str:
    copies = math.prod(layer.stack_sizes) * math.prod(layer.factor_blocks)
    prefix = f"{copies} × " if copies > 1 else ""
    if layer.output_side is None:
        return f"{prefix}F {layer.input_side.describe()}"
    return f"{prefix}A {layer.input_side.describe()}, G {layer.output_side.describe()}"
