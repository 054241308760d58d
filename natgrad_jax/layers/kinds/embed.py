"""Embeddings: the input is a one-hot row, so that the factor over tokens is diagonal.

``A = diag(token frequencies)``. Attending to the same matrix (tied embeddings, ``s = h Eᵀ``) is a
second use of it, in which the rows of tokens belong to the outputs.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax.layers.geometry import Layout
from natgrad_jax.utils.precision import HIGHEST


class EmbedCall(NamedTuple):
    """A lookup of ids of any shape; the first axis counts examples."""

    tokens: int

    @property
    def swapped(self) -> bool:
        return False

    def examples(self, x: jax.Array) -> jax.Array:
        x = jnp.where(x < 0, x + self.tokens, x)  # as jnp.take does
        return x.reshape(x.shape[0] if x.ndim else 1, -1)

    def inputs(self, examples: jax.Array) -> jax.Array:
        """One-hot rows: ``(N, T, tokens)``."""
        return jax.nn.one_hot(examples, self.tokens)

    def row_axes(self, ndim: int) -> tuple[int, ...]:
        return tuple(range(ndim - 1))

    def outputs(self, g: jax.Array) -> jax.Array:
        shape = (1, 1) if g.ndim == 1 else (g.shape[0], math.prod(g.shape[1:-1]))
        return g.reshape(*shape, g.shape[-1])

    def width(self, x: jax.Array) -> int:
        return self.positions(x) * self.tokens

    def positions(self, x: jax.Array) -> int:
        return math.prod(x.shape[1:])

    def frequencies(self, examples: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """How often each token occurs: the diagonal of ``Σ ā āᵀ``."""
        return jnp.zeros(self.tokens, dtype).at[examples.ravel()].add(1)

    def second_moments(self, examples: jax.Array, rotated: jax.Array) -> jax.Array:
        """``Σₙ (Σₜ āₙₜ g̃ₙₜᵀ)²`` without one-hot rows: occurrences of one token are added first."""
        same = (examples[:, :, None] == examples[:, None, :]).astype(rotated.dtype)
        sums = jnp.einsum("ntu,nuo->nto", same, rotated, precision=HIGHEST)
        shares = jnp.square(sums) / same.sum(-1, keepdims=True)  # one share per occurrence
        zero = jnp.zeros((self.tokens, rotated.shape[-1]), rotated.dtype)
        return zero.at[examples.ravel()].add(shares.reshape(-1, shares.shape[-1]))


class AttendCall(NamedTuple):
    """``s = x Eᵀ``: outputs index the rows of E, inputs its columns."""

    @property
    def swapped(self) -> bool:
        return True

    def examples(self, x: jax.Array) -> jax.Array:
        return EmbedCall(0).outputs(x)

    def inputs(self, examples: jax.Array) -> jax.Array:
        return examples

    def row_axes(self, ndim: int) -> tuple[int, ...]:
        return tuple(range(ndim - 1))

    def outputs(self, g: jax.Array) -> jax.Array:
        return EmbedCall(0).outputs(g)

    def width(self, x: jax.Array) -> int:
        return 0

    def positions(self, x: jax.Array) -> int:
        return math.prod(x.shape[1:-1])


def embed(kernel_shape: tuple[int, ...]) -> tuple[EmbedCall, Layout]:
    """The call of a lookup, and the layout of the embedding ``(tokens, features)``."""
    return EmbedCall(kernel_shape[0]), Layout(kernel_shape, (), (0,), (1,))


def attend(kernel_shape: tuple[int, ...]) -> tuple[AttendCall, Layout]:
    """The call of an attention over the embedding, and its layout."""
    return AttendCall(), Layout(kernel_shape, (), (0,), (1,))
