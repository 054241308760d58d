"""Step size and momentum by the quadratic model of the loss."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from regression import quadratic

import natgrad_jax as ng

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("float64")]


def test_step_and_momentum_are_the_minimisers_and_the_decrease_is_the_predicted_one() -> None:
    own = quadratic()
    tx = ng.scale_by_quadratic_model(own.loss_fn, damping=0.0)
    value_fn = jax.jit(lambda p: own.loss_fn(p, own.batch).value)
    params, state = own.params, tx.init(own.params)
    previous = None
    for _ in range(4):
        grads = jax.grad(value_fn)(params)
        updates, state = tx.update(grads, state, params, grad=grads, args=(own.batch,))
        actual = value_fn(optax.apply_updates(params, updates)) - value_fn(params)
        np.testing.assert_allclose(actual, state.predicted, rtol=1e-6)
        if previous is not None:  # no other combination of the two is lower
            F = ng.fisher(own.loss_fn, params, own.batch)
            D = np.stack([-ravel_pytree(grads)[0], ravel_pytree(previous)[0]], axis=1)
            best = np.linalg.solve(D.T @ F @ D, -D.T @ ravel_pytree(grads)[0])
            np.testing.assert_allclose([state.learning_rate, state.momentum], best, rtol=1e-6)
        params, previous = optax.apply_updates(params, updates), updates


@pytest.mark.parametrize("fixed", [{"learning_rate": 0.01}, {"momentum": 0.5}, {"momentum": 0.0}])
def test_what_is_fixed_stays_and_the_other_is_best(fixed: Any) -> None:
    own = quadratic()
    damping, l2 = 0.3, 0.2
    tx = ng.scale_by_quadratic_model(own.loss_fn, damping=damping, l2=l2, **fixed)
    state = tx.init(own.params)
    grads = jax.grad(lambda p: own.loss_fn(p, own.batch).value)(own.params)
    state = state._replace(last=jax.tree.map(lambda p: 0.1 * jnp.cos(p), own.params))
    _, after = tx.update(grads, state, own.params, grad=grads, args=(own.batch,))
    assert all(float(getattr(after, key)) == value for key, value in fixed.items())
    F = ng.fisher(own.loss_fn, own.params, own.batch)
    B, g = F + (damping + l2) * np.eye(len(F)), ravel_pytree(grads)[0]
    last = ravel_pytree(state.last)[0]
    model = lambda a, m: (lambda d: g @ d + d @ B @ d / 2)(-a * g + m * last)
    alpha, mu = float(after.learning_rate), float(after.momentum)
    for step in (1e-3, -1e-3):
        other = (alpha, mu + step) if "learning_rate" in fixed else (alpha + step, mu)
        assert model(alpha, mu) <= model(*other)
