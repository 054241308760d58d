"""The one place for what differs between the supported ends of JAX and Flax."""

from typing import Any

import jax
from jax.sharding import AxisType


def varying_axes(x: Any) -> frozenset[Any]:
    """Named axes of the surrounding shard_map over which ``x`` is known to vary."""
    return jax.typeof(x).manual_axis_type.varying


def explicit_mesh(x: Any) -> Any:
    """The abstract mesh of ``x`` when it has Explicit axes, else None."""
    sharding = getattr(jax.typeof(x), "sharding", None)
    mesh = getattr(sharding, "mesh", None)
    if mesh is None or mesh.empty or AxisType.Explicit not in mesh.axis_types:
        return None
    return mesh


def scan_groups(params: Any) -> tuple[int, int]:
    """How many inputs of a scan equation are constants, and how many are carried."""
    if "ft_in" in params:
        constants, carried, _ = params["ft_in"].unpack()
        return len(list(constants)), len(list(carried))
    return params["num_consts"], params["num_carry"]
