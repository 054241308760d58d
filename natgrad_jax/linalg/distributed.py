"""Divide work among devices that would otherwise all repeat it.

Shares are balanced by cost. Each device runs its own branch of a switch, which writes its share of
the results and leaves zeros elsewhere; a sum over devices gives every device all results.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, PyTree, Shaped

from natgrad_jax.utils.sharding import AxisName, axis_names, devices_along, psum, vary

# "data" or ("data", "model") inside shard_map or pmap, (mesh, "data") under jit.
DeviceAxes = AxisName | tuple[Mesh, AxisName]


class Devices(NamedTuple):
    """The devices along named axes: of ``mesh`` under jit, else of the surrounding shard_map."""

    axes: tuple[str, ...]
    mesh: Mesh | None = None

    @property
    def number(self) -> int:
        if self.mesh is not None:
            return math.prod(self.mesh.shape[a] for a in self.axes)
        return devices_along(self.axes)


def devices(over: DeviceAxes) -> Devices | None:
    """The devices that the option ``refresh_over`` names; raises ValueError for anything else."""
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
    """The share that each item goes to, such that the shares cost about the same.

    Greedy: from the most expensive item down, each goes to the share with the least cost so far.

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
    """For each device and batch the range (start, end) of elements that the device solves.

    ``sizes``: the number of elements in each batch; ``costs``: the cost of one of its elements.

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


class Batch(NamedTuple):
    """``op(*arguments)`` over independent elements; ``cost``: the cost of one of them."""

    op: Callable[..., PyTree[Shaped[Array, "elements ..."]]]
    arguments: Sequence[Shaped[Array, "elements ..."]]
    cost: float


def divided(batches: Sequence[Batch], over: Devices) -> list[PyTree[Shaped[Array, "elements ..."]]]:
    """The results of every batch, on all devices; each device computes its share."""

    def run(arguments: list[list[Array]]) -> list[PyTree[Array]]:
        sizes = [len(arrays[0]) for arrays in arguments]
        ranges = shares(sizes, [batch.cost for batch in batches], over.number)
        arguments = vary(arguments, over.axes)

        def branch(device: int) -> list[PyTree[Array]]:
            found = []
            for batch, arrays, (start, end) in zip(batches, arguments, ranges[device], strict=True):
                forms = jax.eval_shape(batch.op, *arrays)
                whole = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), forms)
                whole = vary(whole, over.axes)
                if end > start:
                    place = lambda x, part, start=start, end=end: x.at[start:end].set(part)
                    part = batch.op(*(x[start:end] for x in arrays))
                    whole = jax.tree.map(place, whole, part)
                found.append(whole)
            return found

        index = jax.lax.axis_index(over.axes)
        branches = [lambda device=device: branch(device) for device in range(over.number)]
        return psum(jax.lax.switch(index, branches), over.axes)

    arguments = [list(batch.arguments) for batch in batches]
    if over.mesh is None:
        return run(arguments)
    everywhere = PartitionSpec()
    return jax.shard_map(run, mesh=over.mesh, in_specs=everywhere, out_specs=everywhere)(arguments)
