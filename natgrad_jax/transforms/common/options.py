"""The static choices of transformations: records, their shorthands, and 0.1.0's keywords.

A choice made once, when a transformation is made, is a small frozen record that defines its own
defaults; a string is shorthand for a record with those. Numbers that may be traced or scheduled
remain keywords, so that ``optax.inject_hyperparams`` finds them in the signature.
"""

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from natgrad_jax.curvature.eigenbases import Eigenbasis
from natgrad_jax.curvature.inverse_methods import METHODS, Inverse, LowRank, Woodbury
from natgrad_jax.layers.approximation import CONVOLUTIONS, Approximation
from natgrad_jax.transforms.common.refresh_schedule import Refresh, refresh_record

F = TypeVar("F", bound=Callable[..., Any])


class _Deprecated:
    """The default of a keyword that a record holds now."""

    def __repr__(self) -> str:
        return "deprecated"


DEPRECATED = _Deprecated()

EIGENVECTORS = 64  # of a basis of low rank, if no number is given

BASES: dict[str, LowRank | Eigenbasis] = {
    "low_rank": LowRank(EIGENVECTORS),
    "eigh": Eigenbasis("eigh"),
    "qr": Eigenbasis("qr"),
}

# 0.1.0's keywords: the option whose record now holds each (the first one that the transformation
# takes), and the field of that record.
_MOVED = {
    "convolution": (("approximation",), "convolution"),
    "group_size": (("approximation",), "group_size"),
    "weight_sharing": (("approximation",), "weight_sharing"),
    "rank": (("inverse", "basis"), "rank"),
    "cutoff": (("inverse",), "cutoff"),
    "basis_tolerance": (("basis",), "tolerance"),
    "spread": (("refresh",), "staggered"),
    "refresh_over": (("refresh",), "over"),
}


def inverse_method(inverse: Inverse | str) -> Inverse:
    """The record for ``inverse=``; raises ValueError with the possible values."""
    if isinstance(inverse, str) and inverse == "woodbury":
        raise ValueError(
            'inverse="woodbury" needs the rank of its updates: write inverse=ng.Woodbury(rank=32).'
        )
    found = METHODS.get(inverse) if isinstance(inverse, str) else inverse
    if not isinstance(found, Inverse):
        raise ValueError(
            f"inverse must be {' or '.join(map(repr, METHODS))}, or a record such as "
            f"ng.LowRank(rank=64); got {inverse!r}."
        )
    return found


def eigenbasis_method(basis: LowRank | Eigenbasis | str) -> LowRank | Eigenbasis:
    """The record for ``basis=``; raises ValueError with the possible values."""
    found = BASES.get(basis) if isinstance(basis, str) else basis
    if not isinstance(found, LowRank | Eigenbasis):
        raise ValueError(
            f"basis must be {' or '.join(map(repr, BASES))}, or a record such as "
            f"ng.LowRank(rank=64) or ng.Eigenbasis('qr', tolerance=0.1); got {basis!r}."
        )
    return found


def approximation_of(approximation: Approximation | str) -> Approximation:
    """The record for ``approximation=``; raises ValueError with the possible values."""
    if isinstance(approximation, str) and approximation in CONVOLUTIONS:
        return Approximation(approximation)  # type: ignore[arg-type]
    if not isinstance(approximation, Approximation):
        raise ValueError(
            f"approximation must be {' or '.join(map(repr, CONVOLUTIONS))}, or a record such as "
            f"ng.Approximation(group_size=32); got {approximation!r}."
        )
    return approximation


def renamed_keywords(make: F) -> F:
    """``make``, which for one release also takes the keywords that are now fields of records.

    They are in its signature, since ``optax.inject_hyperparams`` binds that.
    """
    signature = inspect.signature(make)
    known = signature.parameters
    moved = {
        keyword: next(option for option in options if option in known)
        for keyword, (options, _) in _MOVED.items()
        if keyword not in known and any(option in known for option in options)
    }

    @functools.wraps(make)
    def wrapper(*args: Any, **given: Any) -> Any:
        old = {k: given.pop(k) for k in moved if k in given}
        old = {k: value for k, value in old.items() if value is not DEPRECATED}
        if old:
            fields: dict[str, dict[str, Any]] = {moved[k]: {} for k in old}
            for k, value in old.items():
                if value is not None:
                    fields[moved[k]][_MOVED[k][1]] = value
            defaults = {option: known[option].default for option in fields}
            given |= _records(make.__name__, old, fields, defaults | given)
        return make(*args, **given)

    keyword_only = inspect.Parameter.KEYWORD_ONLY
    also = [inspect.Parameter(k, keyword_only, default=DEPRECATED) for k in moved]
    wrapper.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*known.values(), *also]
    )
    return wrapper  # type: ignore[return-value]


def _records(
    name: str,
    old: Mapping[str, Any],
    fields: Mapping[str, Mapping[str, Any]],
    given: Mapping[str, Any],
) -> dict[str, Any]:
    """The records equivalent to the old keywords; warns, showing how to write them.

    ``fields``: by option, those that the old keywords set; ``given``: the options' values.
    """
    records = {option: _with_fields(option, given[option], own) for option, own in fields.items()}
    was = ", ".join(f"{k}={v!r}" for k, v in old.items())
    now = ", ".join(f"{k}={_as_written(v)}" for k, v in records.items())
    warnings.warn(
        f"{name}({was}) is deprecated: write {name}({now}). The old keywords go with the next "
        "release.",
        DeprecationWarning,
        stacklevel=3,
    )
    return records


def _with_fields(option: str, value: Any, fields: Mapping[str, Any]) -> Any:
    """The record of ``value`` (a record, a shorthand or None) with fields replaced."""
    if option == "inverse" and value == "woodbury" and set(fields) == {"rank"}:
        return Woodbury(**fields)
    parse = {"inverse": inverse_method, "basis": eigenbasis_method,
             "approximation": approximation_of, "refresh": refresh_record}  # fmt: skip
    record = parse[option](value)
    known = {x.name for x in dataclasses.fields(record)}
    if not set(fields) <= known:
        wrong = ", ".join(f"{k}={v!r}" for k, v in fields.items() if k not in known)
        raise ValueError(
            f"{wrong} does not go with {option}={_as_written(record)}: leave it out, or choose "
            f"another {option}."
        )
    return dataclasses.replace(record, **fields)


def _as_written(record: Any) -> str:
    """The record as a user writes it, without default fields."""
    if isinstance(record, Refresh):
        return f"ng.{record!r}"
    own = [f"{x.name}={getattr(record, x.name)!r}" for x in dataclasses.fields(record)
           if getattr(record, x.name) != x.default]  # fmt: skip
    return f"ng.{type(record).__name__}({', '.join(own)})"
