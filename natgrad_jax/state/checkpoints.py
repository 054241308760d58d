"""Saved states: checking that one fits a transformation, and restoring it."""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from natgrad_jax.state.divided import refitted, whole
from natgrad_jax.state.named_leaves import is_empty, name_of, raw, shape_of
from natgrad_jax.state.version_0_1_0 import as_now

SHOWN = 5  # differences in a message

# States are a file format: each former name of a field, or of a word in a request, has a line here,
# oldest first: a regular expression for its old path, such as "/clock/step$" or "/request/stride=",
# and its replacement.
RENAMED: tuple[tuple[str, str], ...] = ()

# Fields that some older version lacks, which start as in tx.init; fields of older versions that are
# no longer needed.
ADDED: frozenset[str] = frozenset(("examples", "beyond=diagonal", "every_step"))
REMOVED: frozenset[str] = frozenset()

# Fields by layer or parameter: 0.1.0 also kept those that optax.masked takes away.
BY_LAYER = frozenset(
    ("factors", "weights", "bases", "moments", "moment_weights", "diagonal", "diagonal_weights")
)


def check_state(saved: Any, state: Any) -> None:
    """Raise unless the saved state has the arrays of ``state``, with the same paths and shapes.

    This library's states are named tuples of dicts by layer path, and checkpoints keep the names:
    so a checkpoint from other Layers, options or versions is detected.

    Args:
      saved: the metadata of a checkpoint, ``manager.item_metadata(step).tree`` of orbax, or any
        tree whose leaves have shapes; named tuples may have become dicts.
      state: the state (or dict of states) to be replaced, fresh from ``tx.init``.

    Raises:
      ValueError: names the first paths where the two differ, and how.

    Source: orbax-checkpoint restores by the same paths, and stops at the first wrong shape.

    >>> import jax.numpy as jnp, natgrad_jax as ng
    >>> state = ng.kfac(0.1, ng.Layers({})).init({})
    >>> ng.check_state(state, state)
    >>> ng.check_state({"clock": {"step": jnp.zeros(())}}, {"clock": {"step": jnp.zeros(3)}})
    Traceback (most recent call last):
    ValueError: the saved state ... clock/step: saved with shape (), now (3,)...
    """
    before, now = ({p: shape_of(x) for p, x in _leaves(t).items()} for t in (saved, state))
    differences = [f"{path}: not in what was saved" for path in now if path not in before]
    differences += [f"{path}: saved, and not there now" for path in before if path not in now]
    differences += [
        f"{path}: saved with shape {before[path]}, now {shape}"
        for path, shape in now.items()
        if before.get(path, shape) != shape
    ]
    _refuse(differences, "To load a state of an older version, use ng.restore_state.")


def restore_state(saved: Any, state: Any) -> Any:
    """The saved state in the structure of ``state``, whichever version of this library saved it.

    For states that were read from disk without their structure, by orbax without a target or by
    ``flax.serialization.msgpack_restore``. States of every version since 0.1.0, the current one
    included, are restored, and training continues as it would have. Nothing is guessed: every array
    of either state has a counterpart in the other, or this raises. (0.1.0 kept one average where
    several terms of a loss now have one each: each gets an equal part. What it kept of layers that
    ``optax.masked`` or ``optax.partition`` takes away is dropped.)

    Args:
      saved: nested dicts, lists and tuples of arrays, by field names or their numbers.
      state: the state (or dict of states, of parameters and states) to be replaced, fresh from
        ``tx.init``.

    Returns:
      The saved values, in the classes of ``state`` and on its devices; no buffer is shared with
      ``saved``.

    Raises:
      TypeError: shapes instead of arrays (metadata of a checkpoint, ``jax.eval_shape``).
      ValueError: names the first paths that are missing, superfluous or of another shape or dtype,
        or that have non-finite numbers where those of ``state`` are finite.

    Source: ``flax.serialization.from_state_dict`` restores by the same names, within one version.

    >>> import flax.serialization, natgrad_jax as ng
    >>> tx = ng.kfac(0.1, ng.Layers({}))
    >>> data = flax.serialization.to_bytes(tx.init({}))
    >>> state = ng.restore_state(flax.serialization.msgpack_restore(data), tx.init({}))
    >>> isinstance(state[0], ng.KFACState), int(state[0].clock.step)
    (True, 0)
    """
    now, before = _leaves(state), _leaves(saved)
    _check_arrays(state=now, saved=before)
    before = as_now(_renamed(before, now), now, state)
    before = _refitted(before, now, _leaves(jax.eval_shape(whole, state)))
    differences, infinite, values = [], [], {}
    for path, leaf in now.items():
        if path not in before:
            if ADDED.isdisjoint(path.split("/")):
                differences.append(f"{path}: not in what was saved, now {_described(leaf)}")
        elif not _fits(before[path], leaf):
            differences.append(
                f"{path}: saved as {_described(before[path])}, now {_described(leaf)}"
            )
        elif not _finite(before[path]) and _finite(leaf):
            infinite.append(path)
        elif not is_empty(leaf):
            values[path] = _placed(before[path], leaf)
    left_out = _left_out(state)
    extra = [path for path in before if path not in now and not left_out(path)]
    _refuse(differences + [f"{path}: saved, and not there now" for path in extra])
    if infinite:
        raise ValueError(
            f"the saved state has non-finite numbers in {_listed(infinite)}. Restore an earlier "
            "checkpoint, or start from tx.init."
        )
    return jax.tree_util.tree_map_with_path(lambda p, x: values.get(name_of(p), x), state)


