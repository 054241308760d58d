"""Factors of convolutions and of groups of channels: several matrices, or several uses of one.

The coordinates are ``places × channels``, in that order, where places are kernel offsets, and maybe
a separate bias. All places share one matrix over channels (SUA), or channels are divided into
groups without correlations between them: Laurent et al. 2018, sections 2.1 and 2.2.
"""

from dataclasses import dataclass, replace
from typing import Any, cast

import jax
import jax.numpy as jnp

from natgrad_jax.layers.factor_structure import FactorStructure
from natgrad_jax.layers.layer_call import LayerCall, PatchCall
from natgrad_jax.linalg.batching import trace_of
from natgrad_jax.linalg.gram import gram, one_axis
from natgrad_jax.linalg.operators import as_operator
from natgrad_jax.utils.precision import HIGHEST


@dataclass(frozen=True)
class Shared(FactorStructure):
    """``I ⊗ C``: one matrix over channels for all places, ``(channels, channels)``.

    ``bias``: one more coordinate, last, stored separately. ``mean``: instead, one more channel, of
    ones at every place, last in the matrix, which thus includes the channels' mean.
    """

    places: int
    channels: int
    bias: bool = False
    mean: bool = False

    @property
    def size(self) -> int:
        return self.places * self.channels + (self.bias or self.mean)

    @property
    def width(self) -> int:
        return self.channels + self.mean

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.width, self.width)

    @property
    def packed(self) -> int:
        return self.places * self.channels + self.bias

    @property
    def bias_apart(self) -> bool:
        return self.bias

    @property
    def mean_included(self) -> bool:
        return self.mean

    @property
    def supports_low_rank(self) -> bool:
        return True

    def describe(self) -> str:
        return f"{self.width}²"

    def spread(self, values: jax.Array, bias: jax.Array | None) -> jax.Array:
        return _spread(values, bias, (self.places, self.width))

    def rows(self, x: jax.Array) -> jax.Array:
        lead, main = x.shape[:-1], x[..., : self.places * self.channels]
        main = jnp.moveaxis(main.reshape(*lead, self.places, self.channels), -2, 2)
        main = main.reshape(lead[0], -1, *lead[2:], self.channels)
        if not self.mean:
            return main
        return jnp.concatenate([main, jnp.ones_like(main[..., :1])], axis=-1)

    def gram(self, rows: jax.Array, dtype: jnp.dtype) -> jax.Array:
        return gram(rows, dtype) / self.places

    def gram_without_rows(
        self,
        call: LayerCall,
        examples: jax.Array,
        dtype: jnp.dtype,
        weight: jax.Array | None = None,
    ) -> jax.Array | None:
        rows = cast(PatchCall, call).channel_rows(examples, self.mean)
        return gram(one_axis(_of_weight(rows, weight)), dtype) / self.places

    def narrow(self, factor: jax.Array) -> jax.Array:
        """The mean over places p of ``A_pp``; with ``mean``, of ``[[A_pp, m_p], [m_pᵀ, rows]]``."""
        n, lead = self.places * self.channels, factor.shape[:-2]
        parts = factor[..., :n, :n].reshape(*lead, self.places, self.channels, self.places, -1)
        C = jnp.moveaxis(jnp.diagonal(parts, axis1=-4, axis2=-2), -1, -3).mean(-3)
        if not self.mean:
            return C
        mean = factor[..., :n, n:].reshape(*lead, self.places, self.channels, 1).mean(-3)
        top = jnp.concatenate([C, mean], axis=-1)
        low = jnp.concatenate([mean.mT, factor[..., n:, n:]], axis=-1)
        return jnp.concatenate([top, low], axis=-2)

    def apply(self, matrix: Any, bias: jax.Array | None, x: jax.Array) -> jax.Array:
        return _apply(matrix, bias, x, (self.places, self.width), self.bias)

    def trace(self, factor: jax.Array, bias: jax.Array | None) -> jax.Array:
        return _trace(trace_of(factor) * self.places, bias)

    def project(self, basis: jax.Array, rows: jax.Array) -> jax.Array:
        return _project(basis, rows, (self.places, self.width), self.bias)


