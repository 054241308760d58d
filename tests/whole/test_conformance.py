"""One suite over every transformation: what optax, jit and unusual inputs may expect of each."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from transformations import (
    BASE,
    TABLE,
    Batch,
    Jitted,
    Poison,
    Setting,
    asks,
    assert_types_stay,
    batch,
    compiled,
    finite,
    fresh,
    layers_for,
    run_steps,
    setting,
    setting_nnx,
    signature,
    stepper,
)

import natgrad_jax as ng
from natgrad_jax.reparametrization.coordinates import CHOICES
from natgrad_jax.state.walk import states

KEY = jax.random.key(0)
each_row = pytest.mark.parametrize("name", TABLE)
each_base = pytest.mark.parametrize("name", BASE)
HALF = (jnp.bfloat16, jnp.float16)


def test_the_table_has_every_transformation() -> None:
    def makes_one(x: Any) -> bool:
        if not inspect.isfunction(x):
            return False
        return inspect.signature(x).return_annotation is optax.GradientTransformationExtraArgs

    public = {name for name in ng.__all__ if makes_one(getattr(ng, name))}
    assert public == {name.split(",")[0] for name in BASE}
    assert {f"in_coordinates, {choice}" for choice in CHOICES} <= set(TABLE)


@each_row
def test_types_stay(name: str) -> None:
    for dtype in (jnp.float32, *HALF):
        s = setting(dtype)
        assert_types_stay(TABLE[name].make(s), s)


@each_row
def test_types_stay_in_double_precision(name: str, float64: None) -> None:
    for dtype in (jnp.float32, jnp.float64):
        s = setting(dtype)
        assert_types_stay(TABLE[name].make(s), s)


@each_row
def test_init_takes_shapes(name: str) -> None:
    s = setting()
    tx = TABLE[name].make(s)
    assert signature(tx.init(jax.eval_shape(lambda: s.params))) == signature(tx.init(s.params))


@each_row
def test_training_compiles_once_and_takes_donated_memory(name: str) -> None:
    """Every parameter moves, and everything that is donated is written in place."""
    s = setting()
    tx = TABLE[name].make(s)
    step = Jitted(stepper(tx, s), donate_argnums=(0, 1))
    params, state = fresh(s.params), tx.init(s.params)
    buffers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((params, state)) if x.size]
    assert len(set(buffers)) == len(buffers), "two leaves in one buffer cannot be donated"
    for i in range(3):
        given = jax.tree.leaves((params, state))
        params, state, _, loss = step(params, state, batch(i), jax.random.key(i), Poison())
        assert finite((params, state, loss))
        # all but numbers that are not read, as the damping of the last step
        assert all(x.is_deleted() for x in given if x.ndim)
    assert step.traces == 1
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), params, s.params)
    assert all(jax.tree.leaves(moved)), moved
    lowered = step.jitted.lower(params, state, batch(), KEY, Poison())
    donated = sum(x.nbytes for x in jax.tree.leaves((params, state)) if x.ndim)
    assert lowered.compile().memory_analysis().alias_size_in_bytes >= donated


@each_row
def test_no_gradient_is_no_step(name: str) -> None:
    """No example counts: nothing is measured, and at first nothing moves but by weight decay."""
    s, state, step = compiled(name)
    nothing = batch()._replace(weights=jnp.zeros_like(batch().weights))
    _, later, updates, loss = step(s.params, state, nothing, KEY, Poison())
    assert finite((updates, later)) and float(loss) == 0
    if "weight decay" not in name:
        assert not any(np.any(x) for x in jax.tree.leaves(updates))
    _, trained, *_ = step(s.params, state, batch(), KEY, Poison())
    _, later, updates, _ = step(s.params, trained, nothing, KEY, Poison())
    assert finite((updates, later))
    assert step.traces == 1


@each_base
def test_gradients_that_vanish_at_a_curved_point_give_a_small_step(name: str) -> None:
    """Targets that are the predictions: no slope, and statistics as elsewhere."""
    s, state, step = compiled(name)
    own = batch()
    logits = lambda params: s.loss_fn(params, own).terms[0].distribution.logits
    calm = own._replace(y=jax.nn.softmax(logits(s.params)))
    _, later, updates, _ = step(s.params, state, calm, KEY, Poison())
    assert finite((updates, later))
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(updates)) < 0.2


@each_base
def test_seeds_vmap_and_steps_scan(name: str, float64: None) -> None:
    """In double precision: SOAP normalizes rounding errors along what logits do not depend on."""
    s, steps, seeds = setting(jnp.float64), 3, 2
    tx = TABLE[name].make(s)
    step = Jitted(stepper(tx, s))
    batches = jax.tree.map(lambda *x: jnp.stack(x), *(batch(i) for i in range(steps)))
    keys = jax.random.split(KEY, (seeds, steps))
    start = [jax.tree.map(lambda x, k=k: x * (1 + k), s.params) for k in range(seeds)]

    def run(params: Any, keys: Any) -> Any:
        def body(carry: Any, given: Any) -> Any:
            params, state, _, loss = stepper(tx, s)(*carry, *given, Poison())
            return (params, state), loss

        return jax.lax.scan(body, (params, tx.init(params)), (batches, keys))

    (ends, _), losses = jax.jit(jax.vmap(run))(jax.tree.map(lambda *x: jnp.stack(x), *start), keys)
    for k, params in enumerate(start):
        own = tx.init(params)
        for i in range(steps):
            params, own, _, loss = step(params, own, batch(i), keys[k, i], Poison())
            np.testing.assert_allclose(losses[k, i], loss, rtol=1e-6)
        end = jax.tree.map(lambda x, k=k: x[k], ends)
        chex.assert_trees_all_close(end, params, rtol=1e-6, atol=1e-7)


@each_base
@pytest.mark.parametrize(
    "dtype, examples", [(jnp.bfloat16, 8), (jnp.float16, 1)], ids=["bfloat16", "float16, one"]
)
def test_half_precision_and_a_single_example_train(name: str, dtype: Any, examples: int) -> None:
    s = setting(dtype)
    batches = [batch(i, examples) for i in range(2)]
    params, _, _ = run_steps(TABLE[name].make(s), s, batches)
    assert all(x.dtype == dtype for x in jax.tree.leaves(params))
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), params, s.params)
    assert all(jax.tree.leaves(moved)), moved


@each_base
def test_double_precision_trains(name: str, float64: None) -> None:
    s = setting(jnp.float64)
    params, _, _ = run_steps(TABLE[name].make(s), s, [batch(), batch(1)])
    assert all(x.dtype == jnp.float64 for x in jax.tree.leaves(params))


# ----------------------------------------------------------------------------- who takes the steps


def by_train_state(name: str) -> tuple[Any, Callable[..., Any], Callable[[Any], Any]]:
    s = setting()
    state = ng.TrainState.create(apply_fn=None, params=s.params, tx=TABLE[name].make(s))
    grad_fn = ng.value_and_grad(s.loss_fn, layers_for(state.opt_state, s))

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(state: Any, own: Batch, key: jax.Array) -> Any:
        asking = asks(state.opt_state)
        loss, grads, statistics = grad_fn(state.params, own, rng=key, opt_state=asking)
        return state.apply_gradients(
            grads=grads, statistics=statistics, value=loss, grad=grads, args=(own,)
        )

    return state, step, lambda state: state.params


def by_nnx_optimizer(name: str) -> tuple[Any, Callable[..., Any], Callable[[Any], Any]]:
    s = setting_nnx()
    optimizer = nnx.Optimizer(s.params, TABLE[name].make(s), wrt=nnx.Param)
    grad_fn = ng.value_and_grad(s.loss_fn, layers_for(optimizer.opt_state, s))

    @nnx.jit
    @chex.assert_max_traces(n=1)
    def step(both: Any, own: Batch, key: jax.Array) -> Any:
        model, optimizer = both
        asking = asks(optimizer.opt_state)
        loss, grads, statistics = grad_fn(model, own, rng=key, opt_state=asking)
        optimizer.update(
            model, grads, statistics=statistics, value=loss, grad=grads, args=(own,),
            split=nnx.split(model),
        )  # fmt: skip
        return model, optimizer

    pure = lambda both: nnx.to_pure_dict(nnx.state(both[0], nnx.Param))
    return (s.params, optimizer), step, pure


@functools.cache
def after_plain_steps(name: str) -> Any:
    s, state, step = compiled(name)
    params = s.params
    for i in range(3):
        params, state, *_ = step(params, state, batch(i), jax.random.key(i), Poison())
    return params


@each_row
@pytest.mark.parametrize("driver", [by_train_state, by_nnx_optimizer])
def test_whoever_takes_the_steps_they_are_those_of_plain_optax(driver: Any, name: str) -> None:
    """Flax's holders of parameters compile once too, and need no more than the batch."""
    chex.clear_trace_counter()
    carry, step, params_of = driver(name)
    for i in range(3):
        carry = step(carry, batch(i), jax.random.key(i))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, params_of(carry), after_plain_steps(name))


