"""Layers of equal geometry, handled as one: a program then does not grow with their number."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from natgrad_jax.layers.collection import Layers
from natgrad_jax.layers.layer import Layer
from natgrad_jax.state.members import Members

T = TypeVar("T")


@functools.lru_cache(maxsize=256)
def bundled(layers: Layers) -> Layers:
    """Layers that differ in their paths alone as one layer each, at the path of the first.

    Its ``members`` are the layers, and the first axis of its stack is theirs.

    >>> import natgrad_jax as ng
    >>> len(bundled(ng.Layers({})))
    0
    """
    alike: dict[Layer, list[Layer]] = {}
    for _, layer in sorted(layers.items()):
        alike.setdefault(_without_paths(layer), []).append(layer)
    return Layers(
        {own[0].path: _bundle(own) for own in alike.values()}, layers.leftover, layers.terms
    )


def _without_paths(layer: Layer) -> Layer:
    parameters = tuple(p._replace(path=()) for p in layer.parameters)
    return replace(layer, path=(), parameters=parameters)


def _bundle(layers: Sequence[Layer]) -> Layer:
    if len(layers) == 1:
        return layers[0]
    first = layers[0]
    stack = tuple((axis + 1 if axis >= 0 else axis, size) for axis, size in first.stack)
    count = len(layers)
    parameters = tuple(p._replace(shape=(count, *p.shape)) for p in first.parameters)
    return replace(first, stack=((0, count), *stack), parameters=parameters, members=tuple(layers))


def part_of(bundle: Layer, count: int) -> Layer:
    """The record for ``count`` of a bundle's members."""
    parameters = tuple(p._replace(shape=(count, *p.shape[1:])) for p in bundle.parameters)
    return replace(bundle, stack=((0, count), *bundle.stack[1:]), parameters=parameters)


def members_of(layers: Layers) -> Members:
    """The members of each bundle, as a field of a state."""
    return {path: {own.path: () for own in layer.each} for path, layer in layers.items()}


def gathered(layer: Layer, of: Callable[[Layer], T], axes: Any = 0) -> T:
    """``of`` a layer; of a bundle's members, stacked along an axis, one for each array if a tree of
    axes is given."""
    if not layer.members:
        return of(layer)
    each: Sequence[Any] = [of(member) for member in layer.members]
    if isinstance(axes, int):
        return jax.tree.map(lambda *x: jnp.stack(x, axes), *each)
    return jax.tree.map(lambda axis, *x: jnp.stack(x, axis), axes, *each)
