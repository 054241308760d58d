"""Loss, gradients and curvature statistics from one forward pass."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PRNGKeyArray, PyTree

from natgrad_jax.curvature.layer_sums import Sums
from natgrad_jax.layers.collection import Layers, check_layers
from natgrad_jax.losses import output_cotangents
from natgrad_jax.losses.loss import Loss, LossFn, as_loss, global_count, whole_count
from natgrad_jax.state.walk import statistics_due
from natgrad_jax.statistics import measuring
from natgrad_jax.statistics.measuring import Measured, Plan
from natgrad_jax.tagging import frontend_of
from natgrad_jax.utils import compat, tree_paths
from natgrad_jax.utils.sharding import AxisName, axis_names, devices_along, psum, vary
from natgrad_jax.utils.tree_paths import Path

FISHERS = ("mc", "exact", "empirical", "none")


class Statistics(NamedTuple):
    """Raw sums over examples; they add: ``jax.tree.map(jnp.add, s1, s2)`` has seen both batches.

    ``examples``: how many, weighted, ``()``; zero means that nothing was measured. ``layers``: the
    sums of each layer by path. ``leftover``: for each parameter with a diagonal block the squared
    sum of the examples' gradients, in the parameter's shape (None without a Fisher pass).
    ``reduced``: sums of the layers with positions, those summed first; they are measured where
    a transformation asks for them, or without ``opt_state``. ``moments``: for each layer
    ``Σₙ (Q_Aᵀ ∇K̄ₙ Q_G)²`` in the bases of ``opt_state``, where its transformation asks.

    Of a loss of several terms each counts its own examples, ``(terms,)``. What is made of gradients
    then has an axis in front in those layers and parameters that more than one term depends on
    (``layer.terms``): G is ``(terms, *stack, *blocks, outputs, outputs)`` there.

    >>> import jax, jax.numpy as jnp, natgrad_jax as ng
    >>> half = ng.Statistics(jnp.asarray(4.0), {}, {}, {}, None)
    >>> float(jax.tree.map(jnp.add, half, half).examples)
    8.0
    """

    examples: jax.Array
    layers: dict[Path, Sums]
    leftover: dict[Path, jax.Array] | None
    reduced: dict[Path, Sums]
    moments: dict[Path, jax.Array] | None


class GradFn(Protocol):
    """What :func:`value_and_grad` returns."""

    def __call__(
        self,
        params: PyTree,
        *args: Any,
        rng: PRNGKeyArray | None = None,
        opt_state: PyTree = None,
    ) -> tuple[Any, optax.Updates, Statistics]:
        """The loss or ``(loss, aux)``, the gradients, and the statistics of this batch."""


def value_and_grad(
    loss_fn: LossFn,
    layers: Layers,
    *,
    fisher: str = "mc",
    samples: int = 1,
    has_aux: bool = False,
    axis_name: AxisName = None,
) -> GradFn:
    """Like ``jax.value_and_grad`` of the loss, with the layers' curvature statistics.

    One forward pass. Its pullback is called with the loss's cotangent for the gradients, and with
    the Fisher's seeds for the statistics: ``Σ ā āᵀ`` and ``Σ g gᵀ`` over the examples and positions
    that each layer saw, ``g = ∂(−log p)/∂s`` of one example, not divided by the batch size.

    Args:
      loss_fn: ``loss_fn(params, *args)`` returns a :class:`Loss`, or ``(Loss, aux)``.
      layers: from :func:`find_layers` on the same model.
      fisher: where labels come from. ``"mc"``: sampled from the model's own predictive
        distribution. ``"exact"``: all of them, by the columns of a root of the output Hessian
        (one backward pass for each class, and for each position where examples have several).
        Where examples depend on one another (contrastive losses, batch normalization in training),
        or :func:`find_layers` cannot tell that they do not, it takes a pass for each example and
        class; ``print(layers)`` says so. Use ``"mc"`` there, whose one pass is right in
        expectation. ``"empirical"``: the true labels, in the training backward pass; not the
        Fisher. ``"none"``: input statistics alone. It is also used where the transformations in
        ``opt_state`` need no gradients (:func:`natgrad_jax.prong`).
      samples: labels drawn for each example, for ``"mc"``.
      has_aux: whether ``loss_fn`` returns ``(Loss, aux)``.
      axis_name: named axis (or axes) of the surrounding ``pmap`` or ``shard_map`` over which the
        batch is split; loss, gradients and statistics then come back global (aux stays each
        device's own). Each device's batch must have the same shape.

    Returns:
      ``grad_fn(params, *args, rng=None, opt_state=None)`` → ``loss, grads, statistics``, with
      has_aux ``(loss, aux), grads, statistics``. ``rng`` is a key, needed by ``"mc"``; ``"exact"``
      and ``"empirical"`` draw from it the signs for the diagonal of leftover parameters (one fixed
      draw without it). With ``opt_state`` statistics are measured only on the steps for which the
      transformation in it asks; without, on every call. For NNX, ``params`` is the model: its
      batch statistics and rng counts are updated in place.

    Raises:
      ValueError: unknown ``fisher``, fewer than one sample, a missing rng, layers of another model.
      TypeError: ``loss_fn`` returns something else than a Loss; ``rng`` is no key.

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
    layers: Layers,
    *,
    fisher: str,
    samples: int,
    has_aux: bool,
    axis_name: AxisName,
) -> GradFn:
    """:func:`value_and_grad` of one of ``parts`` equal micro-batches, which the caller adds up."""
    _check_choices(fisher, samples)
    check_layers(layers)
    axes = axis_names(axis_name)

    def grad_fn(params: Any, *args: Any, rng: Any = None, opt_state: Any = None) -> Any:
        plan = measuring.plan(layers, opt_state, fisher, parts * devices_along(axes))
        if plan.fisher == "mc" and rng is None:
            raise ValueError(
                'fisher="mc" samples labels from the model and needs a key: call '
                "grad_fn(params, batch, rng=key), with another key each step."
            )
        output_cotangents.check_key(rng)
        frontend = frontend_of(params)
        tree, rest = frontend.split(params)
        _check_layers(layers, tree)
        _check_axes(tree, args, axes)

        forward = partial(_forward, frontend, loss_fn, has_aux, axes, rest, args)
        first_outputs = lambda slots: forward(tree, slots)[0][1][0]
        plan = measuring.with_examples(plan, first_outputs)
        readings = vary(measuring.empty(plan), axes)
        with_slots = lambda tree, readings: forward(tree, measuring.slots(plan, readings))
        (value, naturals), pullback, (loss, aux, state) = jax.vjp(
            with_slots, vary(tree, axes), readings, has_aux=True
        )
        frontend.propagate(params, state)
        check_terms(layers, loss)
        one, none = jnp.ones_like(value), jax.tree.map(jnp.zeros_like, naturals)

        def pull(seeds: Any) -> Measured:
            return measuring.measured(plan, axes, *pullback((jnp.zeros_like(value), seeds)))

        due = True if opt_state is None else _due(opt_state, loss, axes)
        if plan.fisher == "empirical" and _shares_training_pass(loss, plan):
            both = partial(_measure_in_training_pass, pullback, (one, none), loss, plan, axes)
            grads, statistics = _when(due, both, lambda: pullback((one, none))[0])
        else:
            grads = pullback((one, none))[0]
            measure = partial(_measure, samples, rng, loss, plan, pull, axes)
            statistics = _when(due, lambda: ((), measure()), lambda: ())[1]
        value, grads = psum(value, axes), psum(grads, axes)
        return ((value, aux) if has_aux else value), grads, statistics

    return grad_fn


