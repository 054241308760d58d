"""A part of the batch to measure on: the loss traced again for every k-th example alone.

A step that measures takes a forward pass for its statistics beside the training pass, and that
needs no more examples than are measured.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax

from natgrad_jax.losses.terms import Term
from natgrad_jax.statistics import plan as planning
from natgrad_jax.statistics.spec import stride_for
from natgrad_jax.tagging.tagged import Tagged, tag
from natgrad_jax.tracing.arguments import axes_of_examples, every, sizes_of
from natgrad_jax.tracing.axes import Along
from natgrad_jax.tracing.trace import Traced


class Measured(NamedTuple):
    """What is measured: a loss, the plan for it, and ``times``, how many examples of the batch each
    of its examples stands for."""

    tagged: Tagged
    plan: planning.Plan
    times: float = 1.0

    def whole(self, sums: Any) -> Any:
        """Sums over its examples, scaled up to those of the batch."""
        return sums if self.times == 1 else jax.tree.map(lambda x: x * self.times, sums)


def on_all(tagged: Tagged, plan: planning.Plan) -> Measured:
    """All examples go forward, of which each layer's reader takes every k-th."""
    return Measured(tagged, planning.with_uses(plan, tagged))


def on_few(
    batch: Measured, args: tuple[Any, ...], retrace: Callable[[tuple[Any, ...]], Traced]
) -> Measured:
    """Every k-th example alone, where the arguments hold examples that do not depend on one
    another; else the ``batch``. ``retrace``: the loss for other arguments."""
    tagged, plan, _ = batch
    axes = axes_of_examples(tagged.traced, tagged.examples)
    sizes = sizes_of(tagged.traced, tagged.examples)
    if axes is None or not sizes or 0 in sizes:
        return batch
    stride = min(map(partial(_stride, plan), tagged.traced.loss.terms, sizes))
    numbers = tuple(len(range(0, n, stride)) for n in sizes)
    times = {n / some for n, some in zip(sizes, numbers, strict=True)}
    if stride == 1 or len(times) > 1:
        return batch
    try:
        traced = retrace(_every(args, axes, stride))
    except Exception:  # loss_fn may refuse another number of examples
        return batch
    few = tag(traced, tagged.parameters)
    same = few.layers == tagged.layers and few.terms == tagged.terms
    if not same or sizes_of(traced, few.examples) != numbers:
        return batch
    return Measured(few, planning.with_uses(planning.unstrided(plan), few), times.pop())


def _stride(plan: planning.Plan, term: Term, size: int) -> int:
    """k of a term of the loss with ``size`` examples."""
    positions = math.prod(term.distribution.examples) / size
    return stride_for(plan.stride, size * plan.parts, positions)


def _every(args: tuple[Any, ...], axes: Sequence[Along | None], stride: int) -> tuple[Any, ...]:
    """Every ``stride``-th example of arguments; ``axes``: of those that are arrays."""
    leaves, structure = jax.tree.flatten(args)
    along = iter(axes)
    some = [every(x, next(along), stride) if hasattr(x, "dtype") else x for x in leaves]
    return jax.tree.unflatten(structure, some)
