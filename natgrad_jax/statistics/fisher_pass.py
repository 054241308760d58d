"""The Fisher's backward passes: their output cotangents, and the sums of their results."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from natgrad_jax.losses import output_cotangents
from natgrad_jax.losses.terms import Loss, global_count, whole_count
from natgrad_jax.statistics import from_cotangents as measurement
from natgrad_jax.statistics.batch_statistics import Statistics
from natgrad_jax.statistics.from_cotangents import Measured, Squares
from natgrad_jax.statistics.plan import Plan
from natgrad_jax.tracing.convolutions import for_control_flow
from natgrad_jax.utils.sharding import psum, vary


def measure(
    samples: int, rng: Any, loss: Loss, plan: Plan, pull: Any, axes: tuple[str, ...]
) -> Statistics:
    """The global statistics of this batch, by backward passes of the Fisher's own cotangents."""
    no_cotangents = tuple(jax.tree.map(jnp.zeros_like, t.distribution.outputs) for t in loss.terms)
    if plan.fisher == "none":
        alone = measurement.separate(plan, pull(no_cotangents))[0]
        return _statistics(loss, plan, Measured(alone, Squares({}, {}, {})), axes, True)
    passes: list[Measured] = []
    inputs: Any = None
    for terms in plan.passes:
        work = _cotangents(samples, rng, loss, plan, axes, terms)
        if len(work) == 1 and work[0][0] == 1:
            inputs, rest = measurement.separate(plan, pull(work[0][1](jnp.zeros((), jnp.int32))))
        else:
            rest = _sum_over(
                work, lambda given: measurement.separate(plan, pull(given))[1], no_cotangents, axes
            )
        passes.append(rest)
    # the inputs are the same in every pass: sum them once, and the rest over passes
    if inputs is None:
        inputs = measurement.separate(plan, pull(no_cotangents))[0]
    found = measurement.join_parts(inputs, measurement.by_terms(plan, passes))
    return _statistics(loss, plan, found, axes)


Work = list[tuple[int, Callable[[jax.Array], output_cotangents.Cotangents]]]


def _cotangents(
    samples: int, rng: Any, loss: Loss, plan: Plan, axes: tuple[str, ...], terms: tuple[int, ...]
) -> Work:
    """The backward passes that measure these terms: their number, and the cotangents of each."""
    of, signs = plan.examples, jax.random.key(0) if rng is None else rng
    if plan.fisher == "empirical":
        return [(1, lambda _: output_cotangents.observed(loss, axes, signs, of, terms))]
    if plan.fisher == "exact":
        columns = output_cotangents.exact_columns(loss, axes, signs, of)
        return [columns[term] for term in terms]
    keys = rng[None] if samples == 1 else jax.random.split(rng, samples)
    return [(samples, lambda i: output_cotangents.sampled(loss, axes, keys[i], samples, of, terms))]


def _sum_over(
    work: Work, measured: Callable[[Any], Measured], no_cotangents: Any, axes: tuple[str, ...]
) -> Measured:
    """The sum of what the passes measure, one after another."""
    zeros = partial(jax.tree.map, lambda x: jnp.zeros(x.shape, x.dtype))
    layers, squares = zeros(jax.eval_shape(measured, no_cotangents))
    total = Measured(vary(layers, axes), squares)
    for count, cotangents in work:

        def body(total: Any, index: jax.Array, cotangents: Any = cotangents) -> Any:
            now, _ = for_control_flow(lambda: measured(cotangents(index)))
            return jax.tree.map(jnp.add, total, now()), None

        total, _ = jax.lax.scan(body, total, jnp.arange(count))
    return total


def shares_training_pass(loss: Loss, plan: Plan) -> bool:
    """Whether training cotangents are the examples' own gradients up to one common factor.

    Squared sums need a pass of their own, with a random sign for each example.
    """
    one_factor = len(loss.terms) == 1 and loss.terms[0].weight is None and loss.scalar is None
    mixed = any(reader.layer.uses > 1 or reader.layer.matrices for reader in plan.readers.values())
    return plan.fisher == "empirical" and one_factor and not plan.from_sums and not mixed


def measure_in_training_pass(
    pullback: Any, cotangent: Any, loss: Loss, plan: Plan, axes: tuple[str, ...]
) -> tuple[Any, Statistics]:
    grads, values = pullback(cotangent)
    term = loss.terms[0]
    # training rows are scale/N · ∇, the Fisher's are √scale · ∇
    factor = whole_count(term, axes) ** 2 / jnp.where(term.scale > 0, term.scale, jnp.inf)
    found = measurement.measured(plan, axes, grads, values)
    layers = measurement.scale_gradients(plan, found.layers, factor)
    return grads, _statistics(loss, plan, found._replace(layers=layers), axes)


def _statistics(
    loss: Loss, plan: Plan, found: Measured, axes: tuple[str, ...], inputs_only: bool = False
) -> Statistics:
    """The global statistics of one pass."""
    layers, squares = psum(found.layers, axes), found.squares
    moments = {path: r.moments for path, r in layers.items() if r.moments is not None}
    of = lambda sharing: {p: r.sums[sharing] for p, r in layers.items() if sharing in r.sums}
    return Statistics(
        examples=examples_of(loss, axes),
        sums={"expand": of("expand") | squares.blocks, "reduce": of("reduce")},
        leftover=None if inputs_only else squares.diagonals,
        moments=moments | squares.moments if plan.in_bases and not inputs_only else None,
    )


def examples_of(loss: Loss, axes: tuple[str, ...]) -> jax.Array:
    """Their number over all devices, of several terms each its own."""
    counts = [global_count(term, axes) for term in loss.terms]
    return counts[0] if len(counts) == 1 else jnp.stack(counts)
