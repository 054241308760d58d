"""Examples' own Jacobians: the network evaluated on each example of a batch by itself.

The loss is run on batches of one example, whose data are the slices of those arguments along which
the outputs' examples lie (:mod:`natgrad_jax.tracing.examples`), under ``vmap``. Where examples
depend on one another, or cannot be told apart, every row is a pullback of the whole batch.
"""

import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from natgrad_jax.losses.distribution_base import Outputs
from natgrad_jax.losses.example_weights import outputs_alone
from natgrad_jax.losses.terms import Term, as_loss
from natgrad_jax.tracing import model
from natgrad_jax.tracing.axes import Along
from natgrad_jax.tracing.dependence import programs
from natgrad_jax.tracing.evaluate import needed_for, values_of
from natgrad_jax.tracing.examples import find_examples
from natgrad_jax.tracing.trace import Traced
from natgrad_jax.utils import tree_paths
from natgrad_jax.utils.precision import HIGHEST
from natgrad_jax.utils.sharding import psum, vary
from natgrad_jax.utils.tree_paths import Path

RANDOM = ("random_bits", "threefry2x32", "rng_bit_generator", "rng_uniform")
APART = (
    "the rows of term {} of the loss each take a pass over the whole batch: its examples could not "
    "be told apart. Give loss_fn the data as arguments, with the examples along one axis, and "
    "random numbers as data, so that it can run on one example."
)

# For each array that goes into the loss the axis of examples, and how many neighbours are one.
Slices = tuple[tuple[int, int] | None, ...]

# By parameter.
Own = Mapping[Path, Array]


class Problem(NamedTuple):
    """A loss at ``tree``: the function, its other arguments, and its trace. ``slices``: for each
    term how its examples are cut out of the arguments, and their axis in its outputs."""

    loss_fn: Callable[..., Any]
    tree: Any
    rest: Any
    args: tuple[Any, ...]
    traced: Traced
    slices: tuple[tuple[Slices, int] | None, ...]

    def axis(self, t: int) -> int | None:
        """The axis of examples in the outputs of term ``t``; None where they cannot be apart."""
        found = self.slices[t]
        return None if found is None else found[1]

    @property
    def arrays(self) -> tuple[Any, ...]:
        """What goes into the loss beside the parameters."""
        return self.traced.inputs[len(self.traced.paths) :]

    def scalar(self) -> Callable[[Sequence[Outputs]], Any] | None:
        """What was added to the loss, as a function of the outputs; None if it needs more."""
        traced, place = self.traced, self.traced.scalar
        if place is None:
            return None
        known = [at for own in traced.raw for at in own.values()]
        _, needed = needed_for(traced.jaxpr.jaxpr, [place], known)
        if needed & set(traced.jaxpr.jaxpr.invars[: len(traced.paths)]):
            return None

        def of(outputs: Sequence[Outputs]) -> Any:
            pairs = zip(traced.raw, outputs, strict=True)
            given = {at: own[name] for places, own in pairs for name, at in places.items()}
            return values_of(traced.jaxpr, traced.inputs, [place], given)[0]

        return of

    def outputs(self, own: Own, arrays: Sequence[Any], t: int, centred: bool = False) -> Outputs:
        """The outputs of term ``t`` for other values of these parameters, and other arrays."""
        tree = tree_paths.replace(self.tree, own)
        leaves, structure = jax.tree.flatten((self.rest, self.args))
        given = iter(arrays)
        whole = [next(given) if _is_array(x) else x for x in leaves]
        rest, args = jax.tree.unflatten(structure, whole)
        with outputs_alone():
            term = as_loss(model.run(self.loss_fn, tree, rest, args)[0]).terms[t]
        every = term.distribution.parametrized
        if not centred and term.uncentred is not None:
            every = every | term.uncentred
        return {name: every[name] for name in self.traced.outputs[t]}


def problem_of(loss_fn: Any, tree: Any, rest: Any, args: Any, traced: Traced) -> Problem:
    """The :class:`Problem`; warns where examples that do not interact cannot be told apart."""
    problem = Problem(loss_fn, tree, rest, args, traced, (None,) * len(traced.outputs))
    examples = find_examples(traced)
    random = _has(traced.jaxpr.jaxpr, RANDOM)
    found: list[tuple[Slices, int] | None] = []
    for t, term in enumerate(examples.terms):
        shape, axis = traced.loss.terms[t].distribution.examples, term.axis
        found.append(None)
        if axis is None or not shape:
            continue
        cut = functools.partial(_cut, size=shape[axis], axis=axis)
        wanted = term.wanted[len(traced.paths) :]
        slices = tuple(cut(x, d) for x, d in zip(problem.arrays, wanted, strict=True))
        if not random and _fits(problem, t, axis, slices):
            found[t] = slices, axis
        else:
            warnings.warn(APART.format(t), stacklevel=4)
    return problem._replace(slices=tuple(found))


