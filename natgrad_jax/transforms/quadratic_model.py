"""Step size and momentum from the exact quadratic model of the loss."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from natgrad_jax.exact.matvec import forms, model_at
from natgrad_jax.losses.terms import LossFn
from natgrad_jax.transforms.common.extra_args import needed, on_parameters
from natgrad_jax.utils.finite import only_finite
from natgrad_jax.utils.hyperparams import Scalar, at, check_not_negative
from natgrad_jax.utils.short_repr import printed_short


@printed_short
class QuadraticModelState(NamedTuple):
    """State of :func:`scale_by_quadratic_model`.

    ``step``: int32 ``()``. ``last``: δ₀, the last update. ``learning_rate``, ``momentum``: the α
    and μ that made it. ``predicted``: ``M(δ)``, the change that the model predicts for it, without
    damping: negative for a decrease. ``rejected``: how many non-finite steps were replaced by
    zeros, int32. All are ``()`` except ``last``.

    >>> import natgrad_jax as ng
    >>> ng.scale_by_quadratic_model(lambda params, batch: None).init({}).last
    {}
    """

    step: jax.Array
    last: optax.Updates
    learning_rate: jax.Array
    momentum: jax.Array
    predicted: jax.Array
    rejected: jax.Array


def scale_by_quadratic_model(
    loss_fn: LossFn,
    *,
    damping: Scalar = 1e-3,
    l2: Scalar = 0.0,
    learning_rate: Scalar | None = None,
    momentum: Scalar | None = None,
    curvature: str = "fisher",
) -> optax.GradientTransformationExtraArgs:
    """Choose step size and momentum by minimising the exact quadratic model of the loss.

    With the incoming direction ``d`` (a preconditioned gradient, to be descended) and the last
    update δ₀, ``δ = −α d + μ δ₀`` minimises::

        M(δ) = ∇ᵀδ + ½ δᵀ(F + (λ + l2) I) δ

    This is a system of two equations, with ``dᵀFd``, ``dᵀFδ₀``, ``δ₀ᵀFδ₀`` from products of the
    network's Jacobian with d and δ₀ (two forward passes, no backward pass). The result is the
    update itself: chain no learning rate after it. ∇ is that of the whole objective, l2 included.

    On a full batch nothing has to be tuned. On mini-batches the model sees one batch only and
    trusts it too far: keep λ large enough, average the parameters, or let the batch grow (Martens &
    Grosse 2015, section 13).

    Args:
      loss_fn: as for :func:`natgrad_jax.find_layers`; its batch is the extra argument ``args``.
      damping: λ ≥ 0, the same as the preconditioner's.
      l2: coefficient of ``½ l2 ‖θ‖²`` in the objective, whose curvature is added.
      learning_rate: a fixed α instead of the optimal one.
      momentum: a fixed μ instead of the optimal one; 0: no momentum.
      curvature: ``"fisher"`` or ``"gauss_newton"``.

    Returns:
      A transformation with ``update(updates, state, params, *, grad, args)``: ``grad`` are the
      gradients before preconditioning, ``args`` the arguments of ``loss_fn`` after the parameters,
      ``(batch,)``. For a ``loss_fn`` of an NNX model also ``split=nnx.split(model)``.

    Raises:
      TypeError: a loss of an NNX model, and ``split`` missing or not ``nnx.split(model)``.
      ValueError: a missing ``params``, ``grad`` or ``args``; parameters masked out; numbers out of
        range.

    Source: Martens & Grosse 2015, sections 6.4 and 7.

    >>> import jax, jax.numpy as jnp, optax, natgrad_jax as ng
    >>> params, x, y = {"kernel": jnp.ones((4, 3))}, jnp.ones((8, 4)), jnp.zeros(8, jnp.int32)
    >>> loss_fn = lambda p, x, y: ng.Categorical(x @ p["kernel"]).nll(y)
    >>> tx = optax.chain(optax.scale_by_adam(), ng.scale_by_quadratic_model(loss_fn))
    >>> grads = jax.grad(lambda p: loss_fn(p, x, y).value)(params)
    >>> updates, state = tx.update(grads, tx.init(params), params, grad=grads, args=(x, y))
    """
    check_not_negative(damping=damping, l2=l2)

    def init_fn(params: optax.Params) -> QuadraticModelState:
        last = jax.tree.map(jnp.zeros_like, params)
        zero = lambda dtype: jnp.zeros((), dtype)  # separate buffers, since states are donated
        numbers = zero(float), zero(float), zero(float)
        return QuadraticModelState(zero(jnp.int32), last, *numbers, zero(jnp.int32))

    def update_fn(
        updates: optax.Updates,
        state: QuadraticModelState,
        params: optax.Params | None = None,
        *,
        grad: optax.Updates | None = None,
        args: Any = None,
        split: Any = None,
        **extra: Any,
    ) -> tuple[optax.Updates, QuadraticModelState]:
        del extra
        needed("scale_by_quadratic_model", params=params, grad=grad, args=args)
        step = state.step
        vectors = [jax.tree.map(jnp.negative, updates), state.last]
        F = forms(model_at(params, on_parameters(loss_fn, args, split)), vectors, curvature)
        dots = jnp.array([[_dot(a, b) for b in vectors] for a in vectors])
        slopes = jnp.array([_dot(grad, v) for v in vectors])
        B = F + at(l2, step) * dots
        fixed = [None if x is None else at(x, step) for x in (learning_rate, momentum)]
        chosen = _minimise(B + at(damping, step) * dots, slopes, fixed)
        predicted = slopes @ chosen + 0.5 * chosen @ B @ chosen
        new = jax.tree.map(
            lambda d, last: (chosen[0] * d + chosen[1] * last).astype(last.dtype), *vectors
        )
        # reject a step if it, or its predicted change, is non-finite
        (new, chosen, predicted), bad = only_finite((new, chosen, predicted))
        rejected = state.rejected + bad
        alpha, mu = chosen
        return new, QuadraticModelState(step + 1, new, alpha, mu, predicted, rejected)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _minimise(B: jax.Array, slopes: jax.Array, fixed: list[jax.Array | None]) -> jax.Array:
    """The (α, μ) that minimise ``slopesᵀx + ½ xᵀBx``; fixed values are kept."""
    alpha, mu = fixed
    if alpha is not None and mu is not None:
        return jnp.stack([alpha, mu])
    if alpha is not None:
        return jnp.stack([alpha, -_over(slopes[1] + B[0, 1] * alpha, B[1, 1])])
    if mu is not None:
        return jnp.stack([-_over(slopes[0] + B[0, 1] * mu, B[0, 0]), mu])
    # if the last step is zero or parallel to the direction, use the direction alone
    scale = jnp.sqrt(jnp.maximum(jnp.diag(B), 0))
    scale = jnp.where(scale > 0, scale, 1)
    cosine = B[0, 1] / (scale[0] * scale[1])
    free = (B[1, 1] > 0) & (cosine**2 < 1 - 1e-6)
    b = -slopes / scale
    below = jnp.where(free, 1 - cosine**2, 1)
    both = jnp.stack([b[0] - cosine * b[1], b[1] - cosine * b[0]]) / below / scale
    alone = jnp.stack([-_over(slopes[0], B[0, 0]), jnp.zeros_like(cosine)])
    return jnp.where(free, both, alone)


def _over(a: jax.Array, b: jax.Array) -> jax.Array:
    """``a / b``, or 0 without curvature (b ≤ 0)."""
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)


def _dot(a: Any, b: Any) -> jax.Array:
    products = jax.tree.map(lambda x, y: jnp.sum(x.astype(float) * y.astype(float)), a, b)
    return jax.tree.reduce(jnp.add, products, jnp.zeros((), float))
