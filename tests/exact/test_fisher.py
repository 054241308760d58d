"""The explicit Fisher and the products with it, against gradients taken one label at a time."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree

import natgrad_jax as ng
from natgrad_jax.losses import output_cotangents

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("float64")]

N, COVARIANCE = 5, np.array([[0.5, 0.1, 0], [0.1, 1.0, 0.2], [0, 0.2, 2.0]])


class Net(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.tanh(nn.Dense(4, param_dtype=jnp.float64)(x))
        x = nn.BatchNorm(use_running_average=False, param_dtype=jnp.float64)(x)
        return nn.Dense(3, param_dtype=jnp.float64)(x)


def apply(params: Any, x: jax.Array) -> jax.Array:
    state = {"BatchNorm_0": {"mean": jnp.zeros(4), "var": jnp.ones(4)}}
    variables = {"params": params, "batch_stats": state}
    return Net().apply(variables, x, mutable=["batch_stats"])[0]


def random(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def problem(name: str) -> Any:
    """A loss, its parameters and batch; and (distribution, weight of each example) by hand."""
    shape = (N, 2, 3) if name == "tokens" else (N, 3)
    x = random(0, *shape)
    params = jax.tree.map(
        lambda v: random(v.size, *v.shape), Net().init(jax.random.key(0), x)["params"]
    )
    y = jnp.arange(np.prod(shape[:-1])).reshape(shape[:-1]) % 3
    weight = jnp.asarray([1.0, 0.0, 2.0, 0.5, 1.0])
    losses = {
        "categorical": lambda z: ng.Categorical(z).nll(y),
        "tokens": lambda z: ng.Categorical(z).nll(y),
        "bernoulli": lambda z: ng.Bernoulli(z).nll(jax.nn.one_hot(y, 3)),
        "gaussian": lambda z: ng.Gaussian(z, covariance=COVARIANCE).nll(x) * 3.0 + 1.0,
        "weights": lambda z: ng.Categorical(z).nll(y, weights=weight, where=weight > 0.7),
        "two terms": lambda z: 2 * ng.Categorical(z).nll(y) + 0.5 * ng.Gaussian(z).nll(x),
        "two lengths": lambda z: ng.Categorical(z).nll(y) + 3 * ng.Gaussian(z[:2]).nll(x[:2]),
        "one example": lambda z: ng.Categorical(z[1]).nll(y[1]),
        "negative": lambda z: ng.Categorical(z).nll(y) - 0.5 * ng.Gaussian(z).nll(x),
    }
    return (lambda p, x: losses[name](apply(p, x))), params, x


NAMES = ["categorical", "tokens", "bernoulli", "gaussian", "weights", "two terms", "two lengths",
         "one example", "negative"]  # fmt: skip


def by_hand(loss_fn: Any, params: Any, x: jax.Array) -> np.ndarray:
    """``Σ scale w Jᵀ H J / Σ w``, H by ``jax.hessian`` of each example's loss, J by ``jacfwd``."""
    theta, unravel = ravel_pytree(params)
    total = np.zeros((theta.size, theta.size))
    for i, term in enumerate(loss_fn(params, x).terms):

        def z(t: Any, i: int = i) -> Any:
            (output,) = loss_fn(unravel(t), x).terms[i].distribution.outputs.values()
            return output.reshape(-1, 3)

        J = jax.jit(jax.jacfwd(z))(theta)
        targets = term.targets.reshape(-1, *term.targets.shape[len(term.distribution.examples) :])

        def nll(z: jax.Array, y: jax.Array, term: Any = term) -> jax.Array:
            return term.distribution.with_outputs({term.distribution.first: z}).nll_per_example(y)

        H = jax.jit(jax.vmap(jax.hessian(nll)))(z(theta), targets)
        w = np.ones(len(H)) if term.weight is None else np.ravel(term.weight)
        # negative multiples of a likelihood have no curvature
        scale = max(float(term.scale), 0) / w.sum()
        total += scale * np.einsum("n,ndp,nde,neq->pq", w, J, H, J)
    return total