def _check_choices(fisher: str, samples: int) -> None:
    if fisher not in FISHERS:
        raise ValueError(f"fisher must be one of {', '.join(map(repr, FISHERS))}; got {fisher!r}.")
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ValueError(f"samples must be a whole number, at least 1; got {samples!r}.")


def _forward(
    frontend: Any,
    loss_fn: Callable[..., Any],
    has_aux: bool,
    axes: tuple[str, ...],
    rest: Any,
    args: Any,
    tree: Any,
    slots: Any,
) -> tuple[tuple[jax.Array, tuple[jax.Array, ...]], tuple[Loss, Any, Any]]:
    """The scalar and the natural outputs, which have cotangents; the loss, aux and state."""
    out, state = frontend.instrument(loss_fn, tree, rest, slots, args)
    loss = as_loss(out, has_aux)
    naturals = tuple(t.distribution.natural for t in loss.terms)
    return (loss.contribution(axes), naturals), (loss, out[1] if has_aux else None, state)


def _measure(
    samples: int, rng: Any, loss: Loss, plan: Plan, pull: Any, axes: tuple[str, ...]
) -> Statistics:
    """The global statistics of this batch by the Fisher's own seeds."""
    no_seeds = tuple(jnp.zeros_like(t.distribution.natural) for t in loss.terms)
    if plan.fisher == "none":
        alone = measuring.split(plan, pull(no_seeds))[0]
        return _statistics(loss, plan, Measured(alone, measuring.Squares({}, {}, {})), axes, True)
    passes: list[Measured] = []
    inputs: Any = None
    for terms in plan.passes:
        work = _seeds(samples, rng, loss, plan, axes, terms)
        if len(work) == 1 and work[0][0] == 1:
            inputs, rest = measuring.split(plan, pull(work[0][1](jnp.zeros((), jnp.int32))))
        else:
            rest = _sum_over(
                work, lambda seed: measuring.split(plan, pull(seed))[1], no_seeds, axes
            )
        passes.append(rest)
    # the inputs are the same in every pass: sum them once, and the rest over passes
    if inputs is None:
        inputs = measuring.split(plan, pull(no_seeds))[0]
    found = measuring.join_parts(inputs, measuring.by_terms(plan, passes))
    return _statistics(loss, plan, found, axes)


