"""Whitened coordinates against brute force and against the explicit whitened network."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from cases import CASES, LINEN_ONLY, Case
from one_layer import build, fresh
from transformations import Jitted

import natgrad_jax as ng

pytestmark = pytest.mark.once

KRONECKER = [c for c in CASES + LINEN_ONLY if c.block == "kronecker"]


def brute_force(case: Case, setup: Any, layer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of the channels under every place of the kernel, block by block."""
    J = oracle.jacobians(setup.output, setup.tree, setup.batch[0], case.arrange)
    at = oracle.places(layer, setup.tree)
    means, covariances = [], []
    for block in sorted({p.block for p in at}):
        rows = []
        for place in sorted({p.place for p in at if not p.bias}):
            own = [
                (p.channel, i)
                for i, p in enumerate(at)
                if (p.block, p.place, p.output, p.bias) == (block, place, 0, False)
                and not (layer.bias is not None and place == 0 and p.channel == layer.inputs)
            ]
            rows.append(J[:, :, block, 0][..., [i for _, i in sorted(own)]])
        rows = np.concatenate([r.reshape(-1, r.shape[-1]) for r in rows])
        means.append(rows.mean(0) if layer.bias is not None else 0 * rows.mean(0))
        centred = rows - means[-1]
        covariances.append(centred.T @ centred / len(rows))
    return np.stack(means), np.stack(covariances)


@pytest.mark.parametrize("case", KRONECKER, ids=lambda c: c.name)
def test_inputs_are_white(case: Case, float64: None) -> None:
    """``UᵀU (Σ + ε I) = I`` and ``c = E[h]`` on the statistics that made them."""
    setup = build(case, "linen", "categorical", jnp.float64)
    layers = ng.find_layers(setup.loss_fn, setup.params, setup.batch)
    epsilon = 1e-3
    tx = ng.in_coordinates(optax.sgd(0.1), layers, decay=0.0, epsilon=epsilon)
    grad_fn = ng.value_and_grad(setup.loss_fn, layers)

    @jax.jit
    def step(batch: Any) -> Any:
        state = tx.init(setup.tree)
        _, grads, statistics = grad_fn(fresh(setup.params), batch, opt_state=state)
        return tx.update(grads, state, setup.tree, statistics=statistics)[1]

    ((path, own),) = ng.bases(step(setup.batch)).items()
    means, covariances = brute_force(case, setup, layers[path])
    if case.ids:
        np.testing.assert_allclose(own.A_scale**-2 - epsilon, np.diag(covariances[0]), atol=1e-12)
        return
    n = own.U.shape[-1]
    for U, Sigma in zip(own.U.reshape(-1, n, n), covariances, strict=True):
        np.testing.assert_allclose(U.T @ U @ (Sigma + epsilon * np.eye(n)), np.eye(n), atol=1e-9)
    if layers[path].bias is None:
        assert own.mean is None
    else:
        np.testing.assert_allclose(own.mean.reshape(-1, n), means, atol=1e-12)


class Net(nn.Module):
    """The canonical network, or the explicit whitened one, with the same names."""

    whitened: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = ng.WhitenedConv if self.whitened else nn.Conv
        dense = ng.WhitenedDense if self.whitened else nn.Dense
        x = nn.tanh(conv(4, (3, 3), strides=2, name="conv")(x))
        x = nn.tanh(conv(4, (2, 2), feature_group_count=2, padding="CIRCULAR", name="groups")(x))
        x = x.reshape(len(x), -1)
        x = nn.tanh(dense(6, use_bias=False, name="narrow")(x))
        return dense(3, name="readout")(x)


class Problem(NamedTuple):
    params: Any
    batch: Any
    layers: ng.Layers
    grad_fn: Any


def loss_fn(params: Any, batch: Any, variables: Any = None) -> ng.Loss:
    net = Net(whitened=variables is not None)
    logits = net.apply({"params": params, "whitening": variables or {}}, batch[0])
    return ng.Categorical(logits).nll(batch[1])


