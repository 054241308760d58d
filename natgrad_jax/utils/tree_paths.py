"""Paths of parameters: the same for every kind of parameter tree.

A path is a tuple of str. Linen dicts, ``FrozenDict``, NNX ``State`` (whose leaves are variables,
with their array under ``.value``) and NNX modules have different key paths for the same parameter.
"""

import dataclasses
from collections.abc import Callable, Mapping
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


def insert(
    tree: PyTree, key: str, value_of: Callable[[Path, Mapping[str, Any]], Any], path: Path = ()
) -> PyTree:
    """``tree`` with ``value_of(path, mapping)`` added under ``key`` to every mapping in it.

    Nothing is added if the value is None. Mappings, also ``FrozenDict``, become plain dicts;
    mappings inside of dataclasses, lists and tuples are included.
    """
    if isinstance(tree, Mapping):
        out = {k: insert(v, key, value_of, (*path, str(k))) for k, v in tree.items()}
        value = value_of(path, tree)
        return out if value is None else {**out, key: value}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        items = zip(tree._fields, tree, strict=True)
        return type(tree)(*(insert(v, key, value_of, (*path, name)) for name, v in items))
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        names = [f.name for f in dataclasses.fields(tree)]
        new = {n: insert(getattr(tree, n), key, value_of, (*path, n)) for n in names}
        return dataclasses.replace(tree, **new)
    if isinstance(tree, list | tuple):
        return type(tree)(insert(v, key, value_of, (*path, str(i))) for i, v in enumerate(tree))
    return tree
