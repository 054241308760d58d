"""States of bundles of equal layers: one layer's part of it, a few layers', and put back together.

A state keeps, at the path of a bundle's first layer, the arrays of all of its members along an axis
that is the first, or the second after one of terms of the loss. ``members``, a field without
arrays, names them.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax

from natgrad_jax.utils.tree_paths import Path

# The keys of a dict without leaves, as in a request: the members of each bundle, by its path.
Members = dict[Path, dict[Path, tuple[()]]]

PER_LAYER = ("factors", "weights", "bases", "moments", "moment_weights", "momentum", "products")


def axes_of(state: Any, field: str, path: Path) -> Any:
    """Which axis of each array of ``state.field[path]`` is that of the members."""
    entry = getattr(state, field)[path]
    if field == "factors":
        axes = jax.tree.map(lambda x: 0, entry)
        if not hasattr(entry, "shares"):
            return axes
        after_terms = lambda tree: jax.tree.map(lambda x: 1, tree)
        return axes._replace(shares=after_terms(entry.shares), weights=1)
    if field in ("moments", "moment_weights"):
        axis = state.moment_weights[path].ndim - state.weights[path].ndim
        return jax.tree.map(lambda x: axis, entry)
    return jax.tree.map(lambda x: 0, entry)


def part(state: Any, path: Path, start: jax.Array, count: int) -> Any:
    """The state of ``count`` members of one bundle from ``start`` on, without other layers."""
    cut = lambda x, axis: jax.lax.dynamic_slice_in_dim(x, start, count, axis)
    own = {
        field: {path: jax.tree.map(cut, getattr(state, field)[path], axes_of(state, field, path))}
        for field in PER_LAYER
        if hasattr(state, field)
    }
    return state._replace(**own)


def with_part(state: Any, field: str, path: Path, start: jax.Array, new: Any) -> Any:
    """``state.field[path]`` with the entries of a few members from ``start`` on."""
    put = lambda old, x, axis: jax.lax.dynamic_update_slice_in_dim(old, x, start, axis)
    return jax.tree.map(put, getattr(state, field)[path], new, axes_of(state, field, path))


def by_layer(state: Any) -> Any:
    """The state as readers see it: every layer at its own path, cut out where it is read."""
    members = getattr(state, "members", None)
    if not isinstance(members, dict):
        return state
    return state._replace(
        **{
            field: ByLayer(state, field, members)
            for field in PER_LAYER
            if isinstance(getattr(state, field, None), dict)
        }
    )


@jax.tree_util.register_pytree_node_class
class ByLayer(Mapping[Path, Any]):
    """A field of a state by layer path; as a pytree, a dict."""

    def __init__(self, state: Any, field: str, members: Members) -> None:
        self._state, self._field = state, field
        self._at = {
            path: (first, i, len(own))
            for first, own in members.items()
            for i, path in enumerate(own)
        }

    def __getitem__(self, path: Path) -> Any:
        first, i, count = self._at[path]
        entry = getattr(self._state, self._field)[first]
        if count == 1:
            return entry
        axes = axes_of(self._state, self._field, first)
        return jax.tree.map(lambda x, axis: jax.lax.index_in_dim(x, i, axis, False), entry, axes)

    def __iter__(self) -> Iterator[Path]:
        return iter(self._at)

    def __len__(self) -> int:
        return len(self._at)

    def tree_flatten(self) -> tuple[list[Any], tuple[Path, ...]]:
        return list(self.values()), tuple(self)

    @classmethod
    def tree_unflatten(cls, paths: tuple[Path, ...], entries: list[Any]) -> dict[Path, Any]:
        return dict(zip(paths, entries, strict=True))