def problem(dtype: Any, examples: int = 48) -> Problem:
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(examples, 6, 6, 2)) + 0.3, dtype)
    shapes = jax.eval_shape(Net().init, jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda s: jnp.asarray(random.normal(size=s.shape) / 3, dtype), shapes)
    batch = (x, jnp.arange(examples) % 3)
    layers = ng.find_layers(loss_fn, params, batch)
    return Problem(params, batch, layers, ng.value_and_grad(loss_fn, layers))


INNERS = {
    "sgd": (lambda: optax.sgd(0.02), "keep"),
    "momentum": (lambda: optax.sgd(0.004, momentum=0.9), "keep"),
    "adam": (lambda: optax.adam(0.002, eps=1e-2), "keep"),
    "adam, reset": (lambda: optax.adam(0.002, eps=1e-2), "reset"),
    "adamw, in whitened parameters": (
        lambda: optax.adamw(0.003, eps=1e-3, weight_decay=0.1),
        "keep",
    ),
}
PERIOD, STEPS, EPSILON = 20, 50, 5e-2


PATHS = [(name, jnp.float64, 1e-10) for name in INNERS] + [
    (name, jnp.float32, 1e-6) for name in ("sgd", "momentum", "adam")
]


@pytest.mark.parametrize("name, dtype, tolerance", PATHS)
def test_explicit_whitened_network_takes_the_same_path(
    name: str, dtype: Any, tolerance: float
) -> None:
    with jax.enable_x64(dtype == jnp.float64):
        make, on_refresh = INNERS[name]
        own = problem(dtype)
        probabilities = jax.jit(lambda p, x: nn.softmax(Net().apply({"params": p}, x)))
        ours, bases = zip(*through_coordinates(own, make(), on_refresh), strict=True)
        theirs = explicit(own, make(), on_refresh, bases)
        for pair in zip(ours, theirs, strict=True):
            a, b = (probabilities(params, own.batch[0]) for params in pair)
            np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)


def through_coordinates(own: Problem, inner: Any, on_refresh: str) -> Any:
    """Canonical parameters and coordinates after every step of ``in_coordinates``."""
    tx = ng.in_coordinates(
        inner, own.layers, decay=0.0, epsilon=EPSILON, refresh_period=PERIOD,
        statistics_period=PERIOD, on_refresh=on_refresh,
    )  # fmt: skip

    @Jitted
    def step(params: Any, state: Any, batch: Any) -> Any:
        _, grads, statistics = own.grad_fn(params, batch, opt_state=state)
        updates, state = tx.update(grads, state, params, statistics=statistics)
        return optax.apply_updates(params, updates), state

    params, state = own.params, tx.init(own.params)
    for _ in range(STEPS):
        params, state = step(params, state, own.batch)
        yield params, ng.bases(state)
    assert step.traces == 1


def explicit(own: Problem, inner: Any, on_refresh: str, bases: Any) -> Any:
    """The same of the whitened network itself, trained by the inner optimizer alone.

    Its coordinates are checked to be the whitening of its own activations, and taken from the
    other: eigenvectors are unique up to rotations in null spaces, which Adam would see.
    """
    measure = jax.jit(ng.value_and_grad(loss_fn, own.layers, fisher="none"))

    @jax.jit
    def step(hat: Any, state: Any, variables: Any, batch: Any) -> Any:
        grads = jax.grad(lambda p: loss_fn(p, batch, variables).value)(hat)
        updates, state = inner.update(grads, state, hat)
        return optax.apply_updates(hat, updates), state

    params, state = own.params, inner.init(own.params)
    for i in range(STEPS):
        if i % PERIOD == 0:
            now, own_now = bases[i], measure(params, own.batch)[2]
            for path, mine in ng.whitening(own_now, own.layers, EPSILON).items():
                np.testing.assert_allclose(
                    now[path].U.mT @ now[path].U, mine.U.mT @ mine.U, rtol=1e-3, atol=1e-3
                )
            hat, variables = ng.whiten(params, own.layers, now), ng.whitening_variables(now)
            state = inner.init(hat) if on_refresh == "reset" else state
        hat, state = step(hat, state, variables, own.batch)
        params = ng.unwhiten(hat, own.layers, now)
        yield params


