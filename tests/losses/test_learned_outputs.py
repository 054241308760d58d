"""Everything of a distribution that is learned is in the Fisher: variances, scales, rates.

Against ``Σ w Jᵀ H J / Σ w`` with H written down for the outputs in which it is simplest.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import natgrad_jax as ng

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("float64")]

N, D, KEY = 12, 2, jax.random.key(0)
random = np.random.default_rng(0)
X, Y, COUNTS = random.normal(size=(N, 3)), random.normal(size=(N, D)), random.poisson(2, (N, D))
LABELS, ADVANTAGE = random.integers(D, size=N), random.normal(size=N)
MASK, WEIGHTS = random.random(N) < 0.7, random.random(N)


class Laplace(ng.Distribution):
    location: jax.Array
    log_scale: jax.Array

    def log_prob(self, targets: Any) -> Any:
        return -jnp.abs(targets - self.location) * jnp.exp(-self.log_scale) - self.log_scale

    def fisher(self) -> Any:
        return (jnp.exp(-2 * self.log_scale), 0.0), (0.0, 1.0)


def net(p: Any, x: Any) -> Any:
    return jnp.tanh(x @ p["w"] + p["b"]) @ p["head"]


def params(features: int = D, **others: Any) -> Any:
    shapes = {"w": (3, 4), "b": (4,), "head": (4, features)}
    r = np.random.default_rng(1)
    return {k: 0.5 * r.normal(size=s) for k, s in shapes.items()} | {
        k: np.asarray(0.3 * r.normal(size=s)) for k, s in others.items()
    }


def diag(*parts: Any) -> Any:
    return jnp.diag(jnp.concatenate([jnp.ravel(x) for x in parts]))


def softmax_fisher(z: Any) -> Any:
    p = jax.nn.softmax(z)
    return jnp.diag(p) - jnp.outer(p, p)


class Part(NamedTuple):
    """``outputs(params, x)`` of one example, and the Fisher ``H`` over them."""

    outputs: Callable[[Any, Any], Any]
    H: Callable[[Any], Any]
    weights: Any = np.ones(N)
    scale: float = 1.0


class Problem(NamedTuple):
    params: Any
    loss_fn: Callable[[Any, Any], ng.Loss]
    parts: tuple[Part, ...]


def given(problem: Problem) -> Any:
    return jax.tree.map(jnp.asarray, problem.params)


def policy(p: Any, x: Any) -> ng.Gaussian:
    return ng.Gaussian(net(p, x)[:, :D], jnp.exp(2 * p["log_std"]))


def surrogate(p: Any, x: Any) -> Any:
    """A policy gradient with advantages of both signs."""
    log_p = -0.5 * (Y - net(p, x)[:, :D]) ** 2 * jnp.exp(-2 * p["log_std"]) - p["log_std"]
    return -(log_p.sum(-1) * ADVANTAGE).mean()


policy_outputs = lambda p, x: jnp.concatenate([net(p, x)[:D], p["log_std"]])
policy_fisher = lambda z: diag(jnp.exp(-2 * z[D:]), jnp.full(D, 2.0))
whole = lambda p, x: net(p, x)

PROBLEMS = {
    "variance head": Problem(params(2 * D),
        lambda p, x: ng.Gaussian(net(p, x)[:, :D], jnp.exp(net(p, x)[:, D:])).nll(Y),
        (Part(whole, lambda z: diag(jnp.exp(-z[D:]), jnp.full(D, 0.5))),)),
    "scalar variance": Problem(params(log_var=()),
        lambda p, x: ng.Gaussian(net(p, x), jnp.exp(p["log_var"])).nll(Y),
        (Part(lambda p, x: jnp.append(net(p, x), p["log_var"]),
              lambda z: diag(jnp.full(D, jnp.exp(-z[D])), 0.5 * D)),)),
    "log_std": Problem(params(log_std=(D,)), lambda p, x: policy(p, x).nll(Y),
        (Part(policy_outputs, policy_fisher),)),
    "log_std, masked and weighted": Problem(params(log_std=(D,)),
        lambda p, x: 3 * policy(p, x).nll(np.where(MASK[:, None], Y, np.nan), MASK, WEIGHTS),
        (Part(policy_outputs, policy_fisher, MASK * WEIGHTS, 3.0),)),
    "log_std, numbers as examples": Problem(params(log_std=(D,)),
        lambda p, x: ng.Gaussian(net(p, x), jnp.exp(2 * p["log_std"]), event_ndims=0).nll(Y),
        (Part(policy_outputs, policy_fisher, scale=1 / D),)),
    "covariance": Problem(params(root=(D, D)),
        lambda p, x: ng.Gaussian(
            net(p, x), covariance=p["root"] @ p["root"].T + jnp.eye(D)).nll(Y),
        (Part(lambda p, x: jnp.append(net(p, x), p["root"] @ p["root"].T + jnp.eye(D)),
              lambda z: covariance_fisher(z)),)),
    "poisson": Problem(params(), lambda p, x: ng.Poisson(net(p, x)).nll(COUNTS),
        (Part(whole, lambda z: diag(jnp.exp(z))),)),
    "negative binomial": Problem(params(),
        lambda p, x: ng.NegativeBinomial(net(p, x), 1.5).nll(COUNTS),
        (Part(whole, lambda z: diag(1.5 * jnp.exp(z) / (1.5 + jnp.exp(z)))),)),
    "own": Problem(params(log_scale=(D,)),
        lambda p, x: Laplace(net(p, x), p["log_scale"]).nll(Y),
        (Part(lambda p, x: jnp.append(net(p, x), p["log_scale"]),
              lambda z: diag(jnp.exp(-2 * z[D:]), jnp.ones(D))),)),
    "policy gradient": Problem(params(log_std=(D,)),
        lambda p, x: ng.loss(surrogate(p, x), policy(p, x)),
        (Part(policy_outputs, policy_fisher),)),
    "policy, critic and choice": Problem(params(D + 1 + D, log_std=(D,)),
        lambda p, x: ng.loss(
            surrogate(p, x) + net(p, x).mean(),
            policy(p, x),
            0.5 * ng.Gaussian(net(p, x)[:, D : D + 1]).curvature(weights=WEIGHTS),
            2.0 * ng.Categorical(net(p, x)[:, D + 1 :]).nll(LABELS),
            where=MASK),
        (Part(policy_outputs, policy_fisher, MASK),
         Part(lambda p, x: net(p, x)[D : D + 1], lambda z: jnp.eye(1), WEIGHTS, 0.5),
         Part(lambda p, x: net(p, x)[D + 1 :], softmax_fisher, scale=2.0))),
}  # fmt: skip


def covariance_fisher(z: Any) -> Any:
    P = jnp.linalg.inv(z[D:].reshape(D, D))
    return jax.scipy.linalg.block_diag(P, 0.5 * jnp.kron(P, P))


each_problem = pytest.mark.parametrize("name", PROBLEMS)


def by_hand(problem: Problem) -> np.ndarray:
    theta, unravel = ravel_pytree(given(problem))

    def of(part: Part) -> Any:
        def one(x: Any, w: Any) -> Any:
            outputs = lambda t: part.outputs(unravel(t), x)
            J, H = jax.jacfwd(outputs)(theta), part.H(outputs(theta))
            return w * J.T @ H @ J

        weights = jnp.asarray(part.weights, float)
        return part.scale * jax.vmap(one)(X, weights).sum(0) / weights.sum()

    return sum(np.asarray(jax.jit(functools.partial(of, part))()) for part in problem.parts)


def close(a: Any, b: Any, tolerance: float = 1e-10) -> None:
    assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


@each_problem
def test_the_fisher_its_products_and_its_blocks(name: str) -> None:
    problem = PROBLEMS[name]
    p, loss_fn, F = given(problem), problem.loss_fn, by_hand(problem)
    layers = ng.find_layers(loss_fn, p, X)
    v = jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape)), p)

    @jax.jit
    def found(p: Any, v: Any, X: Any) -> Any:
        of_fisher = (
            ng.fisher(loss_fn, p, X),
            ravel_pytree(ng.fisher_diagonal(loss_fn, p, X))[0],
            ravel_pytree(ng.fisher_vector_product(loss_fn, p, X)(v))[0],
        )
        value, grads, statistics = ng.value_and_grad(loss_fn, layers, fisher="exact")(p, X)
        wanted = jax.value_and_grad(lambda p: loss_fn(p, X).value)(p)
        return of_fisher, (value, grads), wanted, statistics

    (whole, diagonal, product), (value, grads), (loss, gradient), statistics = found(p, v, X)
    close(whole, F)
    close(diagonal, np.diag(F))
    close(product, F @ ravel_pytree(v)[0])
    index = ravel_pytree(p)[1](jnp.arange(len(F), dtype=float))
    np.testing.assert_allclose(value, loss, rtol=1e-12)
    close(ravel_pytree(grads)[0], ravel_pytree(gradient)[0])
    for path in {("log_std",), ("log_var",), ("log_scale",), ("root",)} & set(layers):
        own = np.ravel(index[path[0]]).astype(int)
        A = np.asarray(statistics.layers[path].A).reshape(-1, len(own), len(own))
        examples = np.ravel(statistics.examples)[[0]]  # all are of the first term
        close(A[0] / examples, F[np.ix_(own, own)])


@each_problem
def test_sampled_labels_give_the_fisher(name: str) -> None:
    problem = PROBLEMS[name]
    F = by_hand(problem)
    sampled = functools.partial(ng.fisher, problem.loss_fn, fisher="mc", samples=3000, rng=KEY)
    found = jax.jit(sampled)(given(problem), X)
    assert np.linalg.norm(found - F) < 0.1 * np.linalg.norm(F)


def test_the_right_values_of_a_policy_and_of_a_variance() -> None:
    """2 for every log-deviation, ½ for a log-variance: whatever the network."""
    for name, path, size in [
        ("policy gradient", "log_std", 2.0),
        ("scalar variance", "log_var", D / 2),
    ]:
        p, loss_fn = given(PROBLEMS[name]), PROBLEMS[name].loss_fn
        layers = ng.find_layers(loss_fn, p, X)
        block = jax.jit(functools.partial(ng.fisher, loss_fn, layers=layers))(p, X)[(path,)]
        np.testing.assert_allclose(block, size * np.eye(len(block)), atol=1e-12)


class Critic(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        h = nn.tanh(nn.Dense(8, param_dtype=float)(x))
        log_std = self.param("log_std", nn.initializers.zeros, (D,), float)
        return nn.Dense(D, param_dtype=float)(h), log_std, nn.Dense(1, param_dtype=float)(h)


def test_a_policy_learns_its_deviation() -> None:
    """The first step of K-FAC on it is that of the natural gradient."""
    module = Critic()
    p = jax.jit(module.init)(KEY, X)["params"]

    def loss_fn(p: Any, x: Any) -> ng.Loss:
        mean, log_std, value = module.apply({"params": p}, x)
        log_p = (-0.5 * ((Y - mean) * jnp.exp(-log_std)) ** 2 - log_std).sum(-1)
        goal = -(log_p * ADVANTAGE).mean() + 0.5 * (value**2).mean()
        return ng.loss(goal, ng.Gaussian(mean, jnp.exp(2 * log_std)), ng.Gaussian(value))

    tx = ng.kfac(0.1, ng.find_layers(loss_fn, p, X), damping=1e-6, momentum=None, trust_radius=None)
    grad_fn = ng.value_and_grad(loss_fn, ng.find_layers(loss_fn, p, X), fisher="exact")

    @jax.jit
    def first(p: Any) -> Any:
        state = tx.init(p)
        _, grads, statistics = grad_fn(p, X, opt_state=state)
        return grads, tx.update(grads, state, p, statistics=statistics)[0]

    grads, updates = first(p)
    np.testing.assert_allclose(updates["log_std"], -0.1 * grads["log_std"] / 2, rtol=1e-4)