Work = list[tuple[int, Callable[[jax.Array], output_cotangents.Cotangents]]]


def _seeds(
    samples: int, rng: Any, loss: Loss, plan: Plan, axes: tuple[str, ...], terms: tuple[int, ...]
) -> Work:
    """The backward passes that measure these terms: how many, and the seeds of each by number."""
    of, signs = plan.examples, jax.random.key(0) if rng is None else rng
    if plan.fisher == "empirical":
        return [(1, lambda _: output_cotangents.observed(loss, axes, signs, of, terms))]
    if plan.fisher == "exact":
        columns = output_cotangents.exact_columns(loss, axes, signs, of)
        return [columns[term] for term in terms]
    keys = rng[None] if samples == 1 else jax.random.split(rng, samples)
    return [(samples, lambda i: output_cotangents.sampled(loss, axes, keys[i], samples, of, terms))]


def _sum_over(
    work: Work, measured: Callable[[Any], Measured], no_seeds: Any, axes: tuple[str, ...]
) -> Measured:
    """What the passes measure in all, one after another."""
    zeros = partial(jax.tree.map, lambda x: jnp.zeros(x.shape, x.dtype))
    taps, squares = zeros(jax.eval_shape(measured, no_seeds))
    total = Measured(vary(taps, axes), squares)
    for count, seed in work:

        def body(total: Any, index: jax.Array, seed: Any = seed) -> Any:
            return jax.tree.map(jnp.add, total, measured(seed(index))), None

        total, _ = jax.lax.scan(body, total, jnp.arange(count))
    return total


def _shares_training_pass(loss: Loss, plan: Plan) -> bool:
    """Whether training cotangents are the examples' own gradients up to one common factor.

    What comes from squared sums needs a pass of its own, with a sign for each example.
    """
    one_factor = len(loss.terms) == 1 and loss.terms[0].weight is None and loss.scalar is None
    mixed = any(wanted.layer.uses > 1 for wanted in plan.wanted.values())
    return one_factor and not plan.from_sums and not mixed


