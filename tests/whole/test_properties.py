"""What K-FAC is known to be: exact where it is exact, and blind to affine reparametrizations."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx, struct
from jax.flatten_util import ravel_pytree

import natgrad_jax as ng

pytestmark = pytest.mark.usefixtures("float64")


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


@struct.dataclass
class Box:
    """A parameter tree that is no dict."""

    own: Any


class Linear(nn.Module):
    """A deep linear network."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width in self.widths:
            x = nn.Dense(width, param_dtype=jnp.float64)(x)
        return x


@pytest.mark.parametrize("widths", [(3,), (4, 5, 3)], ids=["one layer", "deep"])
def test_kfac_is_exact_for_linear_networks(widths: tuple[int, ...]) -> None:
    """With a Gaussian output, g does not depend on the example: F's diagonal blocks are A ⊗ G."""
    x, y = normal(0, 6, 4), normal(1, 6, 3)
    covariance = jnp.asarray([[1.0, 0.3, 0.0], [0.3, 0.5, 0.1], [0.0, 0.1, 2.0]])
    model = Linear(widths)
    params = model.init(jax.random.key(0), x)["params"]
    loss_fn = lambda p, x: ng.Gaussian(model.apply({"params": p}, x), covariance=covariance).nll(y)
    layers = ng.find_layers(loss_fn, params, x)
    grad_fn = ng.value_and_grad(loss_fn, layers, fisher="exact")
    _, grads, statistics = jax.jit(grad_fn)(params, x)
    tx = ng.scale_by_kfac(layers, decay=0.0)
    _, state = tx.update(grads, tx.init(params), statistics=statistics)

    precision = np.linalg.inv(covariance)
    for path, layer in layers.items():
        own = params[path[0]]
        theta, unravel = ravel_pytree(own)

        def output(t: Any, x: jax.Array, path: Any = path, unravel: Any = unravel) -> jax.Array:
            return model.apply({"params": params | {path[0]: unravel(t)}}, x)

        J = jax.vmap(jax.jacrev(output), (None, 0))(theta, x)
        F = np.einsum("nop,oq,nqr->pr", J, precision, J) / len(x)
        factors = ng.factors(state)[path]
        assert oracle.relative(oracle.as_matrix(layer, *factors, own), F) < 1e-12


