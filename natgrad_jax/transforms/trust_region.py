"""The trust region as a transformation of its own: KL clipping of any update."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from natgrad_jax.exact.matvec import forms, model_at
from natgrad_jax.losses.terms import LossFn
from natgrad_jax.transforms.common.extra_args import needed, on_parameters
from natgrad_jax.utils.finite import only_finite
from natgrad_jax.utils.hyperparams import Scalar, at, check_positive


def clip_by_trust_radius(
    trust_radius: Scalar, loss_fn: LossFn
) -> optax.GradientTransformationExtraArgs:
    """Scale an update Δ by ``min(1, √(κ / ΔᵀFΔ))``, F the exact Fisher of the batch.

    ``½ ΔᵀFΔ`` is how far the predictive distribution moves, in nats (KL divergence, to second
    order). Place it where updates have their final size, after momentum and the learning rate; it
    takes any update. (The ``trust_radius`` of :func:`natgrad_jax.kfac` uses K-FAC's F, at no cost;
    this one costs a forward pass.) An update that is non-finite, or whose length is, is replaced
    by zeros.

    Args:
      trust_radius: κ > 0; a float, an array or a schedule.
      loss_fn: as for :func:`natgrad_jax.find_layers`; its batch is the extra argument ``args``:
        ``tx.update(grads, state, params, args=(batch,))``.

    Returns:
      A transformation with ``update(updates, state, params, *, args)``; for a ``loss_fn`` of an NNX
      model also ``split=nnx.split(model)``.

    Raises:
      TypeError: a loss of an NNX model, and ``split`` missing or not ``nnx.split(model)``.
      ValueError: κ not positive; missing ``params`` or ``args``; parameters masked out.

    Source: Ba et al. 2016, section 5; Martens & Grosse 2015, section 6.4 (exact products).

    >>> import jax.numpy as jnp, optax, natgrad_jax as ng
    >>> from flax import nnx
    >>> model, x, y = nnx.Linear(4, 3, rngs=nnx.Rngs(0)), jnp.ones((8, 4)), jnp.zeros(8, jnp.int32)
    >>> loss_fn = lambda model, x, y: ng.Categorical(model(x)).nll(y)
    >>> tx = optax.chain(optax.adam(0.1), ng.clip_by_trust_radius(1e-3, loss_fn))
    >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    >>> grads = nnx.grad(lambda model: loss_fn(model, x, y).value)(model)
    >>> updates = optimizer.update(model, grads, args=(x, y), split=nnx.split(model))
    """
    check_positive(trust_radius=trust_radius)

    def init_fn(params: optax.Params) -> optax.ScaleByScheduleState:
        del params
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    def update_fn(
        updates: optax.Updates,
        state: optax.ScaleByScheduleState,
        params: optax.Params | None = None,
        *,
        args: Any = None,
        split: Any = None,
        **extra: Any,
    ) -> tuple[optax.Updates, optax.ScaleByScheduleState]:
        del extra
        needed("clip_by_trust_radius", params=params, args=args)
        form = forms(model_at(params, on_parameters(loss_fn, args, split)), [updates])[0, 0]
        positive = jnp.where(form > 0, form, 1)
        bound = jnp.sqrt(at(trust_radius, state.count) / positive)
        scale = jnp.where(form > 0, jnp.minimum(1, bound), jnp.where(jnp.isnan(form), jnp.nan, 1))
        updates, _ = only_finite(jax.tree.map(lambda u: u * scale.astype(u.dtype), updates))
        return updates, optax.ScaleByScheduleState(state.count + 1)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
