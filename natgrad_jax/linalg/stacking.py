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

from natgrad_jax.linalg.divided import Devices, divided

K = TypeVar("K")
R = TypeVar("R")


class Problem(NamedTuple):
    """``op(*arguments, **options)`` for symmetric matrices, the first argument ``(*lead, n, n)``.

    All arguments and results have the axes ``lead`` in front; ``op`` takes any number of them.
    """

    op: Callable[..., Any]
    arguments: tuple[jax.Array, ...]
    options: tuple[tuple[str, Any], ...] = ()

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
    def cost(self) -> float:
        """Of one matrix: its size cubed."""
        return float(self.arguments[0].shape[-1]) ** 3


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
            solutions[i] = part
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
