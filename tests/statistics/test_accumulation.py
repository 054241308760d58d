"""Micro-batches one after another give what the large batch gives, in float64."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import natgrad_jax as ng

pytestmark = pytest.mark.usefixtures("float64")

PARTS, SIZE, STEPS = 4, 4, 4


class Net(nn.Module):
    """A convolution and two heads."""

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, ...]:
        x = nn.tanh(nn.Conv(3, (2, 2), strides=2, param_dtype=x.dtype)(x)).reshape(len(x), -1)
        return tuple(nn.Dense(n, param_dtype=x.dtype)(x) for n in (3, 2))


def loss_fn(params: Any, batch: Any) -> ng.Loss:
    """Two terms whose masks differ, scaled, and a penalty."""
    logits, mean = Net().apply({"params": params}, batch["x"])
    loss = ng.Categorical(logits).nll(batch["label"], where=batch["where"])
    loss += 0.5 * ng.Gaussian(mean).nll(batch["y"], weights=batch["weights"])
    return loss + 1e-2 * optax.tree.norm(params, squared=True)


def plain_loss_fn(params: Any, batch: Any) -> ng.Loss:
    """No masks, one term: the case whose empirical Fisher shares the training pass."""
    return ng.Categorical(Net().apply({"params": params}, batch["x"])[0]).nll(batch["label"])


def problem(loss_fn: Any = loss_fn, size: int = SIZE) -> tuple[Any, Any, ng.Layers]:
    """Parameters, a batch of unequal counts in its quarters (one of them is all masked), layers."""
    random = np.random.default_rng(0)
    n = PARTS * size
    x = random.normal(size=(n, 4, 4, 2))
    batch = {
        "x": x,
        "label": random.integers(3, size=n),
        "y": random.normal(size=(n, 2)),
        "where": (np.arange(n) % 5 != 1) & (np.arange(n) // size != 2),
        "weights": random.uniform(size=n) * (np.arange(n) % 3 != 0),
    }
    batch = jax.tree.map(jnp.asarray, batch)
    params = jax.jit(Net().init)(jax.random.key(0), batch["x"])["params"]
    blocks = {"Dense_1": "gradient"} if loss_fn is plain_loss_fn else {}  # it is not used there
    return params, batch, ng.find_layers(loss_fn, params, batch, blocks=blocks)


def in_parts(batch: Any) -> Any:
    return jax.tree.map(lambda x: x.reshape(PARTS, -1, *x.shape[1:]), batch)


def assert_close(actual: Any, desired: Any, tolerance: float = 1e-10) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(desired)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "loss_fn, fisher",
    [(loss_fn, fisher) for fisher in ("mc", "exact", "empirical", "none")]
    + [(plain_loss_fn, "empirical")],
)
def test_micro_batches_add_up_to_the_whole(loss_fn: Any, fisher: str) -> None:
    params, batch, layers = problem(loss_fn)
    options = {"fisher": fisher, "samples": 2 if fisher == "mc" else 1}
    whole = jax.jit(ng.value_and_grad(loss_fn, layers, **options))
    parts = jax.jit(ng.accumulate(loss_fn, layers, **options))
    key = jax.random.key(1)
    assert_close(parts(params, in_parts(batch), rng=key), whole(params, batch, rng=key))


# EKFAC keeps the bases of the first step: in a factor's null space they are any
TRANSFORMATIONS = {
    "kfac": partial(ng.kfac, statistics_period=1, refresh_period=1),
    "kfac, thinned, reduce": partial(
        ng.kfac,
        statistics_period=1,
        statistics_fraction=0.5,
        approximation=ng.Approximation(weight_sharing="reduce"),
    ),
    "kfac, nothing measured": partial(ng.kfac, statistics_period=9),
    "ekfac": partial(ng.ekfac, statistics_period=1),
    "ekfac, one direction": partial(ng.ekfac, statistics_period=1, basis=ng.LowRank(1)),
    "ekfac, running average": partial(ng.ekfac, statistics_period=1, moments="running_average"),
    "prong": partial(ng.prong, statistics_period=1),
}


@pytest.mark.parametrize("make", TRANSFORMATIONS.values(), ids=TRANSFORMATIONS)
def test_a_step_on_micro_batches_is_the_step_on_the_whole(make: Any) -> None:
    params, batch, layers = problem()
    tx = make(0.05, layers)

    def stepper(grad_fn: Any, batch: Any) -> Any:
        @jax.jit
        def step(params: Any, state: Any, key: Any) -> Any:
            loss, grads, statistics = grad_fn(params, batch, rng=key, opt_state=state)
            updates, state = tx.update(grads, state, params, statistics=statistics)
            return optax.apply_updates(params, updates), state, loss

        return step

    whole = stepper(ng.value_and_grad(loss_fn, layers), batch)
    parts = stepper(ng.accumulate(loss_fn, layers), in_parts(batch))
    before = whole(params, tx.init(params), jax.random.key(0))[:2]
    key = jax.random.key(1)
    assert_close(parts(*before, key), whole(*before, key))


def test_which_part_is_measured_is_decided_for_the_whole_batch() -> None:
    """Not for micro-batches, or the shares of devices, which are smaller."""
    params, batch, layers = problem(size=128)

    def measured(grad_fn: Any, batch: Any, fraction: float | None = None) -> Any:
        state = ng.scale_by_ekfac(layers, statistics_fraction=fraction).init(params)
        return grad_fn(params, batch, rng=jax.random.key(1), opt_state=state)[2]

    alone = ng.value_and_grad(loss_fn, layers)
    whole, part = (jax.jit(partial(measured, alone, fraction=f))(batch) for f in (1.0, None))
    assert not np.allclose(whole.layers["Dense_0",].A, part.layers["Dense_0",].A)
    parts = jax.jit(partial(measured, ng.accumulate(loss_fn, layers)))(in_parts(batch))
    mapped = jax.shard_map(
        partial(measured, ng.value_and_grad(loss_fn, layers, axis_name="data")),
        mesh=jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,)),
        in_specs=P("data"),
        out_specs=P(),
    )
    for found in (parts, jax.jit(mapped)(batch)):
        assert_close(found, part)


def test_micro_batches_on_four_devices() -> None:
    """Sharded under jit, and inside shard_map: each device has its share of each micro-batch."""
    params, batch, layers = problem()
    key, mesh, spec = jax.random.key(1), jax.make_mesh((4,), ("data",)), P(None, "data")
    whole = jax.jit(ng.value_and_grad(loss_fn, layers))(params, batch, rng=key)
    placed = jax.device_put(in_parts(batch), NamedSharding(mesh, spec))
    everywhere = jax.device_put(params, NamedSharding(mesh, P()))
    with jax.set_mesh(mesh):
        assert_close(jax.jit(ng.accumulate(loss_fn, layers))(everywhere, placed, rng=key), whole)
    mapped = jax.shard_map(
        partial(ng.accumulate(loss_fn, layers, axis_name="data"), rng=key),
        mesh=mesh,
        in_specs=(P(), spec),
        out_specs=P(),
    )
    assert_close(jax.jit(mapped)(everywhere, placed), whole)


def test_counting_masks_costs_no_forward_pass() -> None:
    """The scan that counts examples compiles to sums of masks."""
    params, batch, _ = problem()
    count = lambda batch: [term.count for term in loss_fn(params, batch).terms]
    counting = jax.jit(partial(jax.lax.map, count)).lower(in_parts(batch)).compile()
    forward = jax.jit(lambda b: loss_fn(params, b).value).lower(batch).compile()
    flops = [c.cost_analysis()["flops"] for c in (counting, forward)]
    assert flops[0] < 0.02 * flops[1], flops


def test_auxiliary_output_is_stacked() -> None:
    params, batch, layers = problem()
    with_aux = lambda p, b: (loss_fn(p, b), b["label"][0])
    grad_fn = jax.jit(ng.accumulate(with_aux, layers, has_aux=True))
    (_, aux), _, _ = grad_fn(params, in_parts(batch), rng=jax.random.key(0))
    np.testing.assert_array_equal(aux, batch["label"][::SIZE])


def test_gradients_of_half_precision_are_summed_in_float32() -> None:
    """A thousand equal micro-batches: in bfloat16 the sum would stop at 256 of them."""
    params = {"kernel": jnp.ones((2, 1), jnp.bfloat16)}
    fn = lambda p, x: ng.Gaussian(x @ p["kernel"]).nll(jnp.zeros((len(x), 1)))
    x = jnp.ones((1000, 1, 2), jnp.bfloat16)
    layers = ng.find_layers(fn, params, x[0])
    grads = jax.jit(ng.accumulate(fn, layers))(params, x, rng=jax.random.key(0))[1]
    assert grads["kernel"].dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(grads["kernel"], float), 2, rtol=0.01)


class NetNNX(nnx.Module):
    """A model with a state of its own: batch statistics, and a count of dropout draws."""

    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(self.dropout(nnx.tanh(self.norm(self.hidden(x)))))


def test_the_state_of_an_nnx_model_passes_through_the_micro_batches() -> None:
    nnx_loss = lambda model, x: ng.Categorical(model(x)).nll(jnp.arange(len(x)) % 2)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(PARTS, SIZE, 3)), jnp.float32)
    model = NetNNX(nnx.Rngs(0))
    layers = ng.find_layers(nnx_loss, model, x[0])
    one_by_one = nnx.clone(model)
    grad_fn = ng.value_and_grad(nnx_loss, layers)
    found = [grad_fn(one_by_one, part, rng=jax.random.key(0)) for part in x]
    accumulated = nnx.jit(ng.accumulate(nnx_loss, layers))
    loss, grads, statistics = accumulated(model, x, rng=jax.random.key(0))
    assert_close(nnx.state(model, nnx.BatchStat), nnx.state(one_by_one, nnx.BatchStat), 1e-5)
    assert int(model.dropout.rngs.count[...]) == int(one_by_one.dropout.rngs.count[...]) > 0
    mean = jax.tree.map(lambda *g: sum(g) / PARTS, *[grads for _, grads, _ in found])
    assert_close(grads, mean, 1e-5)
    np.testing.assert_allclose(loss, np.mean([loss for loss, *_ in found]), rtol=1e-5)
    assert float(statistics.examples) == PARTS * SIZE


def test_arrays_need_a_leading_axis_of_micro_batches() -> None:
    params, batch, layers = problem()
    grad_fn = ng.accumulate(loss_fn, layers)
    uneven = in_parts(batch) | {"where": batch["where"]}
    with pytest.raises(ValueError, match="scans over the leading axis"):
        grad_fn(params, uneven, rng=jax.random.key(0))
    with pytest.raises(ValueError, match="scans over the leading axis"):
        grad_fn(params, in_parts(batch) | {"temperature": 1.0}, rng=jax.random.key(0))
    with pytest.raises(ValueError, match="fisher must be one of"):
        ng.accumulate(loss_fn, layers, fisher="sampled")
