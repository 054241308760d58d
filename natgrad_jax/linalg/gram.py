"""Sums of outer products of rows."""

from typing import Any

import jax
import jax.numpy as jnp

from natgrad_jax.utils.precision import of_squares
from natgrad_jax.utils.sharding import replicated


def gram(rows: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """``Σ r rᵀ`` over the two leading axes, accumulated in ``dtype``."""
    return products(rows, rows, dtype, of_squares())


def products(left: jax.Array, right: jax.Array, dtype: jnp.dtype, precision: Any) -> jax.Array:
    """``Σ l rᵀ`` over the two leading axes, accumulated in ``dtype``."""
    out_sharding, leading = replicated(left, left.ndim - 1), "nt"
    if left.shape[1] == 1:  # over two axes XLA writes a transposed copy of the rows first
        left, right, leading = left[:, 0], right[:, 0], "n"
    return jnp.einsum(
        f"{leading}...i,{leading}...j->...ij",
        left,
        right,
        precision=precision,
        preferred_element_type=dtype,
        out_sharding=out_sharding,
    ).astype(dtype)


def one_axis(rows: jax.Array) -> jax.Array:
    """Rows ``(N, T, …)`` as ``(N T, 1, …)``: their products are summed in one pass."""
    return rows.reshape(-1, *rows.shape[2:])[:, None]
