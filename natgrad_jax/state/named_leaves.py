"""The leaves of states by name, as checkpoints have them."""

from typing import Any

import jax

from natgrad_jax.utils.tree_paths import join, normalize


def is_empty(x: Any) -> bool:
    """A word of a request, or a state without arrays; Flax's bytes have {} for ()."""
    return x is None or (isinstance(x, tuple | list | dict) and not x)


def name_of(key_path: tuple[Any, ...]) -> str:
    """A path such as ``/clock/step``, without the keys of the array in an NNX variable and of that
    in a divided one."""
    path = normalize(key_path)
    for wrapped in ("value", "padded"):
        path = path[:-1] if path[-1:] == (wrapped,) else path
    return "/" + join(path)


def raw(x: Any) -> Any:
    """An array as it is stored: a key by its numbers."""
    if jax.dtypes.issubdtype(getattr(x, "dtype", None), jax.dtypes.prng_key):
        concrete = isinstance(x, jax.Array)
        return jax.random.key_data(x) if concrete else jax.eval_shape(jax.random.key_data, x)
    return x


def shape_of(x: Any) -> tuple[int, ...]:
    return tuple(getattr(raw(x), "shape", ()))
