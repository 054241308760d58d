"""The step of any optimizer within a trust region."""

import jax
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from regression import MLP, problem

import natgrad_jax as ng

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("float64")]


def test_trust_radius_bounds_the_step_of_any_optimizer() -> None:
    own = problem(MLP(), 5, 4)
    radius = 1e-4
    tx = optax.chain(optax.adam(0.1), ng.clip_by_trust_radius(radius, own.loss_fn))
    grads = jax.grad(lambda p: own.loss_fn(p, own.batch).value)(own.params)
    updates, _ = tx.update(grads, tx.init(own.params), own.params, args=(own.batch,))
    u, F = ravel_pytree(updates)[0], ng.fisher(own.loss_fn, own.params, own.batch)
    np.testing.assert_allclose(u @ F @ u, radius, rtol=1e-9)
    small = jax.tree.map(lambda g: 1e-6 * g, grads)
    tx = ng.clip_by_trust_radius(radius, own.loss_fn)
    kept, _ = tx.update(small, tx.init(own.params), own.params, args=(own.batch,))
    assert np.array_equal(ravel_pytree(kept)[0], ravel_pytree(small)[0])
