"""The square root of a small matrix whose entries are arrays: one number's output Fisher."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

# Rows of a symmetric matrix; its entries are arrays or numbers, None where there is no formula.
Entries = Sequence[Sequence[Any]]


def root_of(distribution: str, names: Sequence[str], entries: Entries) -> list[list[Any]]:
    """The rows of the Cholesky factor L, ``L Lᵀ = entries``; zero columns where it is singular, NaN
    where a diagonal entry is negative.

    Raises ValueError where an entry has no formula.
    """
    if any(x is None for row in entries for x in row):
        raise ValueError(
            f"the Fisher of {distribution} over ({', '.join(names)}) has no formula here: sample "
            'labels with fisher="mc". For an own distribution write fisher(self), or root_column.'
        )
    root: list[list[Any]] = []
    for i, row in enumerate(entries):
        own: list[Any] = []
        for j, x in enumerate(row[: i + 1]):
            before = own if i == j else root[j]
            for a, b in zip(own[:j], before[:j], strict=True):
                x = x - a * b
            if i == j:
                # a negative information, as of a negative variance, is no rounding
                own.append(jnp.where(jnp.asarray(row[i]) < 0, jnp.nan, jnp.sqrt(jnp.maximum(x, 0))))
            else:
                own.append(over(x, root[j][j]))
        root.append(own + [jnp.zeros(())] * (len(entries) - i - 1))
    return root


def solved(root: Sequence[Sequence[Any]], vector: Sequence[Any]) -> list[Any]:
    """``L⁻¹ v``, zero where L is singular."""
    found: list[Any] = []
    for row, x in zip(root, vector, strict=True):
        for entry, y in zip(row, found, strict=False):
            x = x - entry * y
        found.append(over(x, row[len(found)]))
    return found


def over(x: Any, pivot: Any) -> Any:
    """``x / pivot``, or 0 where that is not positive."""
    return jnp.where(pivot > 0, x / jnp.where(pivot > 0, pivot, 1), 0)
