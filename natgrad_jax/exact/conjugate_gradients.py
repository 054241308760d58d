"""The natural gradient without any approximation: conjugate gradients on the exact Fisher."""

from collections.abc import Callable
from typing import Any

import jax

from natgrad_jax.exact.matvec import fisher_vector_product, gauss_newton_vector_product
from natgrad_jax.utils.hyperparams import check_not_negative

PRODUCTS = {"fisher": fisher_vector_product, "gauss_newton": gauss_newton_vector_product}


def natural_gradient(
    loss_fn: Callable[..., Any],
    params: Any,
    *args: Any,
    gradient: Any,
    damping: float = 1e-3,
    curvature: str = "fisher",
    tolerance: float = 1e-5,
    iterations: int | None = None,
) -> Any:
    """``(F + λ I)⁻¹ ∇`` by conjugate gradients, one product with F an iteration.

    The reference for judging approximations, and Hessian-free optimization's direction; F is never
    formed.

    Args:
      loss_fn, params, *args: as for :func:`natgrad_jax.find_layers`.
      gradient: ∇, a tree like the parameters, from the same batch or another.
      damping: λ ≥ 0.
      curvature: ``"fisher"`` or ``"gauss_newton"``.
      tolerance: stops at ``‖(F + λ I) Δ − ∇‖ ≤ tolerance · ‖∇‖``.
      iterations: at most so many; ten times the number of parameters by default.

    Returns:
      A tree like ``gradient``.

    Raises:
      ValueError: an unknown curvature, a negative damping.

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
