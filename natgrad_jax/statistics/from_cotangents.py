"""From a backward pass's cotangents to the layers' statistics."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax.curvature.eigenbases import second_moments
from natgrad_jax.curvature.layer_sums import Sums
from natgrad_jax.layers.layer import Layer
from natgrad_jax.statistics.layer_statistics import (
    LayerStatistics,
)
from natgrad_jax.statistics.plan import Plan
from natgrad_jax.utils import tree_paths
from natgrad_jax.utils.precision import HIGHEST, at_least_float32
from natgrad_jax.utils.sharding import psum
from natgrad_jax.utils.tree_paths import Path


class Squares(NamedTuple):
    """Products of summed gradients, shaped as the sums: ``w wᵀ``, ``(Q_Aᵀ W Q_G)²``, ``w²``."""

    blocks: dict[Path, Sums]
    moments: dict[Path, jax.Array]
    diagonals: dict[Path, jax.Array]


class Measured(NamedTuple):
    """What one pass measured: ``layers`` on this device, ``squares`` over all devices.

    With several terms (:func:`by_terms`), what depends on gradients has a leading axis of terms.
    """

    layers: dict[Path, LayerStatistics]
    squares: Squares


def measured(
    of: Plan, axes: Sequence[str], grads: Any, values: dict[Path, LayerStatistics]
) -> Measured:
    """The measurement from a pullback's cotangents of parameters and slots."""
    layers = {path: of.readers[path].from_slot(r, of.bases.get(path)) for path, r in values.items()}
    return Measured(layers, _squares(of, axes, grads))


def _squares(of: Plan, axes: Sequence[str], grads: Any) -> Squares:
    """Squares of the Fisher pass's gradients, which are sums over examples and devices.

    Examples' gradients are independent with mean zero (sampled labels, or random signs), so
    that the square of their sum estimates the sum of their squares.
    """
    given = tree_paths.leaves(grads)
    layers = of.blocks | of.moments
    wide = {p.path: given[p.path].astype(at_least_float32(p.dtype)) for p in of.diagonals}
    wide |= {
        p.path: given[p.path].astype(layer.factor_dtype)
        for layer in layers.values()
        for p in layer.parameters
    }
    wide = psum(wide, axes)
    packed = {
        path: layer.pack(layer.to_matrix(*(wide[p.path] for p in layer.parameters)))
        for path, layer in layers.items()
    }
    return Squares(
        {path: _outer(layer, packed[path]) for path, layer in of.blocks.items()},
        {
            path: second_moments(layer, of.bases[path], packed[path])
            for path, layer in of.moments.items()
        },
        {p.path: jnp.square(wide[p.path]) for p in of.diagonals},
    )


def _outer(layer: Layer, w: jax.Array) -> Sums:
    """``w wᵀ``, counted as one row."""
    A = jnp.matmul(w, w.mT, precision=HIGHEST)
    return Sums(A, None, jnp.ones(layer.stack_sizes, A.dtype))


def separate(of: Plan, found: Measured) -> tuple[dict[Path, LayerStatistics], Measured]:
    """What every pass has in common (input factors and counts), and the rest of one pass."""

    def outputs(keep: bool, layer: Layer, sums: Sums) -> Sums:
        if layer.mixed:  # all of it depends on the cotangents
            return sums if keep else Sums(None, None, None)  # type: ignore[arg-type]
        return Sums(None, sums.G, None) if keep else sums._replace(G=None)  # type: ignore[arg-type]

    def part(keep: bool) -> dict[Path, LayerStatistics]:
        return {
            path: LayerStatistics(
                {k: outputs(keep, layer, r.sums[k]) for k, layer in of.readers[path].forms},
                r.moments if keep else None,
            )
            for path, r in found.layers.items()
        }

    return part(False), found._replace(layers=part(True))


def join_parts(inputs: dict[Path, LayerStatistics], rest: Measured) -> Measured:
    """The inverse of :func:`separate`."""
    is_none = lambda x: x is None
    either = lambda a, b: b if a is None else a
    return rest._replace(layers=jax.tree.map(either, inputs, rest.layers, is_leaf=is_none))


def by_terms(of: Plan, passes: Sequence[Measured]) -> Measured:
    """The passes' results (:func:`separate`), by the terms that each parameter depends on."""

    def pick(terms: tuple[int, ...], found: Callable[[Measured], Any]) -> Any:
        own = [found(passes[i]) for t in terms for i, group in enumerate(of.passes) if t in group]
        return own[0] if len(own) == 1 else jax.tree.map(lambda *x: jnp.stack(x), *own)

    def each(terms: Mapping[Path, tuple[int, ...]], found: Any) -> dict[Path, Any]:
        at = lambda path: lambda m: found(m)[path]
        return {path: pick(terms[path], at(path)) for path in found(passes[0])}

    layers = {path: reader.layer for path, reader in of.readers.items()} | of.blocks | of.moments
    of_layer = {path: layer.terms for path, layer in layers.items()}
    of_parameter = {p.path: p.terms for p in of.diagonals}
    return Measured(
        each(of_layer, lambda m: m.layers),
        Squares(
            each(of_layer, lambda m: m.squares.blocks),
            each(of_layer, lambda m: m.squares.moments),
            each(of_parameter, lambda m: m.squares.diagonals),
        ),
    )


def scale_gradients(
    of: Plan, found: dict[Path, LayerStatistics], factor: jax.Array
) -> dict[Path, LayerStatistics]:
    """The statistics with everything quadratic in the gradients multiplied by ``factor``."""
    times = partial(jax.tree.map, lambda x: (x * factor).astype(x.dtype))

    def sums(layer: Layer, s: Sums) -> Sums:
        return s._replace(A=times(s.A)) if layer.block != "kronecker" else s._replace(G=times(s.G))

    return {
        path: LayerStatistics(
            {k: sums(layer, r.sums[k]) for k, layer in of.readers[path].forms}, times(r.moments)
        )
        for path, r in found.items()
    }