def close(a: Any, b: Any, tolerance: float = 1e-10) -> None:
    a, b = np.asarray(a), np.asarray(b)
    assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


@pytest.mark.parametrize("name", NAMES)
def test_the_exact_fisher_its_diagonal_and_its_products(name: str) -> None:
    loss_fn, params, x = problem(name)
    F = by_hand(loss_fn, params, x)
    close(jax.jit(lambda p, x: ng.fisher(loss_fn, p, x))(params, x), F)
    diagonal = jax.jit(lambda p, x: ng.fisher_diagonal(loss_fn, p, x))(params, x)
    close(ravel_pytree(diagonal)[0], np.diag(F))
    v = jax.tree.map(lambda p: random(p.size + 1, *p.shape), params)
    flat, damping = ravel_pytree(v)[0], 0.3
    for product in (ng.fisher_vector_product, ng.gauss_newton_vector_product):
        found = jax.jit(lambda p, v, f=product: f(loss_fn, p, x, damping=damping)(v))(params, v)
        close(ravel_pytree(found)[0], F @ flat + damping * flat)


def test_blocks_are_those_of_the_whole() -> None:
    loss_fn, params, x = problem("categorical")
    layers = ng.find_layers(loss_fn, params, x)
    layers = layers.replace(("Dense_1", "bias"), "diagonal")
    F = jax.jit(lambda p: ng.fisher(loss_fn, p, x))(params)
    index = jax.tree.map(np.asarray, ravel_pytree(params)[1](jnp.arange(len(F)) * 1.0))
    blocks = jax.jit(lambda p: ng.fisher(loss_fn, p, x, layers=layers))(params)
    assert set(blocks) == {*layers, ("Dense_1", "bias")}
    for path, block in blocks.items():
        if path in layers:
            own = [index[path[0]][p.path[-1]] for p in layers[path].parameters]
        else:
            own = [index["Dense_1"]["bias"]]
        at = np.concatenate([np.ravel(i) for i in own]).astype(int)
        close(block, np.asarray(F)[np.ix_(at, at)])


@pytest.mark.parametrize("fisher, samples", [("mc", 1), ("mc", 3), ("empirical", 1)])
def test_sampled_and_true_labels(fisher: str, samples: int) -> None:
    """Outer products of the examples' own gradients, for the labels that value_and_grad draws."""
    loss_fn, params, x = problem("categorical")
    key = jax.random.key(7)
    term = loss_fn(params, x).terms[0]
    if fisher == "empirical":
        drawn = [term.targets]
    else:
        keys = [key] if samples == 1 else jax.random.split(key, samples)
        drawn = [
            output_cotangents.sample_targets(term, (), jax.random.split(k, 1)[0]) for k in keys
        ]
    theta, unravel = ravel_pytree(params)
    total = np.zeros((theta.size, theta.size))
    for labels in drawn:
        nll = lambda t, y=labels: ng.Categorical(apply(unravel(t), x)).nll_per_example(y)
        v = np.asarray(jax.jit(jax.jacfwd(nll))(theta))
        total += v.T @ v / N / len(drawn)
    given = {"fisher": fisher, "samples": samples, "rng": key}
    close(jax.jit(lambda p: ng.fisher(loss_fn, p, x, **given))(params), total)
    diagonal = jax.jit(lambda p: ng.fisher_diagonal(loss_fn, p, x, **given))(params)
    close(ravel_pytree(diagonal)[0], np.diag(total))


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
@pytest.mark.parametrize("name", ["tokens", "two terms", "two lengths", "one example"])
def test_gradients_of_one_example_are_summed_before_the_outer_product(
    name: str, fisher: str
) -> None:
    """Over its positions; each term of the loss for itself."""
    loss_fn, params, x = problem(name)
    terms, key = loss_fn(params, x).terms, jax.random.key(7)
    theta, unravel = ravel_pytree(params)
    counts = [int(np.prod(t.distribution.examples)) for t in terms]
    F = np.zeros((theta.size, theta.size))
    for i, (term, k) in enumerate(zip(terms, jax.random.split(key, len(terms)), strict=True)):
        y = output_cotangents.sample_targets(term, (), k) if fisher == "mc" else term.targets
        n = (*term.distribution.examples, 1)[0]

        def each(t: Any, i: int = i, y: Any = y, n: int = n) -> jax.Array:
            nll = loss_fn(unravel(t), x).terms[i].distribution.nll_per_example(y)
            return nll.reshape(n, -1).sum(-1)

        v = np.asarray(jax.jit(jax.jacfwd(each))(theta)) * np.sqrt(float(term.scale) / counts[i])
        F += v.T @ v
    given = {"fisher": fisher, "rng": key}
    close(jax.jit(lambda p: ng.fisher(loss_fn, p, x, **given))(params), F)
    diagonal = jax.jit(lambda p: ng.fisher_diagonal(loss_fn, p, x, **given))(params)
    close(ravel_pytree(diagonal)[0], np.diag(F))


