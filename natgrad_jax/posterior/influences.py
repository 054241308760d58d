"""How much each training example moves a quantity."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from natgrad_jax.losses.terms import Loss, LossFn, as_loss
from natgrad_jax.posterior.powers import solve
from natgrad_jax.posterior.record import Curvature
from natgrad_jax.tracing import model


def influence(
    curvature: Curvature,
    loss_fn: LossFn,
    params: PyTree,
    query_args: tuple[Any, ...],
    train_args: tuple[Any, ...],
    damping: float | Float[Array, ""],
    *,
    query_fn: Callable[..., Any] | None = None,
    chunk: int = 128,
) -> Float[Array, " N"]:
    """The influence of each training example n on a quantity q: ``−∇qᵀ (F + λ I)⁻¹ ∇ℓₙ``.

    To first order, q changes by ε times this if ``ε ℓₙ`` is added to the mean training loss. Left
    out, which is ``ε = −1/N``, the example changes q by −1/N times this. Where q is a test loss,
    examples with negative influence are the helpful ones.

    The equation is solved once, ``v = (F + λ I)⁻¹ ∇q``. Then ``∇ℓₙᵀ v`` is the derivative of ℓₙ
    along v, in forward mode: no gradient of a single example is stored. (JAX has no forward mode
    of a ``custom_vjp``, and says so.)

    Args:
      curvature: F, from :func:`from_state` or :func:`from_data`.
      loss_fn, params: as for :func:`natgrad_jax.find_layers`; an NNX model should be in evaluation
        mode, ``model.eval()``.
      query_args: the arguments of q after params.
      train_args: the arguments of ``loss_fn`` after params. The leading axis of every array in them
        counts examples; ``loss_fn`` gets each example as a batch of one. Its ℓₙ is the negative
        log likelihood alone: scalars added to the loss (weight decay) belong to no example.
      damping: λ ≥ 0, in the units of the Fisher (loss per parameter squared).
      query_fn: ``query_fn(params, *query_args)`` returns q: a scalar, or a Loss, whose value is
        then taken. None: ``loss_fn``, the loss of the query.
      chunk: the number of examples that are computed at once.

    Returns:
      ``(N,)``, in units of q.

    Raises:
      ValueError: a negative damping; arrays in ``train_args`` without a common leading axis;
        parameters that are missing or have other shapes.
      TypeError: ``loss_fn`` does not return a Loss.

    Source: Koh & Liang 2017, equation 2; Grosse et al. 2023, section 3 (with EKFAC).

    >>> import jax.numpy as jnp, natgrad_jax as ng
    >>> params, x, y = {"kernel": jnp.ones((4, 3))}, jnp.eye(4), jnp.arange(4) % 3
    >>> loss_fn = lambda p, x, y: ng.Categorical(x @ p["kernel"]).nll(y)
    >>> layers = ng.find_layers(loss_fn, params, x, y)
    >>> curvature = ng.posterior.from_data(loss_fn, params, [(x, y)], layers, fisher="exact")
    >>> query = (x[:1], y[:1])  # the first training example itself
    >>> found = ng.posterior.influence(curvature, loss_fn, params, query, (x, y), damping=0.1)
    >>> found.shape, int(found.argmin())
    ((4,), 0)
    """
    _check_examples(train_args)
    tree, rest = model.split(params)

    def query(tree: PyTree) -> Float[Array, ""]:
        out = model.run(query_fn or loss_fn, tree, rest, query_args)[0]
        return as_loss(out).value if query_fn is None or isinstance(out, Loss) else out

    direction = solve(curvature, jax.grad(query)(tree), damping)

    def of(example: PyTree) -> Float[Array, ""]:
        alone = jax.tree.map(lambda x: x[None], example)

        def nll(tree: PyTree) -> Float[Array, ""]:
            return Loss(as_loss(model.run(loss_fn, tree, rest, alone)[0]).terms).value

        return -jax.jvp(nll, (tree,), (direction,))[1]

    return jax.lax.map(of, train_args, batch_size=chunk)


def _check_examples(train_args: tuple[Any, ...]) -> None:
    shapes = [jnp.shape(x) if hasattr(x, "shape") else () for x in jax.tree.leaves(train_args)]
    if not shapes or len({shape[:1] for shape in shapes}) != 1 or not shapes[0]:
        raise ValueError(
            "influence takes examples from the leading axis of every array in train_args; got "
            f"shapes {shapes}. Put into loss_fn itself what all examples share."
        )