@pytest.mark.parametrize("epsilon", [1e-1, 1e-4])
@pytest.mark.parametrize("trouble", ["dead units", "fewer examples than units"])
def test_the_function_is_preserved(trouble: str, epsilon: float) -> None:
    """Round trips, and the whitened network itself, in float32, also where covariances are
    singular."""
    own = problem(jnp.float32, examples=2)
    params, (x, y) = own.params, own.batch
    if trouble == "dead units":
        x = x.at[..., 0].set(3.0)  # a constant channel
        params = {**params, "conv": jax.tree.map(jnp.zeros_like, params["conv"])}
    _, _, statistics = jax.jit(own.grad_fn)(params, (x, y), rng=jax.random.key(0))
    now = ng.whitening(statistics, own.layers, epsilon)
    hat = ng.whiten(params, own.layers, now)
    again = ng.unwhiten(hat, own.layers, now)
    canonical = loss_logits(params, x)
    np.testing.assert_allclose(loss_logits(again, x), canonical, rtol=0, atol=3e-6)
    white = loss_logits(hat, x, ng.whitening_variables(now))
    np.testing.assert_allclose(white, canonical, rtol=0, atol=3e-6)


def loss_logits(params: Any, x: jax.Array, variables: Any = None) -> jax.Array:
    net = Net(whitened=variables is not None)
    return net.apply({"params": params, "whitening": variables or {}}, x)


def one_step(own: Problem, tx: Any, **kwargs: Any) -> Any:
    """One update, by statistics with outputs too."""

    @jax.jit
    def step(params: Any, batch: Any) -> Any:
        state = tx.init(params)
        rng = jax.random.key(0)
        _, grads, statistics = own.grad_fn(params, batch, rng=rng)
        return (grads, *tx.update(grads, state, params, statistics=statistics, **kwargs))

    return step(own.params, own.batch)


def test_prong_is_kfac_with_white_outputs(float64: None) -> None:
    """``Ā⁻¹ ∇K̄`` without ε, and on both sides K-FAC's own update."""
    own = problem(jnp.float64)
    grads, updates, _ = one_step(own, ng.prong(1.0, own.layers, epsilon=1e-14, momentum=None))
    dense = own.layers.select(lambda path, layer: path in {("readout",), ("narrow",)})
    _, _, statistics = own.grad_fn(own.params, own.batch, rng=jax.random.key(0))
    for path, layer in dense.items():
        sums = statistics.layers[path]
        names = [p.path[-1] for p in layer.parameters]
        gradient = layer.to_matrix(*(grads[path[-1]][n] for n in names))
        update = layer.to_matrix(*(updates[path[-1]][n] for n in names))
        np.testing.assert_allclose(
            -update, np.linalg.solve(sums.A / sums.rows, gradient), rtol=1e-6
        )

    tx = ng.in_coordinates(
        optax.sgd(1.0), own.layers, "both_sides", epsilon=1e-16, approximation="kfc"
    )
    _, both, _ = one_step(own, tx)
    _, kfac, _ = one_step(own, optax.chain(ng.scale_by_kfac(own.layers, 1e-16), optax.sgd(1.0)))
    for path in (("readout",), ("narrow",)):
        for name, x in both[path[0]].items():
            np.testing.assert_allclose(x, kfac[path[0]][name], rtol=2e-3)


def test_adam_in_the_eigenbasis_is_adam_of_rotated_gradients(float64: None) -> None:
    own = problem(jnp.float64)
    tx = ng.in_coordinates(optax.adam(1.0), own.layers, "eigenbasis")
    grads, updates, state = one_step(own, tx)
    basis = ng.bases(state)["readout",]
    layer = own.layers["readout",]
    pick = lambda tree: layer.to_matrix(tree["readout"]["kernel"], tree["readout"]["bias"])
    np.testing.assert_allclose(basis.A @ basis.A.T, np.eye(7), atol=1e-12)
    turned = basis.A.T @ pick(grads) @ basis.G
    first = turned / (np.abs(turned) + 1e-8)  # Adam's first step: the sign, but for its epsilon
    np.testing.assert_allclose(basis.A.T @ pick(updates) @ basis.G, -first, atol=1e-6)


