"""K-FAC inside optax and Flax, in numbers: wrappers, schedules, periods, states, averages.

What every transformation has in common is in test_conformance.py.
"""

import functools
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from leftover import HEAD, HIDDEN, Net, batch, find_layers, loss_fn, setting, training_step
from transformations import Jitted, fresh, signature

import natgrad_jax as ng


@functools.cache
def measured(seed=0, fisher="mc", dtype=jnp.float32):
    """Gradients and statistics of one batch."""
    s = setting(fisher, dtype)
    return s.grad_fn(s.params, *batch(seed), rng=jax.random.key(seed))[1:]


def updater(tx):
    """``update(grads, state, statistics)``, compiled."""
    params = setting().params
    return Jitted(lambda g, state, s: tx.update(g, state, params, statistics=s))


def run(tx, steps=3):
    """The updates and states of some steps, each on its own batch at the same parameters."""
    update, state, history = updater(tx), tx.init(setting().params), []
    for i in range(steps):
        updates, state = update(measured(i)[0], state, measured(i)[1])
        history.append((updates, state))
    assert update.traces == 1
    return history


def batch_factors(path, statistics):
    """A and G of one batch for a dense layer: averages over rows."""
    sums = statistics.layers[path]
    return np.asarray(sums.A) / sums.rows, np.asarray(sums.G) / statistics.examples


def assert_close(actual, desired, rtol=1e-5, atol=1e-7):
    assert jax.tree.structure(actual) == jax.tree.structure(desired)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol),
                 actual, desired)  # fmt: skip


def same(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) for x, y in leaves)


def labels_of(params, layer, other):
    """``layer`` for the parameters of dense layers, ``other`` for the rest."""
    return {
        module: dict.fromkeys(leaves, other if module == "norm" else layer)
        for module, leaves in params.items()
    }


def decay_from(value):
    return lambda step: value * 0.5**step


MAPPED = {
    "kfac": lambda layers: ng.kfac(0.1, layers),
    "inject_hyperparams": lambda layers: optax.inject_hyperparams(ng.kfac)(
        learning_rate=0.1, layers=layers, damping=1e-2
    ),
    "partition": lambda layers: optax.partition(
        {"kfac": ng.kfac(0.1, layers), "adam": optax.adam(1e-3)},
        labels_of(setting().params, "kfac", "adam"),
    ),
}


