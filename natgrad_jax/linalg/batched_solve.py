"""Many small problems of linear algebra as few batched ones.

A computation that needs factorisations is a generator: it yields its list of :class:`Problem`, is
sent their solutions, and returns its result. :func:`solve` runs many of them, and evaluates
problems of equal shape as one batch: one program to compile, and one call on accelerators.
"""

import itertools
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from natgrad_jax.linalg.distributed import Devices, divided

K = TypeVar("K")
R = TypeVar("R")


class Problem(NamedTuple):
    """``op(*arguments, **options)`` for symmetric matrices, the first argument ``(*lead, n, n)``.

    All arguments and results have the axes ``lead`` in front; ``op`` takes any number of them.
    ``fills``: whether axes of size n may be filled up with zeros, and results cut to n again: then
    problems of nearly equal size share one program.
    """

    op: Callable[..., Any]
    arguments: tuple[jax.Array, ...]
    options: tuple[tuple[str, Any], ...] = ()
    fills: bool = False

    @property
    def lead(self) -> tuple[int, ...]:
        return self.arguments[0].shape[:-2]

    @property
    def form(self) -> Any:
        """What problems of one batch have in common."""
        axes = len(self.lead)
        kinds = tuple((x.shape[axes:], x.dtype) for x in self.arguments)
        return self.op, self.options, kinds

    @property
    def size(self) -> int:
        """Rows of one matrix."""
        return self.arguments[0].shape[-1]

    @property
    def cost(self) -> float:
        """Of one matrix: its size cubed."""
        return float(self.size) ** 3

    def filled(self) -> "Problem":
        """The problem with axes of the next size that many share."""
        if not self.fills:
            return self
        axes, size = len(self.lead), rounded_up(self.size)

        def fill(x: jax.Array) -> jax.Array:
            more = [size - n if i >= axes and n == self.size else 0 for i, n in enumerate(x.shape)]
            return jnp.pad(x, [(0, n) for n in more]) if any(more) else x

        return self._replace(arguments=tuple(map(fill, self.arguments)))

    def cut(self, found: Any) -> Any:
        """The result of this problem, in that of its filled form."""
        if not self.fills:
            return found
        axes, size = len(self.lead), rounded_up(self.size)

        def cut(x: jax.Array) -> jax.Array:
            own = (slice(self.size if n == size else None) for n in x.shape[axes:])
            return x[(slice(None),) * axes + tuple(own)]

        return jax.tree.map(cut, found)


def rounded_up(size: int) -> int:
    """The next of sixteen sizes an octave, all multiples of eight: 1/16 larger at most, from 128.

    >>> [rounded_up(n) for n in (6, 100, 784, 785, 1001)]
    [8, 104, 800, 800, 1024]
    """
    unit = max(8, 2 ** (size.bit_length() - 5))
    return -(-size // unit) * unit


Solving = Generator[list[Problem], list[Any], R]


def solve(computations: Mapping[K, Solving[R]], over: Devices | None = None) -> dict[K, R]:
    """The result of every computation; each may ask for problems once, or not at all.

    ``over``: devices among which the work is divided; None where every device does all of it.

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
            raise AssertionError("a computation asks for problems once")
    return {key: results[key] for key in computations}


def alone(computation: Solving[R]) -> R:
    """The result of one computation."""
    return solve({(): computation})[()]


def in_stacks(problems: Sequence[Problem], over: Devices | None = None) -> list[Any]:
    """The solution of each problem, those of one form solved together."""
    given, problems = problems, [problem.filled() for problem in problems]
    forms: dict[Any, list[int]] = {}
    for i, problem in enumerate(problems):
        forms.setdefault(problem.form, []).append(i)
    stacks = [[problems[i] for i in members] for members in forms.values()]
    if over is None:
        found = [_together(stack) for stack in stacks]
    else:
        batches = [(partial(s[0].op, **dict(s[0].options)), _joined(s), s[0].cost) for s in stacks]
        solved = divided(batches, over)
        found = [_parted(stack, x) for stack, x in zip(stacks, solved, strict=True)]
    solutions: list[Any] = [None] * len(problems)
    for members, parts in zip(forms.values(), found, strict=True):
        for i, part in zip(members, parts, strict=True):
            solutions[i] = given[i].cut(part)
    return solutions


def _together(stack: list[Problem]) -> list[Any]:
    op = partial(stack[0].op, **dict(stack[0].options))
    if len(stack) == 1:
        return [op(*stack[0].arguments)]
    return _parted(stack, op(*_joined(stack)))


def _joined(stack: list[Problem]) -> list[jax.Array]:
    """The arguments of all problems, ``(b, …)`` each."""
    flat = [[x.reshape(-1, *x.shape[len(p.lead) :]) for x in p.arguments] for p in stack]
    return [jnp.concatenate(same) for same in zip(*flat, strict=True)]


def _parted(stack: list[Problem], found: Any) -> list[Any]:
    """The inverse of :func:`_joined`, for results."""
    ends = list(itertools.accumulate((math.prod(p.lead) for p in stack), initial=0))

    def part(i: int, lead: tuple[int, ...]) -> Any:
        own = lambda x: x[ends[i] : ends[i + 1]].reshape(*lead, *x.shape[1:])
        return jax.tree.map(own, found)

    return [part(i, problem.lead) for i, problem in enumerate(stack)]
