"""Exact natural gradient, and what tunes itself: damping, step size, momentum, trust region."""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from transformations import Jitted

import natgrad_jax as ng

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("float64")]


class Linear(nn.Module):
    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width in self.widths:
            x = nn.Dense(width, use_bias=False)(x)
        return x


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(4)(nn.tanh(nn.Dense(6)(x)))


class Problem(NamedTuple):
    model: nn.Module
    params: Any
    batch: Any
    loss_fn: Any
    layers: ng.Layers


def problem(model: nn.Module, inputs: int, outputs: int, examples: int = 60) -> Problem:
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(examples, inputs)) * np.linspace(1, 3, inputs))
    y = jnp.asarray(random.normal(size=(examples, outputs)))
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    params = jax.tree.map(
        lambda s: jnp.asarray(random.normal(size=s.shape) / np.sqrt(s.shape[0])), shapes
    )

    def loss_fn(params: Any, batch: Any) -> ng.Loss:
        return ng.Gaussian(model.apply({"params": params}, batch[0])).nll(batch[1])

    batch = (x, y)
    return Problem(model, params, batch, loss_fn, ng.find_layers(loss_fn, params, batch))


def deep() -> Problem:
    """No layer narrower than the input or the output, so that nothing is out of reach."""
    return problem(Linear((5, 7, 6, 5)), 5, 5)


def kernels(tree: Any) -> list[jax.Array]:
    return [tree[name]["kernel"] for name in sorted(tree)]


def layerwise(own: Problem, **kwargs: Any) -> Any:
    """The gradient and ``ngd``'s update of rate 1, by exact expectations."""
    tx = ng.ngd(1.0, own.layers, **kwargs)
    grad_fn = ng.value_and_grad(own.loss_fn, own.layers, fisher="exact")

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> Any:
        loss, grads, statistics = grad_fn(params, batch, opt_state=state)
        updates, state = tx.update(grads, state, params, statistics=statistics)
        return loss, updates, state

    return step, tx.init(own.params)


EXACT = {"damping": 0.0, "inverse": "eigh", "cutoff": 1e-10}


def test_every_generalized_inverse_gives_the_same_losses() -> None:
    """The layerwise form, its equivalent through pseudo-inverses of weights, and the Moore–Penrose
    inverse of the whole singular Fisher by brute force."""
    own, rate = deep(), 1e-4
    step, state = layerwise(own, **EXACT)

    @jax.jit
    def by_brute_force(params: Any, batch: Any) -> Any:
        grads = jax.grad(lambda p: own.loss_fn(p, batch).value)(params)
        flat, unravel = ravel_pytree(grads)
        F = ng.fisher(own.loss_fn, params, batch)
        return unravel(-jnp.linalg.pinv(F, rtol=1e-9, hermitian=True) @ flat)

    @jax.jit
    def through_weights(params: Any, batch: Any) -> Any:
        error = own.model.apply({"params": params}, batch[0]) - batch[1]
        found = ng.linear_natural_gradient(kernels(params), batch[0], error)
        return {name: {"kernel": -x} for name, x in zip(sorted(params), found, strict=True)}

    ways = {
        "layerwise": lambda p: step(p, state, own.batch)[1],
        "brute force": lambda p: by_brute_force(p, own.batch),
        "weights": lambda p: through_weights(p, own.batch),
    }
    # the same change of the function, whatever the change of the weights
    change = lambda d: jax.jvp(
        lambda p: own.model.apply({"params": p}, own.batch[0]), (own.params,), (d,)
    )[1]
    layer_by_layer = change(ways["layerwise"](own.params))
    for direction in ways.values():
        np.testing.assert_allclose(change(direction(own.params)), layer_by_layer, atol=1e-7)
    losses: dict[str, list[float]] = {}
    for name, direction in ways.items():
        params = own.params
        losses[name] = []
        for _ in range(20):
            params = jax.tree.map(lambda p, d: p + rate * d, params, direction(params))
            losses[name].append(float(own.loss_fn(params, own.batch).value))
    for name in ways:
        np.testing.assert_allclose(losses[name], losses["layerwise"], rtol=1e-6)


def test_the_excess_loss_falls_exponentially() -> None:
    own, rate = deep(), 0.005
    step, state = layerwise(own, **EXACT)
    params, excess = own.params, []
    for _ in range(60):
        loss, updates, _ = step(params, state, own.batch)
        excess.append(float(loss) - minimum(own))
        params = jax.tree.map(lambda p, u: p + rate * u, params, updates)
    np.testing.assert_allclose(np.diff(np.log(excess)), 2 * np.log(1 - rate), rtol=0.02)


