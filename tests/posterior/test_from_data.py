"""Curvature of a data set against the explicit Fisher, and what is exact in linear models."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree
from posterior_net import (
    BLOCKS,
    N,
    Net,
    as_matrix,
    assembled,
    error,
    loss_fn,
    places,
    random_like,
    setting,
)

import natgrad_jax as ng
from natgrad_jax.curvature.inverses import operate

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("float64")]

CLOSE = 1e-8
# of the second term of two_terms, one batch has no example
UNEQUAL = (slice(0, 8), slice(8, 9), slice(9, N))


def two_terms(params: Any, x: jax.Array, ids: jax.Array, y: jax.Array) -> ng.Loss:
    """Terms of two scales on the same layers; the second has only some of the examples."""
    logits = Net().apply({"params": params}, x, ids)
    second = ng.Gaussian(logits, 0.5).nll(x[:, 0, 0], where=y != 2)
    return 2 * ng.Categorical(logits).nll(y) + 0.3 * second


def dense_of(curvature: Any, params: Any) -> np.ndarray:
    return as_matrix(lambda v: ng.posterior.power(curvature, v, 1), params)


@pytest.mark.parametrize("fisher", ["exact", "empirical", "mc"])
def test_batches_add_up_to_one(fisher: str) -> None:
    """K-FAC of unequal batches is K-FAC of the whole batch; with sampled labels, of one batch."""
    params, batch, layers = setting()
    slices = (slice(0, N),) if fisher == "mc" else UNEQUAL
    batches = [tuple(x[part] for x in batch) for part in slices]
    key = jax.random.key(3)
    found = ng.posterior.from_data(loss_fn, params, batches, layers, fisher=fisher, rng=key)
    tx = ng.scale_by_kfac(layers, decay=0.0, inverse="cholesky")
    grad_fn = jax.jit(ng.value_and_grad(loss_fn, layers, fisher=fisher))
    state = tx.init(params)
    _, grads, statistics = grad_fn(params, *batch, rng=jax.random.fold_in(key, 0), opt_state=state)
    _, state = jax.jit(tx.update)(grads, state, params, statistics=statistics)
    expected, has = assembled(ng.diagnostics.matrices(layers, state), layers, params)
    assert error(dense_of(found, params)[np.ix_(has, has)], expected[np.ix_(has, has)]) < CLOSE
    (diagonal,) = found.diagonal.values()
    if fisher == "mc":
        assert error(diagonal, state.diagonal["mid", "bias"]) < CLOSE
    assert (diagonal > 0).all()


@pytest.mark.parametrize("loss", [loss_fn, two_terms])
def test_ekfac_has_the_diagonal_of_the_fisher_in_its_basis(loss: Any) -> None:
    params, batch, _ = setting()
    layers = ng.find_layers(loss, params, *batch, blocks=BLOCKS)
    batches = [tuple(x[part] for x in batch) for part in UNEQUAL]
    measure = partial(ng.posterior.from_data, loss, params, batches, layers, fisher="exact")
    kfac, ekfac = measure(), measure(kind="ekfac")
    blocks = jax.jit(lambda p: ng.fisher(loss, p, *batch, layers=layers))(params)
    wholes, at = [dense_of(c, params) for c in (ekfac, kfac)], places(layers, params)
    for path, layer in layers.items():
        own, _ = assembled({path: np.asarray(blocks[path])}, layers, params)
        found, rough = (np.zeros_like(whole) for whole in wholes)
        index = np.ix_(at[path], at[path])
        found[index], rough[index] = (whole[index] for whole in wholes)
        if layer.output_side is None:
            assert error(found, own) < CLOSE  # the block itself
            continue
        # Q diag(QᵀFQ) Qᵀ: the same diagonal in the basis, and never further from F than K-FAC
        assert np.linalg.norm(found - own) <= np.linalg.norm(rough - own) * (1 + CLOSE)
        if not layer.stack:
            D, M = own[index], found[index]
            assert abs(np.sum((D - M) * M)) < CLOSE * np.sum(M * M)  # a projection of F
            assert abs(np.trace(D) - np.trace(M)) < CLOSE * np.trace(D)


def test_the_diagonal_is_that_of_the_fisher() -> None:
    params, batch, layers = setting()
    batches = [tuple(x[part] for x in batch) for part in UNEQUAL]
    found = ng.posterior.from_data(
        loss_fn, params, iter(batches), layers, kind="diagonal", fisher="exact"
    )
    assert not found.bases
    expected = jax.jit(lambda p: ng.fisher_diagonal(loss_fn, p, *batch))(params)
    for path, own in found.diagonal.items():
        x = expected
        for name in path:
            x = x[name]
        assert own.shape == x.shape
        if path != ("mid", "bias"):  # in no layer: an estimate
            assert error(own, x) < CLOSE
    v = random_like(params)
    solved = ng.posterior.solve(found, v, 0.1)
    wanted = v["conv"]["kernel"] / (expected["conv"]["kernel"] + 0.1)
    assert error(solved["conv"]["kernel"], wanted) < CLOSE
    logdet = ng.posterior.log_determinant(found, examples=7, prior_precision=0.2)
    values = np.concatenate([np.ravel(x) for x in found.diagonal.values()])
    assert abs(logdet - np.log(7 * values + 0.2).sum()) < CLOSE


def regression() -> Any:
    """One output of unit variance: the Fisher of a linear model is ``E[x̄ x̄ᵀ]`` exactly."""
    random = np.random.default_rng(2)
    x, y = jnp.asarray(random.normal(size=(9, 3))), jnp.asarray(random.normal(size=(9, 1)))
    loss = lambda p, x, y: ng.Gaussian(x @ p["kernel"] + p["bias"]).nll(y)
    X = np.concatenate([x, np.ones((9, 1))], axis=1)
    return loss, x, y, X


@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
def test_a_linear_model_is_exact(kind: str) -> None:
    """Its Fisher, its posterior and, up to a constant, its evidence in closed form."""
    loss, x, y, X = regression()
    tau, n = 0.6, len(X)
    theta = np.linalg.solve(X.T @ X + tau * np.eye(4), X.T @ y)  # the largest posterior
    params = {"kernel": jnp.asarray(theta[:3]), "bias": jnp.asarray(theta[3])}
    layers = ng.find_layers(loss, params, x, y)
    batches = [(x[:5], y[:5]), (x[5:], y[5:])]
    curvature = ng.posterior.from_data(loss, params, batches, layers, kind=kind, fisher="exact")
    F = ng.fisher(loss, params, x, y)  # over (bias, kernel)
    assert error(dense_of(curvature, params), F) < CLOSE
    order = [3, 0, 1, 2]
    precision = (X.T @ X + tau * np.eye(4))[np.ix_(order, order)]
    inverse = as_matrix(lambda v: ng.posterior.solve(curvature, v, tau / n), params) / n
    assert error(inverse, np.linalg.inv(precision)) < CLOSE
    found = ng.posterior.log_marginal_likelihood(
        curvature, params, loss(params, x, y).value, examples=n, prior_precision=tau
    )
    marginal = X @ X.T / tau + np.eye(n)
    exact = (
        -0.5 * (y.T @ np.linalg.solve(marginal, y)).item() - 0.5 * np.linalg.slogdet(marginal)[1]
    )
    assert abs(found - exact) < CLOSE * abs(exact)
    # influence by training anew: d/dε of the minimum of mean loss + ½ λ ‖θ‖² + ε ℓₙ
    query = (x[:1] + 1, y[:1])
    influence = ng.posterior.influence(curvature, loss, params, query, (x, y), tau / n)

    def trained(epsilon: float, k: int) -> float:
        weights = np.ones(n) + n * epsilon * (np.arange(n) == k)
        own = np.linalg.solve(X.T * weights @ X + tau * np.eye(4), X.T * weights @ y)
        return float(loss({"kernel": own[:3], "bias": own[3]}, *query).value)

    slopes = [(trained(1e-5, k) - trained(-1e-5, k)) / 2e-5 for k in range(n)]
    assert error(influence, slopes) < 1e-7


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(nnx.tanh(self.norm(self.hidden(x))))


def nnx_loss(model: Model, x: jax.Array, y: jax.Array) -> ng.Loss:
    return ng.Categorical(model(x)).nll(y)


class Same(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.BatchNorm(use_running_average=True, name="norm")(nn.Dense(4, name="hidden")(x))
        return nn.Dense(2, name="head")(nn.tanh(x))


@pytest.mark.parametrize("kind", ["kfac", "ekfac", "diagonal"])
def test_an_nnx_model_has_the_curvature_of_its_linen_twin(kind: str) -> None:
    model = Model(nnx.Rngs(0))
    state = jax.tree.map(lambda x: x.astype(float), nnx.state(model, nnx.Param))
    nnx.update(model, state)
    model.eval()
    tree: Any = nnx.to_pure_dict(state)
    rename = {"hidden": tree["hidden"], "norm": tree["norm"], "head": tree["head"]}
    stats = {"norm": {"mean": jnp.zeros(4), "var": jnp.ones(4)}}
    twin = lambda p, x, y: ng.Categorical(Same().apply({"params": p, "batch_stats": stats}, x)).nll(
        y
    )
    random = np.random.default_rng(0)
    x, y = jnp.asarray(random.normal(size=(8, 3))), jnp.arange(8) % 2
    found = []
    for loss, params, wrt in ((nnx_loss, model, state), (twin, rename, rename)):
        layers = ng.find_layers(loss, params, x, y)
        before = jax.tree.map(jnp.copy, nnx.state(model))
        curvature = ng.posterior.from_data(
            loss, params, [(x[:3], y[:3]), (x[3:], y[3:])], layers, kind=kind, fisher="exact"
        )
        solved = ng.posterior.solve(curvature, wrt, 0.1)
        drawn = ng.posterior.sample(
            curvature, params, jax.random.key(0), examples=8, prior_precision=1.0
        )
        influence = ng.posterior.influence(curvature, loss, params, (x[:1], y[:1]), (x, y), 0.1)
        logits = drawn(x) if isinstance(drawn, Model) else None
        evidence = ng.posterior.log_marginal_likelihood(
            curvature, params, 0.3, examples=8, prior_precision=1.0
        )
        plain = nnx.to_pure_dict(solved) if isinstance(solved, nnx.State) else solved
        found.append((plain, influence, evidence))
        assert logits is None or (logits.shape == (8, 2) and not np.allclose(logits, model(x)))
        same = jax.tree.map(lambda a, b: bool((a == b).all()), before, nnx.state(model))
        assert all(jax.tree.leaves(same))
    ours, theirs = (ravel_pytree(x)[0] for x in found)
    assert error(ours, theirs) < CLOSE


def test_factors_are_the_means_over_the_data() -> None:
    """``A`` and ``G`` by hand, of the last layer."""
    params, batch, layers = setting()
    batches = [tuple(x[part] for x in batch) for part in UNEQUAL]
    curvature = ng.posterior.from_data(loss_fn, params, batches, layers, fisher="exact")
    own = ng.posterior.select(curvature, "head")
    (layer,) = own.layers.values()
    logits = lambda p: loss_fn({**params, "head": p}, *batch).terms[0].distribution.logits
    J = jax.jacrev(logits)(params["head"])["kernel"]
    h = np.asarray(J)[:, 0, :, 0]  # the inputs of the layer
    p = jax.nn.softmax(logits(params["head"]))
    H = np.einsum("nc,cd->ncd", p, np.eye(3)) - np.einsum("nc,nd->ncd", p, p)
    bar = np.concatenate([h, np.ones((N, 1))], axis=1)
    A, G = bar.T @ bar / N, H.mean(0)
    F = ng.diagnostics.dense(layer, partial(operate, layer, type(own.bases["head",])(A, G)))
    found = dense_of(own, params)
    expected, has = assembled({("head",): F}, layers, params)
    assert error(found, expected) < CLOSE and has.sum() == 15