@pytest.mark.parametrize("name", MAPPED)
def test_map_params_maps_momentum_and_leaves_factors(name):
    params, layers, _ = setting()
    tx = MAPPED[name](layers)
    state = tx.init(params)
    mapped = optax.tree.map_params(tx, lambda x: jnp.full(x.shape, 7.0), state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    assert same(ng.factors(mapped), ng.factors(state)) and same(ng.bases(mapped), ng.bases(state))
    sevens = [x for x in jax.tree.leaves(mapped) if np.shape(x) and np.all(np.asarray(x) == 7)]
    momentum = {"partition": 4 + 2 * 2}.get(name, 6)  # K-FAC's trace, and Adam's two moments
    assert len(sevens) == momentum


def test_a_whole_run_scans():
    params, layers, _ = setting()
    tx, grad_fn = ng.kfac(0.1, layers, statistics_period=2), ng.value_and_grad(loss_fn, layers)

    def body(carry, key):
        params, state = carry
        loss, grads, statistics = grad_fn(params, *batch(), rng=key, opt_state=state)
        updates, state = tx.update(grads, state, params, statistics=statistics)
        return (optax.apply_updates(params, updates), state), (loss, statistics.examples)

    keys = jax.random.split(jax.random.key(0), 6)
    _, (losses, counts) = jax.jit(lambda c: jax.lax.scan(body, c, keys))((params, tx.init(params)))
    assert losses[-1] < losses[0]
    assert counts.tolist() == [8, 0, 8, 0, 8, 0]


# -------------------------------------------------------------------------------------- periods


def change(values):
    """The steps at which a recorded tree differs from the step before it."""
    return [i - 1 for i in range(1, len(values)) if not same(values[i], values[i - 1])]


PERIODS = {
    "floats": lambda layers: ng.kfac(0.01, layers, statistics_period=3, refresh_period=4),
    "schedules": lambda layers: ng.kfac(
        0.01, layers, statistics_period=lambda step: 3, refresh_period=lambda step: 4
    ),
    "injected": lambda layers: optax.inject_hyperparams(ng.kfac)(
        0.01, layers, statistics_period=3, refresh_period=4
    ),
}


@pytest.mark.parametrize("make", PERIODS.values(), ids=PERIODS)
def test_periods_count_steps_from_the_first_and_nothing_recompiles(make):
    params, layers, _ = setting()
    tx = make(layers)
    step, state = training_step(tx, ng.value_and_grad(loss_fn, layers)), tx.init(params)
    states = [state]
    for i in range(20):
        params, state, _ = step(params, state, *batch(i), jax.random.key(i))
        states.append(state)
    assert step.traces == 1
    assert change([ng.factors(s) for s in states]) == list(range(0, 20, 3))
    assert change([ng.bases(s) for s in states]) == list(range(0, 20, 4))


@pytest.mark.parametrize(
    ("periods", "measured", "changed"),
    [
        ({"statistics_period": 3}, [0, 3, 6, 9, 12], [0]),
        ({"refresh_period": 4}, [0, 10], [0, 12]),  # between, nothing was measured
        ({}, [0, 1, 2, 4, 8, 10], [0, 1, 2, 4, 8]),
        ({"trust_radius": None}, [0, 10], [0]),
    ],
)
@pytest.mark.parametrize("alias", [ng.kfac, ng.ekfac])
def test_statistics_are_measured_only_where_due(alias, periods, measured, changed):
    """At the defaults all layers are measured and refreshed early; later they are in turn."""
    params, layers, grad_fn = setting()
    tx = alias(0.01, layers, **periods)
    state, update, seen, moved = tx.init(params), updater(tx), [], []
    for i in range(13):
        _, grads, statistics = grad_fn(params, *batch(i), rng=jax.random.key(i), opt_state=state)
        due = i in measured
        assert all(np.any(x) == due for x in jax.tree.leaves(statistics))
        seen += [i] if float(statistics.examples) == 8 else []
        before, (_, state) = ng.bases(state), update(grads, state, statistics)
        pairs = zip(*map(jax.tree.leaves, (before, ng.bases(state))), strict=True)
        moved += [i] if not any(np.array_equal(a, b) for a, b in pairs) else []
    assert seen == measured and moved == changed


@pytest.mark.parametrize("make", [ng.scale_by_soap, ng.scale_by_shampoo])
def test_factors_of_gradients_are_refreshed_early_too(make):
    params, grads = {"w": jnp.ones((8, 6))}, {"w": jax.random.normal(jax.random.key(0), (4, 8, 6))}
    found = []
    for early in ((), (2,)):
        tx = make(refresh=ng.staggered(40, early=early))
        state, bases = tx.init(params), []
        for i in range(4):
            _, state = tx.update({"w": grads["w"][i]}, state, params)
            bases.append(jax.tree.leaves(ng.bases(state)))
        same = lambda i, bases=bases: all(map(np.array_equal, bases[i], bases[i + 1]))
        found.append([same(i) for i in range(3)])
    assert found == [[True, True, True], [True, False, True]]


def test_statistics_that_come_unasked_are_used():
    tx = ng.scale_by_kfac(setting().layers, decay=0.0, statistics_period=100)
    (_, _), (_, state) = run(tx, 2)
    A, _ = batch_factors(HEAD, measured(1)[1])
    np.testing.assert_allclose(ng.factors(state)[HEAD].A, A, rtol=1e-5)


# ------------------------------------------------------------------------------------- averages


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.95])
def test_factors_are_bias_corrected_averages(decay):
    history = run(ng.scale_by_kfac(setting().layers, decay=decay), 3)
    for n, (_, state) in enumerate(history, start=1):
        weights = np.array([decay ** (n - 1 - i) for i in range(n)])  # 0⁰ = 1: the last batch
        weights /= weights.sum()
        for path in (HIDDEN, HEAD):
            batches = [batch_factors(path, measured(i)[1]) for i in range(n)]
            for k in range(2):
                wanted = sum(w * b[k] for w, b in zip(weights, batches))
                np.testing.assert_allclose(ng.factors(state)[path][k], wanted, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("fisher", ["exact", "empirical", "none"])
def test_two_half_batches_add_up_to_the_whole(fisher):
    params, _, grad_fn = setting(fisher)
    x, y = batch()
    whole = grad_fn(params, x, y)
    halves = [grad_fn(params, x[half], y[half]) for half in (slice(0, 4), slice(4, 8))]
    summed = jax.tree.map(jnp.add, halves[0][2], halves[1][2])
    assert_close(summed._replace(leftover=None), whole[2]._replace(leftover=None), 1e-4, 1e-5)
    gradients = jax.tree.map(lambda a, b: (a + b) / 2, halves[0][1], halves[1][1])
    assert_close(gradients, whole[1], 1e-4, 1e-6)


def test_a_step_on_accumulated_statistics_is_the_step_on_the_whole():
    params, layers, grad_fn = setting("exact")
    # the leftover diagonal is a random estimate: compare the layers
    tx = optax.masked(ng.scale_by_kfac(layers), labels_of(params, True, False))
    x, y = batch()
    _, grads, whole = grad_fn(params, x, y)
    halves = [grad_fn(params, x[half], y[half])[2] for half in (slice(0, 4), slice(4, 8))]
    update, state = updater(tx), tx.init(params)
    expected = update(grads, state, whole)
    actual = update(grads, state, jax.tree.map(jnp.add, *halves))
    assert_close(ng.factors(actual[1]), ng.factors(expected[1]), 1e-4, 1e-6)
    assert_close(actual[0], expected[0], 1e-3, 1e-4)


def spoiled(statistics, path, field, value=jnp.nan):
    sums = statistics.layers[path]
    bad = sums._replace(**{field: getattr(sums, field).at[..., 0, 0].set(value)})
    return statistics._replace(sums={**statistics.sums, "expand": {**statistics.layers, path: bad}})


@pytest.mark.parametrize("field", ["A", "G"])
@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_statistics_that_are_not_finite_are_dropped_and_counted(field, value):
    tx = ng.scale_by_kfac(setting().layers, refresh_period=1)
    update, state = updater(tx), tx.init(setting().params)
    _, state = update(*(measured(0)[0], state, measured(0)[1]))
    bad = spoiled(measured(1)[1], HIDDEN, field, value)
    updates, later = update(measured(1)[0], state, bad)
    assert (int(state.rejected), int(later.rejected)) == (0, 1)
    # A is measured in the forward pass, and does not wait for G
    _, good = update(measured(1)[0], state, measured(1)[1])
    assert same(later.factors[HIDDEN].G, state.factors[HIDDEN].G)
    assert same(later.factors[HIDDEN].A, (state if field == "A" else good).factors[HIDDEN].A)
    assert same(later.weights[HIDDEN], state.weights[HIDDEN])
    assert not same(later.factors[HEAD], state.factors[HEAD])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((updates, later)))


