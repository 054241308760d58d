"""Natural gradient descent: its formula, and exact in deep linear networks."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from regression import MLP, Linear, Problem, problem

import natgrad_jax as ng

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("float64")]


def deep() -> Problem:
    """No layer narrower than the input or the output, so that nothing is out of reach."""
    return problem(Linear((5, 7, 6, 5)), 5, 5)


def kernels(tree: Any) -> list[jax.Array]:
    return [tree[name]["kernel"] for name in sorted(tree)]


def layerwise(own: Problem, **kwargs: Any) -> Any:
    """The gradient and ``ngd``'s update of rate 1, by exact expectations."""
    tx = ng.ngd(1.0, own.layers, **kwargs)
    grad_fn = ng.value_and_grad(own.loss_fn, own.layers, fisher="exact")

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> Any:
        loss, grads, statistics = grad_fn(params, batch, opt_state=state)
        updates, state = tx.update(grads, state, params, statistics=statistics)
        return loss, updates, state

    return step, tx.init(own.params)


EXACT = {"damping": 0.0, "inverse": ng.Eigh(cutoff=1e-10)}


def test_every_generalized_inverse_gives_the_same_losses() -> None:
    """The layerwise form, its equivalent through pseudo-inverses of weights, and the Moore–Penrose
    inverse of the whole singular Fisher by brute force."""
    own, rate = deep(), 1e-4
    step, state = layerwise(own, **EXACT)

    @jax.jit
    def by_brute_force(params: Any, batch: Any) -> Any:
        grads = jax.grad(lambda p: own.loss_fn(p, batch).value)(params)
        flat, unravel = ravel_pytree(grads)
        F = ng.fisher(own.loss_fn, params, batch)
        return unravel(-jnp.linalg.pinv(F, rtol=1e-9, hermitian=True) @ flat)

    @jax.jit
    def through_weights(params: Any, batch: Any) -> Any:
        error = own.model.apply({"params": params}, batch[0]) - batch[1]
        found = ng.linear_natural_gradient(kernels(params), batch[0], error)
        return {name: {"kernel": -x} for name, x in zip(sorted(params), found, strict=True)}

    ways = {
        "layerwise": lambda p: step(p, state, own.batch)[1],
        "brute force": lambda p: by_brute_force(p, own.batch),
        "weights": lambda p: through_weights(p, own.batch),
    }
    # the same change of the function, whatever the change of the weights
    change = lambda d: jax.jvp(
        lambda p: own.model.apply({"params": p}, own.batch[0]), (own.params,), (d,)
    )[1]
    layer_by_layer = change(ways["layerwise"](own.params))
    for direction in ways.values():
        np.testing.assert_allclose(change(direction(own.params)), layer_by_layer, atol=1e-7)
    losses: dict[str, list[float]] = {}
    for name, direction in ways.items():
        params = own.params
        losses[name] = []
        for _ in range(20):
            params = jax.tree.map(lambda p, d: p + rate * d, params, direction(params))
            losses[name].append(float(own.loss_fn(params, own.batch).value))
    for name in ways:
        np.testing.assert_allclose(losses[name], losses["layerwise"], rtol=1e-6)


def test_the_excess_loss_falls_exponentially() -> None:
    own, rate = deep(), 0.005
    step, state = layerwise(own, **EXACT)
    params, excess = own.params, []
    for _ in range(60):
        loss, updates, _ = step(params, state, own.batch)
        excess.append(float(loss) - minimum(own))
        params = jax.tree.map(lambda p, u: p + rate * u, params, updates)
    np.testing.assert_allclose(np.diff(np.log(excess)), 2 * np.log(1 - rate), rtol=0.02)


def minimum(own: Problem) -> float:
    """The least loss of any linear map."""
    x, y = own.batch
    W = np.linalg.lstsq(x, y, rcond=None)[0]
    return float(ng.Gaussian(x @ W).nll(y).value)


def test_the_weights_form_equals_the_layerwise_one_below_full_width() -> None:
    own = problem(Linear((4, 2, 5)), 6, 5)
    step, state = layerwise(own, **EXACT)
    _, updates, _ = step(own.params, state, own.batch)
    error = own.model.apply({"params": own.params}, own.batch[0]) - own.batch[1]
    found = ng.linear_natural_gradient(kernels(own.params), own.batch[0], error)
    for ours, theirs in zip(kernels(updates), found, strict=True):
        np.testing.assert_allclose(-ours, theirs, rtol=1e-8, atol=1e-10)


def test_ngd_is_its_formula() -> None:
    """``(α/L) (A + √λ I)⁻¹ ∇ (G + √λ I)⁻¹``, bias included."""
    own = problem(MLP(), 5, 4)
    grad_fn = ng.value_and_grad(own.loss_fn, own.layers)
    _, grads, statistics = grad_fn(own.params, own.batch, rng=jax.random.key(0))
    tx = ng.ngd(0.5, own.layers, damping=0.04)
    updates, _ = tx.update(grads, tx.init(own.params), statistics=statistics)
    for path, layer in own.layers.items():
        sums, N = statistics.layers[path], 60
        A, G = (sums.A / N + 0.2 * np.eye(len(sums.A)), sums.G / N + 0.2 * np.eye(len(sums.G)))
        matrix = lambda tree, x=layer, p=path: x.to_matrix(tree[p[0]]["kernel"], tree[p[0]]["bias"])
        expected = -0.25 * np.linalg.inv(A) @ matrix(grads) @ np.linalg.inv(G)
        np.testing.assert_allclose(matrix(updates), expected, rtol=1e-9)