def minimum(own: Problem) -> float:
    """The least loss of any linear map."""
    x, y = own.batch
    W = np.linalg.lstsq(x, y, rcond=None)[0]
    return float(ng.Gaussian(x @ W).nll(y).value)


def test_the_weights_form_equals_the_layerwise_one_below_full_width() -> None:
    own = problem(Linear((4, 2, 5)), 6, 5)
    step, state = layerwise(own, **EXACT)
    _, updates, _ = step(own.params, state, own.batch)
    error = own.model.apply({"params": own.params}, own.batch[0]) - own.batch[1]
    found = ng.linear_natural_gradient(kernels(own.params), own.batch[0], error)
    for ours, theirs in zip(kernels(updates), found, strict=True):
        np.testing.assert_allclose(-ours, theirs, rtol=1e-8, atol=1e-10)


def test_ngd_is_its_formula() -> None:
    """``(α/L) (A + √λ I)⁻¹ ∇ (G + √λ I)⁻¹``, bias included."""
    own = problem(MLP(), 5, 4)
    grad_fn = ng.value_and_grad(own.loss_fn, own.layers)
    _, grads, statistics = grad_fn(own.params, own.batch, rng=jax.random.key(0))
    tx = ng.ngd(0.5, own.layers, damping=0.04)
    updates, _ = tx.update(grads, tx.init(own.params), statistics=statistics)
    for path, layer in own.layers.items():
        sums, N = statistics.layers[path], 60
        A, G = (sums.A / N + 0.2 * np.eye(len(sums.A)), sums.G / N + 0.2 * np.eye(len(sums.G)))
        matrix = lambda tree, x=layer, p=path: x.to_matrix(tree[p[0]]["kernel"], tree[p[0]]["bias"])
        expected = -0.25 * np.linalg.inv(A) @ matrix(grads) @ np.linalg.inv(G)
        np.testing.assert_allclose(matrix(updates), expected, rtol=1e-9)


@pytest.mark.parametrize("how", [{"inverse": "eigh"}, {"inverse": "low_rank", "rank": 6},
                                 {"inverse": "low_rank", "rank": 2}])  # fmt: skip
def test_other_inverses_agree_where_they_are_exact(how: Any) -> None:
    own = problem(MLP(), 5, 4)
    grad_fn = ng.value_and_grad(own.loss_fn, own.layers)
    _, grads, statistics = grad_fn(own.params, own.batch, rng=jax.random.key(0))
    found = []
    for kwargs in ({}, how):
        tx = ng.scale_by_kfac(own.layers, **kwargs)
        updates, _ = tx.update(grads, tx.init(own.params), statistics=statistics)
        found.append(ravel_pytree(updates)[0])
    if how.get("rank") == 2:  # kept: the leading directions; so it is near, and not the same
        assert 1e-6 < np.linalg.norm(found[1] - found[0]) / np.linalg.norm(found[0]) < 1
    else:
        np.testing.assert_allclose(found[1], found[0], rtol=1e-7)


def test_woodbury_follows_every_batch() -> None:
    """Between refreshes the inverse is that of the factors with the damping of the refresh, which
    fades by the decay."""
    own = problem(MLP(), 5, 4, examples=3)
    grad_fn = ng.value_and_grad(own.loss_fn, own.layers)
    tx = ng.scale_by_kfac(
        own.layers, 0.1, inverse="woodbury", rank=3, decay=0.9, refresh_period=100,
        statistics_period=1,
    )  # fmt: skip
    state = tx.init(own.params)
    path = ("Dense_0",)
    expected = None

    @jax.jit
    def step(state: Any, batch: Any, key: Any) -> Any:
        _, grads, statistics = grad_fn(own.params, batch, rng=key, opt_state=state)
        return tx.update(grads, state, statistics=statistics)[1], statistics

    for i in range(4):
        batch = jax.tree.map(lambda x, i=i: x * (1 + i), own.batch)
        state, statistics = step(state, batch, jax.random.key(i))
        A = statistics.layers[path].A / 3
        if expected is None:
            expected, weight = np.linalg.inv(ng.bases(state)[path].A), 0.1
            continue
        weight = 0.9 * weight + 0.1
        expected = expected + 0.1 / weight * (A - expected)
        np.testing.assert_allclose(np.linalg.inv(ng.bases(state)[path].A), expected, rtol=1e-6)


def test_conjugate_gradients_solve_the_damped_fisher() -> None:
    own = problem(MLP(), 5, 4)
    grads = jax.grad(lambda p: own.loss_fn(p, own.batch).value)(own.params)
    for curvature in ("fisher", "gauss_newton"):
        found = ng.natural_gradient(
            own.loss_fn, own.params, own.batch, gradient=grads, damping=0.1, tolerance=1e-12,
            curvature=curvature,
        )  # fmt: skip
        F = ng.fisher(own.loss_fn, own.params, own.batch)
        expected = np.linalg.solve(F + 0.1 * np.eye(len(F)), ravel_pytree(grads)[0])
        np.testing.assert_allclose(ravel_pytree(found)[0], expected, rtol=1e-6, atol=1e-9)


