"""Embeddings: the input is a one-hot row, so that the factor over tokens is diagonal.

``A = diag(token frequencies)``. Attending to the same matrix (tied embeddings, ``s = h Eᵀ``) is a
second use of it, in which the rows of tokens belong to the outputs.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax.layers.kinds.dense import normal_form
from natgrad_jax.utils.precision import HIGHEST


class EmbedCall(NamedTuple):
    """A lookup of ids of any shape, with a last axis of length one; the first counts examples.

    ``one_hot``: the ids come as one-hot rows instead. ``features``: how many of the output's last
    axes hold features. Ids out of range, whose rows are zero or NaN, count for no token, or are
    ``clipped``.
    """

    tokens: int
    one_hot: bool = False
    features: int = 1
    clipped: bool = False

    @property
    def swapped(self) -> bool:
        return False

    def examples(self, x: jax.Array) -> jax.Array:
        if self.one_hot:
            ids = jnp.where(jnp.any(x != 0, axis=-1), jnp.argmax(x, axis=-1), self.tokens)
        elif self.clipped:
            ids = jnp.clip(x, 0, self.tokens - 1)[..., 0]
        else:
            ids = jnp.where((x >= 0) & (x < self.tokens), x, self.tokens)[..., 0]
        return ids.reshape(ids.shape[0] if ids.ndim else 1, -1)

    def inputs(self, examples: jax.Array) -> jax.Array:
        """One-hot rows: ``(N, T, tokens)``."""
        return jax.nn.one_hot(examples, self.tokens)

    def row_axes(self, ndim: int) -> tuple[int, ...]:
        return tuple(range(ndim - self.features))

    def output_axes(self, ndim: int) -> tuple[int, ...]:
        return tuple(range(ndim - self.features, ndim))

    @property
    def block_axes(self) -> tuple[int, ...]:
        return ()

    def outputs(self, g: jax.Array) -> jax.Array:
        return normal_form(g, self.row_axes(g.ndim), (), self.output_axes(g.ndim))

    def width(self, x: jax.Array) -> int:
        return self.positions(x) * self.tokens

    def positions(self, x: jax.Array) -> int:
        return math.prod(x.shape[1:-1])

    def frequencies(
        self, examples: jax.Array, dtype: jnp.dtype, weight: jax.Array | None = None
    ) -> jax.Array:
        """How often each token occurs, by weight: the diagonal of ``Σ ā āᵀ``."""
        counted: jax.Array | int = 1
        if weight is not None:
            counted = jnp.broadcast_to(weight, examples.shape).ravel().astype(dtype)
        return jnp.zeros(self.tokens, dtype).at[examples.ravel()].add(counted, mode="drop")

    def second_moments(self, examples: jax.Array, rotated: jax.Array) -> jax.Array:
        """``Σₙ (Σₜ āₙₜ g̃ₙₜᵀ)²`` without one-hot rows: occurrences of one token are added first."""
        same = (examples[:, :, None] == examples[:, None, :]).astype(rotated.dtype)
        sums = jnp.einsum("ntu,nuo->nto", same, rotated, precision=HIGHEST)
        shares = jnp.square(sums) / same.sum(-1, keepdims=True)  # one share per occurrence
        zero = jnp.zeros((self.tokens, rotated.shape[-1]), rotated.dtype)
        return zero.at[examples.ravel()].add(shares.reshape(-1, shares.shape[-1]), mode="drop")
