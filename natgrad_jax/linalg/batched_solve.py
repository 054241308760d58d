"""Solve many small problems of linear algebra in few batched calls.

A computation that needs factorisations is a generator: it yields a list of :class:`Problem`,
receives their solutions, and returns its result. :func:`solve` runs many such generators together
and evaluates problems of equal shape as one batch, which is one program to compile and, on
accelerators, one call.
"""

import itertools
import math
from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree, Shaped

from natgrad_jax.linalg.distributed import Batch, Devices, divided

K = TypeVar("K")
R = TypeVar("R")


class Problem(NamedTuple):
    """``op(*arguments, **options)`` for symmetric matrices, the first argument ``(*batch, n, n)``.

    Arguments and results have the same batch axes in front, and ``op`` accepts any number of them.
    ``fills``: axes of length n may be padded with zeros, and results cut back to n. Problems of
    nearly equal size then share one program.
    """

    op: Callable[..., PyTree[Array]]
    arguments: tuple[Shaped[Array, "..."], ...]
    options: tuple[tuple[str, Hashable], ...] = ()
    fills: bool = False

    @property
    def lead(self) -> tuple[int, ...]:
        """The batch axes."""
        return self.arguments[0].shape[:-2]

    @property
    def form(self) -> Hashable:
        """Problems of equal form are solved as one batch."""
        axes = len(self.lead)
        kinds = tuple((x.shape[axes:], x.dtype) for x in self.arguments)
        return self.op, self.options, kinds

    @property
    def size(self) -> int:
        """n, the number of rows of one matrix."""
        return self.arguments[0].shape[-1]

    @property
    def cost(self) -> float:
        """The cost of one matrix, n³."""
        return float(self.size) ** 3

    def filled(self) -> "Problem":
        """The problem with its matrices padded to the next common size."""
        if not self.fills:
            return self
        axes, size = len(self.lead), rounded_up(self.size)

        def fill(x: Array) -> Array:
            more = [size - n if i >= axes and n == self.size else 0 for i, n in enumerate(x.shape)]
            return jnp.pad(x, [(0, n) for n in more]) if any(more) else x

        return self._replace(arguments=tuple(map(fill, self.arguments)))

    def cut(self, found: PyTree[Array]) -> PyTree[Array]:
        """The solution of this problem, from that of the padded one."""
        if not self.fills:
            return found
        axes, size = len(self.lead), rounded_up(self.size)

        def cut(x: Array) -> Array:
            own = (slice(self.size if n == size else None) for n in x.shape[axes:])
            return x[(slice(None),) * axes + tuple(own)]

        return jax.tree.map(cut, found)


def rounded_up(size: int) -> int:
    """``size`` rounded up to a multiple of 8, and to one of sixteen sizes an octave from 128.

    So a padded matrix has at most 1/16 more rows, from 128 rows.

    >>> [rounded_up(n) for n in (6, 100, 784, 785, 1001)]
    [8, 104, 800, 800, 1024]
    """
    unit = max(8, 2 ** (size.bit_length() - 5))
    return -(-size // unit) * unit


# A generator that yields problems, receives their solutions, and returns R.
Solving = Generator[list[Problem], list[PyTree[Array]], R]


def solve(computations: Mapping[K, Solving[R]], over: Devices | None = None) -> dict[K, R]:
    """The result of every computation; each may yield one list of problems, or none.

    ``over``: the devices that share the work; with None every device does all of it.

    >>> import jax.numpy as jnp
    >>> def trace_of(x):
    ...     (found,) = yield [Problem(lambda m: jnp.trace(m, axis1=-2, axis2=-1), (x,))]
    ...     return float(found)
    >>> solve({"a": trace_of(jnp.eye(2)), "b": trace_of(jnp.eye(3))})
    {'a': 2.0, 'b': 3.0}
    """
    results: dict[K, R] = {}
    asked: dict[K, list[Problem]] = {}
    for key, computation in computations.items():
        try:
            asked[key] = next(computation)
        except StopIteration as done:
            results[key] = done.value
    problems = [problem for asks in asked.values() for problem in asks]
    solutions = iter(in_stacks(problems, over))
    for key, asks in asked.items():
        try:
            computations[key].send([next(solutions) for _ in asks])
        except StopIteration as done:
            results[key] = done.value
        else:
            raise AssertionError("a computation may yield problems only once")
    return {key: results[key] for key in computations}


def alone(computation: Solving[R]) -> R:
    """The result of a single computation."""
    return solve({(): computation})[()]


def in_stacks(problems: Sequence[Problem], over: Devices | None = None) -> list[PyTree[Array]]:
    """The solution of each problem; problems of equal form are solved as one batch."""
    given, problems = problems, [problem.filled() for problem in problems]
    forms: dict[Hashable, list[int]] = {}
    for i, problem in enumerate(problems):
        forms.setdefault(problem.form, []).append(i)
    stacks = [[problems[i] for i in members] for members in forms.values()]
    if over is None:
        found = [_together(stack) for stack in stacks]
    else:
        solved = divided([Batch(_op(s), _joined(s), s[0].cost) for s in stacks], over)
        found = [_parted(stack, x) for stack, x in zip(stacks, solved, strict=True)]
    solutions: list[PyTree[Array]] = [None] * len(problems)
    for members, parts in zip(forms.values(), found, strict=True):
        for i, part in zip(members, parts, strict=True):
            solutions[i] = given[i].cut(part)
    return solutions


def _op(stack: list[Problem]) -> Callable[..., PyTree[Array]]:
    """What solves each of these problems of equal form."""
    return partial(stack[0].op, **dict(stack[0].options))


def _together(stack: list[Problem]) -> list[PyTree[Array]]:
    """The solutions of problems of equal form."""
    if len(stack) == 1:
        return [_op(stack)(*stack[0].arguments)]
    return _parted(stack, _op(stack)(*_joined(stack)))


def _joined(stack: list[Problem]) -> list[Shaped[Array, "total ..."]]:
    """The arguments of all problems, concatenated over one flat batch axis."""
    flat = [[x.reshape(-1, *x.shape[len(p.lead) :]) for x in p.arguments] for p in stack]
    return [jnp.concatenate(same) for same in zip(*flat, strict=True)]


def _parted(stack: list[Problem], found: PyTree[Array]) -> list[PyTree[Array]]:
    """The results of each problem: the inverse of :func:`_joined`."""
    ends = list(itertools.accumulate((math.prod(p.lead) for p in stack), initial=0))

    def part(i: int, lead: tuple[int, ...]) -> PyTree[Array]:
        own = lambda x: x[ends[i] : ends[i + 1]].reshape(*lead, *x.shape[1:])
        return jax.tree.map(own, found)

    return [part(i, problem.lead) for i, problem in enumerate(stack)]