def _renamed(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """The saved values by their current paths; a path that still exists is kept."""
    found = {}
    for path, x in before.items():
        name = path
        for old, new in RENAMED:
            name = re.sub(old, new, name)
        found[path if path in now or name in before else name] = x
    return found


def _refitted(
    before: dict[str, Any], now: dict[str, Any], wholes: dict[str, Any]
) -> dict[str, Any]:
    """The saved values, with as many zeros behind them as ``now``, which may be divided among other
    devices."""
    found = dict(before)
    for path in now.keys() & before.keys():
        x, shape, wanted = before[path], shape_of(wholes[path]), shape_of(now[path])
        stored = shape_of(x)
        if stored == wanted or len(stored) != len(shape) or any(map(int.__lt__, stored, shape)):
            continue
        cut = refitted(x, shape)
        if not np.any(np.asarray(refitted(cut, stored)) != np.asarray(x)):
            found[path] = refitted(cut, wanted)
    return found


def _left_out(state: Any) -> Callable[[str], bool]:
    """A predicate: whether the value saved at a path is no longer needed."""
    is_masked = lambda x: isinstance(x, optax.MaskedState)
    flat = jax.tree_util.tree_flatten_with_path(state, is_leaf=is_masked)[0]
    under = tuple(f"{name_of(path)}/" for path, x in flat if is_masked(x))

    def is_left_out(path: str) -> bool:
        fields = path.split("/")
        masked = path.startswith(under) and not BY_LAYER.isdisjoint(fields)
        return masked or not REMOVED.isdisjoint(fields)

    return is_left_out


def _refuse(differences: list[str], more: str = "") -> None:
    if differences:
        raise ValueError(
            "the saved state is from other Layers, from a transformation with other keywords, or "
            f"from another version of this library: {_listed(differences)}. Make the model and the "
            f"transformation as in the run that saved it, or start from tx.init. {more}".rstrip()
        )


def _listed(parts: list[str]) -> str:
    more = f"; and {len(parts) - SHOWN} more" if len(parts) > SHOWN else ""
    return "; ".join(part.lstrip("/") for part in parts[:SHOWN]) + more


def _leaves(tree: Any) -> dict[str, Any]:
    """The leaves by path; also the words of a request, which are keys without arrays."""
    flat = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_empty)[0]
    twice = [p for p, count in Counter(name_of(path) for path, _ in flat).items() if count > 1]
    if twice:
        raise ValueError(f"two values have one path: {_listed(twice)}. Rename one of each.")
    named = {name_of(path): x for path, x in flat}
    return {p: x for p, x in named.items() if not is_empty(x) or "/request/" in p}


def _check_arrays(**trees: dict[str, Any]) -> None:
    for name, leaves in trees.items():
        for path, x in leaves.items():
            if hasattr(x, "dtype") and not isinstance(x, jax.Array | np.ndarray | np.generic):
                raise TypeError(
                    f"restore_state: {name} holds no array at {path[1:]}, but a "
                    f"{type(x).__name__}. Give it the arrays that were saved, and a state fresh "
                    "from tx.init."
                )


def _described(x: Any) -> str:
    if is_empty(x):
        return "requested"
    return f"{raw(x).dtype if hasattr(x, 'dtype') else type(x).__name__} of shape {shape_of(x)}"


def _fits(x: Any, leaf: Any) -> bool:
    """Whether shape and dtype agree; for a Python number, the kind of number."""
    if is_empty(x) or is_empty(leaf):
        return is_empty(x) and is_empty(leaf)
    x, leaf = raw(x), raw(leaf)
    if hasattr(x, "dtype") and hasattr(leaf, "dtype"):
        return shape_of(x) == shape_of(leaf) and x.dtype == leaf.dtype
    return shape_of(x) == shape_of(leaf) and np.asarray(x).dtype.kind == np.asarray(leaf).dtype.kind


def _finite(x: Any) -> bool:
    if is_empty(x) or not jnp.issubdtype(jnp.result_type(raw(x)), jnp.inexact):
        return True
    return bool(jnp.isfinite(x).all())


def _placed(x: Any, leaf: Any) -> Any:
    """A copy of a saved array, on the devices of ``leaf``."""
    if not hasattr(leaf, "dtype"):
        return type(leaf)(x)
    if not isinstance(leaf, jax.Array):
        return np.array(x)
    x = raw(x)
    if not leaf.committed:
        x = jnp.array(np.asarray(x), raw(leaf).dtype)  # uncommitted to a device, as the leaf is
    if raw(leaf) is not leaf:
        x = jax.random.wrap_key_data(jnp.asarray(x), impl=jax.random.key_impl(leaf))
    return jax.device_put(x, leaf.sharding, may_alias=False) if leaf.committed else x
