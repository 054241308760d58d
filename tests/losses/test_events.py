"""What one example is: every spelling of the same examples gives the same numbers."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import natgrad_jax as ng
from natgrad_jax.exact.matvec import gauss_newton_vector_product, quadratic_forms

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("float64")]

KEY = jax.random.key(3)
FISHERS = ("exact", "mc", "empirical")


def random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


class Spelling(NamedTuple):
    """The output ``z`` of ``(N, 6)`` in another shape, and the same examples in a shape with one
    axis of their own; ``nll``: what both are given."""

    output: Any
    plain: Any
    event_ndims: int | None
    variance: float = 1.0
    nll: dict[str, Any] = {}  # noqa: RUF012
    fishers: tuple[str, ...] = FISHERS


MASK, WEIGHTS = np.array([1, 0, 1, 1, 0], bool), np.array([0.5, 1, 2, 0, 3])
IMAGES = lambda z: z.reshape(5, 3, 2)
ONE = ("exact", "empirical")  # without an axis of examples labels are drawn from another key

SPELLINGS = {
    "(N,)": Spelling(lambda z: z[:, 0], lambda z: z[:, :1], 0),
    "(N,), variance": Spelling(lambda z: z[:, 0], lambda z: z[:, :1], 0, 0.3),
    "(N,), masked and weighted": Spelling(
        lambda z: z[:, 0], lambda z: z[:, :1], 0, nll={"where": MASK, "weights": WEIGHTS}
    ),
    "(N, T)": Spelling(lambda z: z, lambda z: z[..., None], 0),
    "(N, T), masked": Spelling(
        lambda z: z, lambda z: z[..., None], 0, nll={"where": MASK[:, None]}
    ),
    "(N, T, D)": Spelling(IMAGES, IMAGES, None),
    "(N, H, W)": Spelling(IMAGES, lambda z: z, 2, 0.3),
    "(N, H, W), masked and weighted": Spelling(
        IMAGES, lambda z: z, 2, nll={"where": MASK, "weights": WEIGHTS}
    ),
    "one example": Spelling(lambda z: z[0], lambda z: z[:1], 1, 0.3, fishers=ONE),
    "one number": Spelling(lambda z: z[0, 0], lambda z: z[:1, :1], None, 0.3, fishers=ONE),
}  # fmt: skip
DISTRIBUTIONS = {
    "gaussian": lambda s, z, **kw: ng.Gaussian(z, s.variance, **kw),
    "bernoulli": lambda s, z, **kw: ng.Bernoulli(z, **kw),
}


def close(a: Any, b: Any, what: Any) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-14, err_msg=str(what))


def everything(loss_fn: Any, params: Any, x: Any, fishers: tuple[str, ...]) -> dict[str, Any]:
    """All that is computed of a loss."""
    layers = ng.find_layers(loss_fn, params, x)

    @jax.jit  # one program of them all
    def of(params: Any, x: Any) -> dict[str, Any]:
        found: dict[str, Any] = {
            "fisher-vector product": ng.fisher_vector_product(loss_fn, params, x)(params),
            "Gauss-Newton": gauss_newton_vector_product(loss_fn, params, x)(params),
            "quadratic form": quadratic_forms(loss_fn, params, x, vectors=[params]),
            "diagonal": ng.fisher_diagonal(loss_fn, params, x),
        }
        for fisher in fishers:
            grad_fn = ng.value_and_grad(loss_fn, layers, fisher=fisher)
            found[fisher] = grad_fn(params, x, rng=KEY)
            found[f"F, {fisher}"] = ng.fisher(loss_fn, params, x, fisher=fisher, rng=KEY)
        return found

    return of(params, x)


@pytest.mark.parametrize("family", DISTRIBUTIONS)
@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_of_the_same_examples_agree(name: str, family: str) -> None:
    """Loss, gradients, statistics and Fisher; one parameter in a layer, one outside."""
    s, make = SPELLINGS[name], DISTRIBUTIONS[family]
    dense, x = nn.Dense(6, param_dtype=jnp.float64), jnp.asarray(random(2, 5, 3))
    params = {"dense": dense.init(KEY, x)["params"], "shift": jnp.asarray(random(1, 1))}
    targets = (random(4, 5, 6) > 0).astype(float)

    def loss_fn(shape: Any, event_ndims: int | None) -> Any:
        def of(p: Any, x: Any) -> ng.Loss:
            z = jnp.tanh(dense.apply({"params": p["dense"]}, x)) + p["shift"]
            y = make(s, shape(z), event_ndims=event_ndims)
            return 0.7 * y.nll(shape(targets), **s.nll)

        return of

    found = everything(loss_fn(s.output, s.event_ndims), params, x, s.fishers)
    wanted = everything(loss_fn(s.plain, 1), params, x, s.fishers)
    for key, value in wanted.items():
        close(found[key], value, key)


def test_n_numbers_are_n_examples() -> None:
    """Of linear regression, whose Fisher is XᵀX / N."""
    x, w = random(0, 32, 3), random(1, 3)
    y = x @ random(2, 3)
    loss_fn = lambda w: ng.Gaussian(x @ w, event_ndims=0).nll(y)
    np.testing.assert_allclose(loss_fn(w).value, ((x @ w - y) ** 2).mean() / 2, rtol=1e-12)
    np.testing.assert_allclose(ng.fisher(loss_fn, jnp.asarray(w)), x.T @ x / 32, rtol=1e-12)


def test_inside_vmap_a_vector_is_one_example() -> None:
    z, y = jnp.asarray(random(0, 5, 3)), random(1, 5, 3)
    one = lambda z, y: ng.Gaussian(z, event_ndims=1).nll(y).value
    close(jax.vmap(one)(z, y).mean(), ng.Gaussian(z).nll(y).value, "mean")
    number = lambda z, y: ng.Gaussian(z).nll(y).value
    close(jax.vmap(number)(z[0], y[0]).mean(), ng.Gaussian(z[0], event_ndims=0).nll(y[0]).value, 0)


def test_distributions_are_pytrees_whatever_their_leaves() -> None:
    """Through jit, vmap and scan, and around what is no array at all."""
    z, y = jnp.asarray(random(0, 4, 5)), random(1, 4, 5)
    make = lambda z: ng.Gaussian(z, 0.5, event_ndims=0)
    values = jnp.stack([make(row).nll(own).value for row, own in zip(z, y, strict=True)])
    close(jax.jit(make)(z[0]).nll(y[0]).value, values[0], "jit")
    close(jax.vmap(lambda d, y: d.nll(y).value)(jax.vmap(make)(z), y), values, "vmap")
    step = lambda total, row: (total, make(row))
    _, scanned = jax.lax.scan(step, 0.0, z)
    close(jax.vmap(lambda d, y: d.nll(y).value)(scanned, y), values, "scan")
    without = ng.Gaussian(z[0])
    assert jax.tree.map(lambda x: None, without).mean is None
    assert jax.tree.structure(make(z[0])) != jax.tree.structure(without)


@pytest.mark.parametrize("fisher", FISHERS)
def test_numbers_on_explicit_mesh_axes(fisher: str) -> None:
    """A batch of numbers divided over devices is that on one device."""
    x, w = jnp.asarray(random(0, 8, 3)), jnp.asarray(random(1, 3))
    loss_fn = lambda w, x: ng.Gaussian(x @ w["w"], event_ndims=0).nll(x[:, 0])
    grad_fn = jax.jit(
        ng.value_and_grad(loss_fn, ng.find_layers(loss_fn, {"w": w}, x), fisher=fisher)
    )
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
    whole = grad_fn({"w": w}, x, rng=KEY)
    with jax.set_mesh(mesh):
        w, x = jax.device_put((w, x), (NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))))
        close(grad_fn({"w": w}, x, rng=KEY), whole, fisher)