def test_a_leftover_diagonal_that_is_not_finite_is_dropped_and_counted():
    tx = ng.scale_by_kfac(setting().layers)
    update, state = updater(tx), tx.init(setting().params)
    _, state = update(*(measured(0)[0], state, measured(0)[1]))
    leftover = measured(1)[1].leftover
    leftover = {**leftover, ("norm", "scale"): leftover[("norm", "scale")].at[0].set(jnp.nan)}
    updates, later = update(measured(1)[0], state, measured(1)[1]._replace(leftover=leftover))
    assert int(later.rejected) == 1
    assert same(later.diagonal[("norm", "scale")], state.diagonal[("norm", "scale")])
    assert not same(later.diagonal[("norm", "bias")], state.diagonal[("norm", "bias")])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((updates, later)))


def test_no_examples_is_no_information():
    tx = ng.scale_by_kfac(setting().layers)
    update, state = updater(tx), tx.init(setting().params)
    nothing = jax.tree.map(jnp.zeros_like, measured()[1])
    updates, early = update(measured(0)[0], state, nothing)
    assert same(updates, measured(0)[0])  # before anything was measured, gradients pass unchanged
    assert same(early._replace(clock=state.clock), state)
    _, state = update(*(measured(0)[0], state, measured(0)[1]))
    _, later = update(measured(0)[0], state, nothing)
    assert int(later.rejected) == 0
    for field in ("factors", "weights", "diagonal", "diagonal_weights"):
        assert same(getattr(later, field), getattr(state, field)), field


