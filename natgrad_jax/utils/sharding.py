"""Named axes and shardings: the few places where one device and many differ."""

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
from jax.sharding import NamedSharding, PartitionSpec

from natgrad_jax.utils import compat

T = TypeVar("T")
AxisName = str | Sequence[str] | None


def axis_names(axis_name: AxisName) -> tuple[str, ...]:
    """``axis_name`` as a tuple; empty for None."""
    if axis_name is None:
        return ()
    return (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)


def devices_along(axes: Sequence[str]) -> int:
    """How many devices there are along named axes, known when traced."""
    return math.prod(jax.lax.axis_size(axis) for axis in axes)


def vary(tree: T, axes: Sequence[str]) -> T:
    """``tree`` with every leaf varying over ``axes``, so that its cotangents stay per device.

    Under ``shard_map(check_vma=True)`` the cotangent of a replicated value arrives summed over
    the axis; everywhere else this is the identity.
    """

    def leaf(x: Any) -> Any:
        missing = tuple(a for a in axes if a not in compat.varying_axes(x))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(leaf, tree) if axes else tree


def varying_like(x: jax.Array, reference: jax.Array) -> jax.Array:
    """``x`` varying over the axes that ``reference`` varies over: what a scan carry needs."""
    return vary(x, tuple(compat.varying_axes(reference)))


def psum(tree: T, axes: Sequence[str]) -> T:
    """The sum over named axes; the identity without any."""
    return jax.lax.psum(tree, tuple(axes)) if axes else tree


def sharded_like(x: jax.Array, reference: jax.Array) -> jax.Array:
    """A vector over the leading axis of ``reference``, laid out as that axis is (Explicit axes)."""
    mesh = compat.explicit_mesh(reference)
    if mesh is None:
        return x
    spec = PartitionSpec(jax.typeof(reference).sharding.spec[0])
    return jax.sharding.reshard(x, NamedSharding(mesh, spec))


def replicated(x: jax.Array, ndim: int) -> NamedSharding | None:
    """The replicated sharding for a result of ``ndim`` axes where ``x`` is on Explicit axes.

    Contractions over a sharded axis must say there how their result lies; None elsewhere.
    """
    mesh = compat.explicit_mesh(x)
    return None if mesh is None else NamedSharding(mesh, PartitionSpec(*[None] * ndim))
