"""The natural gradient without approximation: conjugate gradients on the exact Fisher."""

from typing import Any

import jax
import optax
from jaxtyping import Array, Float, PyTree

from natgrad_jax.exact.matvec import fisher_vector_product, gauss_newton_vector_product
from natgrad_jax.losses.terms import LossFn
from natgrad_jax.utils.hyperparams import check_not_negative

PRODUCTS = {"fisher": fisher_vector_product, "gauss_newton": gauss_newton_vector_product}


def natural_gradient(
    loss_fn: LossFn,
    params: PyTree,
    *args: Any,
    gradient: optax.Updates,
    damping: float | Float[Array, ""] = 1e-3,
    curvature: str = "fisher",
    tolerance: float = 1e-5,
    iterations: int | None = None,
) -> optax.Updates:
    """``(F + λ I)⁻¹ ∇`` by conjugate gradients, with one product with F in each iteration.

    F is never formed. This is the step of Hessian-free optimization, and a reference for
    approximations.

    Args:
      loss_fn, params, *args: as for :func:`natgrad_jax.find_layers`.
      gradient: ∇, a tree like the parameters, from the same batch or another one.
      damping: λ ≥ 0, in the units of the Fisher (loss per parameter squared).
      curvature: ``"fisher"`` or ``"gauss_newton"``.
      tolerance: the iteration stops at ``‖(F + λ I) Δ − ∇‖ ≤ tolerance · ‖∇‖``.
      iterations: the most iterations; by default ten times the number of parameters.

    Returns:
      A tree like ``gradient``.

    Raises:
      ValueError: an unknown curvature, or a negative damping.

    Source: Martens 2010 (Hessian-free); Martens & Grosse 2015, section 2.

    >>> import jax.numpy as jnp, natgrad_jax as ng
    >>> params, x, y = {"kernel": jnp.ones((4, 3))}, jnp.eye(4), jnp.zeros(4, jnp.int32)
    >>> loss_fn = lambda p, x, y: ng.Categorical(x @ p["kernel"]).nll(y)
    >>> ng.natural_gradient(loss_fn, params, x, y, gradient=params, damping=1.0)["kernel"].shape
    (4, 3)
    """
    check_not_negative(damping=damping)
    if curvature not in PRODUCTS:
        known = " or ".join(map(repr, PRODUCTS))
        raise ValueError(f"curvature must be {known}; got {curvature!r}.")
    product = PRODUCTS[curvature](loss_fn, params, *args, damping=damping)
    solution, _ = jax.scipy.sparse.linalg.cg(product, gradient, tol=tolerance, maxiter=iterations)
    return solution
