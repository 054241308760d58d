"""Refreshes: in stacks, in turn, and divided among devices."""

import math
import re
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import natgrad_jax as ng
from natgrad_jax.linalg.batched_solve import Problem, in_stacks
from natgrad_jax.linalg.cholesky import damped_inverse
from natgrad_jax.linalg.distributed import balanced, devices
from natgrad_jax.linalg.eigh import eigenbasis
from natgrad_jax.transforms.common.refresh_schedule import USUAL, refresh_schedule

PERIOD = 4


class Deep(nn.Module):
    """Layers of one width, and a readout."""

    depth: int
    width: int = 6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(self.depth):
            x = nn.tanh(nn.Dense(self.width)(x))
        return nn.Dense(3)(x)


def problem(depth: int) -> Any:
    model, random = Deep(depth), np.random.default_rng(0)
    x, y = jnp.asarray(random.normal(size=(16, 6)), jnp.float32), jnp.arange(16) % 3
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]

    def loss_fn(params: Any, x: jax.Array, y: jax.Array) -> ng.Loss:
        return ng.Categorical(model.apply({"params": params}, x)).nll(y)

    return loss_fn, params, (x, y), ng.find_layers(loss_fn, params, x, y)


def bases_over_time(
    make: Any, steps: int, statistics_period: int, refresh_period: int | None = PERIOD
) -> list[tuple[Any, Any]]:
    """Updates and bases of each step, the parameters staying where they are."""
    loss_fn, params, batch, layers = problem(5)
    periods = {"statistics_period": statistics_period, "refresh_period": refresh_period}
    tx = make(layers, **periods, statistics_fraction=0.5)
    grad_fn = ng.value_and_grad(loss_fn, layers)

    @jax.jit
    def step(state: Any, key: Any) -> Any:
        _, grads, statistics = grad_fn(params, *batch, rng=key, opt_state=state)
        return tx.update(grads, state, params, statistics=statistics)

    state, found = tx.init(params), []
    for i in range(steps):
        updates, state = step(state, jax.random.key(i))
        found.append((updates, ng.bases(state)))
    return found


def changes(found: list[tuple[Any, Any]]) -> list[set[Any]]:
    """The layers whose bases are others than at the step before."""
    return [
        {path for path in new if not all(jax.tree.leaves(
            jax.tree.map(jnp.array_equal, new[path], old[path])))}
        for (_, old), (_, new) in pairwise(found)
    ]  # fmt: skip


MAKERS = {
    "kfac": ng.scale_by_kfac,
    "kfac, low rank": partial(ng.scale_by_kfac, inverse=ng.LowRank(2)),
    "ekfac": ng.scale_by_ekfac,
}


@pytest.mark.parametrize("name", MAKERS)
def test_layers_in_turn_are_refreshed_once_a_period_each(name: str) -> None:
    found = bases_over_time(partial(MAKERS[name], refresh="staggered"), 3 * PERIOD, 1)
    changed = changes(found)
    paths = set(found[0][1])
    for start in range(0, 2 * PERIOD, PERIOD):
        due = changed[start : start + PERIOD]
        assert sum(map(len, due)) == len(paths) and set().union(*due) == paths
        assert max(map(len, due)) == 2  # six layers in four steps
    assert changed[:PERIOD] == changed[PERIOD : 2 * PERIOD]


@pytest.mark.parametrize("name", ["kfac", "ekfac"])
def test_in_turn_and_together_agree_while_factors_stay(name: str) -> None:
    own = [bases_over_time(partial(MAKERS[name], refresh=how), 3, 100)[-1][0]
           for how in ("staggered", "every")]  # fmt: skip
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), *own)


@pytest.mark.parametrize("name", MAKERS)
def test_layers_are_in_turn_unless_a_period_is_given(name: str) -> None:
    found = bases_over_time(MAKERS[name], 21, 1, None)
    moved = changes(found)
    assert sum(map(len, moved[:20])) == len(found[0][1]) == 6 and max(map(len, moved)) == 1
    assert not any(moved[:10])  # in the first half of the first period
    assert not refresh_schedule(None, 20, USUAL).staggered
    assert not refresh_schedule(ng.every(), None, USUAL).staggered


def programs(equation: Any) -> list[Any]:
    """The programs inside an equation."""
    values = jax.tree.leaves(equation.params, is_leaf=lambda v: hasattr(v, "eqns"))
    inner = [getattr(value, "jaxpr", value) for value in values]
    return [x for x in inner if hasattr(x, "eqns")]


def primitives(jaxpr: Any) -> Any:
    """Every equation, also of the programs inside."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in programs(equation):
            yield from primitives(inner)


def test_programs_do_not_grow_with_layers_of_equal_size() -> None:
    def factorisations(depth: int) -> int:
        loss_fn, params, batch, layers = problem(depth)
        tx = ng.scale_by_kfac(layers, refresh="every")
        _, grads, statistics = jax.eval_shape(
            lambda: ng.value_and_grad(loss_fn, layers)(params, *batch, rng=jax.random.key(0))
        )
        update = lambda g, s, t: tx.update(g, s, statistics=t)
        traced = jax.make_jaxpr(update)(grads, jax.eval_shape(tx.init, params), statistics)
        return sum(str(e.primitive) == "cholesky" for e in primitives(traced.jaxpr))

    assert factorisations(8) == factorisations(4) > 0


def flops(jaxpr: Any) -> float:
    """Of matrix products and factorisations; the costliest branch of a switch."""
    total = 0.0
    for equation in jaxpr.eqns:
        name, shapes = str(equation.primitive), [v.aval.shape for v in equation.invars]
        costs = [flops(inner) for inner in programs(equation)]
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            depth = math.prod(shapes[0][a] for a in contracted)
            total += 2 * depth * math.prod(equation.outvars[0].aval.shape)
        elif name in ("cholesky", "eigh", "triangular_solve"):
            total += math.prod(shapes[0]) * shapes[0][-1]
        elif name == "cond":
            total += max(costs)
        else:
            total += equation.params.get("length", 1) * sum(costs)
    return total


@pytest.mark.parametrize("op", [damped_inverse, eigenbasis])
def test_four_devices_do_a_quarter_of_the_work_each_and_move_the_results_once(
    op: Callable[..., Any],
) -> None:
    random, sizes = np.random.default_rng(0), [24] * 16 + [16] * 8
    gram = lambda n: jnp.asarray(np.cov(random.normal(size=(n, 2 * n))), jnp.float32)
    ones = (jnp.ones(()),) if op is damped_inverse else ()
    given = [(gram(n), *ones) for n in sizes]
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))

    def run(over: Any, given: Any) -> Any:
        return in_stacks([Problem(op, x) for x in given], devices(over))

    one, four = partial(run, None), partial(run, (mesh, "data"))
    counted = [flops(jax.make_jaxpr(f)(given).jaxpr) for f in (one, four)]
    assert 0.25 <= counted[1] / counted[0] <= 0.25 * 1.05
    compiled = jax.jit(four).lower(given).compile()
    moved = sum(
        math.prod(map(int, shape.split(",")))
        for line in compiled.as_text().splitlines() if " all-reduce(" in line
        for shape in re.findall(r"f32\[([\d,]+)\]", line.split(" all-reduce(")[0])
    )  # fmt: skip
    whole = jax.jit(one)(given)
    assert moved == sum(x.size for x in jax.tree.leaves(whole))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), compiled(given), whole)


def test_shares_are_balanced() -> None:
    random = np.random.default_rng(0)
    costs = list(random.random(50))
    loads = np.bincount(balanced(costs, 4), weights=costs)
    assert loads.max() - loads.min() <= max(costs)
