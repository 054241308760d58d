"""Rows of the Fisher's square root: one for each example and column of its output Fisher.

With W the weighted number of examples of a term, ``F = Jᵀ J / W`` and, where the loss reaches the
parameters through the outputs alone, ``∇ = Jᵀ r / W``.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from natgrad_jax.losses import output_cotangents
from natgrad_jax.losses.distribution_base import Outputs
from natgrad_jax.losses.terms import Loss, Term, global_count, whole_count
from natgrad_jax.statistics.example_jacobian import Problem, pulled
from natgrad_jax.utils import tree_paths
from natgrad_jax.utils.precision import HIGHEST
from natgrad_jax.utils.sharding import vary
from natgrad_jax.utils.short_repr import printed_short
from natgrad_jax.utils.tree_paths import Path


@printed_short
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
    flat = lambda x: x.reshape(math.prod(x.shape[:2]), *x.shape[2:])
    J = {path: flat(x) for path, x in parts.J.items()}
    return Rows(J, flat(parts.residual), flat(parts.term), parts.examples.sum(0))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Gram:
    """What :class:`Rows` hold, without J: ``K = J Jᵀ``, ``(rows, rows)``, and Jᵀ as a function.

    ``pullback``: from the loss's cotangents, of its value and of its outputs, to the parameters'.
    ``zero``: of the value. ``columns``: for each term the output cotangents of its rows; ``axes``:
    where its examples lie.
    """

    K: Float[Array, "rows rows"]
    residual: Float[Array, " rows"]
    term: Int[Array, " rows"]
    examples: Float[Array, " terms"]
    columns: tuple[Outputs, ...]
    pullback: Any
    zero: Float[Array, ""]
    axes: tuple[int | None, ...] = field(metadata={"static": True})

    def pull(self, y: Float[Array, " rows"]) -> dict[Path, Array]:
        """``Jᵀ y``, by one backward pass."""
        cotangents, start = [], 0
        for columns, axis in zip(self.columns, self.axes, strict=True):
            first = next(iter(columns.values()))
            count = len(first) * (1 if axis is None else first.shape[axis + 1])
            own, start = y[start : start + count], start + count
            cotangents.append({k: _combined(own, x, axis) for k, x in columns.items()})
        return tree_paths.leaves(self.pullback((self.zero, tuple(cotangents)))[0])

    def push(self, v: dict[Path, Array]) -> Float[Array, " rows"]:
        """``J v``, by the transpose of that."""
        like = jax.ShapeDtypeStruct(self.residual.shape, self.K.dtype)
        (found,) = jax.linear_transpose(self.pull, like)(v)
        return found


def _combined(y: Array, columns: Array, axis: int | None) -> Array:
    """``Σ_c y_nc c_n``: the output cotangents that rows with these coefficients have together."""
    if axis is None:
        return jnp.tensordot(y.astype(columns.dtype), columns, 1)
    y = y.reshape(columns.shape[axis + 1], len(columns)).T.astype(columns.dtype)
    shape = [len(columns)] + [1] * (columns.ndim - 1)
    shape[axis + 1] = y.shape[1]
    return jnp.sum(columns * y.reshape(shape), 0)


class Choice(NamedTuple):
    """How rows are chosen: as in :func:`natgrad_jax.value_and_grad`."""

    fisher: str
    rng: Any
    samples: int
    axes: Sequence[str]


class Measured(NamedTuple):
    """The rows of a loss before their Jacobian: for each term its ``columns`` of output
    cotangents, the rows' ``residual`` and ``term``, and the terms' ``examples``."""

    columns: tuple[Outputs, ...]
    residual: Float[Array, " rows"]
    term: Int[Array, " rows"]
    examples: Float[Array, " terms"]


def measured(problem: Problem, loss: Loss, choice: Choice) -> Measured:
    """The output cotangents of every term's rows, on this device."""
    columns, residuals, terms = [], [], []
    gradients = _output_gradients(problem, loss, choice.axes)
    for t, term in enumerate(loss.terms):
        axis = problem.axis(t)
        columns.append(_columns(loss, t, axis, choice))
        first = next(iter(columns[t].values()))
        count = len(first) * (1 if axis is None else first.shape[axis + 1])
        own = _residual(term, axis, choice, gradients[t])
        residuals.append(jnp.zeros(count) if own is None else own.reshape(-1))
        terms.append(jnp.full(count, t, jnp.int32))
    counts = jnp.stack([global_count(term, choice.axes) for term in loss.terms])
    return Measured(tuple(columns), jnp.concatenate(residuals), jnp.concatenate(terms), counts)


