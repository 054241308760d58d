"""Loss, gradients and curvature statistics of one batch."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, TypeVar, overload

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PRNGKeyArray, PyTree

from natgrad_jax.layers.collection import Layers, check_layers
from natgrad_jax.losses.example_weights import check_values
from natgrad_jax.losses.terms import Loss, LossFn, whole_count
from natgrad_jax.state.walk import states, statistics_due
from natgrad_jax.statistics import forward, from_cotangents as measurement, plan as planning
from natgrad_jax.statistics.batch_statistics import Statistics
from natgrad_jax.statistics.checks import check_axes, check_params, check_terms
from natgrad_jax.statistics.fewer_examples import Measured, on_all, on_few
from natgrad_jax.statistics.fisher_pass import (
    examples_of,
    measure,
    measure_in_training_pass,
    shares_training_pass,
)
from natgrad_jax.statistics.sample_space import check_rng, scaled, value_and_rows
from natgrad_jax.tagging.tagged import Tagged, tag
from natgrad_jax.tracing import model
from natgrad_jax.tracing.convolutions import for_control_flow
from natgrad_jax.tracing.trace import leaks_explained, trace
from natgrad_jax.utils import tree_paths
from natgrad_jax.utils.sharding import AxisName, axis_names, devices_along, psum, vary

FISHERS = ("mc", "exact", "empirical", "none")
SEVERAL = 4  # times the gradients' memory: beyond it the training pass comes before measuring


# Statistics of layers, or rows.
S = TypeVar("S", covariant=True)


class GradFn(Protocol[S]):
    """What :func:`value_and_grad` returns."""

    def __call__(
        self,
        params: PyTree,
        *args: Any,
        rng: PRNGKeyArray | None = None,
        opt_state: PyTree = None,
        loss_scale: Any = None,
    ) -> tuple[Any, optax.Updates, S]:
        """The loss or ``(loss, aux)``, the gradients, and the statistics of this batch."""


@overload
def value_and_grad(
    loss_fn: LossFn,
    layers: Layers,
    *,
    fisher: str = "mc",
    samples: int = 1,
    has_aux: bool = False,
    axis_name: AxisName = None,
) -> GradFn[Statistics]: ...
@overload
def value_and_grad(
    loss_fn: LossFn,
    layers: None = None,
    *,
    fisher: str = "mc",
    samples: int = 1,
    has_aux: bool = False,
    axis_name: AxisName = None,
) -> GradFn[Any]: ...
def value_and_grad(
    loss_fn: LossFn,
    layers: Layers | None = None,
    *,
    fisher: str = "mc",
    samples: int = 1,
    has_aux: bool = False,
    axis_name: AxisName = None,
) -> GradFn[Any]:
    """Like ``jax.value_and_grad`` of the loss, with the layers' curvature statistics.

    The pullback of the forward pass is called with the loss's cotangent for the gradients, and with
    the Fisher's output cotangents for the statistics: ``Σ ā āᵀ`` and ``Σ g gᵀ`` over each layer's
    examples and positions, ``g = ∂(−log p)/∂s`` of one example, not divided by the batch size. With
    ``opt_state`` only some steps measure, and these run the forward pass twice, the second time for
    the measured part of the batch alone if its examples do not depend on one another (once where
    each step is known to measure, ``statistics_period=1``).

    Args:
      loss_fn: ``loss_fn(params, *args)`` returns a :class:`Loss`, or ``(Loss, aux)``.
      layers: from :func:`find_layers` on the same model. None, for transformations that need no
        layers (:func:`exact_ngd`): the statistics are then :class:`Rows`, or None with
        ``fisher="none"``.
      fisher: where labels come from. ``"mc"``: sampled from the model's own predictive
        distribution. ``"exact"``: all of them, by the columns of a root of the output Hessian
        (one backward pass for each class, and for each position if examples have several). If
        examples depend on one another (contrastive losses, batch normalization in training), or
        :func:`find_layers` cannot rule that out, it takes a pass for each example and class;
        ``print(layers)`` says so. Use ``"mc"`` there, whose one pass is right in expectation.
        ``"empirical"``: the true labels, in the training backward pass; not the Fisher.
        ``"none"``: input statistics only; also used automatically if the transformations in
        ``opt_state`` need no output gradients (:func:`natgrad_jax.prong`).
      samples: labels drawn for each example, for ``"mc"``.
      has_aux: whether ``loss_fn`` returns ``(Loss, aux)``.
      axis_name: named axis (or axes) of the surrounding ``pmap`` or ``shard_map`` over which the
        batch is split; loss, gradients and statistics then come back global (aux stays each
        device's own). Each device's batch must have the same shape.

    Returns:
      ``grad_fn(params, *args, rng=None, opt_state=None)`` → ``loss, grads, statistics``, with
      has_aux ``(loss, aux), grads, statistics``. ``rng`` is a key, needed by ``"mc"``; ``"exact"``
      and ``"empirical"`` draw from it the signs for the diagonal of leftover parameters (one fixed
      draw without it). With ``opt_state`` statistics are measured only on the steps on which its
      transformation needs them; without, on every call. With ``loss_scale``, a number ``()``, the
      loss is multiplied by it before gradients are computed and the gradients divided by it after,
      so that they do not underflow in float16; statistics have cotangents of their own, which are
      of order one, and are not scaled. For NNX, ``params`` is the model: its batch
      statistics and rng counts are updated in place.

    Raises:
      ValueError: unknown ``fisher``, fewer than one sample, a missing rng, layers of another model.
      TypeError: ``loss_fn`` does not return a Loss; ``rng`` is no key.

    Source: Martens & Grosse 2015, sections 3 and 5 (the sampled Fisher); Eschenhagen et al. 2023.

    >>> import flax.linen as nn, jax, jax.numpy as jnp, natgrad_jax as ng
    >>> model, x, y = nn.Dense(3), jnp.ones((8, 4)), jnp.zeros(8, jnp.int32)
    >>> params = model.init(jax.random.key(0), x)["params"]
    >>> loss_fn = lambda p, x, y: ng.Categorical(model.apply({"params": p}, x)).nll(y)
    >>> layers = ng.find_layers(loss_fn, params, x, y)
    >>> grad_fn = ng.value_and_grad(loss_fn, layers)
    >>> loss, grads, statistics = grad_fn(params, x, y, rng=jax.random.key(1))
    >>> statistics.layers[()].A.shape, float(statistics.examples)
    ((5, 5), 8.0)
    """
    return of_one_part(
        1, loss_fn, layers, fisher=fisher, samples=samples, has_aux=has_aux, axis_name=axis_name
    )


def of_one_part(
    parts: int,
    loss_fn: LossFn,
    layers: Layers | None,
    *,
    fisher: str,
    samples: int,
    has_aux: bool,
    axis_name: AxisName,
) -> GradFn[Any]:
    """:func:`value_and_grad` of one of ``parts`` equal micro-batches, which the caller adds up."""
    _check_choices(fisher, samples)
    axes = axis_names(axis_name)
    if layers is None:
        return value_and_rows(loss_fn, fisher, samples, has_aux, axes)
    check_layers(layers)

    @leaks_explained()
    def grad_fn(
        params: Any, *args: Any, rng: Any = None, opt_state: Any = None, loss_scale: Any = None
    ) -> Any:
        plan = planning.make_plan(layers, opt_state, fisher, parts * devices_along(axes))
        check_rng(plan.fisher, rng)
        tree, rest = model.split(params)
        check_params(layers, tree)
        check_axes(tree, args, axes)
        tree = vary(tree, axes)
        traced = trace(loss_fn, tree, rest, args, has_aux)
        check_terms(layers, traced.loss)
        batch = on_all(tag(traced, model.parameters_of(tree)), plan)
        at_once = loss_scale is None and shares_training_pass(traced.loss, batch.plan)
        if plan.every_step or at_once:
            (value, outputs), pullback, (loss, aux, state) = first = _tapped_pass(batch, axes, tree)
        else:
            training = partial(forward.plain, traced, axes)
            (value, outputs), pullback, (loss, aux, state) = jax.vjp(training, tree, has_aux=True)
        check_values(loss)
        model.propagate(params, state)
        none, one = jax.tree.map(jnp.zeros_like, outputs), jnp.ones_like(value)

        due = True if plan.every_step else _due(opt_state, loss, axes)
        if at_once:
            both = partial(measure_in_training_pass, pullback, (one, none), loss, batch.plan, axes)
            grads, statistics = _when(due, both, lambda: pullback((one, none))[0])
            grads = psum(grads, axes)
        else:
            grads = psum(scaled(lambda one: pullback((one, none))[0], one, loss_scale), axes)
            if due is True:
                statistics = _own_pass(first, samples, rng, batch.plan, axes)
            else:
                due &= _is_past(pullback, grads, batch.tagged)
                again = lambda args: trace(loss_fn, tree, rest, args, has_aux)
                few = partial(on_few, batch, args, again)
                statistics = _deferred(due, few, samples, rng, tree, loss, axes)
            if opt_state is not None and len(states(opt_state)) > 1:
                statistics = statistics.ready()  # once for all
        value = psum(value, axes)
        return ((value, aux) if has_aux else value), grads, statistics

    return grad_fn


def _check_choices(fisher: str, samples: int) -> None:
    if fisher not in FISHERS:
        raise ValueError(f"fisher must be one of {', '.join(map(repr, FISHERS))}; got {fisher!r}.")
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ValueError(f"samples must be a whole number, at least 1; got {samples!r}.")


def _tapped_pass(of: Measured, axes: tuple[str, ...], tree: Any) -> tuple[Any, Any, Any]:
    """A forward pass with its pullback to parameters and to what is measured."""
    tagged, plan, _ = of
    values = vary(planning.empty(plan), axes)
    return jax.vjp(partial(forward.tapped, tagged, plan, axes), tree, values, has_aux=True)


def _due(opt_state: Any, loss: Loss, axes: tuple[str, ...]) -> jax.Array:
    """Whether to measure now; with several terms, whether one that is due has examples."""
    due = statistics_due(opt_state)
    if not due.ndim:
        return due
    return jnp.any(due & (jnp.stack([whole_count(term, axes) for term in loss.terms]) > 0))


def _own_pass(
    passed: Any, samples: int, rng: Any, plan: planning.Plan, axes: tuple[str, ...]
) -> Statistics:
    """The statistics, by the pullback of :func:`_tapped_pass`."""
    (value, _), back, (loss, _, _) = passed
    pull = lambda given: measurement.measured(plan, axes, *back((jnp.zeros_like(value), given)))
    return measure(samples, rng, loss, plan, pull, axes)


def _deferred(
    due: Any,
    few: Callable[[], Measured],
    samples: int,
    rng: Any,
    tree: Any,
    loss: Loss,
    axes: tuple[str, ...],
) -> Statistics:
    """Measured in a branch, where they are used, for a batch with this ``loss``.

    The branch goes forward again, with a part of the batch that is cut out there: what measuring
    needs of the training pass would be kept on the steps that measure nothing, too, and that costs
    more.
    """

    def parts() -> Any:
        part = few()
        own = _own_pass(_tapped_pass(part, axes, tree), samples, rng, part.plan, axes)
        return part.whole(own.shapes)

    return Statistics.deferred(jnp.where(due, examples_of(loss, axes), 0), parts)


def _is_past(pullback: Any, grads: Any, tagged: Tagged) -> jax.Array | bool:
    """Whether the gradient that is computed last is finite, so that measuring waits for it.

    The training pass's memory is free then. True, without waiting, where that is less than several
    times the gradients', which are kept meanwhile.
    """
    size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
    if not tagged.layers or size(pullback) < SEVERAL * size(grads):
        return True
    first = min(next(iter(tagged.layers.values())).parameters, key=lambda p: math.prod(p.shape))
    return jnp.isfinite(jnp.sum(tree_paths.leaves(grads)[first.path]))


def _when(due: Any, measure: Callable[[], Any], skip: Callable[[], Any]) -> Any:
    """``measure()`` → (first, statistics) if due, else ``skip()`` → first and zero statistics.

    Without a branch if measuring is always due.
    """
    if due is True:
        return measure()
    (measure, (_, shapes)), (skip, _) = for_control_flow(measure), for_control_flow(skip)
    nothing = lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.cond(due, measure, lambda: (skip(), nothing()))
