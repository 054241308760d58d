"""One device and four give the same training, whichever way the four are used."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import natgrad_jax as ng
from natgrad_jax.curvature.layer_sums import gram

DEVICES, STEPS = 4, 5


class Net(nn.Module):
    """A convolution, two norms (one of no known type), a scanned stack and a readout."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(4, (3, 3), strides=2)(x))
        x = nn.LayerNorm()(x).reshape(len(x), -1)
        block = nn.scan(
            nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=2
        )
        x, _ = block()(OwnNorm()(nn.Dense(6)(x)), None)
        return nn.Dense(3)(x)


class OwnNorm(nn.LayerNorm):
    pass


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return x + nn.tanh(nn.Dense(6)(x)), None


model = Net()


def loss_fn(params: Any, batch: Any) -> ng.Loss:
    x, y, where = batch
    return ng.Categorical(model.apply({"params": params}, x)).nll(y, where=where) * 2.0 + 0.1


# EKFAC in groups small enough that no factor has a null space (there a basis is any, and so are its
# moments), and in float64: the gap between two eigenvalues magnifies what rounding leaves apart
class Contender(NamedTuple):
    make: Any
    dtype: Any
    divided: bool  # whether the devices divide refreshes among them
    refresh: Any = ng.every


TRANSFORMATIONS = {
    "kfac": Contender(ng.kfac, jnp.float32, False),
    "kfac, thinned, in turn, divided": Contender(
        partial(ng.kfac, statistics_fraction=0.5), jnp.float32, True, ng.staggered
    ),
    "ekfac, divided": Contender(
        partial(ng.ekfac, approximation=ng.Approximation("sua", 4, "reduce")),
        jnp.float64,
        True,
    ),
    "ekfac, two directions, divided": Contender(
        partial(ng.ekfac, basis=ng.LowRank(2)), jnp.float64, True
    ),
}
TOLERANCES = {jnp.float32: {"rtol": 5e-4, "atol": 1e-5}, jnp.float64: {"rtol": 1e-9, "atol": 1e-9}}


@pytest.fixture(scope="module", params=TRANSFORMATIONS)
def problem(request: Any) -> Any:
    contender = TRANSFORMATIONS[request.param]
    with jax.enable_x64(contender.dtype == jnp.float64):
        yield make_problem(contender)


def make_problem(contender: Contender) -> Any:
    """The layers, from devices to a transformation, parameters and a batch."""
    dtype = contender.dtype
    random = np.random.default_rng(0)
    x = random.normal(size=(16, 6, 6, 2)).astype(dtype)
    y = random.integers(3, size=16).astype(np.int32)
    where = np.arange(16) % 5 != 1  # unequal counts on the devices
    batch = jax.tree.map(jnp.asarray, (x, y, where))
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda p: p.astype(dtype), params)
    layers = ng.find_layers(loss_fn, params, batch, blocks={"OwnNorm_0": "diagonal"})

    def make(over: Any) -> Any:
        over = over if contender.divided else None
        refresh = contender.refresh(2, over=over)
        return contender.make(0.1, layers, statistics_period=2, refresh=refresh, damping=0.1)

    return layers, make, params, batch


def make_step(
    problem: Any, axis_name: str | None, over: Any = None, fisher: str = "mc"
) -> Callable[..., Any]:
    layers, make, *_ = problem
    tx = make(over)
    grad_fn = ng.value_and_grad(loss_fn, layers, axis_name=axis_name, fisher=fisher)

    def step(params: Any, opt_state: Any, batch: Any, key: Any) -> Any:
        loss, grads, statistics = grad_fn(params, batch, rng=key, opt_state=opt_state)
        updates, opt_state = tx.update(grads, opt_state, params, statistics=statistics)
        return optax.apply_updates(params, updates), opt_state, loss

    return step


def train(
    step: Callable[..., Any], problem: Any, place: Any = lambda params, batch: (params, batch)
) -> Any:
    _, make, params, batch = problem
    opt_state = make(None).init(params)
    params, batch = place(params, batch)
    losses = []
    for i in range(STEPS):
        params, opt_state, loss = step(params, opt_state, batch, jax.random.key(i))
        losses.append(loss)
    return jax.device_get((params, ng.factors(opt_state), losses))


