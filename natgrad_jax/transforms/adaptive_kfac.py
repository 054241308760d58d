"""K-FAC that chooses its damping, step size and momentum itself."""

from typing import Any

import optax
from jaxtyping import DTypeLike

from natgrad_jax.curvature.inverse_methods import Inverse
from natgrad_jax.layers.approximation import Approximation
from natgrad_jax.layers.collection import Layers, check_layers
from natgrad_jax.losses.terms import LossFn
from natgrad_jax.transforms.adaptive_damping import (
    DampingRule,
    adaptive_damping,
    levenberg_marquardt,
)
from natgrad_jax.transforms.common.options import renamed_keywords
from natgrad_jax.transforms.common.refresh_schedule import Refresh
from natgrad_jax.transforms.common.trust_radius import PerExample
from natgrad_jax.transforms.kfac import scale_by_kfac
from natgrad_jax.transforms.quadratic_model import scale_by_quadratic_model
from natgrad_jax.utils.hyperparams import Scalar


@renamed_keywords
def adaptive_kfac(
    layers: Layers, loss_fn: LossFn, *, rule: DampingRule | None = None,
    initial: float = 1.0, bounds: tuple[float, float] = (1e-8, 1e8), l2: Scalar = 0.0,
    decay: Scalar = 0.95, statistics_period: Scalar = 1, refresh_period: Scalar | None = None,
    trust_radius: Scalar | PerExample | None = None, inverse: Inverse | str = "low_rank",
    approximation: Approximation | str = "kfc", refresh: Refresh | str | None = None,
    statistics_fraction: float | None = None, factor_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:  # fmt: skip
    """K-FAC without a learning rate: the whole method of Martens & Grosse.

    :func:`scale_by_kfac`, then :func:`scale_by_quadratic_model` with the same λ, inside
    :func:`adaptive_damping`. Nothing has to be tuned. Meant for full, large or growing batches,
    since the quadratic model sees one batch only.

    Args:
      layers: from :func:`natgrad_jax.find_layers`.
      loss_fn: the same loss, of parameters or of an NNX model.
      rule: how λ is adapted, :func:`levenberg_marquardt` by default.
      initial, bounds: the first λ, and its least and largest values.
      l2: coefficient of ``½ l2 ‖θ‖²`` in the objective.
      refresh_period: steps between inversions; None: 5.
      decay, statistics_period, trust_radius, inverse, approximation, refresh, statistics_fraction,
        factor_dtype: as in :func:`scale_by_kfac`.

    Returns:
      A transformation with ``update(grads, state, params, *, statistics, value, args)``, for an NNX
      model also ``split=nnx.split(model)``: as :func:`adaptive_damping`.

    Raises:
      TypeError, ValueError: as those three functions.

    Source: Martens & Grosse 2015, algorithm 2.

    >>> import jax, jax.numpy as jnp, natgrad_jax as ng
    >>> from flax import nnx
    >>> model, x, y = nnx.Linear(4, 3, rngs=nnx.Rngs(0)), jnp.ones((8, 4)), jnp.zeros(8, jnp.int32)
    >>> loss_fn = lambda model, x, y: ng.Categorical(model(x)).nll(y)
    >>> layers = ng.find_layers(loss_fn, model, x, y)
    >>> optimizer = nnx.Optimizer(model, ng.adaptive_kfac(layers, loss_fn), wrt=nnx.Param)
    >>> @nnx.jit
    ... def step(model, optimizer, x, y, key):
    ...     grad_fn = ng.value_and_grad(loss_fn, layers)
    ...     loss, grads, statistics = grad_fn(model, x, y, rng=key, opt_state=optimizer.opt_state)
    ...     extra = {"value": loss, "args": (x, y), "split": nnx.split(model)}
    ...     optimizer.update(model, grads, statistics=statistics, **extra)
    ...     return loss
    >>> losses = [step(model, optimizer, x, y, jax.random.key(i)) for i in range(2)]
    >>> bool(losses[1] < losses[0])
    True
    """
    check_layers(layers)
    if refresh_period is None and getattr(refresh, "period", None) is None:
        refresh_period = 5

    def make(damping: Any) -> optax.GradientTransformation:
        return optax.chain(
            scale_by_kfac(
                layers,
                damping,
                decay=decay,
                statistics_period=statistics_period,
                refresh_period=refresh_period,
                trust_radius=trust_radius,
                inverse=inverse,
                approximation=approximation,
                refresh=refresh,
                statistics_fraction=statistics_fraction,
                factor_dtype=factor_dtype,
            ),
            scale_by_quadratic_model(loss_fn, damping=damping, l2=l2),
        )

    return adaptive_damping(
        make, rule or levenberg_marquardt(), loss_fn, initial=initial, bounds=bounds
    )
