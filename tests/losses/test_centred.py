"""What is measured of a centred Fisher, ``log |ψ|``: against sums over examples by hand."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import natgrad_jax as ng

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("float64")]

N, MASKED, KEY = 12, 4, jax.random.key(0)
random = np.random.default_rng(0)
X, WEIGHTS = random.normal(size=(N, 3)), random.random(N)
ALL, SOME = np.ones(N), np.arange(N) < N - MASKED
X[~SOME] *= 100


def params() -> Any:
    draw = lambda *shape: jnp.asarray(np.random.default_rng(1).normal(size=shape))
    return {"w": draw(3, 4), "scale": draw(4), "jastrow": draw(2), "head": draw(4, 1)}


def log_psi(p: Any, x: Any) -> Any:
    h = jnp.tanh(x @ p["w"]) * p["scale"]
    return (h @ p["head"])[:, 0] + jnp.sin(x[:, 0] * p["jastrow"][0] + p["jastrow"][1])


def loss_fn(p: Any, x: Any, w: Any) -> ng.Loss:
    z = log_psi(p, x)
    psi = ng.Gaussian(z, event_ndims=0)
    return ng.loss(jnp.mean(w * z), psi, weights=w, centred=True)


def layers_of(p: Any) -> ng.Layers:
    return ng.find_layers(loss_fn, p, X, ALL, blocks={"head": "diagonal"})


def jacobian(p: Any) -> Any:
    one = lambda x: ravel_pytree(jax.grad(lambda p: log_psi(p, x[None])[0])(p))[0]
    return np.asarray(jax.vmap(one)(X))


def block(p: Any, F: Any, name: str) -> Any:
    own = np.ravel(ravel_pytree(p)[1](jnp.arange(len(F), dtype=float))[name]).astype(int)
    return F[np.ix_(own, own)]


def off(a: Any, b: Any) -> Any:
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize("w", [ALL, WEIGHTS, SOME * WEIGHTS], ids=["none", "weights", "masked"])
def test_the_fisher_is_the_covariance(w: Any) -> None:
    p = params()
    J, share = jacobian(p), w / w.sum()
    F = (share[:, None] * (J - share @ J)).T @ (J - share @ J)
    assert off(jax.jit(lambda p, w: ng.fisher(loss_fn, p, X, w))(p, w), F) < 1e-12
    rows = jax.jit(ng.value_and_grad(loss_fn, fisher="exact"))(p, X, w)[2]
    flat = np.concatenate([rows.J[(name,)].reshape(N, -1) for name in sorted(p)], 1)
    assert off(flat.T @ flat / w.sum(), F) < 1e-12


@pytest.mark.parametrize("w", [ALL, WEIGHTS, SOME * WEIGHTS], ids=["none", "weights", "masked"])
@pytest.mark.parametrize("fisher", ["mc", "exact"])
def test_statistics_of_layers_in_expectation(w: Any, fisher: str) -> None:
    """Sums of examples' products are second moments, example n times ``1 − 2sₙ + sₙ² W/wₙ`` (s its
    share of the weight W): 1 − 1/N without weights. Squared sums are the covariance's."""
    p, layers = params(), layers_of(params())
    J, share = jacobian(p), w / w.sum()
    each = share * (1 - 2 * share) + share**2
    second = (each[:, None] * J).T @ J
    covariance = (share[:, None] * J).T @ J - np.outer(share @ J, share @ J)
    grad_fn = ng.value_and_grad(loss_fn, layers, fisher=fisher)

    def measured(key: Any) -> Any:
        statistics = grad_fn(p, X, w, rng=key)[2]
        return statistics.layers, statistics.leftover

    draws = jax.jit(jax.vmap(measured))(jax.random.split(KEY, 8000))
    found, leftover = jax.tree.map(lambda x: np.asarray(x.mean(0)) / w.sum(), draws)
    for name in ("scale", "jastrow"):
        A = found[(name,)].A.reshape(len(p[name]), -1)
        assert off(A, block(p, second, name)) < 0.03
    np.testing.assert_allclose(found[("w",)].A, (share[:, None] * X).T @ X, rtol=1e-10, atol=1e-10)
    G = np.einsum("n,ni,nj->ij", each, *2 * [outputs_gradient(p)])
    assert off(found[("w",)].G, G) < 0.03
    diagonal = np.diag(block(p, covariance, "head"))
    assert off(leftover[("head",)].ravel(), diagonal) < 0.06


def outputs_gradient(p: Any) -> Any:
    """``∂ log ψ / ∂(x w)`` of each example."""
    return np.asarray((1 - jnp.tanh(X @ p["w"]) ** 2) * p["scale"] * p["head"][:, 0])


def test_masked_examples_enter_no_factor() -> None:
    p, layers = params(), layers_of(params())
    grad_fn = ng.value_and_grad(loss_fn, layers)
    a = grad_fn(p, X, SOME * 1.0, rng=KEY)[2]
    b = grad_fn(p, X[SOME], ALL[SOME], rng=KEY)[2]
    for x, y in zip(a.layers.values(), b.layers.values(), strict=True):
        same = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-10)
        jax.tree.map(same, (x.A, x.G), (y.A, y.G))


def test_what_a_centred_loss_cannot_be_is_told() -> None:
    z = jnp.ones((4, 1))
    with pytest.raises(TypeError, match="there are none"):
        ng.loss(z.mean(), ng.Gaussian(z).curvature(), centred=True)
    with pytest.raises(TypeError, match="complex mean"):
        ng.loss(z.mean(), ng.Gaussian(z + 1j * z), centred=True)


def test_a_complex_log_psi_has_the_real_part_of_the_geometric_tensor() -> None:
    p = {"w": jnp.asarray(random.normal(size=(3, 2)))}
    of = lambda p, x: jax.lax.complex(*jnp.moveaxis(jnp.tanh(x @ p["w"]), -1, 0))

    def loss_fn(p: Any, x: Any) -> ng.Loss:
        z = of(p, x)
        psi = ng.Gaussian(jnp.stack([z.real, z.imag], axis=-1))
        return ng.loss(z.real.mean(), psi, centred=True)

    parts = lambda p: jnp.stack([of(p, X).real, of(p, X).imag])
    J = np.asarray(jax.jacfwd(parts)(p)["w"]).reshape(2, N, 6)
    slopes = J[0] + 1j * J[1]
    slopes = slopes - slopes.mean(0)
    assert off(ng.fisher(loss_fn, p, X), (slopes.conj().T @ slopes).real / N) < 1e-12
