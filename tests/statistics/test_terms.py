"""Losses of several terms: each counts its own examples, whatever batch they are in."""

import functools
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from transformations import Jitted

import natgrad_jax as ng
from natgrad_jax.statistics import plan as planning

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("float64")]

SIZES = (7, 12, 5)  # of the batches of one task each
TOKENS, WIDTH = 3, 4


class Block(nn.Module):
    @nn.compact
    def __call__(self, h: jax.Array, _: Any) -> Any:
        return h + nn.tanh(nn.Dense(WIDTH, name="dense")(h)), None


class Trunk(nn.Module):
    """An embedding used twice, a stack, a normalization and a convolution, under three heads."""

    @nn.compact
    def __call__(self, ids: jax.Array) -> Any:
        embed = nn.Embed(5, WIDTH, name="embed")
        scan = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        h, _ = scan(name="stack")(embed(ids), None)
        h = nn.LayerNorm(name="norm")(nn.tanh(nn.Conv(WIDTH, (2,), name="conv")(h)))
        return (
            embed.attend(h),
            nn.Dense(2, name="mean")(h.mean(1)),
            nn.Dense(1, name="own")(h[:, 0]),
        )


NET = Trunk()


def terms(params: Any, ids: jax.Array, task: jax.Array) -> list[ng.Loss]:
    logits, mean, own = NET.apply({"params": params}, ids)
    return [
        0.5 * ng.Categorical(logits).nll(ids, where=(task == 0)[:, None]),
        ng.Gaussian(mean, jnp.array([0.3, 0.7])).nll(jnp.ones_like(mean), where=task == 1),
        2.0 * ng.Bernoulli(own).nll(jnp.ones_like(own), where=task == 2),
    ]


def in_order(order: tuple[int, ...]) -> Callable[..., ng.Loss]:
    def loss_fn(params: Any, *batch: Any) -> ng.Loss:
        found = terms(params, *batch)
        first, *rest = (found[i] for i in order)
        return sum(rest, first)

    return loss_fn


def whole_batch() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    ids = random.integers(5, size=(sum(SIZES), TOKENS))
    return ids, np.repeat(np.arange(3), SIZES)


def one_task_batches() -> list[tuple[np.ndarray, np.ndarray]]:
    ends = [0, *itertools.accumulate(SIZES)]
    return [tuple(x[a:b] for x in whole_batch()) for a, b in itertools.pairwise(ends)]


@functools.cache
def start() -> Any:
    params = jax.jit(NET.init)(jax.random.key(0), whole_batch()[0])["params"]
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)


def layers_of(loss_fn: Any) -> ng.Layers:
    return ng.find_layers(loss_fn, start(), *whole_batch())


def added(found: list[Any]) -> Any:
    first, *rest = found
    for one in rest:
        first = jax.tree.map(jnp.add, first, one)
    return first


def two_updates(make: Any, loss_fn: Any, separate: bool) -> Any:
    """The second update, after statistics of the whole batch, or of its tasks one after another."""
    params, layers = start(), layers_of(loss_fn)
    tx, grad_fn = make(layers), ng.value_and_grad(loss_fn, layers, fisher="exact")
    state, updates = tx.init(params), None

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        _, grads, statistics = grad_fn(params, *whole_batch(), opt_state=state)
        if separate:
            statistics = added(
                [grad_fn(params, *b, opt_state=state)[2] for b in one_task_batches()]
            )
        updates, state = tx.update(grads, state, params, statistics=statistics)
        return optax.apply_updates(params, updates), state, updates

    for _ in range(2):
        params, state, updates = step(params, state)
    assert not any(int(s.rejected) for s in jax.tree.leaves(state, is_leaf=_is_ours) if _is_ours(s))
    return updates


def _is_ours(x: Any) -> bool:
    return hasattr(x, "rejected")


EVERY = {"statistics_period": 1, "refresh_period": 1}
MAKE = {
    "kfac": lambda layers: ng.kfac(0.1, layers, inverse="cholesky", **EVERY),
    "kfac, reduce, groups": lambda layers: ng.kfac(
        0.1, layers, approximation=ng.Approximation(group_size=2, weight_sharing="reduce"), **EVERY
    ),
    "ekfac": lambda layers: ng.ekfac(
        0.1,
        layers.replace(("embed",), "frozen"),
        basis="eigh",
        **EVERY,  # its S is of squared sums
    ),
    "ngd": lambda layers: ng.ngd(0.1, layers),
    "both sides": lambda layers: ng.in_coordinates(optax.sgd(0.1), layers, "both_sides", **EVERY),
    "prong": lambda layers: ng.prong(0.1, layers, **EVERY),
}


