"""Loss, gradients and curvature statistics from one forward pass."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax import compat, paths, seeds
from natgrad_jax.clock import statistics_due
from natgrad_jax.layers import Layers, Parameter, check_layers
from natgrad_jax.losses import Loss
from natgrad_jax.parallel import AxisName, axis_names, psum, vary
from natgrad_jax.paths import Path
from natgrad_jax.sums import Sums, stack_first, zero_sums
from natgrad_jax.tagging import as_loss, frontend_of
from natgrad_jax.tagging.slots import Slot

FISHERS = ("mc", "exact", "empirical", "none")


class Statistics(NamedTuple):
    """Raw sums over examples; they add: ``jax.tree.map(jnp.add, s1, s2)`` has seen both batches.

    ``examples``: how many, weighted, ``()``; zero means that nothing was measured. ``layers``: the
    sums of each layer by path. ``leftover``: for each parameter outside every layer the squared
    sum of the examples' gradients, in the parameter's shape (None without a Fisher pass).
    """

    examples: jax.Array
    layers: dict[Path, Sums]
    leftover: dict[Path, jax.Array] | None


def value_and_grad(
    loss_fn: Callable[..., Any],
    layers: Layers,
    *,
    fisher: str = "mc",
    samples: int = 1,
    has_aux: bool = False,
    axis_name: AxisName = None,
) -> Callable[..., Any]:
    """Like ``jax.value_and_grad`` of the loss, with the layers' curvature statistics.

    One forward pass. Its pullback is called with the loss's cotangent for the gradients, and with
    the Fisher's seeds for the statistics: ``Σ ā āᵀ`` and ``Σ g gᵀ`` over the examples and positions
    that each layer saw, ``g = ∂(−log p)/∂s`` of one example, not divided by the batch size.

    Args:
      loss_fn: ``loss_fn(params, *args)`` returns a :class:`Loss`, or ``(Loss, aux)``.
      layers: from :func:`find_layers` on the same model.
      fisher: where labels come from. ``"mc"``: sampled from the model's own predictive
        distribution. ``"exact"``: all of them, by the columns of a root of the output Hessian
        (one backward pass a class, and a position where examples have several). ``"empirical"``:
        the true labels, in the training backward pass; not the Fisher. ``"none"``: input
        statistics alone.
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
      TypeError: ``loss_fn`` returns something else than a Loss.

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
    if fisher not in FISHERS:
        raise ValueError(f"fisher must be one of {', '.join(map(repr, FISHERS))}; got {fisher!r}.")
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ValueError(f"samples must be a whole number, at least 1; got {samples!r}.")
    check_layers(layers)
    axes = axis_names(axis_name)

    def grad_fn(params: Any, *args: Any, rng: Any = None, opt_state: Any = None) -> Any:
        if fisher == "mc" and rng is None:
            raise ValueError(
                'fisher="mc" samples labels from the model and needs a key: call '
                "grad_fn(params, batch, rng=key), with another key each step."
            )
        frontend = frontend_of(params)
        tree, rest = frontend.split(params)
        _check_layers(layers, tree)
        _check_axes(tree, args, axes)

        def forward(tree: Any, slots: Any) -> Any:
            out, state = frontend.instrument(loss_fn, tree, rest, slots, args)
            loss = as_loss(out, has_aux)
            aux = out[1] if has_aux else None
            naturals = tuple(t.distribution.natural for t in loss.terms)
            return (loss.contribution(axes), naturals), (loss, aux, state)

        slots = {path: Slot(zero_sums(layer), layer) for path, layer in layers.items()}
        slots = vary(slots, axes)
        (value, naturals), pullback, (loss, aux, state) = jax.vjp(
            forward, vary(tree, axes), slots, has_aux=True
        )
        frontend.propagate(params, state)
        one, none = jnp.ones_like(value), jax.tree.map(jnp.zeros_like, naturals)
        pull = _Pull(pullback, jnp.zeros_like(value), layers, axes)
        due = True if opt_state is None else statistics_due(opt_state)
        skip = partial(_nothing, layers, fisher)
        if fisher == "empirical" and _shares_training_pass(loss, layers):
            both = partial(_measure_in_training_pass, pullback, (one, none), loss, layers, axes)
            grads, statistics = _when(due, both, lambda: (pullback((one, none))[0], skip()))
        else:
            grads = pullback((one, none))[0]
            measure = partial(_measure, fisher, samples, rng, loss, pull, axes)
            statistics = _when(due, measure, skip)
        value, grads = psum(value, axes), psum(grads, axes)
        return ((value, aux) if has_aux else value), grads, statistics

    return grad_fn


class _Pull:
    """The pullback of the outputs alone: from seeds to sums and squared leftover gradients."""

    def __init__(self, pullback: Any, no_value: jax.Array, layers: Layers, axes: tuple[str, ...]):
        self.pullback, self.no_value, self.layers, self.axes = pullback, no_value, layers, axes

    def __call__(self, cotangents: Any) -> tuple[dict[Path, Sums], dict[Path, jax.Array]]:
        grads, slots = self.pullback((self.no_value, cotangents))
        return _sums(slots), _squares(grads, self.layers, self.axes)


