"""Gradient trees by layer: the matrix ``K̄`` of each from its parameters, and back."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from natgrad_jax.layers.collection import Layers
from natgrad_jax.layers.layer import Layer
from natgrad_jax.linalg.batching import element, run_time_indices
from natgrad_jax.utils import tree_paths
from natgrad_jax.utils.tree_paths import Path, join

BlockMap = Callable[[Path, jax.Array], jax.Array]


def map_layers(tree: Any, layers: Mapping[Path, Layer], of_layer: BlockMap) -> Any:
    """``tree`` with each layer's packed ``K̄`` mapped, all else unchanged; dtypes are kept."""
    given = tree_paths.leaves(tree)
    new: dict[Path, jax.Array] = {}
    places = run_time_indices(max((len(layer.members) for layer in layers.values()), default=0))
    for path, layer in layers.items():
        arrays = _parameters_of(layer, given)
        if arrays is None:
            continue
        mapped = layer.unpack(of_layer(path, layer.pack(layer.to_matrix(*arrays))))
        for i, x in enumerate(layer.from_matrix(mapped)):
            for place, member in enumerate(layer.each):
                at = member.parameters[i].path
                if at in given:
                    own = element(x, places[place]) if layer.members else x
                    new[at] = own.astype(given[at].dtype)
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
    each = (member for layer in layers.values() for member in layer.each)
    known = {p.path: p.shape for layer in each for p in layer.parameters}
    known |= {x.path: x.parameter.shape for x in layers.leftover}
    for path, x in given.items():
        if path not in known or tuple(x.shape) != known[path]:
            had = f"shape {known[path]}" if path in known else "no such parameter"
            raise ValueError(
                f"the gradients have {join(path)} of shape {tuple(x.shape)}; these Layers have "
                f"{had}. Call find_layers again with this model's params."
            )
    if known and not given:
        raise ValueError(
            "the gradients hold no arrays: everything is masked out or missing. "
            "Pass the grads of value_and_grad, and leave at least one layer unmasked."
        )


def _parameters_of(layer: Layer, given: dict[Path, jax.Array]) -> list[jax.Array] | None:
    """The layer's gradients in its factors' dtype; None if all of them are masked out. Of a bundle,
    those of its members, stacked, with zeros for what is masked out."""
    each = [_own_parameters(member, given) for member in layer.each]
    present = next((arrays for arrays in each if arrays is not None), None)
    if present is None or not layer.members:
        return present
    zeros = [jnp.zeros_like(x) for x in present]
    return [jnp.stack(x) for x in zip(*(arrays or zeros for arrays in each), strict=True)]


def _own_parameters(layer: Layer, given: dict[Path, jax.Array]) -> list[jax.Array] | None:
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