def mlp(activation: Callable[[jax.Array], jax.Array]) -> Callable[[Any, jax.Array], jax.Array]:
    class MLP(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            for width in (5, 4):
                x = activation(nn.Dense(width, param_dtype=jnp.float64)(x))
            return nn.Dense(2, param_dtype=jnp.float64)(x)

    return MLP()


def update_once(model: Any, params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """The network's outputs after one natural-gradient step with next to no damping."""
    loss_fn = lambda p, x: ng.Gaussian(model.apply({"params": p}, x)).nll(y)
    layers = ng.find_layers(loss_fn, params, x)
    tx = ng.scale_by_kfac(layers, damping=1e-24, decay=0.0)

    @jax.jit
    def step(params: Any, x: jax.Array) -> jax.Array:
        grad_fn = ng.value_and_grad(loss_fn, layers, fisher="exact")
        _, grads, statistics = grad_fn(params, x)
        updates, _ = tx.update(grads, tx.init(params), statistics=statistics)
        new = jax.tree.map(lambda p, u: p - 0.1 * u, params, updates)
        return model.apply({"params": new}, x)

    return step(params, x)


def test_zero_damping_update_is_affine_invariant() -> None:
    """Another basis of the inputs, logistic instead of tanh: the same function after a step."""
    x, y = normal(0, 40, 3), normal(1, 40, 2)
    tanh = mlp(jnp.tanh)
    params = tanh.init(jax.random.key(0), x)["params"]
    reference = update_once(tanh, params, x, y)
    assert not np.allclose(reference, tanh.apply({"params": params}, x), atol=1e-3)

    # another basis of the input: x' = x M + c, the first layer undoes it
    M, c = normal(2, 3, 3) + 2 * jnp.eye(3), normal(3, 3)
    first = params["Dense_0"]
    kernel = jnp.linalg.solve(M, first["kernel"])
    moved = params | {"Dense_0": {"kernel": kernel, "bias": first["bias"] - c @ kernel}}
    np.testing.assert_allclose(update_once(tanh, moved, x @ M + c, y), reference, atol=1e-6)

    # tanh(s) = 2 sigmoid(2 s) − 1: affine maps of the activations and of what goes into them
    def logistic(layer: Any, first: bool, last: bool) -> Any:
        kernel, bias = layer["kernel"], layer["bias"]
        if not first:
            kernel, bias = 2 * kernel, bias - layer["kernel"].sum(0)
        return (
            {"kernel": kernel, "bias": bias} if last else {"kernel": 2 * kernel, "bias": 2 * bias}
        )

    ends = {"Dense_0": (True, False), "Dense_1": (False, False), "Dense_2": (False, True)}
    same = {name: logistic(params[name], *ends[name]) for name in params}
    sigmoid = mlp(jax.nn.sigmoid)
    np.testing.assert_allclose(
        sigmoid.apply({"params": same}, x), tanh.apply({"params": params}, x), atol=1e-12
    )
    np.testing.assert_allclose(update_once(sigmoid, same, x, y), reference, atol=1e-6)


class Scanned(nn.Module):
    """The same three layers, scanned (on any axis) or written out."""

    axis: int
    remat: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        body = nn.remat(Body) if self.remat else Body
        scan = nn.scan(
            body, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=3
        )
        return scan()(x, None)[0]


def one_of_stack(tree: Any, i: int, axis: int) -> Any:
    return jax.tree.map(lambda x: jnp.take(x, i, axis=axis), tree)


class Body(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return jnp.tanh(nn.Dense(3, param_dtype=jnp.float64)(x)), None


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_scanned_layers_have_the_factors_of_unrolled_ones(axis: int, remat: bool) -> None:
    """Widths equal the stack's length, so that shapes alone cannot tell the stack's axis."""
    x, y = normal(0, 5, 3), normal(1, 5, 3)
    scanned = Scanned(axis, remat)
    params = scanned.init(jax.random.key(0), x)["params"]
    (name,) = params
    loose = {f"Dense_{i}": one_of_stack(params[name]["Dense_0"], i, axis) for i in range(3)}

    def unrolled(p: Any, x: jax.Array) -> jax.Array:
        for i in range(3):
            x = jnp.tanh(nn.Dense(3).apply({"params": p[f"Dense_{i}"]}, x))
        return x

    def measured(apply: Any, params: Any) -> Any:
        loss_fn = lambda p, x: ng.Gaussian(apply(p, x)).nll(y)
        layers = ng.find_layers(loss_fn, params, x)
        grad_fn = ng.value_and_grad(loss_fn, layers, fisher="exact")
        _, grads, statistics = jax.jit(grad_fn)(params, x)
        tx = ng.scale_by_kfac(layers, decay=0.0)
        updates, state = tx.update(grads, tx.init(params), statistics=statistics)
        return updates, ng.factors(state)

    updates, stacked = measured(lambda p, x: scanned.apply({"params": p}, x), params)
    loose_updates, loose_factors = measured(unrolled, loose)
    for i in range(3):
        for ours, theirs in zip(
            stacked[name, "Dense_0"], loose_factors[(f"Dense_{i}",)], strict=True
        ):
            np.testing.assert_allclose(ours[i], theirs, rtol=1e-10, atol=1e-12)
        own = one_of_stack(updates[name]["Dense_0"], i, axis)
        for leaf, other in zip(
            jax.tree.leaves(own), jax.tree.leaves(loose_updates[f"Dense_{i}"]), strict=True
        ):
            np.testing.assert_allclose(leaf, other, rtol=1e-8, atol=1e-12)


def test_a_layer_called_twice_sums_its_calls() -> None:
    """Once on each half with the two losses added: the statistics of one call on both halves."""
    x, y = normal(0, 6, 4), normal(1, 6, 3)
    dense = nn.Dense(3)
    params = dense.init(jax.random.key(0), x)["params"]
    apply = lambda p, x: dense.apply({"params": p}, x)

    def twice(p: Any, x: jax.Array) -> ng.Loss:
        return ng.Gaussian(jnp.concatenate([apply(p, x[:2]), apply(p, x[2:])])).nll(y)

    once = lambda p, x: ng.Gaussian(apply(p, x)).nll(y)
    found = [
        jax.jit(ng.value_and_grad(f, ng.find_layers(f, params, x), fisher="exact"))(params, x)[2]
        for f in (once, twice)
    ]
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_vmapped_examples_and_micro_batches_give_the_batch() -> None:
    """A loss that vmaps the model over examples, and two halves added: the same statistics."""
    x, y = normal(0, 6, 5, 5, 2), normal(1, 6, 3)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            x = jnp.tanh(nn.Conv(3, (3, 3), strides=2, param_dtype=jnp.float64)(x))
            return nn.Dense(3, param_dtype=jnp.float64)(x.reshape(*x.shape[:-3], -1))

    net = Net()
    params = net.init(jax.random.key(0), x)["params"]
    apply = lambda p, x: net.apply({"params": p}, x)
    batched = lambda p, x, y: ng.Gaussian(apply(p, x)).nll(y)
    mapped = lambda p, x, y: ng.Gaussian(jax.vmap(lambda x: apply(p, x))(x)).nll(y)
    layers = ng.find_layers(batched, params, x, y)
    found = ng.find_layers(mapped, params, x, y)
    assert dict(found) == dict(layers)
    whole = jax.jit(ng.value_and_grad(batched, layers, fisher="exact"))(params, x, y)[2]
    each = jax.jit(ng.value_and_grad(mapped, layers, fisher="exact"))
    halves = [each(params, x[i : i + 3], y[i : i + 3])[2] for i in (0, 3)]
    for found in (each(params, x, y)[2], jax.tree.map(jnp.add, *halves)):
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(whole), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("examples, held", [(6, 2), (7, 3)], ids=["even", "with a rest"])
def test_chunked_patches_give_the_same_factor(
    examples: int, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = normal(0, examples, 5, 5, 2), normal(1, examples, 75)
    net = nn.Conv(3, (3, 3), param_dtype=jnp.float64)
    params = net.init(jax.random.key(0), x)["params"]
    loss_fn = lambda p, x: ng.Gaussian(net.apply({"params": p}, x).reshape(examples, -1)).nll(y)
    layers = ng.find_layers(loss_fn, params, x)
    run = lambda: jax.jit(lambda p, x: ng.value_and_grad(loss_fn, layers, fisher="none")(p, x)[2])
    whole = run()(params, x)
    monkeypatch.setattr("natgrad_jax.curvature.layer_sums.MAX_CHUNK_BYTES", 25 * 19 * 4 * held)
    chunked = run().lower(params, x).compile()
    assert "while" in chunked.as_text()
    np.testing.assert_allclose(
        chunked(params, x).layers[()].A, whole.layers[()].A, rtol=1e-12, atol=1e-12
    )


def test_several_samples_average() -> None:
    """The mean of K draws is an estimate of the exact Fisher that tightens with K."""
    x, y = normal(0, 4, 3), jnp.asarray([0, 1, 2, 0])
    dense = nn.Dense(3, param_dtype=jnp.float64)
    params = dense.init(jax.random.key(0), x)["params"]
    loss_fn = lambda p, x: ng.Categorical(dense.apply({"params": p}, x)).nll(y)
    layers = ng.find_layers(loss_fn, params, x)

    def measured(**mode: Any) -> Any:
        grad_fn = ng.value_and_grad(loss_fn, layers, **mode)
        return jax.jit(grad_fn)(params, x, rng=jax.random.key(1))[2].layers[()]

    exact = measured(fisher="exact")
    errors = [oracle.relative(measured(samples=k).G, exact.G) for k in (4, 4000)]
    assert errors[1] < min(0.05, errors[0])
    np.testing.assert_allclose(measured(samples=4).A, exact.A, rtol=1e-12)


def test_warnings_name_every_leftover_parameter() -> None:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            table = self.param("table", nn.initializers.ones, (4, 100))
            scale = self.param("temperature", nn.initializers.ones, ())
            return nn.Dense(3)(x) * scale * table.mean()

    net = Net()
    params = net.init(jax.random.key(0), normal(0, 2, 4))["params"]
    loss_fn = lambda p, x: ng.Gaussian(net.apply({"params": p}, x)).nll(x[:, :3])
    with pytest.warns(ng.UncoveredWarning, match="table") as caught:
        layers = ng.find_layers(loss_fn, params, normal(0, 2, 4))
    assert "table (it goes into reduce_sum" in str(caught[0].message)
    assert set(layers.uncovered) == {("table",)}
    assert layers[("temperature",)].block == "full"


def test_batch_dims_of_dense_general_are_blocks() -> None:
    """One product a head: the factors of each are those of its own inputs and gradients."""
    x, y = normal(0, 2, 5, 4), normal(1, 5, 6)
    dense = nn.DenseGeneral(3, batch_dims=(0,), param_dtype=jnp.float64)
    params = dense.init(jax.random.key(0), x)["params"]

    def loss_fn(p: Any, x: jax.Array) -> ng.Loss:
        s = dense.apply({"params": p}, x)
        return ng.Gaussian(jnp.moveaxis(s, 0, 1).reshape(5, 6)).nll(y)

    layers = ng.find_layers(loss_fn, params, x)
    _, grads, statistics = ng.value_and_grad(loss_fn, layers, fisher="empirical")(params, x)
    sums = statistics.layers[()]
    ones = np.ones((2, 5, 1))
    inputs = np.concatenate([x, ones], axis=-1)
    s = np.asarray(dense.apply({"params": params}, x))
    g = s - np.moveaxis(np.asarray(y).reshape(5, 2, 3), 1, 0)
    np.testing.assert_allclose(sums.A, np.swapaxes(inputs, 1, 2) @ inputs, rtol=1e-10)
    np.testing.assert_allclose(sums.G, np.swapaxes(g, 1, 2) @ g, rtol=1e-10)
    assert grads["kernel"].shape == (2, 4, 3)


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
def test_leftover_parameters_get_the_diagonal_of_their_fisher(fisher: str) -> None:
    """On average over labels or signs: the mean over examples of each squared gradient."""
    x, y = normal(0, 6, 3), normal(1, 6, 3)

    def loss_fn(p: Any, x: jax.Array) -> ng.Loss:
        return ng.Gaussian(jnp.tanh(x * p["scale"]) + p["shift"]).nll(y)

    params = {"scale": jnp.asarray([1.0, -0.5, 2.0]), "shift": jnp.asarray([0.1, 0.0, 0.3])}
    layers = ng.find_layers(loss_fn, params, x, blocks={"*": "diagonal"})
    assert layers.uncovered == ()  # chosen
    grad_fn = ng.value_and_grad(loss_fn, layers, fisher=fisher)
    squares = lambda key: grad_fn(params, x, rng=key)[2]
    found = jax.jit(jax.vmap(squares))(jax.random.split(jax.random.key(0), 4000))
    output = lambda p, x: jnp.tanh(x * p["scale"]) + p["shift"]
    J = jax.vmap(jax.jacrev(output), (None, 0))(params, x)
    g = output(params, x) - y
    for name in params:
        ours = found.leftover[(name,)].mean(0) / 6
        each = (
            (J[name] ** 2).sum(1)
            if fisher != "empirical"
            else jnp.einsum("no,nop->np", g, J[name]) ** 2
        )
        np.testing.assert_allclose(ours, each.mean(0), rtol=0.12)


def test_params_may_lie_in_dataclasses() -> None:
    x = normal(0, 6, 4)
    dense = nn.Dense(2, param_dtype=jnp.float64)
    params = Box(dense.init(jax.random.key(0), x)["params"])
    loss_fn = lambda p, x: ng.Gaussian(dense.apply({"params": p.own}, x)).nll(x[:, :2])
    layers = ng.find_layers(loss_fn, params, x)
    assert layers.uncovered == () and list(layers) == [("own",)]
    _, grads, statistics = ng.value_and_grad(loss_fn, layers, fisher="exact")(params, x)
    tx = ng.kfac(0.1, layers)
    updates, _ = tx.update(grads, tx.init(params), statistics=statistics)
    assert updates.own["kernel"].shape == (4, 2)


def test_shapes_of_numpys_labels_are_enough() -> None:
    """Their int64 is int32 for JAX."""
    loss_fn = lambda W, x, y: ng.Categorical(x @ W).nll(y)
    shape = lambda *sizes, dtype: jax.ShapeDtypeStruct(sizes, dtype)
    batch = shape(8, 4, dtype=np.float64), shape(8, dtype=np.int64)
    with jax.enable_x64(False):
        layers = ng.find_layers(loss_fn, shape(4, 3, dtype=np.float32), *batch)
    assert not layers.uncovered


def test_an_abstract_nnx_model_is_enough() -> None:
    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.norm = nnx.BatchNorm(4, rngs=rngs)
            self.dense = nnx.Linear(4, 3, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.dense(self.norm(x))

    model = nnx.eval_shape(lambda: Net(nnx.Rngs(0)))
    x = jax.ShapeDtypeStruct((5, 4), jnp.float32)
    layers = ng.find_layers(lambda m, x: ng.Gaussian(m(x)).nll(x[:, :3]), model, x)
    assert set(layers) == {("dense",), ("norm",)}