def _measure_in_training_pass(
    pullback: Any, cotangent: Any, loss: Loss, plan: Plan, axes: tuple[str, ...]
) -> tuple[Any, Statistics]:
    grads, readings = pullback(cotangent)
    term = loss.terms[0]
    # training rows are scale/N · ∇, the Fisher's are √scale · ∇
    factor = whole_count(term, axes) ** 2 / jnp.where(term.scale > 0, term.scale, jnp.inf)
    found = measuring.measured(plan, axes, grads, readings)
    taps = measuring.scale_gradients(plan, found.taps, factor)
    return grads, _statistics(loss, plan, found._replace(taps=taps), axes)


def _statistics(
    loss: Loss, plan: Plan, found: Measured, axes: tuple[str, ...], inputs_only: bool = False
) -> Statistics:
    """The global statistics of one pass."""
    taps, squares = psum(found.taps, axes), found.squares
    counts = [global_count(term, axes) for term in loss.terms]
    moments = {path: r.moments for path, r in taps.items() if r.moments is not None}
    return Statistics(
        examples=counts[0] if len(counts) == 1 else jnp.stack(counts),
        layers={path: r.sums for path, r in taps.items() if r.sums is not None} | squares.blocks,
        leftover=None if inputs_only else squares.diagonals,
        reduced={path: r.reduced for path, r in taps.items() if r.reduced is not None},
        moments=moments | squares.moments if plan.in_bases and not inputs_only else None,
    )


def _due(opt_state: Any, loss: Loss, axes: tuple[str, ...]) -> jax.Array:
    """Whether to measure now: of several terms, where one that is due has examples."""
    due = statistics_due(opt_state)
    if not due.ndim:
        return due
    return jnp.any(due & (jnp.stack([whole_count(term, axes) for term in loss.terms]) > 0))


def _when(due: Any, measure: Callable[[], Any], skip: Callable[[], Any]) -> Any:
    """``measure()`` → (first, statistics) where due, else ``skip()`` → first and zero statistics.

    No branch at all where that is known.
    """
    if due is True:
        return measure()
    statistics = jax.eval_shape(measure)[1]
    nothing = lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), statistics)
    return jax.lax.cond(due, measure, lambda: (skip(), nothing()))


def _check_layers(layers: Layers, tree: Any) -> None:
    given = tree_paths.leaves(tree)
    wanted = [p for layer in layers.values() for p in layer.parameters]
    wanted += [u.parameter for u in layers.leftover]
    for parameter in wanted:
        leaf = given.get(parameter.path)
        if leaf is None or tuple(leaf.shape) != parameter.shape:
            came = "no such parameter" if leaf is None else f"shape {tuple(leaf.shape)}"
            raise ValueError(
                f"these Layers were found on another model: they have "
                f"{tree_paths.join(parameter.path)} of shape {parameter.shape}, params has {came}. "
                "Call find_layers again with this model's params."
            )


def check_terms(layers: Layers, loss: Loss) -> None:
    """Raise where the loss has other terms than the one that the layers were found on."""
    if len(layers.terms) != len(loss.terms) and (layers or layers.leftover):
        names = lambda terms: ", ".join(type(t.distribution).__name__ for t in terms)
        before = ", ".join(term.distribution for term in layers.terms)
        raise ValueError(
            f"these Layers were found on a loss of {len(layers.terms)} terms ({before}), and "
            f"loss_fn returned one of {len(loss.terms)} ({names(loss.terms)}). Each term has "
            "curvature of its own: return the same terms always, and leave a task out of a batch "
            "by nll(targets, where=mask)."
        )


def _check_axes(tree: Any, args: Any, axes: tuple[str, ...]) -> None:
    def varying(values: Any) -> set[Any]:
        leaves = (x for x in jax.tree.leaves(values) if isinstance(x, jax.Array))
        return set().union(*(compat.varying_axes(x) for x in leaves))

    missing = varying(args) - varying(tree) - set(axes)
    if missing:
        names = ", ".join(map(repr, sorted(map(str, missing))))
        raise ValueError(
            f"the batch varies over the mesh axis {names} here, inside shard_map: pass "
            f"axis_name={names} to value_and_grad, so that its results are the global ones."
        )