def quadratic() -> Problem:
    """A loss that is its own quadratic model: one linear layer with Gaussian outputs."""
    return problem(Linear((4,)), 5, 4)


def test_step_and_momentum_are_the_minimisers_and_the_decrease_is_the_predicted_one() -> None:
    own = quadratic()
    tx = ng.scale_by_quadratic_model(own.loss_fn, damping=0.0)
    value_fn = jax.jit(lambda p: own.loss_fn(p, own.batch).value)
    params, state = own.params, tx.init(own.params)
    previous = None
    for _ in range(4):
        grads = jax.grad(value_fn)(params)
        updates, state = tx.update(grads, state, params, grad=grads, args=(own.batch,))
        actual = value_fn(optax.apply_updates(params, updates)) - value_fn(params)
        np.testing.assert_allclose(actual, state.predicted, rtol=1e-6)
        if previous is not None:  # no other combination of the two is lower
            F = ng.fisher(own.loss_fn, params, own.batch)
            D = np.stack([-ravel_pytree(grads)[0], ravel_pytree(previous)[0]], axis=1)
            best = np.linalg.solve(D.T @ F @ D, -D.T @ ravel_pytree(grads)[0])
            np.testing.assert_allclose([state.learning_rate, state.momentum], best, rtol=1e-6)
        params, previous = optax.apply_updates(params, updates), updates


@pytest.mark.parametrize("fixed", [{"learning_rate": 0.01}, {"momentum": 0.5}, {"momentum": 0.0}])
def test_what_is_fixed_stays_and_the_other_is_best(fixed: Any) -> None:
    own = quadratic()
    damping, l2 = 0.3, 0.2
    tx = ng.scale_by_quadratic_model(own.loss_fn, damping=damping, l2=l2, **fixed)
    state = tx.init(own.params)
    grads = jax.grad(lambda p: own.loss_fn(p, own.batch).value)(own.params)
    state = state._replace(last=jax.tree.map(lambda p: 0.1 * jnp.cos(p), own.params))
    _, after = tx.update(grads, state, own.params, grad=grads, args=(own.batch,))
    assert all(float(getattr(after, key)) == value for key, value in fixed.items())
    F = ng.fisher(own.loss_fn, own.params, own.batch)
    B, g = F + (damping + l2) * np.eye(len(F)), ravel_pytree(grads)[0]
    last = ravel_pytree(state.last)[0]
    model = lambda a, m: (lambda d: g @ d + d @ B @ d / 2)(-a * g + m * last)
    alpha, mu = float(after.learning_rate), float(after.momentum)
    for step in (1e-3, -1e-3):
        other = (alpha, mu + step) if "learning_rate" in fixed else (alpha + step, mu)
        assert model(alpha, mu) <= model(*other)


RULES = {
    "bernacchia": ng.bernacchia(),
    "bernacchia, its own model": ng.bernacchia(1.0),
    "levenberg_marquardt": ng.levenberg_marquardt(period=2),
}
MAKERS = {
    "kfac": lambda layers, damping: ng.kfac(0.3, layers, damping=damping, statistics_period=1,
                                            refresh_period=1),
    "ekfac": lambda layers, damping: ng.ekfac(0.3, layers, damping=damping, refresh_period=5),
    "ngd": lambda layers, damping: ng.ngd(1.0, layers, damping=damping),
}  # fmt: skip


@pytest.mark.parametrize("start", [1e-6, 1e4])
@pytest.mark.parametrize(
    ("name", "rule"),
    [(name, rule) for name in MAKERS for rule in ("bernacchia", "levenberg_marquardt")]
    + [("ngd", "bernacchia, its own model")],
)
def test_damping_recovers_from_either_side(name: str, rule: str, start: float) -> None:
    own = problem(MLP(), 5, 4)
    tx = ng.adaptive_damping(
        partial(MAKERS[name], own.layers), RULES[rule], own.loss_fn, initial=start
    )
    grad_fn = ng.value_and_grad(own.loss_fn, own.layers)

    @Jitted
    def step(params: Any, state: Any, batch: Any, key: Any) -> Any:
        value, grads, statistics = grad_fn(params, batch, rng=key, opt_state=state)
        updates, state = tx.update(
            grads, state, params, statistics=statistics, value=value, args=(batch,),
            value_fn=lambda p: own.loss_fn(p, batch).value,
        )  # fmt: skip
        return optax.apply_updates(params, updates), state, value

    params, state, losses = own.params, tx.init(own.params), []
    for i in range(60):
        params, state, value = step(params, state, own.batch, jax.random.key(i))
        losses.append(float(value))
    assert step.traces == 1
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
    assert start == 1e4 or losses[-1] < 0.7 * losses[0]
    assert np.argmax(losses) == 0
    history = state.history[:60]
    assert jnp.all(jnp.isfinite(history)) and jnp.isnan(state.history[60])
    assert float(history[0]) == start
    if start == 1e4:
        assert state.level < (start / 10 if rule == "levenberg_marquardt" else start / 100)
    np.testing.assert_allclose(ng.damping(state), history[-1])