def test_plus_keeps_unit_variance_on_every_batch(float64: None) -> None:
    own = problem(jnp.float64)
    epsilon = 1e-6
    tx = ng.prong(0.01, own.layers, plus=True, epsilon=epsilon, refresh_period=50)

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> Any:
        _, grads, statistics = own.grad_fn(params, batch, opt_state=state)
        updates, state = tx.update(grads, state, params, statistics=statistics)
        return optax.apply_updates(params, updates), state, statistics

    params, state = own.params, tx.init(own.params)
    for i in range(3):
        batch = (own.batch[0] * (1 + i), own.batch[1])  # ever wider inputs
        params, state, statistics = step(params, state, batch)
        white = ng.whitening(statistics, own.layers, epsilon)
        for path, now in ng.bases(state).items():
            if path == ("groups",):
                continue
            Sigma = jnp.linalg.inv(white[path].U.T @ white[path].U) - epsilon * jnp.eye(len(now.A))
            variances = jnp.diag(now.A.T @ Sigma @ now.A)
            scaled = jnp.diag(now.U @ Sigma @ now.U.T)
            np.testing.assert_allclose(scaled[variances > 1e-2], 1, atol=1e-3)
            assert jnp.all(scaled < 1.001)


@pytest.mark.parametrize("rank", [None, 2])
def test_transported_momentum_is_the_sum_of_canonical_gradients(
    rank: int | None, float64: None
) -> None:
    """What a trace of gradients stands for does not change at a refresh; squares take squares."""
    own = problem(jnp.float64)
    inner = optax.chain(optax.trace(0.9), optax.scale(-0.01))
    tx = ng.in_coordinates(
        inner, own.layers, decay=0.0, refresh_period=2, statistics_period=1, rank=rank
    )
    params, state = own.params, tx.init(own.params)
    trace = jax.tree.map(jnp.zeros_like, params)
    for _ in range(4):
        _, grads, statistics = own.grad_fn(params, own.batch, opt_state=state)
        updates, state = tx.update(grads, state, params, statistics=statistics)
        trace = jax.tree.map(lambda t, g: 0.9 * t + g, trace, grads)
        layer, now = own.layers["readout",], ng.bases(state)["readout",]
        matrix = layer.to_matrix(trace["readout"]["kernel"], trace["readout"]["bias"])
        # Δ = L Lᵀ m: the covariance of the current coordinates on all canonical gradients so far
        n = len(now.mean)
        L = np.block([[now.U.T, np.zeros((n, 1))], [-now.mean @ now.U.T, np.ones((1, 1))]])
        update = layer.to_matrix(updates["readout"]["kernel"], updates["readout"]["bias"])
        np.testing.assert_allclose(update, -0.01 * L @ L.T @ matrix, rtol=1e-9)
        params = optax.apply_updates(params, updates)


@pytest.mark.parametrize("name, rank", [("conv", None), ("readout", 2)])
def test_transported_squares_take_the_squares_of_the_map(
    name: str, rank: int | None, float64: None
) -> None:
    from natgrad_jax.reparametrization.change_of_basis import transport_gradients, transport_squares

    own = problem(jnp.float64)
    layer = own.layers[name,]
    old, new = (refreshed(own, 1, epsilon=e, rank=rank)[name,] for e in (1e-1, 1e-3))
    new = new._replace(mean=new.mean + 0.3)
    rows = layer.inputs + 1
    P = transport_gradients(layer, old, new, jnp.eye(rows))
    S = jnp.abs(jnp.sin(jnp.arange(rows * 4.0))).reshape(rows, 4)
    np.testing.assert_allclose(transport_squares(layer, old, new, S), P**2 @ S, rtol=1e-10)


def refreshed(own: Problem, times: int, **keywords: Any) -> Any:
    """Coordinates after some refreshes from the same batch at the same parameters."""
    tx = ng.in_coordinates(optax.sgd(0.1), own.layers, refresh_period=1, **keywords)
    grads, statistics = own.grad_fn(own.params, own.batch, rng=jax.random.key(0))[1:]
    update = jax.jit(lambda state: tx.update(grads, state, own.params, statistics=statistics)[1])
    state = tx.init(own.params)
    for _ in range(times):
        state = update(state)
    return ng.bases(state)