@pytest.mark.parametrize("name", MAKE)
def test_statistics_of_the_tasks_add_to_those_of_the_batch_in_every_order(name: str) -> None:
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
    right = two_updates(MAKE[name], in_order((0, 1, 2)), separate=False)
    every = itertools.permutations(range(3))
    for order in every if name == "kfac" else [(2, 0, 1)]:
        jax.tree.map(close, two_updates(MAKE[name], in_order(order), separate=True), right)


def test_micro_batches_of_one_task_each_add_to_the_batch() -> None:
    loss_fn = in_order((0, 1, 2))
    layers, (ids, task) = layers_of(loss_fn), whole_batch()
    order = np.argsort(np.arange(24) % 4, kind="stable")
    ids, task = ids[order], task[order]
    whole = jax.jit(ng.value_and_grad(loss_fn, layers, fisher="exact"))(start(), ids, task)
    parts = jax.jit(ng.accumulate(loss_fn, layers, fisher="exact"))(
        start(), ids.reshape(4, 6, TOKENS), task.reshape(4, 6)
    )
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
    jax.tree.map(close, whole, parts)


def test_a_layer_keeps_what_the_terms_that_reach_it_have() -> None:
    layers = layers_of(in_order((0, 1, 2)))
    assert [t.distribution for t in layers.terms] == ["Categorical", "Gaussian", "Bernoulli"]
    assert {path[0]: layer.terms for path, layer in layers.items()} == {
        "embed": (0, 1, 2), "stack": (0, 1, 2), "norm": (0, 1, 2), "conv": (0, 1, 2),
        "mean": (1,), "own": (2,),
    }  # fmt: skip


def test_what_is_measured_is_the_fisher_of_the_loss() -> None:
    """A full block is it, whatever share of the examples each term has; so is the trace of S."""
    loss_fn = in_order((1, 0, 2))
    layers, params = layers_of(loss_fn), start()
    tx = ng.ekfac(0.1, layers.replace(("embed",), "frozen"), basis="eigh", decay=0.0, **EVERY)
    grad_fn = ng.value_and_grad(loss_fn, layers, fisher="exact")
    state = tx.init(params)

    @jax.jit
    def step(state: Any) -> Any:
        _, grads, statistics = grad_fn(params, *whole_batch(), opt_state=state)
        return tx.update(grads, state, params, statistics=statistics)[1]

    state = step(step(state))
    right = jax.jit(functools.partial(ng.fisher, loss_fn, layers=layers))(params, *whole_batch())
    by_unit = right["norm",].reshape(2, WIDTH, 2, WIDTH).transpose(1, 0, 3, 2)
    np.testing.assert_allclose(
        ng.factors(state)["norm",].A, by_unit.reshape(2 * WIDTH, -1), rtol=1e-9, atol=1e-12
    )
    for path in [("stack", "dense"), ("conv",), ("mean",), ("own",)]:
        np.testing.assert_allclose(state[0].moments[path].sum(), right[path].trace(), rtol=1e-9)


def test_a_batch_without_a_task_leaves_its_curvature_where_it_is() -> None:
    loss_fn = in_order((0, 1, 2))
    layers, params = layers_of(loss_fn), start()
    for make in (MAKE["kfac"], MAKE["ekfac"],
                 lambda x: ng.ekfac(0.1, x, moments="running_average", **EVERY)):  # fmt: skip
        tx, grad_fn = make(layers), ng.value_and_grad(loss_fn, layers, fisher="exact")
        state = tx.init(params)
        step = jax.jit(lambda state, *b, tx=tx, grad_fn=grad_fn: tx.update(
            *(lambda out: (out[1], state))(out := grad_fn(params, *b, opt_state=state)),
            params, statistics=out[2])[1])  # fmt: skip
        before = step(step(state, *whole_batch()), *whole_batch())
        after = step(before, *one_task_batches()[0])
        own = lambda state: next(s for s in state if _is_ours(s))
        for field in ("factors", "weights", "moments", "moment_weights"):
            values = [getattr(own(s), field, {}).get(("mean",)) for s in (before, after)]
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-12, 1e-14), *values)
        shares = [own(s).factors[("conv",)].shares.G for s in (before, after)]
        np.testing.assert_array_equal(shares[0][1:], shares[1][1:])  # absent
        weights = [own(s).factors[("conv",)].weights for s in (before, after)]
        assert (weights[0] < weights[1]).tolist() == [True, False, False]
        assert int(own(after).rejected) == 0


def first_factors(tx: Any, layers: ng.Layers, loss_fn: Any, batch: Any, params: Any) -> Any:
    grad_fn, state = ng.value_and_grad(loss_fn, layers, fisher="exact"), tx.init(params)
    _, grads, statistics = grad_fn(params, *batch, opt_state=state)
    return ng.factors(tx.update(grads, state, params, statistics=statistics)[1])


