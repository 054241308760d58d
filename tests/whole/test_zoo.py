"""Every model of the zoo: what is covered, gradients as JAX gives them, one compilation."""

import warnings
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import zoo
from architectures import CASES as ARCHITECTURES
from flax import nnx, traverse_util

import natgrad_jax as ng

each_case = pytest.mark.parametrize("case", zoo.CASES + ARCHITECTURES, ids=lambda case: case.name)


def find_layers(loss_fn, params, *args):
    """The layers; a warning tells of leftover parameters, and comes only with them."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", ng.UncoveredWarning)
        layers = ng.find_layers(loss_fn, params, *args)
    assert [w.category for w in told] == [ng.UncoveredWarning] * bool(layers.uncovered)
    return layers


def parameter_paths(params):
    """Every parameter's path, by Flax's own means."""
    if isinstance(params, nnx.Module):
        flat = nnx.to_flat_state(nnx.state(params, nnx.Param))
        return {tuple(map(str, path)) for path, _ in flat}
    return set(traverse_util.flatten_dict(nn.meta.unbox(params)))


@each_case
def test_every_parameter_is_covered_and_the_table_names_each_once(case):
    problem = case.make()
    layers = find_layers(problem.loss_fn, problem.params, *problem.args)
    everything = parameter_paths(problem.params)
    assert layers.uncovered == ()
    covered = [p.path for layer in layers.values() for p in layer.parameters]
    assert sorted(covered) == sorted(everything)
    _, rule, *rows, summary = str(layers).splitlines()
    assert set(rule) == {"─", " "}
    named = [row.split()[0] for row in rows]
    assert sorted(named) == sorted("/".join(path) for path in everything)
    assert summary.startswith(f"{len(layers)} layer")


def reference(problem, params, args):
    """What JAX's or Flax's value_and_grad gives of the same loss, without this library."""

    def value(params, *args):
        out = problem.loss_fn(params, *args)
        return (out[0].value, out[1]) if problem.has_aux else out.value

    transform = nnx.value_and_grad if isinstance(params, nnx.Module) else jax.value_and_grad
    return transform(value, has_aux=problem.has_aux)(params, *args)


def model_state(params):
    """Batch statistics and rng counts of an NNX model, which its loss changes in place."""
    if not isinstance(params, nnx.Module):
        return None
    return nnx.to_pure_dict(nnx.state(params, (nnx.BatchStat, nnx.RngCount)))


class Results(NamedTuple):
    """Of one training step: (value, gradients, the model's state), ours and the reference's."""

    ours: Any
    expected: Any
    statistics: ng.Statistics


def plain_step(problem, layers, tx, traces):
    """``step(state, args, key)`` → state, Results; state = (params, opt_state)."""
    grad_fn = ng.value_and_grad(problem.loss_fn, layers, has_aux=problem.has_aux)

    @jax.jit
    def step(state, args, key):
        traces.append(1)
        params, opt_state = state
        expected = (*reference(problem, params, args), None)
        value, grads, statistics = grad_fn(params, *args, rng=key, opt_state=opt_state)
        updates, opt_state = tx.update(grads, opt_state, params, statistics=statistics)
        results = Results((value, grads, None), expected, statistics)
        return (optax.apply_updates(params, updates), opt_state), results

    return step, (problem.params, tx.init(problem.params))


def nnx_step(problem, layers, tx, traces):
    """The same for NNX; state = (model, optimizer), both changed in place."""
    grad_fn = ng.value_and_grad(problem.loss_fn, layers, has_aux=problem.has_aux)

    @nnx.jit
    def jitted(model, optimizer, args, key):
        traces.append(1)
        twin = nnx.clone(model)
        expected = (*reference(problem, twin, args), model_state(twin))
        value, grads, statistics = grad_fn(model, *args, rng=key, opt_state=optimizer.opt_state)
        ours = value, grads, model_state(model)
        optimizer.update(model, grads, statistics=statistics)
        return Results(ours, expected, statistics)

    def step(state, args, key):
        return state, jitted(*state, args, key)

    return step, (problem.params, nnx.Optimizer(problem.params, tx, wrt=nnx.Param))


def assert_close(actual, desired, tolerance):
    assert jax.tree.structure(actual) == jax.tree.structure(desired)
    for got, want in zip(jax.tree.leaves(actual), jax.tree.leaves(desired)):
        assert got.dtype == want.dtype and got.shape == want.shape
        want = np.asarray(want, np.float64)
        scale = tolerance * max(np.abs(want).max(), 1e-3)
        np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=tolerance, atol=scale)


@each_case
def test_gradients_are_jaxs_own_and_training_compiles_once(case):
    problem = case.make()
    layers = find_layers(problem.loss_fn, problem.params, *problem.args)
    tx = optax.chain(ng.scale_by_kfac(layers, damping=0.1), optax.sgd(0.01))
    make = nnx_step if isinstance(problem.params, nnx.Module) else plain_step
    before, traces = jax.tree.map(np.array, arrays(problem.params)), []
    step, state = make(problem, layers, tx, traces)
    state, results = step(state, problem.args, jax.random.key(2))
    assert_close(results.ours, results.expected, problem.tolerance)
    assert set(results.statistics.layers) == set(layers)
    for path, sums in results.statistics.layers.items():
        assert np.all(np.asarray(sums.rows) > 0), path
        stack = layers[path].stack_sizes
        for x in jax.tree.leaves(sums):
            elements = np.asarray(x).reshape(*stack, -1)
            assert np.all(np.any(elements != 0, axis=-1)), path
    for i in range(2):
        state, _ = step(state, problem.args, jax.random.key(3 + i))
    assert len(traces) == 1
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(ng.bases(opt_state_of(state))))
    after = jax.tree.map(np.array, arrays(state[0]))
    assert jax.tree.structure(after) == jax.tree.structure(before)
    for new, old in zip(jax.tree.leaves(after), jax.tree.leaves(before)):
        assert new.dtype == old.dtype and np.isfinite(new).all()
        assert np.any(new != old)


def arrays(params):
    """The parameters' arrays, of a model too."""
    return nnx.state(params, nnx.Param) if isinstance(params, nnx.Module) else params


def opt_state_of(state):
    optimizer = state[1]
    return optimizer.opt_state if isinstance(optimizer, nnx.Optimizer) else optimizer


# ------------------------------------------------- what must not be taken for a layer it is not


class NormalizedDense(nn.Dense):
    """Computes something else than its parent."""

    @nn.compact
    def __call__(self, inputs):
        return super().__call__(inputs / 2)


class RenamedDense(nn.Dense):
    """Computes the same, but nobody can know that."""


class Dense(nn.Dense):
    """Called as its parent."""


class Factorized(nn.Module):
    """A dense layer whose kernel is a pair: lengths and directions."""

    @nn.compact
    def __call__(self, x):
        pair = lambda key, n: (jnp.ones(n), jax.random.normal(key, (x.shape[-1], n)) / 10)
        lengths, directions = self.param("kernel", pair, 300)
        shift = self.param("shift", nn.initializers.zeros, (300,))
        return nn.Dense(zoo.CLASSES)(jnp.tanh(x @ (lengths * directions) + shift))


def with_more(*path):
    """A model beside whose parameters lies another one."""
    problem = zoo.classify(zoo.Nested(1), zoo.vector())
    more = {path[-1]: jnp.ones(300)}
    for name in path[-2::-1]:
        more = {name: {**problem.params.get(name, {}), **more}}
    return problem._replace(params={**problem.params, **more})


class NormalizedLinear(nnx.Linear):
    def __call__(self, inputs):
        return super().__call__(inputs / 2)


class MaskedConv(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Conv(zoo.CLASSES, (1, 1), mask=jnp.ones((1, 1, zoo.FEATURES, zoo.CLASSES)))(x)


class Uncalled(nnx.Module):
    def __init__(self, rngs):
        self.used = nnx.Linear(zoo.FEATURES, zoo.CLASSES, rngs=rngs)
        self.unused = nnx.Linear(zoo.FEATURES, zoo.CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.used(x)


class TiedKernel(nnx.Module):
    """Two layers on one kernel: one's inputs and outputs alone are not its statistics."""

    def __init__(self, rngs):
        self.first = nnx.Linear(zoo.FEATURES, zoo.FEATURES, rngs=rngs)
        self.second = nnx.Linear(zoo.FEATURES, zoo.FEATURES, rngs=rngs)
        self.second.kernel = self.first.kernel
        self.head = nnx.Linear(zoo.FEATURES, zoo.CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.head(self.second(nnx.tanh(self.first(x))))


class FrozenKernelNNX(nnx.Module):
    """Its kernel is no parameter: the bias alone trains."""

    def __init__(self, rngs):
        self.frozen = nnx.Linear(zoo.FEATURES, zoo.FEATURES, rngs=rngs)
        self.frozen.kernel = nnx.Variable(self.frozen.kernel[...])
        self.head = nnx.Linear(zoo.FEATURES, zoo.CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.tanh(self.frozen(x)))


def frozen(name):
    """Of the first of two layers one parameter is held outside of params."""
    module, x = zoo.Nested(1), zoo.vector()
    params = zoo.init(module, x)
    held = {name: params["Dense_0"][name]}
    rest = {k: v for k, v in params["Dense_0"].items() if k != name}

    def loss_fn(params, x, y):
        whole = {**params, "Dense_0": {**params["Dense_0"], **held}}
        return ng.Categorical(module.apply({"params": whole}, x)).nll(y)

    y = jnp.arange(zoo.BATCH) % zoo.CLASSES
    return zoo.Problem(loss_fn, {**params, "Dense_0": rest}, (x, y))


PRODUCT = "it is multiplied by another parameter: such a product has no use of its own"
UNUSED = "loss_fn does not use it"
# models that look like others, with the parameters that have no block, and why
LOOKALIKES = [
    (
        "linen subclass of its parent's name",
        lambda: zoo.classify(Dense(zoo.CLASSES), zoo.vector()),
        set(),
        set(),
    ),
    (
        "linen parameter that is a pair",
        lambda: zoo.classify(Factorized(), zoo.vector()),
        {("kernel", "0"), ("kernel", "1")},
        {PRODUCT},
    ),
    (
        "linen parameter beside a layer's",
        lambda: with_more("Dense_0", "more"),
        {("Dense_0", "more")},
        {UNUSED},
    ),
    (
        "parameter of nothing",
        lambda: with_more("unused", "kernel"),
        {("unused", "kernel")},
        {UNUSED},
    ),
    (
        "linen subclass",
        lambda: zoo.classify(NormalizedDense(zoo.CLASSES), zoo.vector()),
        set(),
        set(),
    ),
    (
        "linen subclass without a body",
        lambda: zoo.classify(nn.Sequential([RenamedDense(4), zoo.mlp()]), zoo.vector()),
        set(),
        set(),
    ),
    ("linen masked convolution", lambda: zoo.classify(MaskedConv(), zoo.image()), set(), set()),
    (
        "linen weight norm",
        lambda: zoo.classify(nn.WeightNorm(nn.Dense(zoo.CLASSES)), zoo.vector()),
        set(),
        set(),
    ),
    ("linen kernel held fixed", lambda: frozen("kernel"), set(), set()),
    (
        "nnx kernel held fixed",
        lambda: zoo.classify_nnx(zoo.build(FrozenKernelNNX), zoo.vector()),
        set(),
        set(),
    ),
    (
        "nnx subclass",
        lambda: zoo.classify_nnx(
            zoo.build(lambda rngs: NormalizedLinear(zoo.FEATURES, zoo.CLASSES, rngs=rngs)),
            zoo.vector(),
        ),
        set(),
        set(),
    ),
    (
        "nnx layer never called",
        lambda: zoo.classify_nnx(zoo.build(Uncalled), zoo.vector()),
        {("unused", "kernel"), ("unused", "bias")},
        {UNUSED},
    ),
    (
        "nnx kernel of two layers",
        lambda: zoo.classify_nnx(zoo.build(TiedKernel), zoo.vector()),
        set(),
        set(),
    ),
]


@pytest.mark.parametrize("make, uncovered, reasons", [row[1:] for row in LOOKALIKES],
                         ids=[row[0] for row in LOOKALIKES])  # fmt: skip
def test_lookalikes_are_covered_or_the_table_says_why_not(make, uncovered, reasons):
    problem = make()
    layers = find_layers(problem.loss_fn, problem.params, *problem.args)
    assert set(layers.uncovered) == uncovered
    assert {u.reason for u in layers.leftover} == reasons
    assert all(reason in str(layers) for reason in reasons)


def test_a_layer_whose_bias_is_held_fixed_is_a_layer_without_bias():
    problem = frozen("bias")
    layers = find_layers(problem.loss_fn, problem.params, *problem.args)
    assert layers.uncovered == () and layers[("Dense_0",)].bias is None
    step, state = plain_step(problem, layers, ng.kfac(0.01, layers), [])
    _, results = step(state, problem.args, jax.random.key(2))
    assert_close(results.ours, results.expected, problem.tolerance)
    assert results.statistics.layers[("Dense_0",)].A.shape == (zoo.FEATURES, zoo.FEATURES)


TRANSFORMS = {
    "jax.jit": (jax.jit, "linen: mlp"),
    "jax.checkpoint": (jax.checkpoint, "linen: mlp"),
    "nnx.jit": (nnx.jit, "nnx: mlp in nnx.List"),
    "nnx.remat": (nnx.remat, "nnx: mlp in nnx.List"),
}


@pytest.mark.parametrize("transform, name", TRANSFORMS.values(), ids=TRANSFORMS)
def test_the_whole_loss_may_be_transformed(transform, name):
    (problem,) = [case.make() for case in zoo.CASES if case.name == name]
    transformed = problem._replace(loss_fn=transform(problem.loss_fn))
    layers = find_layers(transformed.loss_fn, problem.params, *problem.args)
    assert layers == find_layers(problem.loss_fn, problem.params, *problem.args)
    results = [
        ng.value_and_grad(p.loss_fn, layers)(p.params, *p.args, rng=jax.random.key(0))
        for p in (transformed, problem)
    ]
    assert_close(*results, problem.tolerance)


TRAINED = [row for row in LOOKALIKES if row[0] in ("linen subclass", "nnx kernel of two layers")]


@pytest.mark.parametrize("make", [row[1] for row in TRAINED], ids=[row[0] for row in TRAINED])
def test_lookalikes_train(make):
    problem = make()
    layers = ng.find_layers(problem.loss_fn, problem.params, *problem.args)
    build = nnx_step if isinstance(problem.params, nnx.Module) else plain_step
    step, state = build(problem, layers, ng.kfac(0.01, layers), [])
    _, results = step(state, problem.args, jax.random.key(2))
    assert_close(results.ours, results.expected, problem.tolerance)