def pulled(
    problem: Problem, t: int, term: Term, own: Own, columns: Outputs, axes: Sequence[str]
) -> dict[Path, Float[Array, "rows ..."]]:
    """``cᵀ ∂o/∂θ`` over the parameters ``own``, for each example and each of the ``columns`` c of
    output cotangents; for all examples at once where they cannot be told apart."""
    arrays, found = problem.arrays, problem.slices[t]
    if found is None:
        of = lambda own: problem.outputs(own, arrays, t, centred=True)
        _, pull = jax.vjp(of, own)
        return jax.lax.map(lambda c: pull(c)[0], columns)
    slices, axis = found
    in_axes = [None if s is None else s[0] for s in slices]
    data = [_divided(x, s) for x, s in zip(arrays, slices, strict=True)]

    def rows(data: list[Any], columns: Outputs) -> tuple[Outputs, Any]:
        outputs, pull = jax.vjp(lambda own: problem.outputs(own, data, t), own)
        each = jax.tree.map(lambda c: jnp.expand_dims(c, axis + 1), columns)
        return outputs, jax.vmap(lambda c: pull(c)[0])(each)

    outputs, J = jax.vmap(rows, in_axes=(in_axes, axis + 1))(data, columns)
    if term.uncentred is not None:
        J = _centred(problem, t, term, own, J, columns, axes)
    outputs = {k: jnp.moveaxis(jnp.squeeze(x, axis + 1), 0, axis) for k, x in outputs.items()}
    same = _same(term.raw, outputs)
    flat = lambda x: jnp.where(same, x, jnp.nan).reshape(math.prod(x.shape[:2]), *x.shape[2:])
    return {path: flat(x) for path, x in J.items()}


def _centred(
    problem: Problem, t: int, term: Term, own: Own, J: Own, columns: Outputs, axes: Sequence[str]
) -> dict[Path, Float[Array, "rows ..."]]:
    """The rows of ``∂o/∂θ`` less its weighted mean over examples."""
    axis = problem.axis(t) or 0
    for name, mean in _mean_jacobian(problem, t, term, own, axes).items():
        c = jnp.moveaxis(columns[name], axis + 1, 0)
        size = len(next(iter(mean.values())))
        c = c.reshape(*c.shape[:2], -1, size).sum(2)  # over an example's positions
        less = lambda j, m, c=c: j - jnp.tensordot(c, m, 1, precision=HIGHEST).astype(j.dtype)
        J = {path: less(j, mean[path]) for path, j in J.items()}
    return dict(J)


def _mean_jacobian(
    problem: Problem, t: int, term: Term, own: Own, axes: Sequence[str]
) -> dict[str, dict[Path, Array]]:
    """``Σ w ∂o/∂θ / Σ w`` of each output's numbers, ``(numbers, *parameter)``."""
    distribution, arrays = term.distribution, problem.arrays
    weight = jnp.ones(distribution.examples) if term.weight is None else term.weight
    weight = weight / psum(vary(weight.sum(), axes), axes)
    outputs, pull = jax.vjp(lambda own: problem.outputs(own, arrays, t), own)
    zeros = jax.tree.map(jnp.zeros_like, outputs)
    found: dict[str, dict[Path, Array]] = {}
    for name, x in outputs.items():
        of_one = x.shape[len(distribution.examples) :]
        share = jnp.broadcast_to(distribution.beside(name, weight), x.shape).astype(x.dtype)
        of = lambda unit, name=name, share=share: pull(zeros | {name: share * unit})[0]
        unit = jnp.eye(math.prod(of_one), dtype=x.dtype).reshape(-1, *of_one)
        found[name] = psum(jax.vmap(of)(unit), axes)
    return found


def _divided(x: Array, s: tuple[int, int] | None) -> Array:
    """``x`` with its axis of examples divided into examples and their neighbours."""
    if s is None:
        return x
    axis, inner = s
    return x.reshape(*x.shape[:axis], -1, inner, *x.shape[axis + 1 :])


def _cut(x: Any, demand: Any, size: int, axis: int) -> tuple[int, int] | None:
    """How the examples are cut out of an array: as the outputs need it; what they do not need
    differentiably (targets, masks, ids) along an axis of the examples' length."""
    if isinstance(demand, Along):
        whole = x.shape[demand.axis] == demand.size * demand.inner
        return (demand.axis, demand.inner) if whole else None
    key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key) or (x.dtype == np.uint32 and x.ndim == 1)
    if demand is not None or key:
        return None
    at = next((a for a in (axis, 0) if x.ndim > a and x.shape[a] == size), None)
    return None if at is None else (at, 1)


def _fits(problem: Problem, t: int, axis: int, slices: Slices) -> bool:
    """Whether the loss runs on one example, and gives the outputs of one."""

    def one(own: Any, arrays: Any) -> Any:
        pairs = zip(arrays, slices, strict=True)
        data = [
            _divided(x, s) if s is None else jax.lax.index_in_dim(_divided(x, s), 0, s[0], False)
            for x, s in pairs
        ]
        return problem.outputs(own, data, t)

    try:
        outputs = jax.eval_shape(one, tree_paths.leaves(problem.tree), list(problem.arrays))
    except (TypeError, ValueError):
        return False
    whole = problem.traced.loss.terms[t].raw
    shape = lambda x: (*x.shape[:axis], 1, *x.shape[axis + 1 :])
    return all(outputs[name].shape == shape(x) for name, x in whole.items())


def _same(a: Outputs, b: Outputs) -> Array:
    """Whether the outputs agree up to rounding."""
    off = [jnp.max(jnp.abs(a[name] - b[name])) for name in a]
    rounding = max(float(jnp.finfo(x.dtype).eps) for x in a.values()) ** 0.5
    size = [jnp.max(jnp.abs(x)) for x in a.values()]
    return jnp.max(jnp.stack(off)) <= 10 * rounding * jnp.max(jnp.stack(size))


def _has(jaxpr: Any, names: Sequence[str]) -> bool:
    inside = (p for e in jaxpr.eqns for p in programs(e.params))
    return any(e.primitive.name in names for e in jaxpr.eqns) or any(
        _has(getattr(p, "jaxpr", p), names) for p in inside
    )


def _is_array(x: Any) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype")
