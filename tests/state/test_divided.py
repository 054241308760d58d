"""States are divided where parameters are, train as one device does, and are saved across both."""

from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from saving import assert_same_bits, restore, save

import natgrad_jax as ng
from natgrad_jax.state.divided import Divided, whole

DEVICES, STEPS = 4, 5


class Net(nn.Module):
    """Widths that four devices divide and one that they do not, two equal layers among them."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width in (96, 128, 128, 128, 130):
            x = nn.tanh(nn.Dense(width, param_dtype=float)(x))
        return nn.Dense(4, param_dtype=float)(x)


model = Net()


def loss_fn(params: Any, x: jax.Array, y: jax.Array) -> ng.Loss:
    return ng.Categorical(model.apply({"params": params}, x)).nll(y)


def data() -> tuple[jax.Array, jax.Array]:
    random = np.random.default_rng(0)
    return jnp.asarray(random.normal(size=(400, 90))), jnp.asarray(random.integers(4, size=400))


@pytest.fixture(autouse=True, scope="module")
def _in_float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def parameters() -> Any:
    return jax.jit(model.init)(jax.random.key(0), data()[0])["params"]


def layers() -> ng.Layers:
    return ng.find_layers(loss_fn, parameters(), *data())


def divided(tree: Any, devices: int = DEVICES, kind: AxisType = AxisType.Auto) -> Any:
    """Every array along its largest axis that the devices divide."""
    mesh = jax.make_mesh((devices,), ("fsdp",), axis_types=(kind,), devices=jax.devices()[:devices])

    def place(x: jax.Array) -> jax.Array:
        fits = [i for i in np.argsort(x.shape)[::-1] if x.shape[i] % devices == 0]
        spec = P(*[None] * fits[0], "fsdp") if fits and x.ndim else P()
        return jax.device_put(x, NamedSharding(mesh, spec))

    return jax.tree.map(place, tree)


TRANSFORMATIONS: dict[str, Callable[[ng.Layers], optax.GradientTransformationExtraArgs]] = {
    "kfac": lambda layers: ng.kfac(0.1, layers, refresh=ng.staggered(3)),
    "kfac, whole inverses": lambda layers: ng.kfac(0.1, layers, inverse="cholesky"),
    "ekfac": lambda layers: ng.ekfac(0.1, layers, basis=ng.LowRank(40)),
    "ngd": lambda layers: ng.ngd(0.1, layers, damping=1e-2),
    "prong": lambda layers: ng.prong(0.01, layers),
    "adam in coordinates": lambda layers: ng.in_coordinates(
        optax.adam(1e-3, eps=1e-2), layers, "both_sides", epsilon=1e-2
    ),
    # no whole bases: those of the null space of a few gradients are any
    "shampoo": lambda layers: ng.shampoo(1e-3, basis=ng.LowRank(20), refresh="every"),
    "soap": lambda layers: ng.soap(1e-3, basis=ng.LowRank(3), refresh="every"),
}


def train(tx: Any, place: Callable[[Any], Any], params: Any, state: Any, steps: int = STEPS) -> Any:
    grad_fn = ng.value_and_grad(loss_fn, layers())
    batch = place(data())

    @jax.jit
    def step(params: Any, state: Any, key: jax.Array) -> Any:
        _, grads, statistics = grad_fn(params, *batch, rng=key, opt_state=state)
        updates, state = tx.update(grads, state, params, statistics=statistics)
        return optax.apply_updates(params, updates), state

    for i in range(steps):
        params, state = step(params, state, jax.random.key(i))
    return params, state


def of_each_device(state: Any) -> float:
    """The part of a state that one device holds."""
    arrays = jax.tree.leaves(state)
    return sum(x.addressable_shards[0].data.nbytes for x in arrays) / sum(x.nbytes for x in arrays)


def own(state: Any) -> list[Divided]:
    is_divided = lambda x: isinstance(x, Divided)
    return [x for x in jax.tree.leaves(state, is_leaf=is_divided) if is_divided(x)]


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_four_devices_hold_a_quarter_each_and_train_as_one_does(name: str) -> None:
    tx = TRANSFORMATIONS[name](layers())
    params = divided(parameters())
    start = tx.init(params)
    assert of_each_device(start) <= 0.3
    there, state = train(tx, divided, params, start)
    here, _ = train(tx, lambda x: x, parameters(), tx.init(parameters()))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-7), there, here)
    assert own(state) and of_each_device(state) <= 0.3
    for x in own(state):
        assert x.padded.sharding.is_equivalent_to(x.sharding, x.padded.ndim)


def test_an_nnx_optimizer_keeps_divided_arrays() -> None:
    x, y = divided(data())
    network = nnx.Linear(90, 128, param_dtype=float, rngs=nnx.Rngs(0))
    nnx.update(network, divided(nnx.state(network)))
    nnx_loss = lambda network, x, y: ng.Categorical(network(x)).nll(y)
    layers = ng.find_layers(nnx_loss, network, x, y)
    optimizer = nnx.Optimizer(network, ng.kfac(0.1, layers), wrt=nnx.Param)
    grad_fn = ng.value_and_grad(nnx_loss, layers)

    @nnx.jit
    def step(network: Any, optimizer: Any, key: jax.Array) -> Any:
        state = optimizer.opt_state
        loss, grads, statistics = grad_fn(network, x, y, rng=key, opt_state=state)
        optimizer.update(network, grads, statistics=statistics)
        return loss

    losses = [float(step(network, optimizer, jax.random.key(i))) for i in range(5)]
    assert losses[-1] < losses[0]
    assert len(own(optimizer.opt_state)) > 3


def test_readers_see_whole_arrays() -> None:
    tx = TRANSFORMATIONS["kfac"](layers())
    one, four = tx.init(parameters()), tx.init(divided(parameters()))
    assert [x.shape for x in jax.tree.leaves(ng.factors(four))] == [
        x.shape for x in jax.tree.leaves(ng.factors(one))
    ]
    print(ng.diagnostics.report(layers(), four))


@pytest.mark.parametrize("place", ["jit", "explicit", "replicated"])
def test_states_are_as_ever_where_nothing_tells_how_to_divide(place: str) -> None:
    tx, params = TRANSFORMATIONS["kfac"](layers()), parameters()
    if place == "jit":
        state = jax.jit(tx.init)(divided(params))
    elif place == "explicit":
        state = tx.init(divided(params, kind=AxisType.Explicit))
    else:
        state = tx.init(divided(params, devices=1))
    assert not own(state)
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(params))


@pytest.mark.parametrize("before, after", [(1, 4), (4, 1), (4, 2), (3, 4)])
def test_a_saved_state_is_restored_onto_any_number_of_devices(
    before: int, after: int, tmp_path: Any
) -> None:
    place = lambda n: (lambda x: x) if n == 1 else lambda x: divided(x, n)
    tx = TRANSFORMATIONS["kfac"](layers())
    params = place(before)(parameters())
    params, saved = train(tx, place(before), params, tx.init(params), 2)
    target = tx.init(place(after)(parameters()))
    if jax.tree.map(jnp.shape, saved) == jax.tree.map(jnp.shape, target):  # orbax as it is
        save(tmp_path, saved)
        assert_same_bits(whole(restore(tmp_path, target)), whole(saved))
    restored = ng.restore_state(saved, target)
    assert jax.tree.structure(restored) == jax.tree.structure(target)
    assert_same_bits(whole(restored), whole(saved))
    for a, b in zip(own(restored), own(target), strict=True):
        assert a.padded.sharding == b.padded.sharding


def test_what_does_not_fit_is_still_refused() -> None:
    tx = TRANSFORMATIONS["kfac"](layers())
    saved = tx.init(parameters())
    grown = lambda x: jnp.pad(x, [(0, 1)] * x.ndim, constant_values=1) if x.ndim else x
    larger = jax.tree.map(grown, saved)
    with pytest.raises(ValueError, match="saved as"):
        ng.restore_state(larger, tx.init(divided(parameters())))


def test_beside_whole_parameters_on_a_mesh_a_step_is_compiled_once() -> None:
    own, (x, y) = layers(), data()
    tx, grad_fn = ng.kfac(0.1, own), ng.value_and_grad(loss_fn, own)
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    params = jax.device_put(parameters(), NamedSharding(mesh, P()))
    batch = jax.device_put((x, y), NamedSharding(mesh, P("data")))

    @jax.jit
    def step(params: Any, state: Any, key: jax.Array) -> Any:
        _, grads, statistics = grad_fn(params, *batch, rng=key, opt_state=state)
        updates, state = tx.update(grads, state, params, statistics=statistics)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for i in range(2):
        params, state = step(params, state, jax.random.key(i))
    assert step._cache_size() == 1
