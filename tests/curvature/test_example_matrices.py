"""Factors of layers that a loss differentiates, from the examples' own gradient matrices."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import jet

import natgrad_jax as ng
from natgrad_jax.curvature.example_matrices import RIDGE

pytestmark = pytest.mark.usefixtures("float64")

WIDTHS = (2, 5, 4, 1)


def network(params: Any, x: jax.Array) -> jax.Array:
    for W, b in params[:-1]:
        x = jnp.tanh(x @ W + b)
    W, b = params[-1]
    return (x @ W + b)[0]


def by_hessian(u: Any, x: jax.Array) -> jax.Array:
    return jnp.trace(jax.hessian(u)(x))


def by_reverse_twice(u: Any, x: jax.Array) -> jax.Array:
    return sum(jax.grad(lambda x, i=i: jax.grad(u)(x)[i])(x)[i] for i in range(2))


def by_jvp_twice(u: Any, x: jax.Array) -> jax.Array:
    second = lambda v: jax.jvp(lambda x: jax.jvp(u, (x,), (v,))[1], (x,), (v,))[1]
    return second(jnp.array([1.0, 0.0])) + second(jnp.array([0.0, 1.0]))


def by_linearize(u: Any, x: jax.Array) -> jax.Array:
    slope = lambda x: jax.vmap(jax.linearize(u, x)[1])(jnp.eye(2))
    return jnp.trace(jax.vmap(lambda v: jax.linearize(slope, x)[1](v))(jnp.eye(2)))


def by_jacfwd(u: Any, x: jax.Array) -> jax.Array:
    return jnp.trace(jax.jacfwd(jax.jacfwd(u))(x))


def by_taylor(u: Any, x: jax.Array) -> jax.Array:
    second = lambda v: jet.jet(u, (x,), ((v, jnp.zeros(2)),))[1][1]
    return second(jnp.array([1.0, 0.0])) + second(jnp.array([0.0, 1.0]))


def squared_gradient(u: Any, x: jax.Array) -> jax.Array:
    return jnp.sum(jax.grad(u)(x) ** 2)


MODES: dict[str, Callable[..., jax.Array]] = {
    "hessian": by_hessian,
    "reverse twice": by_reverse_twice,
    "jvp twice": by_jvp_twice,
    "linearize": by_linearize,
    "jacfwd": by_jacfwd,
    "Taylor mode": by_taylor,
    "squared gradient": squared_gradient,
}


def problem(mode: str) -> tuple[Any, Any, Any]:
    random = np.random.default_rng(0)
    pairs = itertools.pairwise(WIDTHS)
    params = [(jnp.asarray(random.normal(size=s) / 2), jnp.asarray(random.normal(size=s[1])))
              for s in pairs]  # fmt: skip
    x = jnp.asarray(random.normal(size=(7, 2)))
    residual = lambda params, x: MODES[mode](lambda x: network(params, x), x) - jnp.sin(x).sum()

    def loss_fn(params: Any, x: jax.Array) -> ng.Loss:
        residuals = jax.vmap(lambda x: residual(params, x))(x)
        return ng.Gaussian(residuals[:, None]).nll(jnp.zeros((len(x), 1)))

    return loss_fn, params, (x, residual)


def rule(M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rule of the module's docstring, written out: A and G, whose product is F."""
    unit = lambda R: R / (np.trace(R) / len(R))
    whiten = lambda R: np.linalg.inv(unit(R) + RIDGE * np.eye(len(R)))
    W = whiten(np.einsum("nio,nip->op", M, M))
    A = np.einsum("nio,op,njp->ij", M, W, M)
    G = np.einsum("nio,ij,njp->op", M, whiten(A), M)
    total = np.sqrt((M**2).sum() / len(M))
    return A / np.trace(A) * total, G / np.trace(G) * total


@pytest.mark.parametrize("mode", MODES)
def test_factors_and_moments_are_those_of_the_examples_gradients(mode: str) -> None:
    loss_fn, params, (x, residual) = problem(mode)
    layers = ng.find_layers(loss_fn, params, x, blocks={"2/1": "gradient"})  # it has no gradient
    assert all(layers[str(i),].matrices for i in range(2))
    tx = ng.scale_by_ekfac(layers, basis="eigh", decay=0.0, statistics_period=1, refresh_period=1)
    grad_fn = ng.value_and_grad(loss_fn, layers, fisher="exact")

    @jax.jit
    def step(params: Any, state: Any, x: jax.Array) -> Any:
        _, grads, statistics = grad_fn(params, x, opt_state=state)
        return grads, tx.update(grads, state, params, statistics=statistics)[1]

    state = tx.init(params)
    for _ in range(2):
        grads, state = step(params, state, x)
    wanted = jax.jit(jax.grad(lambda p: loss_fn(p, x).value))(params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), grads, wanted
    )
    own = jax.jit(jax.vmap(jax.grad(residual), (None, 0)))(params, x)
    for i in range(2):
        M = np.concatenate([own[i][0], own[i][1][:, None]], axis=1)
        A, G = rule(M)
        factors, Q = ng.factors(state)[str(i),], ng.bases(state)[str(i),]
        np.testing.assert_allclose(factors.A, A, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(factors.G, G, rtol=1e-9, atol=1e-12)
        rotated = np.einsum("ia,nio,ob->nab", Q.A, M, Q.G)
        np.testing.assert_allclose(
            state.moments[str(i),], (rotated**2).mean(0), rtol=1e-8, atol=1e-12
        )


def test_prong_whitens_the_inputs_of_the_uses_forward() -> None:
    loss_fn, params, (x, _) = problem("hessian")
    layers = ng.find_layers(loss_fn, params, x, blocks={"2/1": "gradient"})
    _, _, statistics = jax.jit(ng.value_and_grad(loss_fn, layers, fisher="none"))(params, x)
    A = statistics.layers["0",].A
    ones = float(A[-1, -1])  # of the use with the bias
    np.testing.assert_allclose(A[:-1, -1], np.asarray(x).sum(0), rtol=1e-12)
    assert ones == len(x)