def mesh(kind: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh((DEVICES,), ("data",), axis_types=(kind,))


def sharded(kind: AxisType, problem: Any) -> Any:
    """The user's code of one device, under jit with a sharded batch."""
    m = mesh(kind)

    def place(params: Any, batch: Any) -> Any:
        params = jax.device_put(params, NamedSharding(m, P()))
        return params, jax.device_put(batch, NamedSharding(m, P("data")))

    with jax.set_mesh(m):
        return train(jax.jit(make_step(problem, None, (m, "data"))), problem, place)


def shard_mapped(check_vma: bool, problem: Any) -> Any:
    step = jax.shard_map(
        make_step(problem, "data", "data"),
        mesh=mesh(AxisType.Auto),
        in_specs=(P(), P(), P("data"), P()),
        out_specs=P(),
        check_vma=check_vma,
    )
    return train(jax.jit(step), problem)


def pmapped(problem: Any) -> Any:
    step = jax.pmap(
        make_step(problem, "data", "data"),
        axis_name="data",
        in_axes=(None, None, 0, None),
        out_axes=None,
    )
    split = lambda params, batch: (
        params,
        jax.tree.map(lambda x: x.reshape(DEVICES, -1, *x.shape[1:]), batch),
    )
    return train(step, problem, split)


WAYS = {
    "jit, Auto axes": partial(sharded, AxisType.Auto),
    "jit, Explicit axes": partial(sharded, AxisType.Explicit),
    "shard_map, check_vma": partial(shard_mapped, True),
    "shard_map, no check_vma": partial(shard_mapped, False),
    "pmap": pmapped,
}


@pytest.fixture(scope="module")
def one_device(problem: Any) -> Any:
    return train(jax.jit(make_step(problem, None)), problem)


@pytest.mark.parametrize("way", WAYS)
def test_four_devices_equal_one(way: str, problem: Any, one_device: Any) -> None:
    found = WAYS[way](problem)
    for ours, theirs in zip(jax.tree.leaves(found[0]), jax.tree.leaves(one_device[0]), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)  # the parameters
    tolerance = TOLERANCES[jax.tree.leaves(problem[2])[0].dtype.type]
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(one_device), strict=True):
        np.testing.assert_allclose(ours, theirs, **tolerance)


@pytest.mark.parametrize("fisher", ["exact", "empirical", "none"])
def test_statistics_are_global_in_every_mode(fisher: str, problem: Any) -> None:
    layers, _, params, batch = problem
    one = ng.value_and_grad(loss_fn, layers, fisher=fisher)(params, batch, rng=jax.random.key(0))
    four = jax.jit(
        jax.shard_map(
            partial(
                ng.value_and_grad(loss_fn, layers, fisher=fisher, axis_name="data"),
                rng=jax.random.key(0),
            ),
            mesh=mesh(AxisType.Auto),
            in_specs=(P(), P("data")),
            out_specs=P(),
        )
    )(params, batch)
    for ours, theirs in zip(jax.tree.leaves(four), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=1e-4)


def test_a_batch_that_varies_needs_its_axis_named(problem: Any) -> None:
    layers, _, params, batch = problem
    step = jax.shard_map(
        lambda p, b: ng.value_and_grad(loss_fn, layers)(p, b, rng=jax.random.key(0))[0],
        mesh=mesh(AxisType.Auto),
        in_specs=(P(), P("data")),
        out_specs=P("data"),
    )
    with pytest.raises(ValueError, match="pass axis_name='data'"):
        jax.jit(step)(params, batch)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_positions_that_devices_divide_are_not_gathered(kind: AxisType) -> None:
    both = jax.make_mesh((2, 2), ("data", "sequence"), axis_types=(kind,) * 2)
    x = jax.random.normal(jax.random.key(0), (4, 6, 5))
    divided = jax.device_put(x, NamedSharding(both, P("data", "sequence")))
    program = jax.jit(partial(gram, dtype=jnp.float32)).lower(divided).compile()
    np.testing.assert_allclose(program(divided), jnp.einsum("nti,ntj->ij", x, x), rtol=1e-5)
    moved = re.findall(r"(all-\w+|collective-\w+)\(", program.as_text())
    assert set(moved) == {"all-reduce"}