@pytest.mark.parametrize("coordinates", ["whitening", "whitening_plus"])
def test_few_directions_are_the_leading_ones(coordinates: str, float64: None) -> None:
    """``UᵀU`` is that of the k leading eigenvalues, and of the mean of the others."""
    own, epsilon, rank = problem(jnp.float64), 1e-2, 2
    few = refreshed(own, 600, coordinates=coordinates, epsilon=epsilon, rank=rank)
    whole = refreshed(own, 1, coordinates=coordinates, epsilon=epsilon)
    for name in ("narrow", "readout"):
        U = whole[name,].U
        values, Q = np.linalg.eigh(np.linalg.inv(U.T @ U) - epsilon * np.eye(len(U)))
        values[:-rank] = values[:-rank].mean()
        wanted = (Q / (values + epsilon)) @ Q.T
        np.testing.assert_allclose(few[name,].U.T @ few[name,].U, wanted, rtol=1e-6, atol=1e-6)
        assert few[name,].A.shape == (len(U), rank)
    assert few["conv",].A_rest is None  # two channels: nothing to save


def test_samples_are_gathered_before_a_refresh_and_only_then() -> None:
    """With 48 examples a batch, 120 samples are the last three batches before every refresh."""
    own = problem(jnp.float32)
    tx = ng.prong(0.01, own.layers, samples=120, refresh_period=10, epsilon=1e-3)
    params, state = own.params, tx.init(own.params)
    measured, seen = [], []
    step = jax.jit(lambda p, s, b: own.grad_fn(p, b, opt_state=s)[1:])
    update = jax.jit(lambda g, s, p, t: tx.update(g, s, p, statistics=t))
    random = np.random.default_rng(1)
    for i in range(21):
        batch = (jnp.asarray(random.normal(size=own.batch[0].shape), jnp.float32), own.batch[1])
        grads, statistics = step(params, state, batch)
        if statistics.examples > 0:
            measured.append(i)
            seen.append(statistics)
        _, state = update(grads, state, params, statistics)
    assert measured == [0, 8, 9, 10, 18, 19, 20]
    total = jax.tree.map(lambda *s: sum(s), *seen[-3:])
    white = ng.whitening(total, own.layers, 1e-3)
    for path, now in ng.bases(state).items():
        a, b = (np.asarray(x.U.mT @ x.U) for x in (now, white[path]))
        assert oracle.relative(a, b) <= 1e-4


def test_inner_transformations_see_the_coordinates() -> None:
    """L-BFGS with its line search runs inside; its value_fn takes whitened parameters."""
    own = problem(jnp.float32)
    tx = ng.in_coordinates(optax.lbfgs(), own.layers, on_refresh="reset", refresh_period=10)
    value_fn = lambda p: loss_fn(p, own.batch).value

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        loss, grads, statistics = own.grad_fn(params, own.batch, opt_state=state)
        updates, state = tx.update(
            grads, state, params, statistics=statistics, value=loss, grad=grads,
            value_fn=value_fn,
        )  # fmt: skip
        return optax.apply_updates(params, updates), state, loss

    params, state, losses = own.params, tx.init(own.params), []
    for _ in range(15):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert losses[-1] < 0.05 * losses[0]


def test_no_fisher_pass_and_no_key_is_needed() -> None:
    own = problem(jnp.float32)
    state = ng.prong(0.1, own.layers).init(own.params)
    _, _, statistics = own.grad_fn(own.params, own.batch, opt_state=state)  # no rng
    assert statistics.leftover is None
    assert all(sums.G is None for sums in statistics.layers.values())


