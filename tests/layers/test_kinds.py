"""Every layer kind against brute force, in float64: factors, and the preconditioned update."""

import dataclasses
import warnings
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import APPROXIMATED, CASES, LINEN_ONLY, OWN, REPRESENTATIVE, Case
from one_layer import EXAMPLES, Setup, build, fresh

import natgrad_jax as ng
from natgrad_jax.curvature.eigenbases import everywhere
from natgrad_jax.curvature.inverses import operate
from natgrad_jax.curvature.partial_eigenbasis import is_partial
from natgrad_jax.layers.approximation import Approximation
from natgrad_jax.losses import output_cotangents

WHOLE = Approximation()
PARTIAL = [c for c in CASES if c.name in (
    "dense", "dense on positions", "einsum per head", "conv 2-d", "conv 2-d grouped", "embed",
    "conv transpose")]  # fmt: skip


def output_gradients(setup: Setup, fisher: str, rng: Any, arrange: Any) -> Any:
    """``∂(−log p)/∂s`` for every seed, one example at a time: ``(seeds, T, B, O)``, and whose."""
    x, _ = setup.batch
    s = jax.jit(setup.output)(setup.tree, x)
    term = setup_loss(setup).terms[0]
    if fisher == "exact":
        columns = oracle.seed_columns(term.distribution)
        spots = [np.unravel_index(i, term.distribution.examples) for i in range(len(columns))]
        wanted = [(spot, c) for spot, cs in zip(spots, columns, strict=True) for c in cs]
    else:
        if fisher == "mc":
            targets = output_cotangents.sample_targets(term, (), jax.random.split(rng, 1)[0])
        else:
            targets = term.targets
        total = lambda z: term.distribution.with_outputs(z).nll_per_example(targets).sum()
        (gradient,) = map(np.asarray, jax.grad(total)(term.distribution.outputs).values())
        wanted = [((n,), gradient[n]) for n in range(EXAMPLES)]
    (output,) = term.distribution.outputs.values()
    batch_seeds = np.zeros((len(wanted), *output.shape), s.dtype)
    for i, (spot, value) in enumerate(wanted):
        batch_seeds[(i, *spot)] = value
    pull = jax.jit(jax.vmap(lambda seed: jax.vjp(setup.natural, s)[1](seed)[0]))
    found = np.asarray(pull(batch_seeds))
    gradients = [arrange(g[spot[0]]) for g, (spot, _) in zip(found, wanted, strict=True)]
    return np.stack(gradients), np.array([spot[0] for spot, _ in wanted])


def setup_loss(setup: Setup) -> ng.Loss:
    return jax.jit(lambda batch: setup.loss_fn(fresh(setup.params), batch))(setup.batch)


def explicit(
    case: Case, setup: Setup, layer: Any, fisher: str, rng: Any, how: Approximation
) -> tuple[np.ndarray, np.ndarray]:
    """The approximation of the layer's block that is asked for, and the block itself."""
    J = oracle.jacobians(setup.output, setup.tree, setup.batch[0], case.arrange)
    g, seeds_of = output_gradients(setup, fisher, rng, case.arrange)
    examples = float(setup_loss(setup).terms[0].count)
    F = oracle.example_fisher(J, g, examples, seeds_of)
    if case.block == "full":
        return F, F
    if case.block == "unit":
        units = np.concatenate([np.arange(v.shape[-1]) for v in jax.tree.leaves(setup.tree)])
        return np.where(units[:, None] == units, F, 0), F
    pair = oracle.reduced(J, g) if how.weight_sharing == "reduce" else (J, g)
    product = oracle.kronecker(*pair, examples)
    at = oracle.places(layer, setup.tree)
    if case.ids:  # the factor over tokens is a diagonal
        token = np.array([p.channel for p in at])
        product = np.where(token[:, None] == token, product, 0)
    return oracle.approximate(product, at, how.convolution, how.group_size), F


