"""Damping that follows how well the quadratic model predicted the last step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from natgrad_jax.exact.matvec import forms, model_at
from natgrad_jax.losses.terms import LossFn, as_loss
from natgrad_jax.state.clock import due
from natgrad_jax.state.walk import instances
from natgrad_jax.transforms.common.extra_args import needed, on_parameters
from natgrad_jax.transforms.quadratic_model import QuadraticModelState
from natgrad_jax.utils.finite import only_finite
from natgrad_jax.utils.hyperparams import check_fraction, check_period, check_positive, is_concrete
from natgrad_jax.utils.short_repr import printed_short

# How many values of λ the state remembers.
HISTORY = 1000


class DampingRule(NamedTuple):
    """How λ follows ρ, the actual change of the loss divided by the predicted one.

    Every ``period`` steps ``λ ← λ · up`` if ``ρ < low`` and ``λ ← λ · down`` if ``ρ > high``.
    ``alpha``: predict with the curvature that the update itself inverts, ``(1 − α/2) ∇ᵀδ`` for
    ``δ = −α F⁻¹∇``; None: predict with the exact Fisher, however the update was computed.

    >>> import natgrad_jax as ng
    >>> ng.DampingRule(period=1, up=2.0, down=0.5).low
    0.25
    """

    period: int
    up: float
    down: float
    low: float = 0.25
    high: float = 0.75
    alpha: float | None = None


def bernacchia(alpha: float | None = None) -> DampingRule:
    """``λ ← 3λ/2`` if ρ < 1/4, ``2λ/3`` if ρ > 3/4, every step.

    Args:
      alpha: the learning rate of :func:`natgrad_jax.ngd` (without momentum): the prediction is then
        the paper's, ``(−α + α²/2) Σ tr(dᵢᵀ∇ᵢ)`` with d the natural gradient, at one forward pass
        per step; None: predict with the exact Fisher.

    Source: Bernacchia et al. 2018, section 5.

    >>> bernacchia().up
    1.5
    """
    return DampingRule(1, 3 / 2, 2 / 3, alpha=alpha)


def levenberg_marquardt(period: int = 5, omega: float = 19 / 20) -> DampingRule:
    """``λ ← λ ω^{−T₁}`` if ρ < 1/4, ``λ ω^{T₁}`` if ρ > 3/4, every T₁ = ``period`` steps.

    Args:
      period: T₁, steps between updates of λ; omega: ω in (0, 1), the factor of one step.

    Raises:
      ValueError: a period that is no whole number, ω out of range.

    Source: Martens & Grosse 2015, section 6.5.

    >>> round(levenberg_marquardt().down, 3)
    0.774
    """
    check_period(period=period)
    check_positive(omega=omega)
    check_fraction(omega=omega)
    return DampingRule(period, omega**-period, omega**period)


@printed_short
class AdaptiveDampingState(NamedTuple):
    """State of :func:`adaptive_damping`.

    ``step``: int32 ``()``. ``level``: λ of the next step, ``()``. ``ratio``: the last ρ, ``()``.
    ``history``: the λ used, ``(HISTORY,)``: that of step t at index t modulo HISTORY, NaN where
    there is none yet. ``refused``: how many updates were replaced by zeros, int32 ``()``.
    ``inner``: the state of the transformation that ``make`` returned.

    >>> import natgrad_jax as ng
    >>> make = lambda damping: ng.kfac(0.1, ng.Layers({}), damping=damping)
    >>> tx = ng.adaptive_damping(make, ng.bernacchia(), lambda params, batch: None, initial=2.0)
    >>> float(tx.init({}).level)
    2.0
    """

    step: jax.Array
    level: jax.Array
    ratio: jax.Array
    history: jax.Array
    refused: jax.Array
    inner: Any


def adaptive_damping(
    make: Callable[[Any], optax.GradientTransformation],
    rule: DampingRule,
    loss_fn: LossFn,
    *,
    initial: float = 1.0,
    bounds: tuple[float, float] = (1e-8, 1e8),
) -> optax.GradientTransformationExtraArgs:
    """Adapt a transformation's damping λ to how well its quadratic model predicts the loss.

    With δ the update that ``make(λ)`` gives at parameters θ, on the same batch::

        ρ = (h(θ + δ) − h(θ)) / (∇ᵀδ + ½ δᵀFδ)

    F is the exact Fisher (a forward pass, and one through ``value_fn``, on the steps where the rule
    updates λ), so that momentum, trust regions and learning rates in ``make`` are accounted for;
    with the rule's ``alpha``, F is the curvature that the update inverts. On those steps an update
    that would raise the loss or make it non-finite, or that comes from non-finite gradients, is
    replaced by zeros, and λ rises; the momentum in ``make`` is kept.

    Args:
      make: a function from λ to a transformation whose updates are final (learning rate and sign
        included), such as ``lambda damping: ng.kfac(0.1, layers, damping=damping)``; also with
        :func:`ekfac`, :func:`ngd` or any chain that contains one of them.
      rule: :func:`bernacchia`, :func:`levenberg_marquardt`, or your own :class:`DampingRule`.
      loss_fn: as for :func:`natgrad_jax.find_layers`.
      initial: the first λ.
      bounds: the least and the largest λ.

    Returns:
      A transformation with ``update(grads, state, params, *, statistics, value, args)``: ``value``
      the loss at ``params``, ``args`` the arguments of ``loss_fn`` after the parameters,
      ``(batch,)``. For a ``loss_fn`` of an NNX model also ``split=nnx.split(model)``: ``loss_fn``
      and ``value_fn`` are then called with a copy of the model. With dropout, split it before
      computing the gradients, ``before = nnx.as_pure(nnx.split(model))``, so that both draw the
      same random numbers. ``value_fn`` (from parameters to the loss) defaults to ``loss_fn`` on
      this batch, ``grad`` to the gradients. ``ng.damping(opt_state)`` is λ of the last step.

    Raises:
      TypeError: a loss of an NNX model, and ``split`` missing or not ``nnx.split(model)``.
      ValueError: a missing ``params``, ``value`` or ``args``, with the call to write; parameters
        masked out; numbers out of range.

    Source: Martens & Grosse 2015, section 6.5; Bernacchia et al. 2018, section 5.

    >>> import jax, jax.numpy as jnp, natgrad_jax as ng
    >>> params, x, y = {"kernel": jnp.ones((4, 3))}, jnp.ones((8, 4)), jnp.zeros(8, jnp.int32)
    >>> loss_fn = lambda p, x, y: ng.Categorical(x @ p["kernel"]).nll(y)
    >>> layers = ng.find_layers(loss_fn, params, x, y)
    >>> make = lambda damping: ng.kfac(0.1, layers, damping=damping)
    >>> tx = ng.adaptive_damping(make, ng.levenberg_marquardt(), loss_fn)
    >>> state, grad_fn = tx.init(params), ng.value_and_grad(loss_fn, layers)
    >>> loss, grads, statistics = grad_fn(params, x, y, rng=jax.random.key(0), opt_state=state)
    >>> extra = {"statistics": statistics, "value": loss, "args": (x, y)}
    >>> updates, state = tx.update(grads, state, params, **extra)
    """
    low, high = bounds
    check_positive(initial=initial, low=low, high=high, up=rule.up, down=rule.down)
    check_period(period=rule.period)
    if rule.alpha is not None:
        check_positive(alpha=rule.alpha)
    if is_concrete(initial) and not low <= initial <= high:
        raise ValueError(f"initial={initial!r} must lie within bounds={bounds!r}.")

    def init_fn(params: optax.Params) -> AdaptiveDampingState:
        level = jnp.asarray(initial, float)
        zero, history = jnp.zeros((), jnp.int32), jnp.full(HISTORY, jnp.nan, float)
        inner = make(level).init(params)
        state = AdaptiveDampingState(zero, level, jnp.ones((), float), history, zero, inner)
        return jax.tree.map(jnp.copy, state)  # λ occurs several times: no two may share a buffer

    def update_fn(
        updates: optax.Updates,
        state: AdaptiveDampingState,
        params: optax.Params | None = None,
        *,
        value: Any = None,
        value_fn: Callable[[Any], Any] | None = None,
        args: Any = None,
        split: Any = None,
        grad: optax.Updates | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, AdaptiveDampingState]:
        needed("adaptive_damping", params=params, value=value, args=args)
        grad = updates if grad is None else grad
        loss_of = on_parameters(loss_fn, args, split)
        given = None if value_fn is None else on_parameters(value_fn, (), split)
        value_of = given or (lambda params: as_loss(loss_of(params)).value)
        inner = optax.with_extra_args_support(make(state.level))
        extra |= {"value": value, "value_fn": value_of, "args": args, "split": split, "grad": grad}
        new, inner_state = inner.update(updates, state.inner, params, **extra)

        def judged() -> tuple[Any, jax.Array, jax.Array, jax.Array]:
            actual = value_of(optax.apply_updates(params, new)) - value
            # non-finite gradients give a zero update, which says nothing about λ
            actual = jnp.where(only_finite(grad)[1], jnp.nan, actual)
            predicted = _predicted(rule, inner_state, loss_of, params, grad, new)
            return judge(rule, new, state, actual, predicted)

        kept = (new, state.level, state.ratio, state.refused)
        new, level, ratio, refused = jax.lax.cond(
            due(state.step, rule.period), judged, lambda: kept
        )
        return new, AdaptiveDampingState(
            step=state.step + 1,
            level=jnp.clip(level, low, high),
            ratio=ratio,
            history=state.history.at[state.step % HISTORY].set(state.level),
            refused=refused,
            inner=inner_state,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def judge(
    rule: DampingRule,
    updates: Any,
    state: AdaptiveDampingState,
    actual: jax.Array,
    predicted: jax.Array,
) -> tuple[Any, jax.Array, jax.Array, jax.Array]:
    """The update or zeros, the next λ, ρ, and the number of refused updates so far."""
    # a zero step changes the loss exactly as predicted
    still = (predicted == 0) & (actual == 0)
    ratio = jnp.where(still, 1, actual / jnp.where(predicted == 0, -jnp.inf, predicted))
    bad = ~jnp.isfinite(actual) | ~jnp.isfinite(predicted) | (predicted > 0)
    ratio = jnp.where(bad, -1, ratio).astype(state.ratio.dtype)
    level = state.level * jnp.where(
        ratio < rule.low, rule.up, jnp.where(ratio > rule.high, rule.down, 1)
    )
    refuse = ~jnp.isfinite(actual) | (actual > 0)
    updates = jax.tree.map(lambda u: jnp.where(refuse, jnp.zeros_like(u), u), updates)
    return updates, level.astype(state.level.dtype), ratio, state.refused + refuse


def _predicted(
    rule: DampingRule,
    inner: Any,
    loss_of: Callable[[Any], Any],
    params: Any,
    grad: Any,
    updates: Any,
) -> jax.Array:
    """``∇ᵀδ + ½ δᵀFδ``; from the quadratic model's state if ``inner`` has one."""
    models = instances(inner, QuadraticModelState)
    if models:
        return models[-1].predicted
    slopes = jax.tree.map(lambda g, u: jnp.sum(g.astype(float) * u.astype(float)), grad, updates)
    slope = jax.tree.reduce(jnp.add, slopes, jnp.zeros((), float))
    if rule.alpha is not None:
        return (1 - rule.alpha / 2) * slope
    return slope + 0.5 * forms(model_at(params, loss_of), [updates])[0, 0]
