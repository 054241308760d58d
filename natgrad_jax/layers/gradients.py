"""Gradient trees by layer: the matrix ``K̄`` of each from its parameters, and back."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from natgrad_jax.layers.collection import Layers
from natgrad_jax.layers.layer import Layer
from natgrad_jax.utils import tree_paths
from natgrad_jax.utils.tree_paths import Path, join

BlockMap = Callable[[Path, jax.Array], jax.Array]


def map_layers(tree: Any, layers: Mapping[Path, Layer], of_layer: BlockMap) -> Any:
    """``tree`` with each layer's packed ``K̄`` mapped, all else unchanged; dtypes are kept."""
    given = tree_paths.leaves(tree)
    new: dict[Path, jax.Array] = {}
    for path, layer in layers.items():
        arrays = _parameters_of(layer, given)
        if arrays is None:
            continue
        mapped = layer.unpack(of_layer(path, layer.pack(layer.to_matrix(*arrays))))
        for parameter, x in zip(layer.parameters, layer.from_matrix(mapped), strict=True):
            new[parameter.path] = x.astype(given[parameter.path].dtype)
    return tree_paths.replace(tree, new)


def packed(updates: optax.Updates, layers: Layers) -> dict[Path, jax.Array]:
    """Each layer's packed ``K̄``, except for layers that are masked out."""
    given = tree_paths.leaves(updates)
    found = {path: _parameters_of(layer, given) for path, layer in layers.items()}
    return {
        path: layers[path].pack(layers[path].to_matrix(*arrays))
        for path, arrays in found.items()
        if arrays is not None
    }


def check_paths(given: dict[Path, Any], layers: Layers) -> None:
    known = {p.path: p.shape for layer in layers.values() for p in layer.parameters}
    known |= {x.path: x.parameter.shape for x in layers.leftover}
    for path, x in given.items():
        if path not in known or tuple(x.shape) != known[path]:
            had = f"shape {known[path]}" if path in known else "no such parameter"
            raise ValueError(
                f"the gradients have {join(path)} of shape {tuple(x.shape)}; these Layers have "
                f"{had}. Call find_layers again with this model's params."
            )
    if known and not given:
        raise ValueError("the gradients hold no arrays: everything is masked out or missing.")


def _parameters_of(layer: Layer, given: dict[Path, jax.Array]) -> list[jax.Array] | None:
    """The layer's gradients in its factors' dtype; None if all of them are masked out."""
    present = [p for p in layer.parameters if p.path in given]
    if not present:
        return None
    if len(present) < len(layer.parameters):
        absent = next(p for p in layer.parameters if p.path not in given)
        raise ValueError(
            f"layer {join(layer.path)} is masked in part: {join(absent.path)} is missing, but its "
            "block spans the whole layer. Mask whole layers, or take that parameter out of the "
            'block: layers.replace(path, "frozen").'
        )
    return [given[p.path].astype(layer.factor_dtype) for p in layer.parameters]
