"""Losses in float16 under a scale: gradients are scaled, statistics are not."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import natgrad_jax as ng

N = 512
X = jax.random.normal(jax.random.key(0), (N, 6))
LABELS = jnp.arange(N) % 3
NET = nn.Sequential([nn.Dense(8, dtype=jnp.float16), nn.relu, nn.Dense(3, dtype=jnp.float16)])
PARAMS = NET.init(jax.random.key(1), X)["params"]
SCALE = 2.0**15


def small(params: Any, x: Any, labels: Any) -> ng.Loss:
    """Gradients of one example are below float16's least number."""
    return 1e-5 * ng.Categorical(NET.apply({"params": params}, x)).nll(labels)


def wide(params: Any, x: Any, labels: Any) -> ng.Loss:
    net = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(3)])
    return 1e-5 * ng.Categorical(net.apply({"params": params}, x)).nll(labels)


@pytest.mark.parametrize("fisher", ["mc", "empirical", "exact"])
def test_gradients_do_not_underflow_and_statistics_stay(fisher: str) -> None:
    layers = ng.find_layers(small, PARAMS, X, LABELS)
    grad_fn = jax.jit(ng.value_and_grad(small, layers, fisher=fisher))
    key = jax.random.key(2)
    right = jax.grad(lambda p: wide(p, X, LABELS).value)(PARAMS)
    off = lambda grads: float(optax.tree.norm(optax.tree.sub(grads, right)))
    loss, grads, statistics = grad_fn(PARAMS, X, LABELS, rng=key)
    scaled_loss, scaled, same = grad_fn(PARAMS, X, LABELS, rng=key, loss_scale=SCALE)
    size = float(optax.tree.norm(right))
    assert off(grads) > 0.2 * size
    assert off(scaled) < 0.02 * size
    assert float(loss) == float(scaled_loss)
    if fisher == "empirical":  # in the training pass without a scale, in one of its own with it
        key_free = ng.value_and_grad(wide, layers, fisher=fisher)
        statistics = key_free(PARAMS, X, LABELS, rng=key)[2]
    for a, b in zip(jax.tree.leaves(statistics), jax.tree.leaves(same), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-2, atol=1e-5 * float(jnp.max(jnp.abs(b))))


def test_micro_batches_and_rows_take_it_too() -> None:
    right = jax.grad(lambda p: wide(p, X, LABELS).value)(PARAMS)
    layers = ng.find_layers(small, PARAMS, X, LABELS)
    split = X.reshape(4, -1, 6), LABELS.reshape(4, -1)
    _, parts, _ = ng.accumulate(small, layers)(
        PARAMS, *split, rng=jax.random.key(0), loss_scale=SCALE
    )
    _, alone, _ = ng.value_and_grad(small, fisher="none")(PARAMS, X, LABELS, loss_scale=SCALE)
    for grads in (parts, alone):
        off = optax.tree.norm(optax.tree.sub(grads, right)) / optax.tree.norm(right)
        assert float(off) < 0.02


def test_an_overflow_is_seen_in_the_gradients_and_stays_out_of_the_state() -> None:
    layers = ng.find_layers(small, PARAMS, X, LABELS)
    tx, grad_fn = ng.kfac(0.1, layers), ng.value_and_grad(small, layers)
    state = tx.init(PARAMS)
    _, grads, statistics = grad_fn(
        PARAMS, X, LABELS, rng=jax.random.key(0), opt_state=state, loss_scale=1e12
    )
    assert not all(bool(jnp.all(jnp.isfinite(g))) for g in jax.tree.leaves(grads))
    updates, state = tx.update(grads, state, PARAMS, statistics=statistics)
    assert all(
        bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves((updates, ng.factors(state)))
    )