def test_a_first_refresh_without_information_does_not_waste_the_period():
    """Where the first batch brought nothing, the first one that does is inverted at once."""
    tx = ng.scale_by_kfac(setting().layers, refresh_period=20)
    update, state = updater(tx), tx.init(setting().params)
    nothing = jax.tree.map(jnp.zeros_like, measured()[1])
    _, state = update(measured(0)[0], state, nothing)
    _, state = update(*(measured(0)[0], state, measured(0)[1]))
    for path in (HIDDEN, HEAD):
        assert not np.array_equal(ng.bases(state)[path].A, np.eye(5 if path == HIDDEN else 6))


# ------------------------------------------------------------------------------ hyperparameters


@pytest.mark.parametrize("momentum", [{}, {"momentum": 0.8, "nesterov": False}], ids=str)
@pytest.mark.parametrize(
    "alias, scale_by, options",
    [
        (ng.kfac, ng.scale_by_kfac, {}),
        (ng.ekfac, ng.scale_by_ekfac, {"moments": "running_average"}),
    ],
    ids=["kfac", "ekfac"],
)
def test_an_alias_is_the_chain_it_says(alias, scale_by, options, momentum):
    layers = setting().layers
    whole = alias(0.1, layers, **options, **momentum, weight_decay=0.01, trust_radius=None)
    chain = optax.chain(
        scale_by(layers, **options),
        optax.trace(0.8, nesterov=momentum.get("nesterov", True)),
        optax.add_decayed_weights(0.01),
        optax.scale(-0.1),
    )
    for (a, _), (b, _) in zip(run(whole), run(chain)):
        assert_close(a, b)


def test_the_trust_region_bounds_the_step():
    layers = setting().layers
    (free, _), (tight, _), (loose, _) = (
        run(ng.scale_by_kfac(layers, trust_radius=radius), 1)[0] for radius in (None, 1e-4, 1e4)
    )
    assert_close(loose, free)
    products = jax.tree.map(lambda a, b: jnp.sum(a * b), free, measured(0)[0])
    scale = np.sqrt(1e-4 / sum(jax.tree.leaves(products)))
    assert scale < 1
    assert_close(tight, jax.tree.map(lambda x: x * scale, free))


