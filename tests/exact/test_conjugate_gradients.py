"""The natural gradient by conjugate gradients."""

import jax
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from regression import MLP, problem

import natgrad_jax as ng

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("float64")]


def test_conjugate_gradients_solve_the_damped_fisher() -> None:
    own = problem(MLP(), 5, 4)
    grads = jax.grad(lambda p: own.loss_fn(p, own.batch).value)(own.params)
    for curvature in ("fisher", "gauss_newton"):
        found = ng.natural_gradient(
            own.loss_fn, own.params, own.batch, gradient=grads, damping=0.1, tolerance=1e-12,
            curvature=curvature,
        )  # fmt: skip
        F = ng.fisher(own.loss_fn, own.params, own.batch)
        expected = np.linalg.solve(F + 0.1 * np.eye(len(F)), ravel_pytree(grads)[0])
        np.testing.assert_allclose(ravel_pytree(found)[0], expected, rtol=1e-6, atol=1e-9)
