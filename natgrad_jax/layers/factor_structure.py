"""The two sides of a kernel matrix, and the structured factors that act on them.

A factor is a matrix over the rows (inputs) or the columns (outputs) of ``K̄``. Dense factors, the
groups and the SUA form of Laurent et al. 2018 and the diagonal of an embedding are one thing: the
coordinates fall into groups, and each group has a small matrix of its own, which the places of a
receptive field either join (KFC) or share (SUA).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax.linalg.batching import trace_of
from natgrad_jax.utils.precision import HIGHEST


class Side(NamedTuple):
    """``places × channels`` coordinates, in that order, and perhaps one more for the bias.

    ``group``: channels in one group; the last group is filled up with zeros. ``shared``: the places
    share each group's matrix. ``bias``: one more coordinate, last, uncorrelated with the others.
    ``grouped``: whether the factor has an axis of groups; ``diagonal``: whether it is a vector.
    ``constant``: the bias is a channel of ones in every place, last in the shared matrix, which so
    holds the channels' mean.
    """

    places: int
    channels: int
    group: int
    shared: bool = False
    bias: bool = False
    grouped: bool = False
    diagonal: bool = False
    constant: bool = False

    @property
    def size(self) -> int:
        """Coordinates before packing."""
        return self.places * self.channels + (self.bias or self.constant)

    @property
    def groups(self) -> int:
        return -(-self.channels // self.group)

    @property
    def width(self) -> int:
        """Rows of one group's matrix."""
        return self.group + self.constant if self.shared else self.group * self.places

    @property
    def packed(self) -> int:
        """Coordinates after :meth:`pack`."""
        return self.groups * self.group * self.places + self.bias

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the factor: ``(n, n)``, ``(groups, n, n)`` or, diagonal, ``(n,)``."""
        if self.diagonal:
            return (self.channels,)
        return (self.groups,) * self.grouped + (self.width, self.width)

    def pack(self, x: jax.Array, axis: int) -> jax.Array:
        """``x`` with the coordinates on ``axis`` in groups: (groups, places, group), then bias."""
        if not self.grouped:
            return x
        x = jnp.moveaxis(x, axis, -1)
        main, rest = self._parted(x)
        main = main.reshape(*x.shape[:-1], self.places, self.channels)
        fill = self.groups * self.group - self.channels
        main = jnp.pad(main, [(0, 0)] * (main.ndim - 1) + [(0, fill)])
        main = main.reshape(*x.shape[:-1], self.places, self.groups, self.group)
        main = jnp.swapaxes(main, -3, -2).reshape(*x.shape[:-1], -1)
        return jnp.moveaxis(jnp.concatenate([main, rest], axis=-1), -1, axis)

    def unpack(self, x: jax.Array, axis: int) -> jax.Array:
        """The inverse of :meth:`pack`; what lies in the filling is dropped."""
        if not self.grouped:
            return x
        x = jnp.moveaxis(x, axis, -1)
        main, rest = self._parted(x)
        main = main.reshape(*x.shape[:-1], self.groups, self.places, self.group)
        main = jnp.swapaxes(main, -3, -2).reshape(*x.shape[:-1], self.places, -1)
        main = main[..., : self.channels].reshape(*x.shape[:-1], -1)
        return jnp.moveaxis(jnp.concatenate([main, rest], axis=-1), -1, axis)

    def rows(self, x: jax.Array) -> jax.Array:
        """Rows ``(N, T, *blocks, size)`` as ``(N, T', *blocks, [groups,] width)``.

        Their sums of products, over N and T', are the factor (times ``places`` where those share
        it). The bias has no part: its own entry is the number of rows.
        """
        main = self._parted(self.pack(x, -1))[0]
        if self.diagonal or (not self.grouped and not self.shared):
            return main
        lead = main.shape[:-1]
        if not self.shared:
            return main.reshape(*lead, self.groups, self.width)
        main = main.reshape(*lead, self.groups, self.places, self.group)
        main = jnp.moveaxis(main, -2, 2).reshape(lead[0], -1, *lead[2:], self.groups, self.group)
        if self.constant:
            main = jnp.concatenate([main, jnp.ones_like(main[..., :1])], axis=-1)
        return main if self.grouped else main[..., 0, :]

    def narrow(self, factor: jax.Array) -> jax.Array:
        """This side's part of a whole factor ``(…, size, size)``: what its own sums would be."""
        n = self.places * self.channels
        if self.constant:
            return self._narrow_centred(factor, n)
        apart = self._replace(bias=False)
        packed = apart.pack(apart.pack(factor[..., :n, :n], -1), -2)
        count = self.groups * (self.places if self.shared else 1)
        parts = packed.reshape(*factor.shape[:-2], count, self.width, count, self.width)
        parts = jnp.moveaxis(jnp.diagonal(parts, axis1=-4, axis2=-2), -1, -3)
        if self.shared:
            parts = parts.reshape(*factor.shape[:-2], self.groups, -1, self.width, self.width)
            parts = parts.mean(-3)
        return parts if self.grouped else parts[..., 0, :, :]

    def _narrow_centred(self, factor: jax.Array, n: int) -> jax.Array:
        """Means over places of ``[[A_pp, m_p], [m_pᵀ, rows]]``."""
        lead = factor.shape[:-2]
        parts = factor[..., :n, :n].reshape(*lead, self.places, self.channels, self.places, -1)
        C = jnp.moveaxis(jnp.diagonal(parts, axis1=-4, axis2=-2), -1, -3).mean(-3)
        mean = factor[..., :n, n:].reshape(*lead, self.places, self.channels, 1).mean(-3)
        top = jnp.concatenate([C, mean], axis=-1)
        low = jnp.concatenate([mean.mT, factor[..., n:, n:]], axis=-1)
        return jnp.concatenate([top, low], axis=-2)

    def apply(self, factor: jax.Array, bias: jax.Array | None, x: jax.Array) -> jax.Array:
        """``M x`` for the structured matrix M; ``x``: ``(…, packed, columns)``.

        ``bias``: M's entry at the bias, ``(…)``; None stands for 1.
        """
        if self.diagonal:
            return factor[..., None] * x
        matrices = factor if self.grouped else factor[..., None, :, :]
        main, rest = x, None
        if self.bias:
            main, rest = x[..., :-1, :], x[..., -1:, :]
        if self.groups == 1 and self.width == main.shape[-2]:
            out = jnp.matmul(matrices[..., 0, :, :], main, precision=HIGHEST)
        else:
            inner = (self.groups, -1, self.width, main.shape[-1])
            parts = main.reshape(*main.shape[:-2], *inner)
            out = jnp.matmul(matrices[..., None, :, :], parts, precision=HIGHEST)
            out = out.reshape(main.shape)
        if rest is None:
            return out
        rest = rest if bias is None else rest * bias[..., None, None].astype(rest.dtype)
        return jnp.concatenate([out, rest], axis=-2)

    def project(self, basis: jax.Array, rows: jax.Array) -> jax.Array:
        """``Qᵀ r`` of packed rows ``(N, T, *blocks, packed)``, Q in the form of a factor."""
        if self.diagonal:
            return rows  # coordinates are their own eigenvectors
        main, rest = self._parted(rows)
        if self.groups == 1 and self.width == main.shape[-1]:
            basis = basis[..., 0, :, :] if self.grouped else basis
            out = jnp.einsum("nt...i,...ij->nt...j", main, basis, precision=HIGHEST)
        else:
            parts = main.reshape(*main.shape[:-1], self.groups, -1, self.width)
            basis = basis if self.grouped else basis[..., None, :, :]
            out = jnp.einsum("nt...gpi,...gij->nt...gpj", parts, basis, precision=HIGHEST)
            out = out.reshape(main.shape)
        return jnp.concatenate([out, rest], axis=-1)

    def rotate(self, basis: jax.Array, x: jax.Array) -> jax.Array:
        """``Qᵀ x`` of packed ``(…, packed, columns)``: into the eigenbasis."""
        return x if self.diagonal else self.apply(basis.mT, None, x)

    def rotate_back(self, basis: jax.Array, x: jax.Array) -> jax.Array:
        """``Q x``, the inverse of :meth:`rotate`."""
        return x if self.diagonal else self.apply(basis, None, x)

    def trace(self, factor: jax.Array, bias: jax.Array | None) -> jax.Array:
        """The trace of the structured matrix: ``(…)``."""
        if self.diagonal:
            return factor.sum(-1)
        trace = trace_of(factor)
        trace = trace.sum(-1) if self.grouped else trace
        trace = trace * self.places if self.shared else trace
        return trace if bias is None else trace + bias.astype(trace.dtype)

    def spread(self, values: jax.Array, bias: jax.Array | None) -> jax.Array:
        """Values ``(…, [groups,] width)`` of the matrices at every coordinate: ``(…, packed)``."""
        if self.diagonal:
            return values
        values = values if self.grouped else values[..., None, :]
        if self.shared:
            values = jnp.broadcast_to(
                values[..., None, :], (*values.shape[:-1], self.places, self.width)
            )
            values = values.reshape(*values.shape[:-3], -1)
        else:
            values = values.reshape(*values.shape[:-2], -1)
        if not self.bias:
            return values
        assert bias is not None
        return jnp.concatenate([values, bias[..., None].astype(values.dtype)], axis=-1)

    def _parted(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        n = x.shape[-1] - (self.bias or self.constant)
        return x[..., :n], x[..., n:]


def whole(size: int) -> Side:
    """One dense matrix over all coordinates, the bias among them."""
    return Side(places=1, channels=size, group=size)


def diagonal(size: int) -> Side:
    """A vector of one number a coordinate."""
    return Side(places=1, channels=size, group=1, diagonal=True)


def input_side(
    places: int,
    channels: int,
    bias: bool,
    group_size: int | None,
    shared: bool,
    centred: bool = False,
) -> Side:
    """The rows of a kernel of ``places × channels`` inputs, simplified as asked."""
    shared = shared and places > 1
    if shared and centred and bias:
        return Side(places, channels, channels, shared=True, constant=True)
    if group_size is None and not shared:
        return whole(places * channels + bias)
    if places == 1:  # the bias is one more channel
        return _in_groups(1, channels + bias, False, group_size)
    return _in_groups(places, channels, bias, group_size, shared)


def output_side(channels: int, group_size: int | None) -> Side:
    """The columns of a kernel, in groups where asked."""
    return whole(channels) if group_size is None else _in_groups(1, channels, False, group_size)


def _in_groups(
    places: int, channels: int, bias: bool, group_size: int | None, shared: bool = False
) -> Side:
    grouped = group_size is not None
    group = min(group_size or channels, channels)
    return Side(places, channels, group, shared, bias, grouped)


def elements(side: Side) -> int:
    """Numbers in one factor over this side."""
    return math.prod(side.shape)
