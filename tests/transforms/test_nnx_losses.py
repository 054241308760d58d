"""What runs the loss again, on NNX models: by which spelling, and what stays as it was."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import nnx

import natgrad_jax as ng


class Net(nnx.Module):
    """Two layers; with ``noisy``, batch statistics and random numbers that a call changes."""

    def __init__(self, noisy: bool = False):
        rngs = nnx.Rngs(0)
        self.hidden = nnx.Linear(4, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs) if noisy else None
        self.dropout = nnx.Dropout(0.5, rngs=rngs) if noisy else None
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.tanh(self.hidden(x))
        return self.head(x if self.norm is None else self.dropout(self.norm(x)))


def loss_fn(model: Net, x: jax.Array, y: jax.Array) -> ng.Loss:
    return ng.Categorical(model(x)).nll(y)


X = jax.random.normal(jax.random.key(0), (32, 4))
Y = jax.random.randint(jax.random.key(1), (32,), 0, 3)
MAKERS: dict[str, Callable[[Any, ng.Layers], Any]] = {
    "adaptive_kfac": lambda loss, layers: ng.adaptive_kfac(layers, loss),
    "adaptive_damping": lambda loss, layers: ng.adaptive_damping(
        lambda damping: ng.kfac(0.1, layers, damping=damping, trust_radius=2e-3),
        ng.bernacchia(),
        loss,
    ),
    "scale_by_quadratic_model": lambda loss, layers: optax.chain(
        ng.scale_by_kfac(layers), ng.scale_by_quadratic_model(loss)
    ),
    "clip_by_trust_radius": lambda loss, layers: optax.chain(
        optax.adam(1e-2), ng.clip_by_trust_radius(1e-2, loss)
    ),
}
by_maker = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def of_the_state(model: Net) -> Any:
    """The loss as a function of the parameters alone."""
    graph, _, rest = nnx.split(model, nnx.Param, ...)
    return lambda params, x, y: loss_fn(nnx.merge(graph, params, rest), x, y)


def train(make: Any, given: Callable[[Net], dict[str, Any]], loss: Any) -> list[float]:
    model = Net()
    layers = ng.find_layers(loss_fn, model, X, Y)
    optimizer = nnx.Optimizer(model, make(loss, layers), wrt=nnx.Param)
    grad_fn = ng.value_and_grad(loss_fn, layers)

    @nnx.jit
    def step(model: Net, optimizer: Any, key: jax.Array) -> jax.Array:
        loss, grads, statistics = grad_fn(model, X, Y, rng=key)
        extra = {"value": loss, "args": (X, Y), "grad": grads, **given(model)}
        optimizer.update(model, grads, statistics=statistics, **extra)
        return loss

    return [float(step(model, optimizer, jax.random.key(i))) for i in range(10)]


def value_fn(loss: Any) -> dict[str, Any]:
    return {"value_fn": lambda given: loss(given, X, Y).value}


@by_maker
def test_a_loss_of_the_model_and_one_of_its_parameters_train_alike(make: Any) -> None:
    by_state = of_the_state(Net())
    losses = train(make, lambda model: {"split": nnx.split(model)}, loss_fn)
    assert losses[-1] < losses[0] - 0.05
    for given, loss in (
        (lambda model: {"split": nnx.split(model, nnx.Param, ...), **value_fn(loss_fn)}, loss_fn),
        (lambda model: {}, by_state),
        (lambda model: value_fn(by_state), by_state),
    ):
        np.testing.assert_allclose(train(make, given, loss), losses, rtol=1e-4)


@by_maker
@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (lambda model: {}, TypeError, "given an nnx.State.*raised TypeError.*write"),
        (lambda model: {"split": model}, TypeError, "must be nnx.split.*got Net.*Write"),
        (lambda model: {"args": None}, ValueError, "needs args: write"),
    ],
    ids=["no split", "the model", "no args"],
)
def test_what_to_write_is_told(make: Any, given: Any, error: Any, message: str) -> None:
    call = r" optimizer\.update\(model, grads, .*, split=nnx\.split\(model\)\)"
    with pytest.raises(error, match=f"(?s){message}{call}"):
        train(make, given, loss_fn)


@pytest.mark.parametrize("jit", [nnx.jit, lambda step: step], ids=["jit", "no jit"])
@by_maker
def test_the_model_changes_by_the_gradients_alone(make: Any, jit: Any) -> None:
    """Its batch statistics and rng counts; and no tracer is left in it."""
    model, twin = Net(noisy=True), Net(noisy=True)
    layers = ng.find_layers(loss_fn, model, X, Y)
    optimizer = nnx.Optimizer(model, make(loss_fn, layers), wrt=nnx.Param)
    grad_fn = ng.value_and_grad(loss_fn, layers)

    @jit
    def step(model: Net, optimizer: Any) -> None:
        loss, grads, statistics = grad_fn(model, X, Y, rng=jax.random.key(0))
        optimizer.update(
            model, grads, statistics=statistics, value=loss, args=(X, Y), grad=grads,
            split=nnx.split(model),
        )  # fmt: skip

    step(model, optimizer)
    grad_fn(twin, X, Y, rng=jax.random.key(0))
    rest = nnx.All(nnx.Not(nnx.Param), nnx.Not(nnx.RngKey))  # NumPy does not compare keys
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5)
    jax.tree.map(close, *(nnx.state(m, rest) for m in (model, twin)))
    assert not np.array_equal(model.head.kernel[...], twin.head.kernel[...])


@pytest.mark.parametrize("early", [True, False])
def test_an_early_copy_has_the_dropout_that_the_gradients_had(early: bool) -> None:
    """A small step does what is predicted, unless it is judged on other random numbers."""
    model = Net(noisy=True)
    small = lambda damping: optax.scale(-0.01 + 0 * damping)
    tx = ng.adaptive_damping(small, ng.bernacchia(), loss_fn)
    before = nnx.as_pure(nnx.split(model))
    value, grads = nnx.value_and_grad(lambda model: loss_fn(model, X, Y).value)(model)
    split = before if early else nnx.split(model)
    params = nnx.state(model, nnx.Param)
    _, state = tx.update(grads, tx.init(params), params, value=value, args=(X, Y), split=split)
    assert (abs(float(state.ratio) - 1) < 0.1) == early