def balanced(factors: Any) -> list[jax.Array]:
    """Each times the other's trace: a Kronecker product is one however its scale is divided."""
    own = (factors.A, factors.G)
    traces = [1 if x is None else x.sum() if x.ndim == 1 else jnp.einsum("...ii->", x) for x in own]
    pairs = zip(own, traces[::-1], strict=True)
    return [x * other for x, other in pairs if x is not None]


@pytest.mark.parametrize("name", ["kfac", "both sides"])
@pytest.mark.parametrize("task", range(3))
def test_a_batch_of_one_task_is_measured_as_by_its_own_loss(name: str, task: int) -> None:
    batch = one_task_batches()[task]
    found = []
    for loss_fn in (in_order((0, 1, 2)), in_order((task,))):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ng.UncoveredWarning)
            layers = layers_of(loss_fn)
        measured = functools.partial(first_factors, MAKE[name](layers), layers, loss_fn, batch)
        factors = jax.jit(measured)(start())
        kept = found[0] if found else [p for p in factors if task in layers[p].terms]
        found.append({path: balanced(f) for path, f in factors.items() if path in kept})
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
    jax.tree.map(close, *found)


def test_a_task_that_was_absent_when_due_is_measured_when_it_comes() -> None:
    """Tasks in turn, at a period that one of them never falls on."""
    loss_fn = in_order((0, 1, 2))
    layers, params = layers_of(loss_fn), start()
    tx, grad_fn = ng.kfac(0.1, layers, statistics_period=3), ng.value_and_grad(loss_fn, layers)
    state = tx.init(params)

    @Jitted
    def step(params: Any, state: Any, ids: Any, task: Any, key: Any) -> Any:
        _, grads, statistics = grad_fn(params, ids, task, rng=key, opt_state=state)
        updates, state = tx.update(grads, state, params, statistics=statistics)
        return optax.apply_updates(params, updates), state, statistics.examples

    ids, _ = whole_batch()
    seen = []
    for i in range(9):
        task = jnp.full(len(ids), i % 3)
        params, state, examples = step(params, state, ids, task, jax.random.key(i))
        seen.append([float(x) for x in examples])
    assert step.traces == 1
    assert np.array(seen).sum(0).tolist() == [72.0 * TOKENS, 72.0, 72.0]
    factors = ng.factors(state)
    assert all(np.any(f.G) for f in factors.values() if f.G is not None)


def test_models_that_share_nothing_share_a_pass() -> None:
    def loss_fn(params: Any, x: jax.Array) -> ng.Loss:
        one = nn.Dense(3).apply({"params": params["one"]}, x)
        other = nn.Dense(2).apply({"params": params["other"]}, x)
        return ng.Gaussian(one).nll(x[:, :3]) + ng.Gaussian(other).nll(x[:, :2])

    x = jnp.ones((6, 4))
    params = {"one": nn.Dense(3), "other": nn.Dense(2)}
    params = {k: m.init(jax.random.key(0), x)["params"] for k, m in params.items()}
    layers = ng.find_layers(loss_fn, params, x)
    assert planning.make_plan(layers, None, "mc").passes == ((0, 1),)
    shared = layers_of(in_order((0, 1, 2)))
    assert planning.make_plan(shared, None, "mc").passes == ((0,), (1,), (2,))


def test_another_number_of_terms_is_told() -> None:
    layers = layers_of(in_order((0, 1, 2)))
    grad_fn = ng.value_and_grad(in_order((0, 1)), layers)
    with pytest.raises(ValueError, match=r"(?s)3 terms \(Categorical.*2 \(Cat.*where=mask"):
        grad_fn(start(), *whole_batch(), rng=jax.random.key(0))


@pytest.mark.parametrize("make", ["kfac", "ekfac", "both sides"])
def test_the_state_can_be_read(make: str) -> None:
    loss_fn = in_order((0, 1, 2))
    layers = layers_of(loss_fn)
    layers = layers.replace(("norm",), "diagonal")
    tx, grad_fn = MAKE[make](layers), ng.value_and_grad(loss_fn, layers, fisher="exact")

    @jax.jit
    def step(params: Any) -> Any:
        state = tx.init(params)
        _, grads, statistics = grad_fn(params, *whole_batch(), opt_state=state)
        return tx.update(grads, state, params, statistics=statistics)

    updates, state = step(start())
    report = ng.diagnostics.report(layers, state, updates=updates, spectra=True)
    assert all(np.isfinite(x) for x in report.scalars().values())
    text = str(layers)
    assert "; 1: Gaussian, examples on axis 0;" in text
