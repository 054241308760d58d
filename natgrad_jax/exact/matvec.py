"""Products with the exact Fisher of any model, and quadratic forms, without any matrix.

Everything starts from ``J``, the Jacobian of the network's natural outputs over the whole batch, so
that what couples examples (batch statistics) is as in training.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax.losses.loss import Loss, Term, as_loss, positive
from natgrad_jax.tagging import frontend_of
from natgrad_jax.utils.precision import at_least_float32


class Model(NamedTuple):
    """A loss at its parameters, as functions of the parameter tree."""

    tree: Any
    naturals: Callable[[Any], tuple[jax.Array, ...]]
    loss: Loss


def fisher_vector_product(
    loss_fn: Callable[..., Any], params: Any, *args: Any, damping: Any = 0.0
) -> Callable[[Any], Any]:
    """The function ``v ↦ F v + λ v``, F the exact Fisher, without any matrix.

    ``F v = Σ Jₙᵀ Hₙ (J v)ₙ / N``, H the Fisher of the predictive distribution in its natural
    output: one forward and one backward pass a product; the network is linearized once.

    Args:
      loss_fn, params, *args: as for :func:`natgrad_jax.find_layers`.
      damping: λ.

    Returns:
      A linear function of trees like the parameters (for an NNX model like
      ``nnx.state(model, nnx.Param)``).

    Source: Schraudolph 2002, section 3; Martens & Grosse 2015, appendix C.

    >>> import jax.numpy as jnp, natgrad_jax as ng
    >>> params, x, y = {"kernel": jnp.ones((4, 3))}, jnp.ones((8, 4)), jnp.zeros(8, jnp.int32)
    >>> loss_fn = lambda p, x, y: ng.Categorical(x @ p["kernel"]).nll(y)
    >>> ng.fisher_vector_product(loss_fn, params, x, y)(params)["kernel"].shape
    (4, 3)
    """
    return _product(loss_fn, params, args, damping, _fisher_of_output)


def gauss_newton_vector_product(
    loss_fn: Callable[..., Any], params: Any, *args: Any, damping: Any = 0.0
) -> Callable[[Any], Any]:
    """The function ``v ↦ G v + λ v``, G the generalized Gauss-Newton matrix of the loss.

    ``G v = Σ Jₙᵀ ∇²(−log p)ₙ (J v)ₙ / N`` with the true labels. For the distributions here, whose
    outputs are natural parameters, it equals the Fisher. Scalars added to the loss have no part,
    nor have negative multiples of a likelihood.

    Arguments and result are those of :func:`fisher_vector_product`.

    Source: Schraudolph 2002, section 3; Martens 2020, section 9.

    >>> import jax.numpy as jnp, natgrad_jax as ng
    >>> params, x, y = {"kernel": jnp.ones((4, 3))}, jnp.ones((8, 4)), jnp.zeros(8, jnp.int32)
    >>> loss_fn = lambda p, x, y: ng.Categorical(x @ p["kernel"]).nll(y)
    >>> ng.gauss_newton_vector_product(loss_fn, params, x, y)(params)["kernel"].shape
    (4, 3)
    """
    return _product(loss_fn, params, args, damping, _hessian_of_output)


def quadratic_forms(
    loss_fn: Callable[..., Any],
    params: Any,
    *args: Any,
    vectors: Sequence[Any],
    curvature: str = "fisher",
) -> jax.Array:
    """``vᵢᵀ F vⱼ`` for every pair of vectors, ``(k, k)``: one forward pass a vector, none back.

    Args:
      loss_fn, params, *args: as for :func:`natgrad_jax.find_layers`.
      vectors: k trees like the parameters.
      curvature: ``"fisher"``, or ``"gauss_newton"`` with the true labels.

    Returns:
      ``(k, k)``, symmetric, in the units of the loss.

    Raises:
      ValueError: an unknown curvature.

    Source: Martens & Grosse 2015, appendix C.

    >>> import jax.numpy as jnp, natgrad_jax as ng
    >>> params, x, y = {"kernel": jnp.ones((4, 3))}, jnp.ones((8, 4)), jnp.zeros(8, jnp.int32)
    >>> loss_fn = lambda p, x, y: ng.Categorical(x @ p["kernel"]).nll(y)
    >>> ng.quadratic_forms(loss_fn, params, x, y, vectors=[params]).shape
    (1, 1)
    """
    return forms(model_of(loss_fn, params, args), vectors, curvature)


def forms(model: Model, vectors: Sequence[Any], curvature: str = "fisher") -> jax.Array:
    """:func:`quadratic_forms` of a model that is read already."""
    if curvature not in OF_OUTPUT:
        known = " or ".join(map(repr, OF_OUTPUT))
        raise ValueError(f"curvature must be {known}; got {curvature!r}.")
    of_output = OF_OUTPUT[curvature]
    outputs = [jax.jvp(model.naturals, (model.tree,), (v,))[1] for v in vectors]
    curved = [
        [_weigh(term, of_output(term, u)) for term, u in zip(model.loss.terms, out, strict=True)]
        for out in outputs
    ]
    inner = lambda a, b: sum(
        jnp.sum(x.astype(float) * y.astype(float)) for x, y in zip(a, b, strict=True)
    )
    return jnp.array([[inner(a, b) for b in curved] for a in outputs])


def model_of(loss_fn: Any, params: Any, args: Any) -> Model:
    """The loss of ``loss_fn(params, *args)`` at these parameters."""
    frontend = frontend_of(params)
    tree, rest = frontend.split(params)
    return model_at(tree, lambda tree: frontend.instrument(loss_fn, tree, rest, {}, args)[0])


def model_at(tree: Any, loss_of: Callable[[Any], Any]) -> Model:
    """The loss of ``loss_of(tree)`` at this tree of parameters."""
    loss = lambda tree: as_loss(loss_of(tree))
    naturals = lambda tree: tuple(t.distribution.natural for t in loss(tree).terms)
    return Model(tree, naturals, loss(tree))


def _product(
    loss_fn: Any, params: Any, args: Any, damping: Any, of_output: Callable[[Term, Any], Any]
) -> Callable[[Any], Any]:
    model = model_of(loss_fn, params, args)
    _, forward = jax.linearize(model.naturals, model.tree)
    backward = jax.linear_transpose(forward, model.tree)

    def product(v: Any) -> Any:
        pairs = zip(model.loss.terms, forward(v), strict=True)
        (Fv,) = backward(tuple(_weigh(term, of_output(term, u)) for term, u in pairs))
        return jax.tree.map(lambda f, x: f + jnp.asarray(damping, x.dtype) * x, Fv, v)

    return product


def _weigh(term: Term, u: jax.Array) -> jax.Array:
    """As the seeds are weighed: nothing of masked examples, nor of negative multiples."""
    weight = jnp.ones(())
    if term.weight is not None:
        weight = term.distribution.beside_event(term.weight)
    factor = jnp.maximum(term.scale, 0) * weight / positive(term.count)
    return jnp.where(weight > 0, u * factor, 0).astype(term.distribution.natural.dtype)


def _fisher_of_output(term: Term, u: jax.Array) -> jax.Array:
    """``H u``, from the columns of a root of H."""
    u = u.astype(at_least_float32(u.dtype))

    def add(column: jax.Array, total: jax.Array) -> jax.Array:
        r = term.distribution.root_column(column)
        return total + r * term.distribution.over_event(r * u, keepdims=True)

    return jax.lax.fori_loop(0, term.distribution.columns, add, jnp.zeros_like(u))


def _hessian_of_output(term: Term, u: jax.Array) -> jax.Array:
    """``∇²(−log p) u`` at the true labels."""
    distribution = term.distribution
    total = lambda z: distribution.with_natural(z).nll_per_example(term.targets).sum()
    return jax.jvp(jax.grad(total), (distribution.natural,), (u,))[1]


OF_OUTPUT = {"fisher": _fisher_of_output, "gauss_newton": _hessian_of_output}
