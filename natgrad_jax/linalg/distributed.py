"""Work that every device would repeat, divided among them: each solves its share, and all get all.

Shares are balanced by cost. A device runs its own branch of a switch, fills its part of the
results and leaves zeros elsewhere; the sum over devices is everybody's result.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from natgrad_jax.utils.sharding import AxisName, axis_names, devices_along, psum, vary


class Devices(NamedTuple):
    """Named axes: of ``mesh``, under jit; of the surrounding shard_map or pmap without one."""

    axes: tuple[str, ...]
    mesh: Mesh | None = None

    @property
    def number(self) -> int:
        if self.mesh is not None:
            return math.prod(self.mesh.shape[a] for a in self.axes)
        return devices_along(self.axes)


def devices(over: AxisName | tuple[Mesh, AxisName]) -> Devices | None:
    """``"data"``, ``("data", "model")``, or ``(mesh, "data")``; raises where it is none of them."""
    if over is None:
        return None
    mesh, axis = over if isinstance(over, tuple) and isinstance(over[0], Mesh) else (None, over)
    names = axis_names(axis) if isinstance(axis, str | tuple | list) else ()
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(
            'refresh_over takes the name of an axis inside shard_map or pmap, "data", or a mesh '
            f'and the name of its axis under jit, (mesh, "data"); got {over!r}.'
        )
    missing = [name for name in names if mesh is not None and name not in mesh.shape]
    if missing:
        raise ValueError(f"refresh_over: the mesh has axes {tuple(mesh.shape)}, not {missing}.")
    return Devices(names, mesh)


def balanced(costs: Sequence[float], shares: int) -> list[int]:
    """The share of each cost, so that their sums are about equal: the largest first, each to the
    share that has least.

    >>> balanced([3.0, 1.0, 2.0], 2)
    [0, 1, 1]
    """
    loads, found = [0.0] * shares, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        found[i] = min(range(shares), key=loads.__getitem__)
        loads[found[i]] += costs[i]
    return found


def shares(
    sizes: Sequence[int], costs: Sequence[float], devices: int
) -> list[list[tuple[int, int]]]:
    """For each device, from where to where it solves each batch.

    >>> shares([4, 1], [1.0, 2.0], 2)
    [[(0, 1), (0, 1)], [(1, 4), (1, 1)]]
    """
    each = [cost for cost, size in zip(costs, sizes, strict=True) for _ in range(size)]
    owners = iter(balanced(each, devices))
    counts = [[0] * devices for _ in sizes]
    for batch, size in enumerate(sizes):
        for _ in range(size):
            counts[batch][next(owners)] += 1
    ends = [list(itertools.accumulate(of, initial=0)) for of in counts]
    return [[(e[device], e[device + 1]) for e in ends] for device in range(devices)]


def divided(
    batches: Sequence[tuple[Callable[..., Any], Sequence[jax.Array], float]], over: Devices
) -> list[Any]:
    """``op(*arguments)`` of every batch, by all devices together.

    Each batch is ``(op, arguments, cost)``: arrays ``(b, …)`` of b independent elements, and what
    one of them costs.
    """

    def run(arguments: list[list[jax.Array]]) -> list[Any]:
        sizes = [len(arrays[0]) for arrays in arguments]
        ranges = shares(sizes, [cost for _, _, cost in batches], over.number)
        arguments = vary(arguments, over.axes)

        def branch(device: int) -> list[Any]:
            found = []
            for (op, _, _), arrays, (start, end) in zip(
                batches, arguments, ranges[device], strict=True
            ):
                forms = jax.eval_shape(op, *arrays)
                whole = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), forms)
                whole = vary(whole, over.axes)
                if end > start:
                    place = lambda x, part, start=start, end=end: x.at[start:end].set(part)
                    whole = jax.tree.map(place, whole, op(*(x[start:end] for x in arrays)))
                found.append(whole)
            return found

        index = jax.lax.axis_index(over.axes)
        branches = [lambda device=device: branch(device) for device in range(over.number)]
        return psum(jax.lax.switch(index, branches), over.axes)

    arguments = [list(arrays) for _, arrays, _ in batches]
    if over.mesh is None:
        return run(arguments)
    everywhere = PartitionSpec()
    return jax.shard_map(run, mesh=over.mesh, in_specs=everywhere, out_specs=everywhere)(arguments)
