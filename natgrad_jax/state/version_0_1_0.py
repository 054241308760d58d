"""States of version 0.1.0: its fields and layers by the names of today."""

import re
from typing import Any

import jax
import numpy as np

from natgrad_jax.state.named_leaves import is_empty, name_of, shape_of

# For a loss of several terms, 0.1.0 had no axis of terms in these fields: it kept the sum over them
# (True), of which each term now gets an equal part, or a value that holds for each of them.
OF_TERMS = {
    "shares": True,
    "moments": True,
    "diagonal": True,
    "weights": False,
    "moment_weights": False,
    "diagonal_weights": False,
    "statistics_due": False,
    "examples": False,
}
# Where 0.1.0 kept what is now in the factors of such a layer.
WITHOUT_TERMS = (
    (r"/factors/([^/]+)/shares/", r"/factors/\1/"),
    (r"/factors/([^/]+)/weights$", r"/weights/\1"),
)


def as_now(before: dict[str, Any], now: dict[str, Any], state: Any) -> dict[str, Any]:
    """The saved values in the form of today, if 0.1.0 saved them; ``now``: the leaves of ``state``
    by name."""
    return _with_terms(_stacked(_as_matrices(before), state), now)


def _as_matrices(before: dict[str, Any]) -> dict[str, Any]:
    """The saved values, with the numbers inside an inverse of low rank as a diagonal matrix."""
    return {
        path.replace("/gains", "/inner"): x[..., None] * np.eye(x.shape[-1], dtype=x.dtype)
        if path.endswith("/gains")
        else x
        for path, x in before.items()
    }


def _stacked(before: dict[str, Any], state: Any) -> dict[str, Any]:
    """The saved values, with those of layers that are one in ``state`` stacked."""
    found = dict(before)
    flat = jax.tree_util.tree_flatten_with_path(state, is_leaf=is_empty)[0]
    words = [name_of(path).split("/members/") for path, x in flat if is_empty(x)]
    bundles: dict[tuple[str, str], list[str]] = {}
    for at, pair in (x for x in words if len(x) == 2):
        first, member = pair.split("/")
        bundles.setdefault((at, first), []).append(member)
    for (at, first), members in bundles.items():
        for path in before:
            field, _, rest = path.removeprefix(f"{at}/").partition("/")
            own = [f"{at}/{field}/{member}{rest.removeprefix(first)}" for member in members]
            if rest.split("/")[0] != first or len(own) == 1 or not all(x in before for x in own):
                continue
            found |= {path: np.stack([np.asarray(found.pop(x)) for x in own])}
    return found


def _with_terms(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """The saved values, with what 0.1.0 kept for all terms of a loss divided among them."""
    clocks = [path for path in now if path.endswith("/clock/statistics_due") and path in before]
    without = [path for path in clocks if shape_of(before[path]) != shape_of(now[path])]
    states = tuple(path.removesuffix("clock/statistics_due") for path in without)
    found = dict(before)
    for path, leaf in now.items():
        origin, shape = path, shape_of(leaf)
        for now_at, old_at in WITHOUT_TERMS:
            origin = re.sub(now_at, old_at, origin)
        fields = [name for name in path.split("/") if name in OF_TERMS]
        if not (path.startswith(states) and fields and shape and origin in before):
            continue
        x = np.asarray(before[origin])
        # of a Kronecker product A ⊗ G only G is divided
        whole = not OF_TERMS[fields[-1]] or (path.endswith("/A") and f"{path[:-1]}G" in now)
        if shape[1:] == x.shape:
            found[path] = np.stack([x if whole else x / shape[0]] * shape[0])
    return found
