"""One matrix over all coordinates, or a diagonal; and the structures of a kernel's two factors."""

import math
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp

from natgrad_jax.layers.factor_structure import FactorStructure
from natgrad_jax.layers.grouped_structures import Grouped, Shared
from natgrad_jax.layers.layer_call import LayerCall, OneHotCall
from natgrad_jax.layers.sketched import Sketched
from natgrad_jax.linalg.batching import trace_of
from natgrad_jax.linalg.operators import as_operator
from natgrad_jax.linalg.pseudo_inverse import reciprocal
from natgrad_jax.utils.precision import HIGHEST


@dataclass(frozen=True)
class Dense(FactorStructure):
    """One matrix over all ``n`` coordinates, a bias among them: ``(n, n)``."""

    n: int

    @property
    def size(self) -> int:
        return self.n

    @property
    def width(self) -> int:
        return self.n

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.n, self.n)

    @property
    def supports_low_rank(self) -> bool:
        return True

    @property
    def supports_partial_basis(self) -> bool:
        return True

    def describe(self) -> str:
        return f"{self.n}²"

    def spread(self, values: jax.Array, bias: jax.Array | None) -> jax.Array:
        return values

    def narrow(self, factor: jax.Array) -> jax.Array:
        return factor

    def apply(self, matrix: Any, bias: jax.Array | None, x: jax.Array) -> jax.Array:
        return as_operator(matrix).apply(x)

    def apply_right(self, matrix: Any, x: jax.Array) -> jax.Array:
        return as_operator(matrix).apply_right(x)

    def trace(self, factor: jax.Array, bias: jax.Array | None) -> jax.Array:
        return trace_of(factor)

    def project(self, basis: jax.Array, rows: jax.Array) -> jax.Array:
        return jnp.einsum("nt...i,...ij->nt...j", rows, basis, precision=HIGHEST)


@dataclass(frozen=True)
class Diagonal(FactorStructure):
    """One number per coordinate, ``(n,)``, for one-hot inputs and sides too wide for a matrix. It
    needs no factorisation: its eigenvectors are the unit vectors."""

    n: int
    one_hot: bool = False

    @property
    def size(self) -> int:
        return self.n

    @property
    def width(self) -> int:
        return 1

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.n,)

    @property
    def cost(self) -> int:
        return 0

    def describe(self) -> str:
        return f"diagonal {self.n}"

    def spread(self, values: jax.Array, bias: jax.Array | None) -> jax.Array:
        return values

    def gram(self, rows: jax.Array, dtype: jnp.dtype) -> jax.Array:
        return jnp.sum(jnp.square(rows.astype(dtype)), axis=(0, 1))

    def gram_without_rows(
        self,
        call: LayerCall,
        examples: jax.Array,
        dtype: jnp.dtype,
        weight: jax.Array | None = None,
    ) -> jax.Array | None:
        if not self.one_hot:
            return None
        return cast(OneHotCall, call).frequencies(examples, dtype, weight)

    def narrow(self, factor: jax.Array) -> jax.Array:
        return jnp.diagonal(factor, axis1=-2, axis2=-1)

    def identity(self, lead: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        return jnp.ones((*lead, self.n), dtype)

    def apply(self, matrix: Any, bias: jax.Array | None, x: jax.Array) -> jax.Array:
        return matrix[..., None] * x

    def trace(self, factor: jax.Array, bias: jax.Array | None) -> jax.Array:
        return factor.sum(-1)

    def squared_norm(self, factor: jax.Array, bias: jax.Array | None) -> jax.Array:
        return jnp.square(factor).sum(-1)

    def direct_inverse(self, factor: jax.Array, damping: jax.Array) -> jax.Array | None:
        return reciprocal(factor + damping.astype(factor.dtype)[..., None])

    def inverse_error(
        self, factor: jax.Array, damping: jax.Array, inverse: Any, columns: jax.Array
    ) -> jax.Array:
        return jnp.square((factor + damping[..., None]) * inverse - 1)

    def update_rank(self, rank: int) -> int:
        return 0

    def eigenvalues(self, matrix: jax.Array) -> jax.Array:
        return matrix

    def mean_eigenvalue(self, matrix: jax.Array) -> jax.Array:
        return matrix.mean(-1)

    def direct_eigenbasis(self, factor: jax.Array) -> tuple[jax.Array, jax.Array] | None:
        return jnp.ones_like(factor), factor

    def project(self, basis: jax.Array, rows: jax.Array) -> jax.Array:
        return rows

    def rotate(self, basis: jax.Array, x: jax.Array) -> jax.Array:
        return x

    def rotate_back(self, basis: jax.Array, x: jax.Array) -> jax.Array:
        return x

    def turn(self, x: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
        return x

    def transport(self, moments: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
        return moments

    def along(self, factor: jax.Array, basis: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        return factor, jnp.zeros_like(factor), jnp.square(factor)


def input_structure(
    places: int,
    channels: int,
    bias: bool,
    group_size: int | None = None,
    shared: bool = False,
    centred: bool = False,
    max_size: int | None = None,
    columns: int = 0,
) -> FactorStructure:
    """The structure of A for a kernel with ``places × channels`` inputs.

    ``shared``: all places share one matrix over channels, also if the whole one would have more
    than ``max_size`` rows; ``centred``: with their mean in it; ``columns``: of the sketch of
    what has more all the same, 0 for its diagonal.
    """
    most = math.inf if max_size is None else max_size
    whole = places * channels + bias
    shared = (shared or (whole > most and group_size is None)) and places > 1
    if shared and centred and bias:
        return Shared(places, channels, mean=True)
    if group_size is None and shared and channels <= most:
        return Shared(places, channels, bias)
    if group_size is None:
        return Dense(whole) if whole <= most else _wide(whole, columns)
    if places == 1:  # the bias counts as one more channel
        return _in_groups(group_size, channels + bias)
    return _in_groups(group_size, channels, places, bias, shared)


def output_structure(
    channels: int, group_size: int | None = None, max_size: int | None = None, columns: int = 0
) -> FactorStructure:
    """The structure of G for a kernel with ``channels`` outputs, in groups if given a size."""
    if group_size is not None:
        return _in_groups(group_size, channels)
    most = math.inf if max_size is None else max_size
    return Dense(channels) if channels <= most else _wide(channels, columns)


def _wide(size: int, columns: int) -> FactorStructure:
    return Sketched(size, columns) if columns else Diagonal(size)


def _in_groups(
    size: int, channels: int, places: int = 1, bias: bool = False, shared: bool = False
) -> Grouped:
    return Grouped(places, channels, min(size, channels), bias, shared)
