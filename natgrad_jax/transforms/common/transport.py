"""Writing an inner optimizer's state in new coordinates."""

from collections.abc import Mapping
from typing import Any

import jax

from natgrad_jax.layers.gradients import map_layers
from natgrad_jax.layers.layer import Layer
from natgrad_jax.reparametrization import change_of_basis
from natgrad_jax.reparametrization.coordinates import Coordinates
from natgrad_jax.utils import tree_paths
from natgrad_jax.utils.tree_paths import Path

ON_REFRESH = ("transport", "keep", "reset")

# Fields in which optax keeps averages of squared gradients; all others are treated as gradients.
SECOND_MOMENTS = ("nu", "nu_max", "sum_of_squares", "e_g", "e_x")


def transport(
    inner: Any,
    like: Any,
    layers: Mapping[Path, Layer],
    old: Mapping[Path, Coordinates],
    new: Mapping[Path, Coordinates],
) -> Any:
    """An optax state with every tree in the form of ``like`` written in the new coordinates.

    Trees of gradients are mapped as gradients, those in the fields ``SECOND_MOMENTS`` by the
    squared entries of that map.
    """
    given = {path: x.shape for path, x in tree_paths.leaves(like).items()}

    def is_like(x: Any) -> bool:
        if type(x) is not type(like):
            return False
        own = tree_paths.leaves(x)
        return bool(own) and all(
            path in given and getattr(leaf, "shape", None) == given[path]
            for path, leaf in own.items()
        )

    def move(key_path: tuple[Any, ...], x: Any) -> Any:
        if not is_like(x):
            return x
        of = (
            change_of_basis.transport_squares
            if _field(key_path) in SECOND_MOMENTS
            else change_of_basis.transport_gradients
        )
        return map_layers(x, layers, lambda path, m: of(layers[path], old[path], new[path], m))

    return jax.tree_util.tree_map_with_path(move, inner, is_leaf=is_like)


def _field(key_path: tuple[Any, ...]) -> str:
    """The last field of a NamedTuple on the way to a tree."""
    names = [key.name for key in key_path if isinstance(key, jax.tree_util.GetAttrKey)]
    return names[-1] if names else ""