def test_damping_stays_within_its_bounds_and_bad_steps_are_taken_back() -> None:
    own = quadratic()
    diverging = lambda damping: optax.scale(-1e3 + 0 * damping)
    tx = ng.adaptive_damping(diverging, ng.bernacchia(), own.loss_fn, initial=1.0, bounds=(0.5, 2))
    value_fn = lambda p: own.loss_fn(p, own.batch).value
    params, state = own.params, tx.init(own.params)
    for _ in range(5):
        value, grads = jax.value_and_grad(value_fn)(params)
        updates, state = tx.update(
            grads, state, params, value=value, value_fn=value_fn, args=(own.batch,)
        )
        assert not np.any(ravel_pytree(updates)[0])
    assert float(state.level) == 2 and int(state.refused) == 5


def test_trust_radius_bounds_the_step_of_any_optimizer() -> None:
    own = problem(MLP(), 5, 4)
    radius = 1e-4
    tx = optax.chain(optax.adam(0.1), ng.clip_by_trust_radius(radius, own.loss_fn))
    grads = jax.grad(lambda p: own.loss_fn(p, own.batch).value)(own.params)
    updates, _ = tx.update(grads, tx.init(own.params), own.params, args=(own.batch,))
    u, F = ravel_pytree(updates)[0], ng.fisher(own.loss_fn, own.params, own.batch)
    np.testing.assert_allclose(u @ F @ u, radius, rtol=1e-9)
    small = jax.tree.map(lambda g: 1e-6 * g, grads)
    tx = ng.clip_by_trust_radius(radius, own.loss_fn)
    kept, _ = tx.update(small, tx.init(own.params), own.params, args=(own.batch,))
    assert np.array_equal(ravel_pytree(kept)[0], ravel_pytree(small)[0])


def test_missing_arguments_show_the_call() -> None:
    own = quadratic()
    grads = own.params
    damped = ng.adaptive_damping(lambda d: optax.scale(d), ng.bernacchia(), own.loss_fn)
    model = ng.scale_by_quadratic_model(own.loss_fn)
    trust = ng.clip_by_trust_radius(1.0, own.loss_fn)
    for tx, message in (
        (damped, "value, args: write tx.update.*value=loss, args="),
        (model, "grad, args: write .*grad=grads, args="),
        (trust, "needs args"),
    ):
        with pytest.raises(ValueError, match=message):
            tx.update(grads, tx.init(own.params), own.params)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda x: ng.ngd(1.0, x, damping=0.0), 'inverse="eigh"'),
        (lambda x: ng.ngd(1.0, x, inverse="woodbury", rank=3), "give a decay"),
        (lambda x: ng.kfac(1.0, x, inverse="woodbury"), "needs rank="),
        (lambda x: ng.kfac(1.0, x, inverse="svd"), "'low_rank'"),
        (lambda x: ng.kfac(1.0, x, inverse="eigh", rank=3), 'inverse="low_rank"'),
        (lambda x: ng.kfac(1.0, x, statistics_fraction=0.0), r"in \(0, 1\]"),
        (lambda x: ng.ekfac(1.0, x, statistics_fraction=jnp.ones(())), "static_args"),
        (lambda x: ng.ekfac(1.0, x, spread=True, refresh_period=lambda step: 20), "must be known"),
        (lambda x: ng.kfac(1.0, x, refresh_over=3), "name of an axis"),
        (
            lambda x: ng.prong(1.0, x, refresh_over=(jax.make_mesh((1,), ("data",)), "batch")),
            "the mesh has axes",
        ),
        (lambda x: ng.adaptive_damping(x, ng.bernacchia(), None, initial=1e9), "within bounds"),
        (lambda x: ng.levenberg_marquardt(omega=1.5), "omega"),
        (lambda x: ng.scale_by_quadratic_model(None, damping=-1.0), "not be negative"),
    ],
)
def test_errors(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(ng.Layers({}))