# ------------------------------------------------------------------------------ optax's wrappers

MASK = {"norm": {"scale": False}, "head": {"kernel": True, "bias": True}}
LABELS = {"norm": {"scale": "other"}, "head": {"kernel": "own", "bias": "own"}}


def injected(name: str, s: Setting) -> Any:
    row = TABLE[name]
    return optax.inject_hyperparams(row.factory, static_args=row.static)(**row.given(s))


WRAPPERS = {
    "chain": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx, optax.scale(0.5)),
    "masked": lambda tx: optax.masked(tx, MASK),
    "partition": lambda tx: optax.partition({"own": tx, "other": optax.adam(1e-3)}, LABELS),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
}


@each_row
def test_wrappers_keep_types_and_the_state_can_be_read(name: str) -> None:
    s = setting()
    wrapped = [wrap(TABLE[name].make(s)) for wrapper, wrap in WRAPPERS.items()
               if not (TABLE[name].whole and wrapper in ("masked", "partition"))]  # fmt: skip
    for tx in (*wrapped, injected(name, s)):
        state = assert_types_stay(tx, s)
        for own in states(state):
            if isinstance(own, ng.ExactNGDState):  # it has no factors
                assert ng.damping(state).shape == ()
                continue
            assert set(ng.factors(state)) == set(ng.bases(state)) == set(own.factors)


