"""Products with the exact Fisher of any model, and quadratic forms, without a matrix.

All use J, the Jacobian of the network's outputs for the whole batch. Operations that couple
examples (batch statistics) therefore act as in training.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from natgrad_jax.losses.distribution_base import Outputs
from natgrad_jax.losses.terms import Loss, LossFn, Term, as_loss, positive
from natgrad_jax.tracing import model
from natgrad_jax.utils.precision import at_least_float32


class Model(NamedTuple):
    """A loss at given parameters.

    ``tree``: the parameters. ``outputs``: from such a tree to the network's outputs for each term
    of the loss. ``loss``: the loss at ``tree``.
    """

    tree: optax.Params
    outputs: Callable[[optax.Params], tuple[Outputs, ...]]
    loss: Loss


def fisher_vector_product(
    loss_fn: LossFn, params: PyTree, *args: Any, damping: float | Float[Array, ""] = 0.0
) -> Callable[[optax.Params], optax.Params]:
    """The function ``v ↦ F v + λ v`` of the exact Fisher F, without forming F.

    ``F v = Σₙ Jₙᵀ Hₙ (J v)ₙ / N``, where Hₙ is the Fisher of the predictive distribution with
    respect to the network's output. The network is linearized once; each product then takes one
    forward and one backward pass.

    Args:
      loss_fn, params, *args: as for :func:`natgrad_jax.find_layers`.
      damping: λ, in the units of the Fisher (loss per parameter squared).

    Returns:
      A linear function from trees like the parameters to such trees (for an NNX model, trees like
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
    loss_fn: LossFn, params: PyTree, *args: Any, damping: float | Float[Array, ""] = 0.0
) -> Callable[[optax.Params], optax.Params]:
    """The function ``v ↦ G v + λ v`` of the generalized Gauss-Newton matrix G of the loss.

    ``G v = Σₙ Jₙᵀ ∇²(−log p)ₙ (J v)ₙ / N`` with the true labels. G equals the Fisher for the
    distributions whose outputs are natural parameters (Categorical, Bernoulli, a Gaussian's mean,
    Poisson). Scalars added to the loss
    and negative multiples of a likelihood do not contribute.

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
    loss_fn: LossFn,
    params: PyTree,
    *args: Any,
    vectors: Sequence[optax.Params],
    curvature: str = "fisher",
) -> Float[Array, "k k"]:
    """``vᵢᵀ F vⱼ`` for every pair of k vectors, with one forward pass for each and none backward.

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


def forms(
    model: Model, vectors: Sequence[optax.Params], curvature: str = "fisher"
) -> Float[Array, "k k"]:
    """:func:`quadratic_forms` of a :class:`Model`."""
    if curvature not in OF_OUTPUT:
        known = " or ".join(map(repr, OF_OUTPUT))
        raise ValueError(f"curvature must be {known}; got {curvature!r}.")
    of_output = OF_OUTPUT[curvature]
    outputs = [jax.jvp(model.outputs, (model.tree,), (v,))[1] for v in vectors]
    curved = [
        tuple(_weigh(t, of_output(t, u)) for t, u in zip(model.loss.terms, out, strict=True))
        for out in outputs
    ]
    dot = lambda x, y: jnp.sum(x.astype(float) * y.astype(float))
    inner = lambda a, b: functools.reduce(jnp.add, jax.tree.leaves(jax.tree.map(dot, a, b)))
    return jnp.array([[inner(a, b) for b in curved] for a in outputs])


def model_of(loss_fn: LossFn, params: PyTree, args: tuple[Any, ...]) -> Model:
    """The :class:`Model` of ``loss_fn(params, *args)``."""
    tree, rest = model.split(params)
    return model_at(tree, lambda tree: model.run(loss_fn, tree, rest, args)[0])


def model_at(
    tree: optax.Params, loss_of: Callable[[optax.Params], Loss | tuple[Loss, Any]]
) -> Model:
    """The :class:`Model` of ``loss_of(tree)``."""
    loss = lambda tree: as_loss(loss_of(tree))
    outputs = lambda tree: tuple(t.distribution.outputs for t in loss(tree).terms)
    # traced, as ``outputs`` is: which outputs depend on parameters is then the same
    _, _, at_tree = jax.vjp(lambda tree: (jnp.zeros(()), loss(tree)), tree, has_aux=True)
    return Model(tree, outputs, at_tree)


# From a term of the loss and the change of its output to the curvature's product with that change.
_OfOutput = Callable[[Term, Outputs], Outputs]


def _product(
    loss_fn: LossFn,
    params: PyTree,
    args: tuple[Any, ...],
    damping: float | Float[Array, ""],
    of_output: _OfOutput,
) -> Callable[[optax.Params], optax.Params]:
    model = model_of(loss_fn, params, args)
    _, forward = jax.linearize(model.outputs, model.tree)
    backward = jax.linear_transpose(forward, model.tree)

    def product(v: optax.Params) -> optax.Params:
        pairs = zip(model.loss.terms, forward(v), strict=True)
        (Fv,) = backward(tuple(_weigh(term, of_output(term, u)) for term, u in pairs))
        return jax.tree.map(lambda f, x: f + jnp.asarray(damping, x.dtype) * x, Fv, v)

    return product


def _weigh(term: Term, u: Outputs) -> Outputs:
    """``u`` times ``scale · w / Σ w``; zero for masked examples and for negative scales."""

    def of(name: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
        weight = jnp.ones(())
        if term.weight is not None:
            weight = term.distribution.beside(name, term.weight)
        factor = jnp.maximum(term.scale, 0) * weight / positive(term.count)
        return jnp.where(weight > 0, x * factor, 0).astype(term.distribution.outputs[name].dtype)

    return {name: of(name, x) for name, x in u.items()}


def _fisher_of_output(term: Term, u: Outputs) -> Outputs:
    """``H u = Σ r rᵀ u`` over the columns r of the square root of H."""
    u = {name: x.astype(at_least_float32(x.dtype)) for name, x in u.items()}
    over, beside = term.distribution.over_event, term.distribution.beside

    def add(column: Int[Array, ""], total: Outputs) -> Outputs:
        r = term.distribution.root_column(column)
        along = functools.reduce(jnp.add, [over(r[name] * u[name]) for name in u])
        return {name: total[name] + r[name] * beside(name, along) for name in u}

    zeros = jax.tree.map(jnp.zeros_like, u)
    return jax.lax.fori_loop(0, term.distribution.columns, add, zeros)


def _hessian_of_output(term: Term, u: Outputs) -> Outputs:
    """``∇²(−log p) u`` at the true labels."""
    distribution, targets = term.distribution, term.targets
    if targets is None:
        raise ValueError(
            'curvature="gauss_newton" needs the true labels of every term; distributions given to '
            'ng.loss, and .curvature(), have none. Use "fisher".'
        )
    total = lambda z: distribution.with_outputs(z).nll_per_example(targets).sum()
    return jax.jvp(jax.grad(total), (distribution.outputs,), (u,))[1]


OF_OUTPUT: dict[str, _OfOutput] = {
    "fisher": _fisher_of_output,
    "gauss_newton": _hessian_of_output,
}
