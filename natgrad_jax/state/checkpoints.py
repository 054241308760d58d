"""Whether a saved state is one of this transformation, before anything reads it."""

from typing import Any

import jax

from natgrad_jax.utils.tree_paths import Path, join, normalize

SHOWN = 5  # differences in a message


def check_state(saved: Any, state: Any) -> None:
    """Raise unless what was saved has the arrays of ``state``, path by path and shape by shape.

    Fields of this library's states are named tuples by layer path, and checkpoints keep the names:
    so a state of other Layers, of other keywords or of another version tells itself.

    Args:
      saved: the metadata of a checkpoint, ``manager.item_metadata(step).tree`` of orbax, or any
        tree whose leaves have shapes; named tuples may have become dicts.
      state: the state (or dict of states) that it is to replace, fresh from ``tx.init``.

    Raises:
      ValueError: names the first paths where the two differ, and how.

    Source: orbax-checkpoint restores by the same paths, and stops at the first shape without it.

    >>> import jax.numpy as jnp, natgrad_jax as ng
    >>> state = ng.kfac(0.1, ng.Layers({})).init({})
    >>> ng.check_state(state, state)
    >>> ng.check_state({"clock": {"step": jnp.zeros(())}}, {"clock": {"step": jnp.zeros(3)}})
    Traceback (most recent call last):
    ValueError: the saved state ... clock/step: saved with shape (), now (3,)...
    """
    before, now = _shapes(saved), _shapes(state)
    differences = [f"{join(path)}: not in what was saved" for path in now if path not in before]
    differences += [f"{join(path)}: saved, and not there now" for path in before if path not in now]
    differences += [
        f"{join(path)}: saved with shape {before[path]}, now {shape}"
        for path, shape in now.items()
        if before.get(path, shape) != shape
    ]
    if differences:
        more = f"; and {len(differences) - SHOWN} more" if len(differences) > SHOWN else ""
        raise ValueError(
            "the saved state is of other Layers, of a transformation with other keywords, or of "
            f"another version of this library: {'; '.join(differences[:SHOWN])}{more}. Make the "
            "model and the transformation as the run that saved it did, or start from tx.init."
        )


def _shapes(tree: Any) -> dict[Path, tuple[int, ...]]:
    """By path; also of what a state asks for, which is spelled in keys without arrays."""
    is_mark = lambda x: type(x) is tuple and not x
    flat = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_mark)[0]
    return {normalize(path): _shape(x) for path, x in flat}


def _shape(x: Any) -> tuple[int, ...]:
    """As arrays are stored: a key by its numbers."""
    if jax.dtypes.issubdtype(getattr(x, "dtype", None), jax.dtypes.prng_key):
        x = jax.eval_shape(jax.random.key_data, x)
    return tuple(getattr(x, "shape", ()))
