"""Rows of the Fisher's square root: one for each example and column of its output Fisher.

With W the weighted number of examples of a term, ``F = Jᵀ J / W`` and, where the loss reaches the
parameters through the outputs alone, ``∇ = Jᵀ r / W``.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core
from jaxtyping import Array, Float, Int

from natgrad_jax.losses import output_cotangents
from natgrad_jax.losses.distribution_base import Outputs
from natgrad_jax.losses.likelihood import check_values
from natgrad_jax.losses.terms import Loss, LossFn, Term, global_count, whole_count
from natgrad_jax.statistics.checks import check_axes
from natgrad_jax.statistics.example_jacobian import Problem, problem_of, pulled
from natgrad_jax.tracing import model
from natgrad_jax.tracing.trace import trace
from natgrad_jax.utils.precision import at_least_float32
from natgrad_jax.utils.sharding import psum, vary
from natgrad_jax.utils.tree_paths import Path


class Rows(NamedTuple):
    """The statistics of :func:`natgrad_jax.exact_ngd`: rows, which stack over batches.

    ``J``: by parameter ``√(scale · w) Rₙᵀ ∂oₙ/∂θ``, ``(rows, *parameter)``, Rₙ a column of the root
    of example n's Fisher over the outputs o. ``residual``: ``(rows,)``, r above; zero where the
    gradient is not known through the outputs. ``term``: of the loss, int32 ``(rows,)``.
    ``examples``: the weighted number of examples of each term, ``(terms,)``.

    >>> import jax.numpy as jnp, natgrad_jax as ng
    >>> loss_fn = lambda p, x: ng.Gaussian(x @ p["w"], event_ndims=0).nll(x[:, 0])
    >>> grad_fn = ng.value_and_grad(loss_fn, fisher="exact")
    >>> grad_fn({"w": jnp.ones(3)}, jnp.ones((5, 3)))[2].J[("w",)].shape
    (5, 3)
    """

    J: dict[Path, Float[Array, "rows ..."]]
    residual: Float[Array, " rows"]
    term: Int[Array, " rows"]
    examples: Float[Array, " terms"]


def stacked(parts: Rows) -> Rows:
    """The rows of k micro-batches, each array with a leading axis of k, as those of one batch."""
    flat = lambda x: x.reshape(-1, *x.shape[2:])
    J = {path: flat(x) for path, x in parts.J.items()}
    return Rows(J, flat(parts.residual), flat(parts.term), parts.examples.sum(0))


def value_and_rows(
    loss_fn: LossFn, fisher: str, samples: int, has_aux: bool, axes: tuple[str, ...]
) -> Any:
    """:func:`natgrad_jax.value_and_grad` without layers."""

    def grad_fn(
        params: Any, *args: Any, rng: Any = None, opt_state: Any = None, loss_scale: Any = None
    ) -> Any:
        del opt_state  # rows are needed in every step
        check_rng(fisher, rng)
        tree, rest = model.split(params)
        check_axes(tree, args, axes)
        tree = vary(tree, axes)
        traced = trace(loss_fn, tree, rest, args, has_aux)
        others = traced.inputs[len(traced.paths) :]

        def forward(tree: Any) -> Any:
            outs = core.jaxpr_as_fun(traced.jaxpr)(*jax.tree.leaves(tree), *others)
            loss, aux, state = traced.result(outs)
            return loss.contribution(axes), (loss, aux, state)

        value, pullback, (loss, aux, state) = jax.vjp(forward, tree, has_aux=True)
        check_values(loss)
        model.propagate(params, state)
        grads = scaled(lambda one: pullback(one)[0], jnp.ones_like(value), loss_scale)
        rows = None
        if fisher != "none":
            problem = problem_of(loss_fn, tree, rest, args, traced)
            rows = rows_of(problem, tree, loss, Choice(fisher, rng, samples, axes))
        value, grads = psum(value, axes), psum(grads, axes)
        return ((value, aux) if has_aux else value), grads, rows

    return grad_fn


def scaled(pullback: Callable[[Any], Any], one: Any, loss_scale: Any) -> Any:
    """The gradients, through a loss that is multiplied by ``loss_scale``."""
    if loss_scale is None:
        return pullback(one)
    over = lambda x: (x.astype(at_least_float32(x.dtype)) / loss_scale).astype(x.dtype)
    return jax.tree.map(over, pullback(one * jnp.asarray(loss_scale, one.dtype)))


def check_rng(fisher: str, rng: Any) -> None:
    """Raise without the key that sampling needs, and for what is no key."""
    if fisher == "mc" and rng is None:
        raise ValueError(
            'fisher="mc" samples labels from the model and needs a key: call '
            "grad_fn(params, batch, rng=key), with a new key each step."
        )
    output_cotangents.check_key(rng)


class Choice(NamedTuple):
    """How rows are chosen: as in :func:`natgrad_jax.value_and_grad`."""

    fisher: str
    rng: Any
    samples: int
    axes: Sequence[str]


def rows_of(problem: Problem, tree: Any, loss: Loss, choice: Choice) -> Rows:
    """The rows of every term, those of all devices of the named axes."""
    axes, found = choice.axes, []
    gradients = _output_gradients(problem, loss, axes)
    for t, term in enumerate(loss.terms):
        axis = problem.axis(t)
        columns = _columns(loss, t, axis, choice)
        J = pulled(problem, t, term, tree, columns, axes)
        residual = _residual(term, axis, choice, gradients[t])
        count = len(next(iter(J.values())))
        residual = jnp.zeros(count) if residual is None else residual.reshape(-1)
        found.append((J, residual, jnp.full(count, t, jnp.int32)))
    J, residual, terms = jax.tree.map(lambda *x: jnp.concatenate(x), *found)
    if axes:
        gather = lambda x: jax.lax.all_gather(vary(x, axes), tuple(axes), tiled=True)
        J, residual, terms = jax.tree.map(gather, (J, residual, terms))
    counts = jnp.stack([global_count(term, axes) for term in loss.terms])
    return Rows(J, residual, terms, counts)


def _columns(loss: Loss, t: int, axis: int | None, choice: Choice) -> Outputs:
    """The output cotangents of a term's rows, ``(columns, *outputs)``: one row for each example, or
    for all together where examples cannot be told apart (``axis`` None)."""
    fisher, rng, samples, axes = choice
    of = [axis if i == t else None for i in range(len(loss.terms))]
    if fisher == "mc":
        keys = rng[None] if samples == 1 else jax.random.split(rng, samples)
        draw = lambda k: output_cotangents.sampled(loss, axes, k, samples, of, (t,))[t]
        return jax.vmap(draw)(keys)
    if fisher == "empirical":
        key = jax.random.key(0) if axis is None else None
        cotangent = output_cotangents.observed(loss, axes, key, of, (t,))[t]
        return jax.tree.map(lambda x: x[None], cotangent)
    count, cotangents = output_cotangents.exact_columns(loss, axes, None, of)[t]
    return jax.vmap(lambda i: cotangents(i)[t])(jnp.arange(count))


def _residual(
    term: Term, axis: int | None, choice: Choice, gradient: Outputs | None
) -> Float[Array, "..."] | None:
    """r of a term's rows, ``(examples, columns)``; None if it is not known."""
    distribution = term.distribution
    weight = jnp.ones(distribution.examples) if term.weight is None else term.weight
    root = jnp.sqrt(jnp.maximum(term.scale, 0) * weight)
    if choice.fisher == "empirical":
        if axis is None or (term.weight is not None and weight.ndim > 1):
            return None
        root = jnp.moveaxis(root, axis, 0)
        return root.reshape(len(root), -1)[:, 0]
    if choice.fisher == "mc" or gradient is None:
        return None
    coordinates = distribution.coordinates(gradient)
    if coordinates is None:
        return None
    root = jnp.where(root > 0, root, jnp.inf)[..., None]
    found = coordinates * whole_count(term, choice.axes) / root
    return found if axis is None else jnp.moveaxis(found, axis, 0)


def _output_gradients(
    problem: Problem, loss: Loss, axes: Sequence[str]
) -> Sequence[Outputs | None]:
    """For each term the gradient of the loss with respect to its outputs; None where the loss is
    not a function of the outputs."""
    given = tuple(term.raw for term in loss.terms)
    of_scalar = problem.scalar()

    def value(outputs: Sequence[Outputs]) -> Float[Array, ""]:
        terms = tuple(t.at(o) for t, o in zip(loss.terms, outputs, strict=True))
        scalar = None if of_scalar is None else of_scalar(outputs)
        return replace(loss, terms=terms, scalar=scalar).contribution(axes)

    return jax.grad(value)(given)