def test_identity_is_the_inner_optimizer() -> None:
    own = problem(jnp.float32)
    tx = ng.in_coordinates(optax.adam(0.1), own.layers, "identity")
    grads, updates, _ = one_step(own, tx)
    plain, _ = optax.adam(0.1).update(grads, optax.adam(0.1).init(own.params))
    for ours, theirs in zip(jax.tree.leaves(updates), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda layers: ng.in_coordinates(layers, optax.sgd(0.1)), "layers must be what"),
        (lambda layers: ng.in_coordinates(0.1, layers), "inner must be an optax"),
        (lambda layers: ng.in_coordinates(optax.sgd(1.0), layers, "white"), "'whitening'"),
        (lambda layers: ng.prong(0.1, layers, on_refresh="move"), "'transport'"),
        (lambda layers: ng.prong(0.1, layers, epsilon=0.0), "epsilon must be positive"),
        (lambda layers: ng.prong(0.1, layers, rank=0), "counts directions"),
        (
            lambda layers: ng.in_coordinates(optax.sgd(1.0), layers, "both_sides", rank=2),
            "'both_sides'",
        ),
        (lambda layers: ng.prong(0.1, layers, plus=True, samples=10), "leave samples out"),
    ],
)
def test_errors(make: Any, message: str) -> None:
    own = problem(jnp.float32)
    with pytest.raises((ValueError, TypeError), match=message):
        make(own.layers)


def test_reset_asks_for_params() -> None:
    own = problem(jnp.float32)
    tx = ng.prong(0.1, own.layers, on_refresh="reset")
    state = tx.init(own.params)
    _, grads, statistics = own.grad_fn(own.params, own.batch, opt_state=state)
    with pytest.raises(ValueError, match="opt_state, params"):
        tx.update(grads, state, statistics=statistics)


def test_coordinates_of_other_layers_are_refused() -> None:
    own = problem(jnp.float32)
    with pytest.raises(ValueError, match="no such layers"):
        ng.whiten(own.params, own.layers, {("nowhere",): ng.Coordinates()})


def test_nothing_that_is_not_finite_enters() -> None:
    own = problem(jnp.float32)
    tx = ng.prong(0.1, own.layers, refresh_period=1, statistics_period=1)
    state = tx.init(own.params)
    step = jax.jit(
        lambda p, s, b: tx.update(
            own.grad_fn(p, b, opt_state=s)[1], s, p, statistics=own.grad_fn(p, b, opt_state=s)[2]
        )
    )
    _, state = step(own.params, state, own.batch)
    before = jax.tree.leaves(ng.bases(state))
    x = own.batch[0].at[0, 0, 0, 0].set(jnp.nan)
    _, state = step(own.params, state, (x, own.batch[1]))
    assert int(state.rejected) > 0
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(ng.bases(state)))
    np.testing.assert_array_equal(before[0], jax.tree.leaves(ng.bases(state))[0])


def test_paths_of_a_state_are_those_of_the_layers() -> None:
    own = problem(jnp.float32)
    state = ng.prong(0.1, own.layers).init(own.params)
    assert set(ng.bases(state)) == set(own.layers) == set(ng.factors(state))


def test_a_refresh_measures_its_own_batch() -> None:
    """Also where statistics are wanted less often, and on other steps."""
    own, epsilon, random = problem(jnp.float32), 1e-2, np.random.default_rng(1)
    tx = ng.prong(
        0.01, own.layers, statistics_period=3, refresh_period=2, decay=0.0, epsilon=epsilon
    )
    state, measured = tx.init(own.params), []
    step = jax.jit(lambda state, batch: own.grad_fn(own.params, batch, opt_state=state)[1:])
    for i in range(7):
        batch = (jnp.asarray(random.normal(size=own.batch[0].shape), jnp.float32), own.batch[1])
        grads, statistics = step(state, batch)
        measured.append(bool(statistics.examples > 0))
        _, state = tx.update(grads, state, own.params, statistics=statistics)
        if i % 2 == 0:
            white = ng.whitening(statistics, own.layers, epsilon)
            for path, now in ng.bases(state).items():
                np.testing.assert_allclose(
                    now.U.mT @ now.U, white[path].U.mT @ white[path].U, rtol=1e-3, atol=1e-3
                )
    assert measured == [i % 3 == 0 or i % 2 == 0 for i in range(7)]
