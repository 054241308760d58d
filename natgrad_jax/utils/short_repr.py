"""Short texts of states and statistics: shapes in place of numbers, one line for each layer."""

import dataclasses
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from natgrad_jax.utils.hyperparams import is_concrete
from natgrad_jax.utils.tree_paths import join

Class = TypeVar("Class", bound=type)


def printed_short(cls: Class) -> Class:
    """The NamedTuple or dataclass with a ``repr`` that is short at any size."""
    cls.__repr__ = _record  # type: ignore[assignment, method-assign]
    return cls


def bytes_text(n: float) -> str:
    """``6.5 MB``."""
    for unit in ("B", "kB", "MB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if n >= 10 or unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} GB"


def short_text(name: str, fields: dict[str, Any], members: Any = None) -> str:
    """``Name(number=…, array=shape; bytes; also other fields)``.

    With fields by path, the first of them has a line for each layer; the others are only named. Of
    the sums of statistics, by weight sharing, the first that has some is shown.
    """
    total = bytes_text(_bytes(fields))
    if isinstance(sums := fields.get("sums"), dict):
        fields = {**fields, "sums": next(filter(None, sums.values()), None)}
    fields = {name: x for name, x in fields.items() if jax.tree.leaves(x)}
    by_path = {key: x for key, x in fields.items() if _is_by_path(x)}
    told = ", ".join(_field(key, x) for key, x in fields.items() if key not in by_path)
    if not by_path:
        return f"{name}({told})"
    (first, layers), *others = by_path.items()
    also = [f"also {', '.join(key for key, _ in others)}"] if others else []
    head = "; ".join([*filter(None, [told]), total, *also, f"{first}:"])
    label = lambda path: join(path) + _more((members or {}).get(path, ()))
    lines = [f"  {label(path)}: {_text(x)}" for path, x in layers.items()]
    return "\n".join([f"{name}({head}", *lines]) + ")"


def _record(record: Any) -> str:
    if dataclasses.is_dataclass(record):
        own = [x.name for x in dataclasses.fields(record) if not x.metadata.get("static")]
    else:
        own = record._fields
    fields = {name: getattr(record, name) for name in own}
    return short_text(type(record).__name__, fields, getattr(record, "members", None))


def _is_by_path(x: Any) -> bool:
    return isinstance(x, dict) and all(isinstance(key, tuple) for key in x)


def _more(members: Any) -> str:
    return f" and {len(members) - 1} more" if len(members) > 1 else ""


def _field(name: str, x: Any) -> str:
    return f"step={_text(x.step)}" if name == "clock" else f"{name}={_text(x)}"


def _text(x: Any) -> str:
    if isinstance(x, nnx.Variable):
        return _text(x[...])
    if isinstance(x, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct):
        return _number(x) or f"{x.dtype}[{','.join(map(str, x.shape))}]"
    if type(x).__repr__ is _record or jax.tree_util.all_leaves([x]) or not jax.tree.leaves(x):
        return repr(x)
    if type(x) is tuple and any(hasattr(own, "_fields") for own in x):
        return f"({', '.join(map(_text, x))})"  # a chain
    return f"{type(x).__name__}({len(jax.tree.leaves(x))} arrays, {bytes_text(_bytes(x))})"


def _number(x: Any) -> str:
    """Of a scalar whose value can be had here and now; else nothing."""
    numeric = jnp.issubdtype(x.dtype, jnp.number) or x.dtype == bool
    if x.shape or not numeric or isinstance(x, jax.ShapeDtypeStruct) or not is_concrete(x):
        return ""
    if isinstance(x, jax.Array) and (x.is_deleted() or not x.is_fully_addressable):
        return ""
    value = np.asarray(x).item()
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree) if hasattr(x, "dtype"))
