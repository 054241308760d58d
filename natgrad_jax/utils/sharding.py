"""Named mesh axes and shardings: what differs between one device and many."""

import math
from collections.abc import Sequence
from typing import TypeVar

import jax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, ArrayLike, Shaped

from natgrad_jax.utils import compat

T = TypeVar("T")  # a pytree of arrays
AxisName = str | Sequence[str] | None


def axis_names(axis_name: AxisName) -> tuple[str, ...]:
    """``axis_name`` as a tuple; empty for None."""
    if axis_name is None:
        return ()
    return (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)


def devices_along(axes: Sequence[str]) -> int:
    """The number of devices along the named axes, a Python number also while traced."""
    return math.prod(jax.lax.axis_size(axis) for axis in axes)


def vary(tree: T, axes: Sequence[str]) -> T:
    """``tree`` with every leaf marked as varying over ``axes``: cotangents stay on their device.

    Under ``shard_map(check_vma=True)`` the cotangent of a replicated value is summed over the axis.
    Everywhere else this is the identity.
    """

    def leaf(x: ArrayLike) -> ArrayLike:
        missing = tuple(a for a in axes if a not in compat.varying_axes(x))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(leaf, tree) if axes else tree


def varying_like(x: Shaped[Array, "*shape"], reference: Array) -> Shaped[Array, "*shape"]:
    """``x`` marked as varying over the same axes as ``reference``, as a scan's carry must be."""
    return vary(x, tuple(compat.varying_axes(reference)))


def psum(tree: T, axes: Sequence[str]) -> T:
    """The sum over the named axes; the identity if there are none."""
    return jax.lax.psum(tree, tuple(axes)) if axes else tree


def sharded_like(x: Shaped[Array, " n"], reference: Shaped[Array, "n ..."]) -> Shaped[Array, " n"]:
    """``x``, sharded like the leading axis of ``reference`` if that is on Explicit axes."""
    mesh = compat.explicit_mesh(reference)
    if mesh is None:
        return x
    spec = PartitionSpec(jax.typeof(reference).sharding.spec[0])
    return jax.sharding.reshard(x, NamedSharding(mesh, spec))


def replicated(x: Array, ndim: int) -> NamedSharding | None:
    """The replicated sharding of an array of ``ndim`` axes, if ``x`` is on Explicit axes.

    With Explicit axes a contraction over a sharded axis needs the sharding of its result.
    """
    mesh = compat.explicit_mesh(x)
    return None if mesh is None else NamedSharding(mesh, PartitionSpec(*[None] * ndim))