@pytest.mark.parametrize("alias", [ng.kfac, ng.ngd])
@pytest.mark.parametrize("most", [1e-2, 1e-5])
def test_the_trust_radius_grows_with_the_batch_up_to_a_limit(alias, most):
    """Also on the steps after, which do not measure."""
    layers, n = setting().layers, float(measured(0)[1].examples)
    same = [
        run(alias(0.1, layers, trust_radius=radius, statistics_period=2), 3)
        for radius in (ng.PerExample(1e-6, most), min(1e-6 * n, most))
    ]
    for (a, _), (b, _) in zip(*same, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize(
    "how, factor",
    [
        ({"warmup_steps": 3}, lambda step: jnp.minimum((step + 1) / 3, 1)),  # in equal parts
        ({"decay_steps": 2}, lambda step: 1 / jnp.sqrt(1 + step / 2)),
    ],
)
def test_the_trust_radius_warms_up_and_decays(how, factor):
    layers = setting().layers
    same = [
        run(ng.kfac(0.1, layers, trust_radius=radius, statistics_period=2), 5)
        for radius in (ng.PerExample(1.0, 1e-5, **how), lambda step: 1e-5 * factor(step))
    ]
    for (a, _), (b, _) in zip(*same, strict=True):
        assert_close(a, b)


HYPERPARAMETERS = {
    "learning_rate": 0.1,
    "damping": 0.1,
    "decay": 0.9,
    "trust_radius": 1e-5,
    "weight_decay": 0.1,
    "momentum": 0.9,
}


@pytest.mark.parametrize("name, value", HYPERPARAMETERS.items(), ids=HYPERPARAMETERS)
def test_every_number_takes_a_schedule_and_an_array(name, value):
    def make(value):
        given = {"learning_rate": 0.1, "refresh_period": 1, "trust_radius": None, name: value}
        return ng.kfac(layers=setting().layers, **given)

    constant, array, scheduled = (
        run(make(v), 2) for v in (value, jnp.asarray(value), decay_from(value))
    )
    assert_close(array[0][0], constant[0][0])
    assert_close(array[1][0], constant[1][0])
    assert_close(scheduled[0][0], constant[0][0])  # a schedule starts at step 0
    assert not same(scheduled[1][0], constant[1][0])


def test_damping_follows_its_schedule():
    history = run(ng.kfac(0.1, setting().layers, damping=decay_from(0.8)), 3)
    assert [round(float(ng.damping(state)), 6) for _, state in history] == [0.8, 0.4, 0.2]


def test_injected_hyperparameters_change_in_mid_training():
    layers = setting().layers
    tx = optax.inject_hyperparams(ng.kfac)(
        learning_rate=0.1, layers=layers, damping=0.1, refresh_period=1, momentum=0.0,
        trust_radius=1e9,
    )  # fmt: skip
    update, state = updater(tx), tx.init(setting().params)
    grads, statistics = measured()
    small, state = update(grads, state, statistics)
    state.hyperparams["learning_rate"] = jnp.asarray(0.2, jnp.float32)
    large, state = update(grads, state, statistics)
    assert_close(large, jax.tree.map(lambda x: 2 * x, small))
    assert float(ng.damping(state)) == pytest.approx(0.1)
    state.hyperparams["damping"] = jnp.asarray(10.0, jnp.float32)
    damped, state = update(grads, state, statistics)
    assert float(ng.damping(state)) == 10
    assert optax.tree.norm(damped) < 0.5 * optax.tree.norm(large)
    assert update.traces == 1


def test_injected_schedules_are_read_at_every_step():
    tx = optax.inject_hyperparams(ng.kfac)(
        learning_rate=decay_from(0.4), layers=setting().layers, damping=decay_from(0.8)
    )
    history = run(tx, 3)
    rates = [float(state.hyperparams["learning_rate"]) for _, state in history]
    np.testing.assert_allclose(rates, [0.4, 0.2, 0.1], rtol=1e-6)
    lams = [float(ng.damping(state)) for _, state in history]
    np.testing.assert_allclose(lams, [0.8, 0.4, 0.2], rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_parameters_keep_their_dtype(dtype):
    params, layers, _ = setting("mc", dtype)
    grads, statistics = measured(0, "mc", dtype)
    tx = ng.kfac(0.1, layers, damping=0.1)
    state = tx.init(params)
    updates, later = jax.jit(lambda *a: tx.update(*a, params, statistics=statistics))(grads, state)
    assert signature(later) == signature(state)
    assert {x.dtype for x in jax.tree.leaves((grads, updates))} == {jnp.dtype(dtype)}
    floats = [*jax.tree.leaves(ng.factors(later)), *jax.tree.leaves(ng.bases(later))]
    assert {x.dtype for x in floats} == {jnp.dtype(jnp.float32)}
    full = ng.kfac(0.1, setting().layers, damping=0.1)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), grads)
    expected, _ = jax.jit(lambda: full.update(
        wide, full.init(setting().params), setting().params, statistics=statistics
    ))()  # fmt: skip
    narrow = jax.tree.map(lambda x: np.asarray(x, np.float32), updates)
    assert_close(narrow, expected, rtol=0.02, atol=1e-3)


# ------------------------------------------------------------------------------ optax's wrappers