@dataclass(frozen=True)
class Grouped(FactorStructure):
    """A matrix for each group of channels, ``(groups, width, width)``.

    ``group``: channels in one group; the last group is padded with zeros. ``bias``: one more
    coordinate, last, stored separately. ``shared``: all places share the group's matrix (SUA);
    otherwise it is over the group's channels at all places.
    """

    places: int
    channels: int
    group: int
    bias: bool = False
    shared: bool = False

    @property
    def size(self) -> int:
        return self.places * self.channels + self.bias

    @property
    def groups(self) -> int:
        return -(-self.channels // self.group)

    @property
    def width(self) -> int:
        return self.group if self.shared else self.group * self.places

    @property
    def uses(self) -> int:
        """How often each matrix occurs on the diagonal."""
        return self.places if self.shared else 1

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.groups, self.width, self.width)

    @property
    def packed(self) -> int:
        return self.groups * self.group * self.places + self.bias

    @property
    def bias_apart(self) -> bool:
        return self.bias

    @property
    def cost(self) -> int:
        return self.width**3 * self.groups

    def describe(self) -> str:
        return f"{self.groups} × {self.width}²"

    def pack(self, x: jax.Array, axis: int) -> jax.Array:
        """Coordinates in groups: (groups, places, group), then the bias."""
        main, rest = _parted(jnp.moveaxis(x, axis, -1), self.bias)
        lead, fill = main.shape[:-1], self.groups * self.group - self.channels
        main = main.reshape(*lead, self.places, self.channels)
        main = jnp.pad(main, [(0, 0)] * (main.ndim - 1) + [(0, fill)])
        main = main.reshape(*lead, self.places, self.groups, self.group)
        main = jnp.swapaxes(main, -3, -2).reshape(*lead, -1)
        return jnp.moveaxis(jnp.concatenate([main, rest], axis=-1), -1, axis)

    def unpack(self, x: jax.Array, axis: int) -> jax.Array:
        """The inverse of :meth:`pack`; the padding is dropped."""
        main, rest = _parted(jnp.moveaxis(x, axis, -1), self.bias)
        lead = main.shape[:-1]
        main = main.reshape(*lead, self.groups, self.places, self.group)
        main = jnp.swapaxes(main, -3, -2).reshape(*lead, self.places, -1)
        main = main[..., : self.channels].reshape(*lead, -1)
        return jnp.moveaxis(jnp.concatenate([main, rest], axis=-1), -1, axis)

    def spread(self, values: jax.Array, bias: jax.Array | None) -> jax.Array:
        return _spread(values, bias, self._form)

    def each_matrix(self, x: jax.Array) -> jax.Array:
        return x[..., None]

    def rows(self, x: jax.Array) -> jax.Array:
        main = _parted(self.pack(x, -1), self.bias)[0]
        lead = main.shape[:-1]
        if not self.shared:
            return main.reshape(*lead, self.groups, self.width)
        main = main.reshape(*lead, self.groups, self.places, self.group)
        return jnp.moveaxis(main, -2, 2).reshape(lead[0], -1, *lead[2:], self.groups, self.group)

    def gram(self, rows: jax.Array, dtype: jnp.dtype) -> jax.Array:
        products = gram(rows, dtype)
        return products / self.places if self.shared else products

    def gram_without_rows(
        self,
        call: LayerCall,
        examples: jax.Array,
        dtype: jnp.dtype,
        weight: jax.Array | None = None,
    ) -> jax.Array | None:
        if not self.shared:
            return None
        rows = _of_weight(cast(PatchCall, call).channel_rows(examples), weight)
        at_one_place = Grouped(1, self.channels, self.group)
        return gram(one_axis(at_one_place.rows(rows)), dtype) / self.places

    def narrow(self, factor: jax.Array) -> jax.Array:
        n, lead, count = self.places * self.channels, factor.shape[:-2], self.groups * self.uses
        without_bias = replace(self, bias=False)
        packed = without_bias.pack(without_bias.pack(factor[..., :n, :n], -1), -2)
        parts = packed.reshape(*lead, count, self.width, count, self.width)
        parts = jnp.moveaxis(jnp.diagonal(parts, axis1=-4, axis2=-2), -1, -3)
        if not self.shared:
            return parts
        return parts.reshape(*lead, self.groups, -1, self.width, self.width).mean(-3)

    def apply(self, matrix: Any, bias: jax.Array | None, x: jax.Array) -> jax.Array:
        return _apply(matrix, bias, x, self._form, self.bias)

    def trace(self, factor: jax.Array, bias: jax.Array | None) -> jax.Array:
        trace = trace_of(factor).sum(-1)
        return _trace(trace * self.places if self.shared else trace, bias)

    def project(self, basis: jax.Array, rows: jax.Array) -> jax.Array:
        return _project(basis, rows, self._form, self.bias)

    @property
    def _form(self) -> tuple[int, int, int]:
        """Shape of the packed coordinates without the bias."""
        return self.groups, self.uses, self.width


def _of_weight(rows: jax.Array, weight: jax.Array | None) -> jax.Array:
    """Rows ``(N, ·, …)`` times the roots of their examples' weights."""
    if weight is None:
        return rows
    return rows * jnp.sqrt(weight).astype(rows.dtype).reshape(-1, *[1] * (rows.ndim - 1))


def _parted(x: jax.Array, bias: bool) -> tuple[jax.Array, jax.Array]:
    """The coordinates on the last axis, split into those without the bias, and the bias."""
    n = x.shape[-1] - bias
    return x[..., :n], x[..., n:]


def _spread(values: jax.Array, bias: jax.Array | None, form: tuple[int, ...]) -> jax.Array:
    """Values of each matrix at every coordinate ``(*form)``, then the bias's."""
    lead = values.shape[: values.ndim - len(form) + 1]
    at_uses = jnp.broadcast_to(values[..., None, :], (*lead, *form)).reshape(*lead, -1)
    if bias is None:
        return at_uses
    return jnp.concatenate([at_uses, bias[..., None].astype(values.dtype)], axis=-1)


def _apply(
    matrix: Any, bias: jax.Array | None, x: jax.Array, form: tuple[int, ...], apart: bool
) -> jax.Array:
    """``M x`` for coordinates ``(*form)``, matrices on the last axis, and maybe a separate bias."""
    end = x.shape[-2] - apart
    main, rest = x[..., :end, :], x[..., end:, :]
    parts = main.reshape(*x.shape[:-2], *form, x.shape[-1])
    out = as_operator(matrix).repeated().apply(parts).reshape(main.shape)
    if not apart:
        return out
    rest = rest if bias is None else rest * bias[..., None, None].astype(rest.dtype)
    return jnp.concatenate([out, rest], axis=-2)


def _project(basis: jax.Array, rows: jax.Array, form: tuple[int, ...], apart: bool) -> jax.Array:
    """``Qᵀ r`` of rows of such coordinates."""
    main, rest = _parted(rows, apart)
    parts = main.reshape(*main.shape[:-1], *form)
    out = jnp.einsum("nt...pi,...ij->nt...pj", parts, basis, precision=HIGHEST)
    return jnp.concatenate([out.reshape(main.shape), rest], axis=-1)


def _trace(factor_trace: jax.Array, bias: jax.Array | None) -> jax.Array:
    return factor_trace if bias is None else factor_trace + bias.astype(factor_trace.dtype)
