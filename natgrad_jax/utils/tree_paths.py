"""Paths of parameters: the same for every kind of parameter tree.

A path is a tuple of str. Linen dicts, ``FrozenDict``, NNX ``State`` (whose leaves are variables,
with their array under ``.value``) and NNX modules have different key paths for the same parameter.
"""

from collections.abc import Mapping
from typing import Any

import jax
from jaxtyping import PyTree

Path = tuple[str, ...]

# The attribute that holds the array of an NNX variable.
_VARIABLE_VALUE = "value"


def normalize(key_path: jax.tree_util.KeyPath) -> Path:
    """The path of a leaf, from its key path in ``jax.tree_util``."""
    keys = list(key_path)
    if keys and isinstance(keys[-1], jax.tree_util.GetAttrKey) and keys[-1].name == _VARIABLE_VALUE:
        keys.pop()
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)


def leaves(tree: PyTree) -> dict[Path, Any]:
    """The leaves of ``tree`` by path, in the order of the tree."""
    return {normalize(p): leaf for p, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def replace(tree: PyTree, values: Mapping[Path, Any]) -> PyTree:
    """``tree`` with the leaves at these paths replaced."""
    return jax.tree_util.tree_map_with_path(lambda p, x: values.get(normalize(p), x), tree)


def join(path: Path) -> str:
    """The path as text: ``encoder/Dense_0/kernel``."""
    return "/".join(path) or "."