def test_masked_layers_pass_unchanged():
    layers = setting().layers
    mask = {"hidden": {"kernel": True, "bias": True}, "norm": False, "head": False}
    updates = run(optax.masked(ng.scale_by_kfac(layers), mask), 1)[0][0]
    everything = run(ng.scale_by_kfac(layers), 1)[0][0]
    assert_close(updates["hidden"], everything["hidden"])
    assert same(updates["head"], measured(0)[0]["head"])
    assert same(updates["norm"], measured(0)[0]["norm"])


@pytest.mark.parametrize("on_layers, on_rest", [("kfac", "adam"), ("adam", "kfac")])
def test_partition_gives_each_its_own(on_layers, on_rest):
    """K-FAC on the layers and Adam on the rest; and the other way round: no layer is left to it."""
    params, layers, _ = setting()
    methods = {"kfac": ng.scale_by_kfac(layers), "adam": optax.adam(1e-3)}
    tx = optax.partition(methods, labels_of(params, on_layers, on_rest))
    updates = run(tx, 1)[0][0]
    kfac = run(methods["kfac"], 1)[0][0]
    adam, _ = methods["adam"].update(measured(0)[0], methods["adam"].init(params))
    for name, x in updates.items():
        label = on_rest if name == "norm" else on_layers
        assert_close(x, {"kfac": kfac, "adam": adam}[label][name])


def test_apply_if_finite_holds_the_state_back():
    tx = optax.apply_if_finite(ng.kfac(0.1, setting().layers, refresh_period=1), 5)
    update, state = updater(tx), tx.init(setting().params)
    grads, statistics = measured()
    _, state = update(grads, state, statistics)
    updates, later = update(jax.tree.map(lambda x: x * jnp.nan, grads), state, measured(1)[1])
    assert not any(np.any(x) for x in jax.tree.leaves(updates))
    assert same(later.inner_state, state.inner_state)
    # it looks at gradients alone: statistics that are not finite we keep out ourselves
    bad = spoiled(statistics, HEAD, "G")
    updates, later = update(grads, state, bad)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((updates, later)))
    assert any(np.any(x) for x in jax.tree.leaves(updates))


def test_multi_steps_passes_statistics_and_does_not_add_them():
    """MultiSteps averages gradients; what reaches us are the last micro-batch's statistics.

    So users add them: ``jax.tree.map(jnp.add, s1, s2)``, and give the sum at the last micro-step.
    """
    tx = optax.MultiSteps(ng.kfac(0.1, setting().layers), 2).gradient_transformation()
    update, start = updater(tx), tx.init(setting().params)
    (g0, s0), (g1, s1) = measured(0), measured(1)
    updates, middle = update(g0, start, s0)
    assert not any(np.any(x) for x in jax.tree.leaves(updates))
    assert not any(np.any(x) for x in jax.tree.leaves(ng.factors(middle)))
    _, last = update(g1, middle, s1)
    _, both = update(g1, middle, jax.tree.map(jnp.add, s0, s1))
    for k in range(2):
        one, two = batch_factors(HEAD, s0)[k], batch_factors(HEAD, s1)[k]
        np.testing.assert_allclose(ng.factors(last)[HEAD][k], two, rtol=1e-5, atol=1e-7)
        mean = (one + two) / 2
        np.testing.assert_allclose(ng.factors(both)[HEAD][k], mean, rtol=1e-5, atol=1e-7)


def test_the_period_counts_real_steps_in_multi_steps():
    """Statistics are due on every micro-step of a step that measures, and on none of the others."""
    params, layers, grad_fn = setting()
    inner = ng.kfac(0.1, layers, statistics_period=2)
    tx = optax.MultiSteps(inner, 2).gradient_transformation()
    update, state, counts = updater(tx), tx.init(params), []
    for i in range(6):
        _, grads, statistics = grad_fn(params, *batch(i), rng=jax.random.key(i), opt_state=state)
        counts.append(float(statistics.examples))
        _, state = update(grads, state, statistics)
    assert counts == [8, 8, 0, 0, 8, 8]