def _measure(
    fisher: str, samples: int, rng: Any, loss: Loss, pull: _Pull, axes: tuple[str, ...]
) -> Statistics:
    """The global statistics of this batch by the Fisher's own seeds."""
    no_seeds = tuple(jnp.zeros_like(t.distribution.natural) for t in loss.terms)
    signs = jax.random.key(0) if rng is None else rng
    if fisher == "none":
        inputs = {path: s._replace(G=None) for path, s in pull(no_seeds)[0].items()}
        return _statistics(loss, inputs, None, axes)
    if fisher == "mc" and samples == 1:
        sums, squares = pull(seeds.sampled(loss, axes, rng, 1))
        return _statistics(loss, sums, squares, axes)
    if fisher == "empirical":
        sums, squares = pull(seeds.observed(loss, axes, signs))
        return _statistics(loss, sums, squares, axes)
    if fisher == "mc":
        keys = jax.random.split(rng, samples)
        passes = [(samples, lambda i: seeds.sampled(loss, axes, keys[i], samples))]
    else:
        passes = seeds.exact_columns(loss, axes, signs)
    # the inputs are the same in every pass: sum them once, and the outputs' products over passes
    inputs, squares = jax.eval_shape(pull, no_seeds)
    zeros = partial(jax.tree.map, lambda x: jnp.zeros(x.shape, x.dtype))
    total = vary(zeros({p: s.G for p, s in inputs.items()}), axes), zeros(squares)
    for count, seed in passes:

        def body(total: Any, index: jax.Array, seed: Any = seed) -> Any:
            sums, squares = pull(seed(index))
            outputs = {p: s.G for p, s in sums.items()}
            return jax.tree.map(jnp.add, total, (outputs, squares)), None

        total, _ = jax.lax.scan(body, total, jnp.arange(count))
    outputs, squares = total
    sums = {p: s._replace(G=outputs[p]) for p, s in pull(no_seeds)[0].items()}
    return _statistics(loss, sums, squares, axes)


def _shares_training_pass(loss: Loss, layers: Layers) -> bool:
    """Whether training cotangents are the examples' own gradients up to one common factor.

    Leftover parameters need a pass of their own: their squares take signs for each example.
    """
    one_factor = len(loss.terms) == 1 and loss.terms[0].weight is None and loss.scalar is None
    return one_factor and not layers.leftover


def _measure_in_training_pass(
    pullback: Any, cotangent: Any, loss: Loss, layers: Layers, axes: tuple[str, ...]
) -> tuple[Any, Statistics]:
    grads, slots = pullback(cotangent)
    term = loss.terms[0]
    # training rows are scale/N · ∇, the Fisher's are √scale · ∇
    factor = seeds.global_count(term, axes) ** 2 / jnp.where(term.scale > 0, term.scale, jnp.inf)
    sums = {
        p: s._replace(G=jax.tree.map(lambda G: (G * factor).astype(G.dtype), s.G))
        for p, s in _sums(slots).items()
    }
    return grads, _statistics(loss, sums, {}, axes)


def _statistics(loss: Loss, sums: Any, squares: Any, axes: tuple[str, ...]) -> Statistics:
    """The global statistics; ``sums`` are this device's, ``squares`` are global already."""
    return Statistics(seeds.global_count(loss.terms[0], axes), psum(sums, axes), squares)


def _sums(slots: dict[Path, Slot]) -> dict[Path, Sums]:
    return {path: stack_first(slot.sums, slot.layer) for path, slot in slots.items()}


def _squares(grads: Any, layers: Layers, axes: tuple[str, ...]) -> dict[Path, jax.Array]:
    """Squared Fisher-pass gradients of the parameters outside every layer, over all devices.

    Examples' gradients are independent with mean zero (sampled labels, or random signs), so
    that the square of their sum estimates the sum of their squares.
    """
    by_path = paths.leaves(grads)
    wide = {
        u.parameter.path: by_path[u.parameter.path].astype(_wide_dtype(u.parameter))
        for u in layers.leftover
    }
    return {path: jnp.square(g) for path, g in psum(wide, axes).items()}


def _nothing(layers: Layers, fisher: str) -> Statistics:
    """Zero statistics: no information, of the same structure as measured ones."""
    sums = {path: stack_first(zero_sums(layer), layer) for path, layer in layers.items()}
    count = jnp.zeros((), float)
    if fisher == "none":
        return Statistics(count, {p: s._replace(G=None) for p, s in sums.items()}, None)
    leftover = {
        u.parameter.path: jnp.zeros(u.parameter.shape, _wide_dtype(u.parameter))
        for u in layers.leftover
    }
    return Statistics(count, sums, leftover)


def _wide_dtype(parameter: Parameter) -> Any:
    return jnp.promote_types(parameter.dtype, jnp.float32)


def _when(due: Any, measure: Callable[[], Any], skip: Callable[[], Any]) -> Any:
    """``measure()`` where due, else ``skip()``; no branch at all where that is known."""
    if due is True:
        return measure()
    shapes = jax.eval_shape(measure)

    def skipped() -> Any:
        return jax.tree.map(lambda x, s: x.astype(s.dtype), skip(), shapes)

    return jax.lax.cond(due, measure, skipped)


def _check_layers(layers: Layers, tree: Any) -> None:
    given = paths.leaves(tree)
    wanted = [p for layer in layers.values() for p in layer.parameters]
    wanted += [u.parameter for u in layers.leftover]
    for parameter in wanted:
        leaf = given.get(parameter.path)
        if leaf is None or tuple(leaf.shape) != parameter.shape:
            came = "no such parameter" if leaf is None else f"shape {tuple(leaf.shape)}"
            raise ValueError(
                f"these Layers were found on another model: they have "
                f"{paths.join(parameter.path)} of shape {parameter.shape}, params has {came}. "
                "Call find_layers again with this model's params."
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
