"""Parameter trees by path: the one place that knows how a tree spells a parameter's name.

A path is a tuple of str. Flax Linen dicts, ``FrozenDict``, NNX ``State`` (whose leaves are
variables: ``….value``) and NNX modules spell the same parameter differently; here they agree.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

Path = tuple[str, ...]

# The attribute under which NNX variables hold their array in a key path.
_VARIABLE_VALUE = "value"


def normalize(key_path: tuple[Any, ...]) -> Path:
    """The path of a leaf from the key path that ``jax.tree_util`` gives it."""
    keys = list(key_path)
    if keys and isinstance(keys[-1], jax.tree_util.GetAttrKey) and keys[-1].name == _VARIABLE_VALUE:
        keys.pop()
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)


def leaves(tree: Any) -> dict[Path, Any]:
    """Every leaf of ``tree`` by path, in the tree's own order."""
    return {normalize(p): leaf for p, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def replace(tree: Any, values: Mapping[Path, Any]) -> Any:
    """``tree`` with the leaves at the paths of ``values`` replaced."""
    return jax.tree_util.tree_map_with_path(lambda p, x: values.get(normalize(p), x), tree)


def join(path: Path) -> str:
    """The path as people write it: ``encoder/Dense_0/kernel``."""
    return "/".join(path) or "."


def insert(
    tree: Any, key: str, value_of: Callable[[Path, Mapping[str, Any]], Any], path: Path = ()
) -> Any:
    """``tree`` with ``value_of(path, mapping)`` under ``key`` of each mapping; not where None.

    Walks mappings, dataclasses, lists and tuples; mappings come back as plain dicts, also a
    ``FrozenDict``.
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
