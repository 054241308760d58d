"""Everything that depends on the version of JAX or Flax."""

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType
from jaxtyping import Array, ArrayLike


def varying_axes(x: ArrayLike) -> frozenset[str]:
    """The named axes of the surrounding shard_map over which ``x`` varies."""
    return jax.typeof(x).manual_axis_type.varying


def explicit_mesh(x: Array) -> AbstractMesh | None:
    """The abstract mesh of ``x``, if it has Explicit axes."""
    sharding = getattr(jax.typeof(x), "sharding", None)
    mesh = getattr(sharding, "mesh", None)
    if mesh is None or mesh.empty or AxisType.Explicit not in mesh.axis_types:
        return None
    return mesh


def scan_groups(params: Mapping[str, Any]) -> tuple[int, int]:
    """The number of constants and of carried values among the inputs of a scan equation."""
    if "ft_in" in params:
        constants, carried, _ = params["ft_in"].unpack()
        return len(list(constants)), len(list(carried))
    return params["num_consts"], params["num_carry"]