def test_the_sample_is_that_of_value_and_grad() -> None:
    """One example and one layer: the Kronecker product of its factors is the Fisher itself."""
    x, params = random(0, 1, 4), {"kernel": random(1, 4, 3)}
    dense = nn.Dense(3, use_bias=False, param_dtype=jnp.float64)
    loss_fn = lambda p, x: ng.Categorical(dense.apply({"params": p}, x)).nll(jnp.zeros(1, int))
    layers = ng.find_layers(loss_fn, params, x)
    for samples in (1, 5):
        grad_fn = ng.value_and_grad(loss_fn, layers, samples=samples)
        sums = grad_fn(params, x, rng=jax.random.key(3))[2].layers[()]
        F = ng.fisher(loss_fn, params, x, fisher="mc", rng=jax.random.key(3), samples=samples)
        close(F, np.kron(sums.A, sums.G))


@pytest.mark.parametrize(
    "of_params, of_inputs",
    [("float32", "float64"), ("bfloat16", "bfloat16")],
)
def test_mixed_and_half_precision(of_params: str, of_inputs: str) -> None:
    """Sums over many examples are kept in at least float32."""
    n = 1024
    params, x = {"w": random(0, 4, 3).astype(of_params)}, random(1, n, 4).astype(of_inputs)
    make = lambda x: lambda p: ng.Categorical(x @ p["w"]).nll(jnp.arange(n) % 3)
    exact = {"w": params["w"].astype(float)}
    F = jax.jit(lambda p: ng.fisher(make(x.astype(float)), p))(exact)
    loss_fn, v = make(x), jax.tree.map(jnp.ones_like, params)
    found = jax.jit(lambda p: ng.fisher(loss_fn, p))(params)
    diagonal = jax.jit(lambda p: ng.fisher_diagonal(loss_fn, p))(params)["w"]
    assert found.dtype == diagonal.dtype == jnp.float32
    close(found.astype(float), F, 1e-2)
    close(diagonal.ravel().astype(float), np.diag(F), 1e-2)
    for product in (ng.fisher_vector_product, ng.gauss_newton_vector_product):
        ours = jax.jit(lambda p, v, f=product: f(loss_fn, p)(v))(params, v)
        ours = ours["w"].ravel().astype(float)
        assert np.linalg.norm(ours - F.sum(1)) < 0.05 * np.linalg.norm(F)


