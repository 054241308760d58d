"""Statistics of a part of the batch: the loss of every k-th example alone."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
import zoo_of_others
import zoo_of_others_derivatives
from jax.extend import core

import natgrad_jax as ng
from natgrad_jax.statistics.fewer_examples import Measured, on_all, on_few
from natgrad_jax.statistics.plan import make_plan
from natgrad_jax.tagging.tagged import tag
from natgrad_jax.tracing import model
from natgrad_jax.tracing.trace import trace

CASES = zoo.CASES + zoo_of_others.CASES + zoo_of_others_derivatives.CASES
# examples depend on one another, or the loss takes no other number of them
WHOLE = ("batch norm", "ResNet", "dispatched", "ragged", "masked kernel", "conditional")
N, K = 12, 3
PARAMS = {"w": jnp.ones((4, 2)), "z": jnp.ones((N, 4))}


def pair(problem: Any, stride: int) -> tuple[Measured, Measured]:
    """What is measured of all examples and of every k-th."""
    tree, rest = model.split(problem.params)
    again = lambda args: trace(problem.loss_fn, tree, rest, args, problem.has_aux)
    tagged = tag(again(problem.args), model.parameters_of(tree))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ng.UncoveredWarning)
        layers = ng.find_layers(problem.loss_fn, problem.params, *problem.args)
    batch = on_all(tagged, make_plan(layers, None, "mc")._replace(stride=stride))
    return batch, on_few(batch, problem.args, again)


def outputs(measured: Measured) -> list[dict[str, jax.Array]]:
    """Of each term of the loss."""
    traced = measured.tagged.traced
    values = jax.jit(core.jaxpr_as_fun(traced.jaxpr))(*traced.inputs)
    return [{name: values[at] for name, at in own.items()} for own in traced.outputs]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_outputs_of_few_are_those_among_all(case: Any) -> None:
    batch, few = pair(case.make(), 2)
    if any(word in case.name for word in WHOLE):
        assert few is batch
        return
    assert few.times == 2
    terms = zip(outputs(batch), outputs(few), batch.tagged.terms, strict=True)
    for whole, part, term in terms:
        for name, x in whole.items():
            wanted = jnp.take(x, jnp.arange(0, x.shape[term.examples], 2), term.examples)
            assert part[name].shape == wanted.shape
            if "dropout in scan" not in case.name:  # masks are drawn anew
                np.testing.assert_allclose(part[name], wanted, rtol=1e-5, atol=1e-6)


class Own(NamedTuple):
    """Parameters, and a loss of arguments; ``cut``: whether fewer examples can be given."""

    loss_fn: Callable[..., ng.Loss]
    args: tuple[Any, ...]
    cut: bool
    params: Any = PARAMS
    has_aux: bool = False


x, ids = jnp.arange(4.0 * N).reshape(N, 4) / N, jnp.arange(N) % 5
table = jnp.ones((N, 4)) * jnp.arange(N)[:, None]  # as many rows as there are examples
held = jnp.arange(N) / N
gaussian = lambda mean: ng.Gaussian(mean).nll(jnp.zeros_like(mean))
OWN = {
    "words looked up in an argument": Own(
        lambda p, ids, table: gaussian(table[ids] @ p["w"]), (ids, table), True
    ),
    "examples on the second axis": Own(
        lambda p, x: gaussian(jnp.moveaxis(x, 1, 0) @ p["w"]), (x.T,), True
    ),
    "examples and positions on one axis": Own(
        lambda p, x: gaussian((x @ p["w"]).reshape(N // 3 if len(x) == N else -1, 3, 2)), (x,), True
    ),
    "a key": Own(
        lambda p, x, key: gaussian((x + jax.random.normal(key, x.shape)) @ p["w"]),
        (x, jax.random.key(0)),
        True,
    ),
    "weights and labels": Own(
        lambda p, x, y, w: ng.Categorical(x @ p["w"]).nll(y, where=w),
        (x, ids % 2, jnp.arange(1.0, 1 + N)),
        True,
    ),
    "the batch's mean": Own(lambda p, x: gaussian((x - x.mean(0)) @ p["w"]), (x,), False),
    "the mean of another argument": Own(
        lambda p, x, c: gaussian((x + c.mean(0)) @ p["w"]), (x, 2 * x), True
    ),
    "a constant for each example": Own(
        lambda p, x: gaussian((x * held[: len(x), None]) @ p["w"]), (x,), False
    ),
    "a count of examples": Own(
        lambda p, x: gaussian((x * jnp.arange(len(x))[:, None]) @ p["w"]), (x,), False
    ),
    "a parameter for each example": Own(
        lambda p, x: gaussian((x + p["z"][: len(x)]) @ p["w"]), (x,), False
    ),
    "no arguments": Own(lambda p: gaussian(x @ p["w"]), (), False),
    "a number of examples that is fixed": Own(
        lambda p, x: gaussian(x.reshape(N, 4) @ p["w"]), (x,), False
    ),
}


@pytest.mark.parametrize("own", OWN.values(), ids=OWN)
def test_what_holds_examples_is_cut_and_nothing_else(own: Own) -> None:
    batch, few = pair(own, K)
    assert (few is not batch) == own.cut
    random = any(jnp.issubdtype(a.dtype, jax.dtypes.prng_key) for a in own.args)
    if own.cut and not random:
        for whole, part in zip(outputs(batch), outputs(few), strict=True):
            for name in part:
                np.testing.assert_allclose(part[name], whole[name][::K], rtol=1e-6)


class Net(nn.Module):
    """Words with attention, a norm and a head."""

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        h = nn.Embed(5, 4)(ids) + self.param("positions", nn.initializers.normal(1.0), (3, 4))
        h = h + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(h))
        return nn.Dense(5)(h)


@pytest.mark.parametrize("name", ["kfac", "ekfac"])
@pytest.mark.parametrize("fisher", ["mc", "exact"])
def test_statistics_are_those_of_the_part_times_k(name: str, fisher: str, float64: None) -> None:
    net, words = Net(), jax.random.randint(jax.random.key(0), (N, 3), 0, 5)
    params = jax.tree.map(lambda a: a.astype(float), net.init(jax.random.key(1), words)["params"])
    loss_fn = lambda p, x: ng.Categorical(net.apply({"params": p}, x)).nll((x + 1) % 5)
    layers = ng.find_layers(loss_fn, params, words)
    grad_fn = ng.value_and_grad(loss_fn, layers, fisher=fisher)
    make = partial(getattr(ng, f"scale_by_{name}"), layers)

    @jax.jit
    def measured(words: jax.Array, state: Any) -> Any:
        _, grads, statistics = grad_fn(params, words, rng=jax.random.key(2), opt_state=state)
        return grads, statistics

    state = make(statistics_fraction=1 / K).init(params)
    grads, some = measured(words, state)
    _, alone = measured(words[::K], make(statistics_period=1).init(params))
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12),
        grads,
        jax.grad(lambda p: loss_fn(p, words).value)(params),
    )
    assert some.examples == 3 * N and alone.examples == 3 * N / K
    for ours, wanted in zip(
        jax.tree.leaves((some.sums, some.moments)),
        jax.tree.leaves((alone.sums, alone.moments)),
        strict=True,
    ):
        np.testing.assert_allclose(ours, K * wanted, rtol=1e-9, atol=1e-9)
