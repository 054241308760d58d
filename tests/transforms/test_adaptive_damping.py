"""Damping that adapts itself."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from regression import MLP, problem, quadratic
from transformations import Jitted

import natgrad_jax as ng

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("float64")]


RULES = {
    "bernacchia": ng.bernacchia(),
    "bernacchia, its own model": ng.bernacchia(1.0),
    "levenberg_marquardt": ng.levenberg_marquardt(period=2),
}
MAKERS = {
    "kfac": lambda layers, damping: ng.kfac(0.3, layers, damping=damping, statistics_period=1,
                                            refresh_period=1),
    "ekfac": lambda layers, damping: ng.ekfac(0.3, layers, damping=damping, refresh_period=5),
    "ngd": lambda layers, damping: ng.ngd(1.0, layers, damping=damping),
}  # fmt: skip


@pytest.mark.parametrize("start", [1e-6, 1e4])
@pytest.mark.parametrize(
    ("name", "rule"),
    [(name, rule) for name in MAKERS for rule in ("bernacchia", "levenberg_marquardt")]
    + [("ngd", "bernacchia, its own model")],
)
def test_damping_recovers_from_either_side(name: str, rule: str, start: float) -> None:
    own = problem(MLP(), 5, 4)
    tx = ng.adaptive_damping(
        partial(MAKERS[name], own.layers), RULES[rule], own.loss_fn, initial=start
    )
    grad_fn = ng.value_and_grad(own.loss_fn, own.layers)

    @Jitted
    def step(params: Any, state: Any, batch: Any, key: Any) -> Any:
        value, grads, statistics = grad_fn(params, batch, rng=key, opt_state=state)
        updates, state = tx.update(
            grads, state, params, statistics=statistics, value=value, args=(batch,),
            value_fn=lambda p: own.loss_fn(p, batch).value,
        )  # fmt: skip
        return optax.apply_updates(params, updates), state, value

    params, state, losses = own.params, tx.init(own.params), []
    for i in range(60):
        params, state, value = step(params, state, own.batch, jax.random.key(i))
        losses.append(float(value))
    assert step.traces == 1
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
    assert start == 1e4 or losses[-1] < 0.7 * losses[0]
    assert np.argmax(losses) == 0
    history = state.history[:60]
    assert jnp.all(jnp.isfinite(history)) and jnp.isnan(state.history[60])
    assert float(history[0]) == start
    if start == 1e4:
        assert state.level < (start / 10 if rule == "levenberg_marquardt" else start / 100)
    np.testing.assert_allclose(ng.damping(state), history[-1])


def test_damping_stays_within_its_bounds_and_bad_steps_are_taken_back() -> None:
    own = quadratic()
    diverging = lambda damping: optax.scale(-1e3 + 0 * damping)
    tx = ng.adaptive_damping(diverging, ng.bernacchia(), own.loss_fn, initial=1.0, bounds=(0.5, 2))
    value_fn = lambda p: own.loss_fn(p, own.batch).value
    params, state = own.params, tx.init(own.params)
    for _ in range(5):
        value, grads = jax.value_and_grad(value_fn)(params)
        updates, state = tx.update(
            grads, state, params, value=value, value_fn=value_fn, args=(own.batch,)
        )
        assert not np.any(ravel_pytree(updates)[0])
    assert float(state.level) == 2 and int(state.refused) == 5
