"""The forward pass of a traced loss, as ``jax.vjp`` takes it, with statistics or without."""

from typing import Any

import jax
from jax.extend import core

from natgrad_jax.losses.distribution_base import Outputs
from natgrad_jax.losses.terms import Loss
from natgrad_jax.statistics import plan as planning
from natgrad_jax.tagging.tagged import Tagged
from natgrad_jax.tracing.evaluate import evaluate
from natgrad_jax.tracing.trace import Traced

# The loss's scalar and outputs, which take cotangents; and the loss, aux and state.
Passed = tuple[tuple[jax.Array, tuple[Outputs, ...]], tuple[Loss, Any, Any]]


def plain(traced: Traced, axes: tuple[str, ...], tree: Any) -> Passed:
    """The loss as it is, at these parameters."""
    inputs = [*jax.tree.leaves(tree), *traced.inputs[len(traced.paths) :]]
    return _passed(traced, core.jaxpr_as_fun(traced.jaxpr)(*inputs), axes)


def tapped(
    tagged: Tagged, plan: planning.Plan, axes: tuple[str, ...], tree: Any, values: Any
) -> Passed:
    """The same numbers; the cotangents of ``values``, zeros, are what the plan measures."""
    leaves = jax.tree.leaves(tree)
    inputs = [*leaves, *tagged.traced.inputs[len(leaves) :]]
    instruments, weights = planning.instruments_of(plan, tagged, inputs)
    rows, slots = planning.rows(plan, tagged, values), planning.slots(plan, values) | weights
    outs = evaluate(tagged.traced.jaxpr, inputs, rows, instruments, slots)
    return _passed(tagged.traced, outs, axes)


def _passed(traced: Traced, outs: Any, axes: tuple[str, ...]) -> Passed:
    loss, aux, state = traced.result(outs)
    outputs = tuple(t.distribution.outputs for t in loss.terms)
    return (loss.contribution(axes), outputs), (loss, aux, state)
