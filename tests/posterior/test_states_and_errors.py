"""States of chains and wrappers, and what is said of input that does not fit."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import natgrad_jax as ng

pytestmark = pytest.mark.once

KEY = jax.random.key(0)
X, Y = jnp.asarray(np.random.default_rng(0).normal(size=(8, 4)), jnp.float32), jnp.arange(8) % 3


def loss_fn(params: Any, x: jax.Array, y: jax.Array) -> ng.Loss:
    h = jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return ng.Categorical(h @ params["head"]["kernel"]).nll(y)


def parameters(width: int = 5) -> Any:
    random = np.random.default_rng(1)
    normal = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
    return {"hidden": {"kernel": normal(4, width), "bias": normal(width)},
            "head": {"kernel": normal(width, 3)}}  # fmt: skip


PARAMS = parameters()
LAYERS = ng.find_layers(loss_fn, PARAMS, X, Y)


@functools.cache
def stepped(make: Callable[[ng.Layers], Any]) -> Any:
    """The state after one step."""
    tx = make(LAYERS)
    state = tx.init(PARAMS)
    _, grads, statistics = jax.jit(ng.value_and_grad(loss_fn, LAYERS))(
        PARAMS, X, Y, rng=KEY, opt_state=state
    )
    return tx.update(grads, state, PARAMS, statistics=statistics)[1]


def kfac(layers: ng.Layers) -> Any:
    return ng.kfac(0.1, layers)


def ekfac(layers: ng.Layers) -> Any:
    return ng.ekfac(0.1, layers)


def both(layers: ng.Layers) -> Any:
    return optax.chain(ng.scale_by_kfac(layers), ng.scale_by_kfac(layers))


def divided(layers: ng.Layers) -> Any:
    """Two optimizers, each for its layer."""
    labels = {"hidden": "a", "head": "b"}
    return optax.partition({"a": kfac(layers), "b": ekfac(layers)}, labels)


def frozen(layers: ng.Layers) -> Any:
    return optax.partition({"a": kfac(layers), "b": optax.set_to_zero()},
                           {"hidden": "b", "head": "a"})  # fmt: skip


@functools.cache
def curvature() -> ng.posterior.Curvature:
    return ng.posterior.from_state(stepped(kfac), LAYERS)


def test_states_of_a_partition_are_put_together() -> None:
    found = ng.posterior.from_state(stepped(divided), LAYERS)
    assert set(found.bases) == {("hidden",), ("head",)}
    whole = ng.posterior.from_state(stepped(kfac), LAYERS)
    solve = lambda c: ng.posterior.solve(c, PARAMS, 0.1)
    np.testing.assert_allclose(
        solve(found)["hidden"]["kernel"], solve(whole)["hidden"]["kernel"], rtol=1e-4
    )


def test_what_is_not_trained_is_constant() -> None:
    found = ng.posterior.from_state(stepped(frozen), LAYERS)
    assert set(found.bases) == {("head",)}
    solved = ng.posterior.solve(found, PARAMS, 0.1)
    assert not solved["hidden"]["kernel"].any() and solved["head"]["kernel"].any()


def test_the_state_of_an_nnx_optimizer() -> None:
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    loss = lambda model, x, y: ng.Categorical(model(x)).nll(y)
    layers = ng.find_layers(loss, model, X, Y)
    optimizer = nnx.Optimizer(model, ng.kfac(0.1, layers), wrt=nnx.Param)
    grad_fn = ng.value_and_grad(loss, layers)
    _, grads, statistics = grad_fn(model, X, Y, rng=KEY, opt_state=optimizer.opt_state)
    optimizer.update(model, grads, statistics=statistics)
    found = ng.posterior.from_state(optimizer.opt_state, layers)
    solved = ng.posterior.solve(found, nnx.state(model, nnx.Param), 0.1)
    assert jnp.isfinite(solved["kernel"][...]).all()


def test_the_record_passes_through_jit_and_vmap() -> None:
    traces = []

    @jax.jit
    def several(c: ng.posterior.Curvature, params: Any, keys: Any) -> Any:
        traces.append(None)
        draw = lambda key: ng.posterior.sample(c, params, key, examples=8, prior_precision=1.0)
        return jax.vmap(draw)(keys)

    for other in (curvature(), jax.tree.map(lambda x: 2 * x, curvature())):
        assert several(other, PARAMS, jax.random.split(KEY, 3))["head"]["kernel"].shape == (3, 5, 3)
    assert len(traces) == 1
    grid = jnp.array([0.1, 1.0, 10.0])
    evidence = jax.vmap(lambda tau: ng.posterior.log_marginal_likelihood(
        curvature(), PARAMS, 1.0, examples=8, prior_precision=tau))(grid)  # fmt: skip
    assert evidence.shape == (3,) and jnp.isfinite(evidence).all()


def test_low_precision_parameters_keep_their_dtype() -> None:
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    layers = ng.find_layers(loss_fn, params, X, Y)
    found = ng.posterior.from_data(loss_fn, params, [(X, Y)], layers, rng=KEY)
    drawn = ng.posterior.sample(found, params, KEY, examples=8, prior_precision=1.0)
    assert {x.dtype for x in jax.tree.leaves(drawn)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("make", [kfac, ekfac])
def test_under_jit_what_was_never_measured_is_nan(make: Any) -> None:
    def solved(state: Any) -> Any:
        return ng.posterior.solve(ng.posterior.from_state(state, LAYERS), PARAMS, 0.1)

    never = jax.jit(solved)(make(LAYERS).init(PARAMS))
    assert all(jnp.isnan(x).all() for x in jax.tree.leaves(never))
    known = jax.jit(solved)(stepped(make))
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(known))


def from_data(*, batches: Any = ((X, Y),), layers: Any = LAYERS, **kwargs: Any) -> Any:
    return ng.posterior.from_data(loss_fn, PARAMS, batches, layers, **{"rng": KEY, **kwargs})


def sample(params: Any = PARAMS, rng: Any = KEY, **kwargs: Any) -> Any:
    numbers = {"examples": 8, "prior_precision": 1.0, **kwargs}
    return ng.posterior.sample(curvature(), params, rng, **numbers)


def influence(train_args: Any) -> Any:
    return ng.posterior.influence(curvature(), loss_fn, PARAMS, (X, Y), train_args, 0.1)


def prong(layers: ng.Layers) -> Any:
    return ng.prong(0.1, layers)


WIDE = ng.find_layers(loss_fn, parameters(6), X, Y)
BAD = {
    "another optimizer": (lambda: ng.posterior.from_state(optax.adam(1.0).init(PARAMS), LAYERS),
                          "no factors of the Fisher.*kfac.*from_data"),
    "whitening": (lambda: ng.posterior.from_state(prong(LAYERS).init(PARAMS), LAYERS),
                  "no factors of the Fisher"),
    "before the first step": (lambda: ng.posterior.from_state(kfac(LAYERS).init(PARAMS), LAYERS),
                              "not measured hidden yet.*at least one step.*from_data"),
    "two states": (lambda: ng.posterior.from_state(stepped(both), LAYERS),
                   "several states.*one of them"),
    "other layers": (lambda: ng.posterior.from_state(stepped(kfac), WIDE),
                     "factors of head that do not fit.*Layers that its transformation"),
    "fewer layers": (lambda: ng.posterior.from_state(
        stepped(kfac), LAYERS.select(lambda path, _: "head" in path)), "of hidden.*do not fit"),
    "another model": (lambda: sample(parameters(6)), r"hidden/kernel.*\(4, 5\).*\(4, 6\)"),
    "a missing layer": (lambda: ng.posterior.solve(curvature(), {"head": PARAMS["head"]}, 0.1),
                        "no such parameter.*select"),
    "negative precision": (lambda: sample(prior_precision=-1.0), "prior_precision.*negative.*-1"),
    "negative temperature": (lambda: sample(temperature=-1.0), "temperature.*negative.*-1"),
    "no examples": (lambda: sample(examples=0), "examples must be positive"),
    "no key": (lambda: sample(rng=3), "rng must be one key"),
    "negative damping": (lambda: ng.posterior.solve(curvature(), PARAMS, -0.1),
                         "damping.*negative"),
    "no precision": (lambda: ng.posterior.log_marginal_likelihood(
        curvature(), PARAMS, 1.0, examples=8, prior_precision=0.0), "prior_precision.*positive"),
    "negative N": (lambda: ng.posterior.log_determinant(
        curvature(), examples=-8, prior_precision=1.0), "examples must be positive"),
    "nothing there": (lambda: ng.posterior.select(curvature(), "tail"),
                      "'tail'.*it has hidden, head"),
    "a part of a layer": (lambda: ng.posterior.select(curvature(), "hidden/bias"),
                          'hidden/bias is a part of layer hidden.*"hidden"'),
    "unknown kind": (lambda: from_data(kind="full"), "'kfac', 'ekfac', 'diagonal'; got 'full'"),
    "a generator twice": (lambda: from_data(kind="ekfac", batches=iter([(X, Y)])),
                          "twice.*list_iterator.*list\\(batches\\)"),
    "no batches": (lambda: from_data(batches=[]), "no batches"),
    "a batch alone": (lambda: from_data(batches=(X, Y)), "tuple of loss_fn's arguments.*got Array"),
    "no key for labels": (lambda: from_data(rng=None), 'fisher="mc" and rng=None.*rng=key'),
    "no Fisher": (lambda: from_data(fisher="none"), 'fisher="none"'),
    "unknown Fisher": (lambda: from_data(fisher="true"), "fisher must be one of"),
    "no layers": (lambda: from_data(layers=PARAMS), "find_layers"),
    "unequal examples": (lambda: influence((X, Y[:3])), "leading axis.*8, 4.*3"),
    "a shared number": (lambda: influence((X, 1.0)), "leading axis.*Put into loss_fn"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_told(name: str) -> None:
    call, message = BAD[name]
    with pytest.raises((ValueError, TypeError), match=f"(?s){message}"):
        call()


def test_the_good_calls_of_this_file_pass() -> None:
    assert jnp.isfinite(influence((X, Y))).all()
    assert from_data().eigenvalues.keys() == LAYERS.keys()
    assert jnp.isfinite(sample()["head"]["kernel"]).all()