def test_extra_arguments_of_other_transformations_pass_by():
    params, layers, _ = setting()
    tx = ng.kfac(0.1, layers)
    grads, statistics = measured()
    extra = {"value": 1.0, "grad": grads, "value_fn": lambda params: 0.0}
    updates, _ = tx.update(grads, tx.init(params), params, statistics=statistics, **extra)
    assert_close(updates, run(tx, 1)[0][0])


# ----------------------------------------------------------------------------------------- Flax


def test_train_state_trains_with_other_transformations_too():
    params = setting().params
    state = ng.TrainState.create(apply_fn=Net().apply, params=params, tx=optax.sgd(0.5))
    grads, statistics = measured()
    later = state.apply_gradients(grads=grads, statistics=statistics, apply_fn=None)
    assert later.apply_fn is None and later.step == 1
    assert_close(later.params, jax.tree.map(lambda p, g: p - 0.5 * g, params, grads))
    assert_close(state.apply_gradients(grads=grads).params, later.params)


class OwnNormNNX(nnx.LayerNorm):
    """The same in NNX."""


class NetNNX(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(4, 5, rngs=rngs)
        self.norm = OwnNormNNX(5, rngs=rngs)
        self.head = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.tanh(self.norm(self.hidden(x))))


def test_nnx_optimizer_takes_the_steps_that_linen_takes():
    def nnx_loss(model, x, y):
        return ng.Categorical(model(x)).nll(y)

    params = setting().params
    model = NetNNX(nnx.Rngs(0))
    nnx.update(model, fresh(params))
    layers = find_layers(nnx_loss, model, *batch())
    make = lambda layers: ng.kfac(0.1, layers, statistics_period=2, refresh_period=2)
    optimizer = nnx.Optimizer(model, make(layers), wrt=nnx.Param)
    grad_fn = ng.value_and_grad(nnx_loss, layers)

    @functools.partial(nnx.jit, donate_argnums=(0, 1))
    def step(model, optimizer, x, y, key):
        loss, grads, statistics = grad_fn(model, x, y, rng=key, opt_state=optimizer.opt_state)
        optimizer.update(model, grads, statistics=statistics)
        return loss, statistics.examples

    _, linen_layers, linen_grad_fn = setting()
    tx = make(linen_layers)
    opt_state, linen_step = tx.init(params), training_step(tx, linen_grad_fn)
    counts = []
    for i in range(3):
        loss, count = step(model, optimizer, *batch(i), jax.random.key(i))
        counts.append(float(count))
        params, opt_state, expected = linen_step(params, opt_state, *batch(i), jax.random.key(i))
        np.testing.assert_allclose(loss, expected, rtol=1e-4)
    assert counts == [8, 0, 8]
    assert_close(nnx.to_pure_dict(nnx.state(model, nnx.Param)), params, 1e-3, 1e-4)
    assert_close(ng.factors(optimizer.opt_state), ng.factors(opt_state), 1e-3, 1e-5)
    assert_close(ng.bases(optimizer.opt_state), ng.bases(opt_state), 1e-2, 1e-2)
    assert float(ng.damping(optimizer.opt_state)) == float(ng.damping(opt_state))


def test_frozen_parameters_may_be_a_frozen_dict():
    from flax.core import freeze

    params, layers, _ = setting()
    frozen = freeze(params)
    found = find_layers(loss_fn, frozen, *batch())
    assert found == layers
    tx = ng.kfac(0.1, layers)
    step = training_step(tx, ng.value_and_grad(loss_fn, layers))
    new, _, loss = step(frozen, tx.init(frozen), *batch(), jax.random.key(0))
    assert jax.tree.structure(new) == jax.tree.structure(frozen)
    assert jnp.isfinite(loss)


def test_layers_wholly_covered_do_not_warn():
    model = nn.Dense(3)
    params = model.init(jax.random.key(0), batch()[0])["params"]
    wholly = lambda p, x, y: ng.Categorical(model.apply({"params": p}, x)).nll(y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ng.find_layers(wholly, params, *batch()).uncovered == ()