def test_nnx_models_keep_their_state_and_have_blocks() -> None:
    class Normed(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.dense = nnx.Linear(3, 3, param_dtype=jnp.float64, rngs=rngs)
            self.norm = nnx.BatchNorm(3, param_dtype=jnp.float64, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.norm(self.dense(x))

    model, x = Normed(nnx.Rngs(0)), random(0, N, 3)
    for name in ("mean", "var"):  # Flax makes them float32
        setattr(model.norm, name, nnx.BatchStat(jnp.full(3, 0.7)))
    loss_fn = lambda model, x: ng.Gaussian(model(x)).nll(jnp.zeros((N, 3)))
    before = nnx.to_pure_dict(nnx.state(model))
    params = nnx.state(model, nnx.Param)
    F = ng.fisher(loss_fn, model, x)
    layers = ng.find_layers(loss_fn, model, x)
    blocks = ng.fisher(loss_fn, model, x, layers=layers)
    index = ravel_pytree(params)[1](jnp.arange(18.0))
    for path, block in blocks.items():
        at = [np.ravel(index[path[0]][p.path[-1]][...]) for p in layers[path].parameters]
        at = np.concatenate(at).astype(int)
        close(block, np.asarray(F)[np.ix_(at, at)])
    diagonal = ng.fisher_diagonal(loss_fn, model, x)
    assert jax.tree.structure(diagonal) == jax.tree.structure(params)
    close(ravel_pytree(diagonal)[0], np.diag(F))
    v = jax.tree.map(jnp.ones_like, params)
    close(ravel_pytree(ng.fisher_vector_product(loss_fn, model, x)(v))[0], F.sum(1))
    after = nnx.to_pure_dict(nnx.state(model))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), before, after))


def test_nnx_models() -> None:
    class NetNNX(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.a = nnx.Linear(3, 2, param_dtype=jnp.float64, rngs=rngs)
            self.b = nnx.Linear(2, 3, param_dtype=jnp.float64, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.b(nnx.tanh(self.a(x)))

    model, x = NetNNX(nnx.Rngs(0)), random(0, N, 3)
    loss_fn = lambda model, x: ng.Categorical(model(x)).nll(jnp.arange(N) % 3)
    graph, state = nnx.split(model)
    theta, unravel = ravel_pytree(state)
    F = ng.fisher(loss_fn, model, x)
    J = jax.jacfwd(lambda t: nnx.merge(graph, unravel(t))(x))(theta)
    p = jax.nn.softmax(model(x))
    H = jax.vmap(jnp.diag)(p) - p[:, :, None] * p[:, None, :]
    close(F, np.einsum("ndp,nde,neq->pq", J, H, J) / N)
    v = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    close(ravel_pytree(ng.fisher_vector_product(loss_fn, model, x)(v))[0], F.sum(1))


def test_errors_say_what_to_write() -> None:
    loss_fn, params, x = problem("categorical")
    with pytest.raises(ValueError, match='"exact", "mc" or "empirical"'):
        ng.fisher(loss_fn, params, x, fisher="true")
    with pytest.raises(ValueError, match="rng=key"):
        ng.fisher(loss_fn, params, x, fisher="mc")
    for samples in (0, 1.5, True):
        with pytest.raises(ValueError, match="whole number"):
            ng.fisher(loss_fn, params, x, fisher="mc", rng=jax.random.key(0), samples=samples)
    other = jax.tree.map(lambda p: p, params) | {"Dense_1": {"kernel": jnp.ones((4, 3))}}
    with pytest.raises(ValueError, match="found on another model"):
        layers = ng.find_layers(loss_fn, params, x)
        plain = lambda p, x: ng.Gaussian(x @ p["Dense_0"]["kernel"]).nll(jnp.zeros((N, 4)))
        ng.fisher(plain, other, x, layers=layers)
    large = {"w": jnp.ones(30_000)}
    with pytest.raises(ValueError, match="fisher_vector_product"):
        ng.fisher(lambda p, x: ng.Gaussian(x * p["w"].sum()).nll(x), large, x)


@pytest.mark.parametrize("fisher", ["exact"])
def test_ekfac_is_never_further_than_kfac(fisher: str) -> None:
    loss_fn, params, x = problem("categorical")
    error = ng.diagnostics.approximation_error(
        loss_fn, params, x, fisher=fisher, rng=jax.random.key(1)
    )
    for suffix in ("", "_sua", "_reduce"):
        assert 0 < error["ekfac" + suffix] <= error["kfac" + suffix] * (1 + 1e-10)
    assert max(error["kfac"], error["diagonal"]) < error["zero"]