def _jacobian(
    problem: Problem, loss: Loss, found: Measured, own: Any, axes: Sequence[str]
) -> dict[Path, Float[Array, "rows ..."]]:
    """The rows of J over the parameters ``own``."""
    of = lambda t, term: pulled(problem, t, term, own, found.columns[t], axes)
    parts = [of(t, term) for t, term in enumerate(loss.terms)]
    return jax.tree.map(lambda *x: jnp.concatenate(x), *parts)


def rows_of(problem: Problem, loss: Loss, choice: Choice) -> Rows:
    """The rows of every term, those of all devices of the named axes."""
    axes, found = choice.axes, measured(problem, loss, choice)
    J = _jacobian(problem, loss, found, tree_paths.leaves(problem.tree), axes)
    rows = Rows(J, *found[1:])
    if not axes:
        return rows
    gather = lambda x: jax.lax.all_gather(vary(x, axes), tuple(axes), tiled=True)
    J, residual, term = jax.tree.map(gather, rows[:3])
    return Rows(J, residual, term, rows.examples)


def gram_of(problem: Problem, loss: Loss, choice: Choice, pullback: Any, zero: Any) -> Gram:
    """K, summed over parameters one after another, so that J never lies whole."""
    found = measured(problem, loss, choice)
    axes = tuple(problem.axis(t) for t in range(len(loss.terms)))
    of = lambda own: _jacobian(problem, loss, found, own, ()).values()
    parameters = tree_paths.leaves(problem.tree).items()
    products = (gram(j) for path, x in parameters for j in of({path: x}))
    none = jnp.zeros((len(found.residual),) * 2, jnp.float32)
    K = functools.reduce(jnp.add, products, none)
    return Gram(K, *found[1:], found.columns, pullback, zero, axes)


def gram(j: Float[Array, "rows ..."]) -> Float[Array, "rows rows"]:
    """``J Jᵀ`` of one parameter; complex numbers are pairs of real ones."""
    flat = j.reshape(len(j), math.prod(j.shape[1:]))
    return jnp.matmul(flat, flat.conj().T, precision=HIGHEST).real


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
    term: Term, axis: int | None, choice: Choice, gradient: Outputs
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
    if choice.fisher == "mc":
        return None
    coordinates = distribution.coordinates(gradient)
    if coordinates is None:
        return None
    root = jnp.where(root > 0, root, jnp.inf)[..., None]
    found = coordinates * whole_count(term, choice.axes) / root
    return found if axis is None else jnp.moveaxis(found, axis, 0)


def _output_gradients(problem: Problem, loss: Loss, axes: Sequence[str]) -> Sequence[Outputs]:
    """For each term the gradient of the loss with respect to its outputs, without what was added to
    the loss and is not a function of the outputs alone."""
    given = tuple(term.raw for term in loss.terms)
    of_scalar = problem.scalar()

    def value(outputs: Sequence[Outputs]) -> Float[Array, ""]:
        terms = tuple(t.at(o) for t, o in zip(loss.terms, outputs, strict=True))
        scalar = None if of_scalar is None else of_scalar(outputs)
        return replace(loss, terms=terms, scalar=scalar).contribution(axes)

    return jax.grad(value)(given)