@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if row.whole])
@pytest.mark.parametrize("wrapper", ["masked", "partition"])
def test_what_runs_the_loss_says_that_it_needs_every_parameter(name: str, wrapper: str) -> None:
    s = setting()
    with pytest.raises(ValueError, match=r"(?s)needs all parameters.*optax\.masked"):
        assert_types_stay(WRAPPERS[wrapper](TABLE[name].make(s)), s)


# ------------------------------------------------------------------------- layers that are special


WITH_LAYERS = [name for name, row in BASE.items() if "layers" in row.given(setting())]


@pytest.mark.parametrize("name", WITH_LAYERS)
def test_frozen_parts_stay(name: str) -> None:
    """Also under weight decay, where the transformation has one."""
    s = setting()
    s = s._replace(layers=s.layers.replace(("norm",), "frozen").replace("*/bias", "frozen"))
    row = TABLE[name]
    decays = "weight_decay" in inspect.signature(row.factory).parameters
    tx = row.factory(**row.given(s), **({"weight_decay": 0.1} if decays else {}))
    params, _, _ = run_steps(tx, s, [batch(), batch(1)])
    same = jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), params, s.params)
    assert same == {"norm": {"scale": True}, "head": {"kernel": False, "bias": True}}


@pytest.mark.parametrize("name", WITH_LAYERS)
def test_a_model_without_layers_trains(name: str) -> None:
    """All parameters left over, to the diagonal of the Fisher or to the plain gradient."""
    s = setting()
    s = s._replace(layers=s.layers.select(lambda *_: False).replace(("norm",), "gradient"))
    assert len(s.layers) == 0
    run_steps(TABLE[name].make(s), s, [batch(), batch(1)])


@each_row
def test_no_parameters_at_all_are_no_error(name: str) -> None:
    loss_fn = lambda params, own: ng.Categorical(jnp.zeros_like(own.y)).nll(own.y)
    s = Setting({}, ng.Layers({}), loss_fn)
    assert_types_stay(TABLE[name].make(s), s)


@functools.cache
def narrow() -> Setting:
    """A layer of no inputs, one of no outputs, and a head that sees neither."""

    def loss_fn(params: Any, own: Batch) -> ng.Loss:
        dense = functools.partial(nn.Dense, kernel_init=nn.initializers.zeros)
        none = dense(2, use_bias=False).apply({"params": params["none"]}, own.x[:, :0])
        gone = dense(0).apply({"params": params["gone"]}, own.x)
        logits = nn.Dense(3).apply({"params": params["head"]}, jnp.hstack([none, gone, own.x]))
        return ng.Categorical(logits).nll(own.y)

    ones = jnp.ones
    params = {
        "none": {"kernel": ones((0, 2))},
        "gone": {"kernel": ones((4, 0)), "bias": ones(0)},
        "head": {"kernel": ones((6, 3)), "bias": ones(3)},
    }
    return Setting(params, ng.find_layers(loss_fn, params, batch()), loss_fn)


@each_base
def test_layers_of_no_size_do_no_harm(name: str) -> None:
    s = narrow()
    run_steps(TABLE[name].make(s), s, [batch(), batch(1)])