def check(
    case: Case,
    framework: str,
    distribution: str,
    fisher: str,
    dtype: Any,
    tolerance: float,
    how: Approximation = WHOLE,
    rank: int = 64,
) -> None:
    """Factors, K-FAC's update, EKFAC's moments and update, and its guarantee.

    ``rank``: of EKFAC's bases, whole where it is large.
    """
    setup = build(case, framework, distribution, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layers = ng.find_layers(setup.loss_fn, setup.params, setup.batch)
    assert layers.uncovered == ()
    rng, damping = jax.random.key(3), 0.05
    grad_fn = ng.value_and_grad(setup.loss_fn, layers, fisher=fisher)
    options = {"damping": damping, "decay": 0.0, "statistics_period": 1, "approximation": how}
    kfac = ng.scale_by_kfac(layers, **options)
    ekfac = ng.scale_by_ekfac(layers, basis=ng.LowRank(rank), **options)

    @jax.jit
    def step(batch: Any) -> Any:
        _, grads, statistics = grad_fn(fresh(setup.params), batch, rng=rng)
        updates, state = kfac.update(grads, kfac.init(grads), statistics=statistics)
        return grads, updates, ng.factors(state)

    @jax.jit
    def in_eigenbasis(state: Any, batch: Any) -> Any:
        _, grads, statistics = grad_fn(fresh(setup.params), batch, rng=rng, opt_state=state)
        return ekfac.update(grads, state, statistics=statistics)

    grads, updates, found = step(setup.batch)
    (factors,), ((path, layer),) = found.values(), layers.approximate(how).items()
    assert layer.block == case.block
    approximate, F = explicit(case, setup, layer, fisher, rng, how)
    ours = oracle.dense(layer, partial(operate, layer, factors), setup.tree)
    assert oracle.relative(ours, approximate) <= tolerance
    if factors.G is not None and factors.A.ndim == factors.G.ndim and how == WHOLE:
        assert oracle.relative(oracle.as_matrix(layer, *factors, setup.tree), ours) <= tolerance

    gradient, update = flat_vector(grads), flat_vector(updates)
    damped = oracle.damped(layer, factors, ours, damping, setup.tree)
    assert oracle.relative(update, np.linalg.solve(damped, gradient)) <= tolerance

    if fisher == "empirical" or dtype == jnp.float32 or framework == "nnx":
        return  # EKFAC's own part, once for every kind
    state = ekfac.init(grads)
    for _ in range(2):  # the first step finds the bases, the second measures in them
        updates, state = in_eigenbasis(state, setup.batch)
    bases = ng.bases(state)[path]
    cut = [is_partial(side, Q) for side, Q in zip(sides(layer), bases[:2])]
    assert any(cut) == (rank == 1)
    Q = oracle.dense(layer, partial(turned_back, layer, bases), setup.tree)
    S = oracle.dense(layer, lambda x: x * everywhere(layer, bases, state.moments[path]), setup.tree)
    whole = case.block != "unit" and Q.shape == F.shape and np.allclose(Q @ Q.T, np.eye(len(Q)))
    assert whole or rank > 1
    if whole:
        alike = oracle.dense(layer, partial(levelled, layer, bases), setup.tree)
        assert oracle.relative(np.diag(S), alike @ np.diag(Q.T @ F @ Q)) <= 10 * tolerance
        best = Q @ S @ Q.T
        slack = tolerance * np.linalg.norm(F)
        if not any(cut):
            assert np.linalg.norm(F - best) <= np.linalg.norm(F - approximate) + slack
        solved = np.linalg.solve(best + damping * np.eye(len(F)), gradient)
        assert oracle.relative(flat_vector(updates), solved) <= 10 * tolerance


def sides(layer: Any) -> list[Any]:
    return [side for side in (layer.input_side, layer.output_side) if side is not None]


def turned_back(layer: Any, bases: Any, x: jax.Array) -> jax.Array:
    """``Q_A X Q_Gᵀ``, a partial basis completed by any other directions."""
    for side, Q in zip(sides(layer), bases[:2]):
        whole = oracle.completed(Q) if is_partial(side, Q) else Q
        x = side.rotate_back(whole, x).mT
    return x.mT if layer.output_side is None else x


def levelled(layer: Any, bases: Any, x: jax.Array) -> jax.Array:
    """All directions that a partial basis leaves out have the same number: their mean."""
    for side, Q in zip(sides(layer), bases[:2]):
        if is_partial(side, Q):
            k = Q.shape[-1]
            others = x[..., k:, :]
            mean = jnp.broadcast_to(others.mean(-2, keepdims=True), others.shape)
            x = jnp.concatenate([x[..., :k, :], mean], axis=-2)
        x = x.mT
    return x.mT if layer.output_side is None else x


def flat_vector(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


@pytest.mark.parametrize("case", CASES + LINEN_ONLY + OWN, ids=lambda c: c.name)
def test_linen(case: Case, float64: None) -> None:
    check(case, "linen", "categorical", "exact", jnp.float64, 1e-10)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_nnx(case: Case, float64: None) -> None:
    check(case, "nnx", "categorical", "mc", jnp.float64, 1e-10)


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
@pytest.mark.parametrize("case", REPRESENTATIVE, ids=lambda c: c.name)
def test_other_labels(case: Case, fisher: str, float64: None) -> None:
    check(case, "linen", "categorical", fisher, jnp.float64, 1e-10)


@pytest.mark.parametrize("case", REPRESENTATIVE, ids=lambda c: c.name)
def test_float32(case: Case) -> None:
    check(case, "linen", "categorical", "mc", jnp.float32, 1e-4)


WAYS = [
    Approximation(convolution="sua"),
    Approximation(group_size=2),
    Approximation("sua", 2),
    Approximation(weight_sharing="reduce"),
]


@pytest.mark.once
@pytest.mark.parametrize("how", WAYS, ids=lambda how: " ".join(map(str, dataclasses.astuple(how))))
@pytest.mark.parametrize("case", APPROXIMATED, ids=lambda c: c.name)
def test_approximations(case: Case, how: Approximation, float64: None) -> None:
    check(case, "linen", "categorical", "mc", jnp.float64, 1e-10, how)


@pytest.mark.once
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("case", PARTIAL, ids=lambda c: c.name)
def test_leading_directions(case: Case, sharing: str, float64: None) -> None:
    """One leading direction a side, and all others as one: S is the mean of what they have."""
    how = Approximation(weight_sharing=sharing)
    check(case, "linen", "categorical", "mc", jnp.float64, 1e-10, how, rank=1)


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
@pytest.mark.parametrize("distribution", ["bernoulli", "gaussian"])
def test_other_distributions(distribution: str, fisher: str, float64: None) -> None:
    check(CASES[0], "linen", distribution, fisher, jnp.float64, 1e-10)


@pytest.mark.parametrize("case", REPRESENTATIVE, ids=lambda c: c.name)
def test_statistics_of_every_second_example_stand_for_all(case: Case, float64: None) -> None:
    setup = build(case, "linen", "categorical", jnp.float64)
    layers = ng.find_layers(setup.loss_fn, setup.params, setup.batch)
    grad_fn = jax.jit(ng.value_and_grad(setup.loss_fn, layers, fisher="empirical"))

    def measured(fraction: float, batch: Any) -> Any:
        state = ng.scale_by_ekfac(layers, statistics_fraction=fraction).init(setup.params)
        _, grads, statistics = grad_fn(setup.params, batch, opt_state=state)
        return grads, (statistics.layers, statistics.moments), statistics.examples

    with_others = jax.tree.map(lambda x: jnp.repeat(x, 2, 0).at[1::2].set(x[::-1]), setup.batch)
    grads, thinned, examples = measured(0.5, with_others)
    _, whole, half = measured(1.0, setup.batch)
    all_grads, _, _ = measured(1.0, with_others)
    assert examples == 2 * half
    for ours, wanted in zip(jax.tree.leaves(thinned), jax.tree.leaves(whole), strict=True):
        assert_close(ours, 2 * wanted)
    jax.tree.map(assert_close, grads, all_grads)


@pytest.mark.parametrize("make", [ng.scale_by_kfac, ng.scale_by_ekfac])
def test_a_part_of_many_examples_is_measured(make: Any) -> None:
    model = nn.Dense(3)
    params = model.init(jax.random.key(0), jnp.zeros((1, 4)))["params"]

    def measured(n: int, **options: Any) -> jax.Array:
        x, y = jax.random.normal(jax.random.key(1), (n, 4)), jnp.arange(n) % 3
        loss_fn = lambda params: ng.Categorical(model.apply({"params": params}, x)).nll(y)
        layers = ng.find_layers(loss_fn, params)
        state = make(layers, **options).init(params)
        grad_fn = ng.value_and_grad(loss_fn, layers, fisher="empirical")
        _, _, found = grad_fn(params, opt_state=state)
        assert found.examples == found.layers[()].rows == n
        return found.layers[()].A

    whole, part = (measured(512, statistics_fraction=f) for f in (1.0, 0.25))
    assert oracle.relative(np.asarray(part), np.asarray(whole)) > 1e-3
    np.testing.assert_array_equal(measured(512), part)
    np.testing.assert_array_equal(measured(512, statistics_period=lambda step: 5), part)
    np.testing.assert_array_equal(measured(512, statistics_period=1), whole)
    np.testing.assert_array_equal(measured(256), measured(256, statistics_fraction=0.5))
    np.testing.assert_array_equal(measured(255), measured(255, statistics_fraction=1.0))


def assert_close(ours: jax.Array, wanted: jax.Array) -> None:
    assert oracle.relative(np.asarray(ours), np.asarray(wanted)) <= 1e-10
