"""Sums of outer products of rows."""

import jax
import jax.numpy as jnp

from natgrad_jax.utils.precision import of_squares
from natgrad_jax.utils.sharding import replicated


def gram(rows: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """``Σ r rᵀ`` over the two leading axes, accumulated in ``dtype``."""
    out_sharding, leading = replicated(rows, rows.ndim - 1), "nt"
    if rows.shape[1] == 1:  # over two axes XLA writes a transposed copy of the rows first
        rows, leading = rows[:, 0], "n"
    return jnp.einsum(
        f"{leading}...i,{leading}...j->...ij",
        rows,
        rows,
        precision=of_squares(),
        preferred_element_type=dtype,
        out_sharding=out_sharding,
    ).astype(dtype)


def one_axis(rows: jax.Array) -> jax.Array:
    """Rows ``(N, T, …)`` as ``(N T, 1, …)``: their products are summed in one pass."""
    return rows.reshape(-1, *rows.shape[2:])[:, None]
