"""The exact natural gradient in sample space against dense solves."""

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree
from jax.sharding import NamedSharding, PartitionSpec as P

import natgrad_jax as ng

N = 8
random = np.random.default_rng(0)
X = random.normal(size=(N, 3))
Y = random.normal(size=(N, 2))
LABELS = random.integers(2, size=N)
COUNTS = random.integers(4, size=(N, 2))
MASK = np.array([1, 1, 0, 1, 1, 1, 0, 1], bool)
ADVANTAGES = random.normal(size=N)

pytestmark = pytest.mark.usefixtures("float64")


def params() -> Any:
    return {
        "w": jnp.asarray(np.random.default_rng(1).normal(size=(3, 4))),
        "b": jnp.ones(4),
        "v": jnp.asarray(np.random.default_rng(2).normal(size=(4, 2))),
        "log_std": jnp.array([0.1, 0.2]),
    }


def net(p: Any, x: Any) -> Any:
    return jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]


def l2(p: Any) -> Any:
    return 0.05 * sum(jnp.vdot(x, x) for x in jax.tree.leaves(p))


def surrogate(p: Any, x: Any, y: Any) -> Any:
    out = net(p, x)
    value = jnp.mean(y[:, 0] * jax.nn.log_softmax(out)[:, 0])
    return ng.loss(value, ng.Categorical(out))


def log_psi(p: Any, x: Any, y: Any) -> Any:
    out = net(p, x)[:, 0]
    energy = y[:, 0] - y[:, 0].mean()
    return ng.loss(jnp.mean(energy * out), ng.Gaussian(out, event_ndims=0), centred=True)


def interacting(p: Any, x: Any, y: Any) -> Any:
    h = net(p, x)
    return ng.Gaussian((h - h.mean(0)) / h.std(0)).nll(y)


CASES: dict[str, Any] = {
    "gaussian": lambda p, x, y: ng.Gaussian(net(p, x)).nll(y),
    "learned variance": lambda p, x, y: ng.Gaussian(
        net(p, x), jnp.exp(2 * p["log_std"])).nll(y, where=MASK),
    "covariance": lambda p, x, y: ng.Gaussian(
        net(p, x), covariance=jnp.outer(p["log_std"], p["log_std"]) + jnp.eye(2)).nll(y),
    "categorical": lambda p, x, y: ng.Categorical(net(p, x)).nll(LABELS),
    "poisson": lambda p, x, y: ng.Poisson(net(p, x)).nll(COUNTS, weights=np.arange(N)),
    "several terms": lambda p, x, y: 2.0 * ng.Categorical(net(p, x)).nll(LABELS)
    + 0.5 * ng.Gaussian(net(p, x[:, ::-1])).nll(y),
    "tokens": lambda p, x, y: ng.Categorical(net(p, jnp.stack([x, x**2], 1))).nll(
        np.stack([LABELS] * 2, 1)),
    "weight decay": lambda p, x, y: ng.Gaussian(net(p, x)).nll(y) + l2(p),
    "surrogate": surrogate,
    "log psi": log_psi,
    "interacting": interacting,
    "one number each": lambda p, x, y: ng.Bernoulli(net(p, x)[:, 0], event_ndims=0).nll(LABELS),
}  # fmt: skip


def by_hand(loss_fn: Any, p: Any, damping: float, prior: Any = None) -> Any:
    """``μδ₋ + (F + λ)⁻¹ (∇ − F μδ₋)`` by a dense solve."""
    theta, unravel = ravel_pytree(p)
    prior = jnp.zeros_like(theta) if prior is None else ravel_pytree(prior)[0]

    @jax.jit
    def of(theta: Any, prior: Any) -> Any:
        F = ng.fisher(loss_fn, unravel(theta), X, Y)
        gradient = jax.grad(lambda t: loss_fn(unravel(t), X, Y).value)(theta)
        found = jnp.linalg.solve(F + damping * jnp.eye(len(theta)), gradient - F @ prior)
        return unravel(prior + found)

    return of(theta, prior)


def close(a: Any, b: Any, tolerance: float = 1e-8) -> None:
    flat = lambda tree: np.asarray(ravel_pytree(tree)[0])
    assert np.linalg.norm(flat(a) - flat(b)) <= tolerance * np.linalg.norm(flat(b))


@pytest.mark.parametrize("case", CASES)
def test_the_direction_is_that_of_a_dense_solve(case: str) -> None:
    p, tx = params(), ng.scale_by_exact_ngd(1e-3)
    grad_fn = ng.value_and_grad(CASES[case], fisher="exact")

    @jax.jit
    def found(p: Any) -> Any:
        _, grads, rows = grad_fn(p, X, Y)
        return grads, tx.update(grads, tx.init(p), statistics=rows)[0]

    grads, updates = found(p)
    close(grads, jax.jit(jax.grad(lambda p: CASES[case](p, X, Y).value))(p), 1e-12)
    close(updates, by_hand(CASES[case], p, 1e-3))


@pytest.mark.parametrize("case", ["gaussian", "categorical", "weight decay"])
def test_spring_is_the_damped_minimiser(case: str) -> None:
    p, tx = params(), ng.scale_by_exact_ngd(1e-2, momentum=0.9)
    state = tx.init(p)._replace(last=jax.tree.map(jnp.cos, p))
    _, grads, rows = jax.jit(ng.value_and_grad(CASES[case], fisher="exact"))(p, X, Y)
    updates, state = jax.jit(tx.update)(grads, state, statistics=rows)
    prior = jax.tree.map(lambda x: 0.9 * jnp.cos(x), p)
    close(updates, by_hand(CASES[case], p, 1e-2, prior))
    close(state.last, updates, 0)


@pytest.mark.parametrize(
    "case", ["gaussian", "learned variance", "several terms", "tokens", "weight decay", "log psi",
             "surrogate", "interacting"],
)  # fmt: skip
def test_without_the_whole_jacobian(case: str) -> None:
    p = params()
    whole, pieces = (
        ng.scale_by_exact_ngd(1e-3, momentum=0.9, trust_radius=1e-2, whole_jacobian=whole)
        for whole in (True, False)
    )

    @functools.partial(jax.jit, static_argnums=0)
    def step(tx: Any, state: Any) -> Any:
        grad_fn = ng.value_and_grad(CASES[case], fisher="exact")
        _, grads, rows = grad_fn(p, X, Y, opt_state=state)
        return tx.update(grads, state, statistics=rows)

    states = [tx.init(p)._replace(last=jax.tree.map(jnp.cos, p)) for tx in (whole, pieces)]
    right, state = step(whole, states[0])
    found, again = step(pieces, states[1])
    close(found, right)
    close((again.last, again.damping), (state.last, state.damping))


def test_pieces_are_refused_where_they_cannot_be() -> None:
    p, tx = params(), ng.exact_ngd(1.0, whole_jacobian=False)
    state, split = tx.init(p), lambda x: jnp.asarray(x).reshape(4, 2, *x.shape[1:])
    _, grads, rows = ng.value_and_grad(CASES["gaussian"], fisher="exact")(p, X, Y, opt_state=state)
    with pytest.raises(ValueError, match="cannot leave parameters out"):
        tx.update(grads | {"w": optax.MaskedNode()}, state, p, statistics=rows)
    with pytest.raises(ValueError, match=r"whole_jacobian=False .*micro-batches"):
        ng.accumulate(CASES["gaussian"], fisher="exact")(p, split(X), split(Y), opt_state=state)
    grad_fn = ng.value_and_grad(CASES["gaussian"], fisher="exact", axis_name="data")
    with pytest.raises(ValueError, match="whole_jacobian=False works under jit"):
        jax.vmap(lambda x, y: grad_fn(p, x, y, opt_state=state), axis_name="data")(
            split(X), split(Y)
        )


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
@pytest.mark.parametrize("case", ["gaussian", "categorical", "several terms", "weight decay"])
def test_sampled_and_empirical_rows(case: str, fisher: str) -> None:
    p, key, tx = params(), jax.random.key(3), ng.scale_by_exact_ngd(1e-2)

    @jax.jit
    def found(p: Any) -> Any:
        _, grads, rows = ng.value_and_grad(CASES[case], fisher=fisher)(p, X, Y, rng=key)
        F = ng.fisher(CASES[case], p, X, Y, fisher=fisher, rng=key)
        flat, unravel = ravel_pytree(grads)
        right = unravel(jnp.linalg.solve(F + 1e-2 * jnp.eye(len(flat)), flat))
        return tx.update(grads, tx.init(p), statistics=rows)[0], right

    close(*found(p))


@pytest.mark.parametrize("case", ["gaussian", "several terms", "log psi", "surrogate"])
@pytest.mark.parametrize("how", ["jit", "shard_map", "pmap"])
def test_four_devices_are_one(case: str, how: str) -> None:
    p, loss_fn = params(), CASES[case]
    if case == "several terms":  # labels belong to the data
        loss_fn = lambda p, x, y: 2.0 * ng.Categorical(net(p, x)).nll(
            (y[:, 0] > 0).astype(int)) + 0.5 * ng.Gaussian(net(p, x[:, ::-1])).nll(y)  # fmt: skip
    if case == "log psi":  # the mean energy is that of the whole batch
        y = jnp.asarray(Y - Y.mean(0))
        loss_fn = lambda p, x, y: _vmc(net(p, x)[:, 0], y[:, 0])
    else:
        y = jnp.asarray(Y)
    tx, x = ng.scale_by_exact_ngd(1e-3), jnp.asarray(X)

    def step(p: Any, x: Any, y: Any, axis_name: Any = None) -> Any:
        grad_fn = ng.value_and_grad(loss_fn, fisher="exact", axis_name=axis_name)
        loss, grads, rows = grad_fn(p, x, y)
        return loss, tx.update(grads, tx.init(p), statistics=rows)[0]

    right = jax.jit(step)(p, x, y)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    if how == "jit":
        place = lambda x: jax.device_put(x, NamedSharding(mesh, P("data")))
        found = jax.jit(step)(p, place(x), place(y))
    elif how == "shard_map":
        found = jax.jit(
            jax.shard_map(
                lambda p, x, y: step(p, x, y, "data"),
                mesh=mesh,
                in_specs=(P(), P("data"), P("data")),
                out_specs=P(),
                check_vma=False,
            )
        )(p, x, y)
    else:
        split = lambda x: x.reshape(4, 2, *x.shape[1:])
        mapped = jax.pmap(lambda p, x, y: step(p, x, y, "data"), "data", in_axes=(None, 0, 0))
        found = jax.tree.map(lambda x: x[0], mapped(p, split(x), split(y)))
    close(found, right)


def _vmc(out: Any, energy: Any) -> Any:
    return ng.loss(jnp.mean(energy * out), ng.Gaussian(out, event_ndims=0), centred=True)


@pytest.mark.parametrize("case", ["gaussian", "weight decay"])
def test_micro_batches_stack(case: str) -> None:
    p, split = params(), lambda x: jnp.asarray(x).reshape(4, 2, *x.shape[1:])
    loss, grads, rows = ng.value_and_grad(CASES[case], fisher="exact")(p, X, Y)
    again = ng.accumulate(CASES[case], fisher="exact")(p, split(X), split(Y))
    close(again[:2], (loss, grads), 1e-12)
    close(again[2].J, rows.J, 1e-12)
    close(again[2].residual, rows.residual, 1e-12)
    close(again[2].examples, rows.examples, 0)


def test_an_nnx_model_with_dropout_and_batch_statistics() -> None:
    """Examples interact, and random numbers are one draw: rows are pullbacks of the whole batch."""

    class Net(nnx.Module):
        def __init__(self) -> None:
            rngs = nnx.Rngs(0)
            self.a = nnx.Linear(3, 4, rngs=rngs, param_dtype=jnp.float64)
            self.norm = nnx.BatchNorm(4, rngs=rngs, param_dtype=jnp.float64)
            self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(1))
            self.b = nnx.Linear(4, 2, rngs=rngs, param_dtype=jnp.float64)

        def __call__(self, x: Any) -> Any:
            return self.b(self.drop(nnx.tanh(self.norm(self.a(x)))))

    model = Net()
    wide = lambda x: x.astype(jnp.float64)
    nnx.update(model, jax.tree.map(wide, nnx.state(model, nnx.BatchStat)))
    loss_fn = lambda model, x, y: ng.Gaussian(model(x)).nll(y)
    F = ng.fisher(loss_fn, model, X, Y)
    before = model.norm.mean[...]
    _, _, rows = ng.value_and_grad(loss_fn, fisher="exact")(model, X, Y)
    J = np.concatenate([x.reshape(len(x), -1) for x in rows.J.values()], 1)
    np.testing.assert_allclose(J.T @ J / N, F, atol=1e-12)
    assert not np.allclose(model.norm.mean[...], before)  # updated in place


def test_data_inside_the_loss_is_told() -> None:
    loss_fn = lambda p: ng.Gaussian(net(p, X)).nll(Y)
    with pytest.warns(UserWarning, match="Give loss_fn the data as arguments"):
        rows = ng.value_and_grad(loss_fn, fisher="exact")(params())[2]
    J = ng.value_and_grad(CASES["gaussian"], fisher="exact")(params(), X, Y)[2].J
    order = np.arange(2 * N)
    for path, x in rows.J.items():
        np.testing.assert_allclose(np.asarray(x)[order], J[path], atol=1e-12)


def test_float32_has_a_floor_of_damping() -> None:
    """Far below rounding λ is raised, so that the step is finite and descends."""
    p = jax.tree.map(lambda x: x.astype(jnp.float32), params())
    x, y = (jnp.asarray(a, jnp.float32) for a in (X, Y))
    tx = ng.scale_by_exact_ngd(1e-30)
    _, grads, rows = ng.value_and_grad(CASES["gaussian"], fisher="exact")(p, x, y)
    updates, state = tx.update(grads, tx.init(p), statistics=rows)
    trace = sum(float(jnp.sum(j**2)) for j in rows.J.values()) / N
    np.testing.assert_allclose(float(state.damping), 16 * 2.0**-23 * trace, rtol=1e-3)
    at_floor = by_hand(CASES["gaussian"], params(), float(state.damping))
    close(updates, at_floor, 0.02)


def test_trust_radius_bounds_the_quadratic_form() -> None:
    p, kappa = params(), 1e-4
    tx = ng.exact_ngd(0.5, damping=1e-2, trust_radius=kappa)

    @jax.jit
    def found(p: Any) -> Any:
        _, grads, rows = ng.value_and_grad(CASES["gaussian"], fisher="exact")(p, X, Y)
        updates = tx.update(grads, tx.init(p), p, statistics=rows)[0]
        return ravel_pytree(updates)[0], ng.fisher(CASES["gaussian"], p, X, Y)

    update, F = found(p)
    F = F + 1e-2 * np.eye(len(update))
    np.testing.assert_allclose(update @ F @ update, kappa, rtol=1e-8)


def test_it_chains_with_line_searches_masks_and_adaptive_damping() -> None:
    p, loss_fn = params(), CASES["gaussian"]
    searched = optax.chain(
        ng.scale_by_exact_ngd(1e-6), optax.scale(-1.0), optax.scale_by_backtracking_linesearch(20)
    )
    adapted = ng.adaptive_damping(
        lambda damping: ng.exact_ngd(1.0, damping=damping),
        ng.levenberg_marquardt(),
        loss_fn,
        initial=1e-2,
    )
    frozen = optax.masked(ng.exact_ngd(1.0), {"w": True, "b": True, "v": True, "log_std": False})
    for tx in (searched, adapted, frozen):
        grad_fn = ng.value_and_grad(loss_fn, fisher="exact")

        @jax.jit
        def step(p: Any, state: Any, tx: Any = tx, grad_fn: Any = grad_fn) -> Any:
            loss, grads, rows = grad_fn(p, X, Y, opt_state=state)
            value_fn = lambda p, statistics=None, args=None: loss_fn(p, X, Y).value
            updates, state = optax.with_extra_args_support(tx).update(
                grads, state, p, statistics=rows, value=loss, grad=grads, value_fn=value_fn,
                args=(X, Y),
            )  # fmt: skip
            return optax.apply_updates(p, updates), state, loss

        now, state = p, tx.init(p)
        for _ in range(12):
            now, state, loss = step(now, state)
        assert loss < 0.5 * loss_fn(p, X, Y).value


def test_nothing_bad_enters_the_state() -> None:
    p, tx = params(), ng.scale_by_exact_ngd(1e-3, momentum=0.5)
    _, grads, rows = ng.value_and_grad(CASES["gaussian"], fisher="exact")(p, X, Y)
    state = tx.update(grads, tx.init(p), statistics=rows)[1]
    bad = rows._replace(residual=rows.residual * jnp.nan)
    zeros, after = tx.update(grads, state, statistics=bad)
    assert int(after.rejected) == 1 and not any(jnp.any(x) for x in jax.tree.leaves(zeros))
    close(after.last, state.last, 0)


def test_training_reaches_rounding_on_a_regression() -> None:
    """Gauss-Newton's quadratic convergence, which no rough direction has."""
    p, tx = params(), ng.exact_ngd(1.0, damping=1e-10)
    wanted = net(jax.tree.map(lambda x: 1.02 * x, p), X)
    grad_fn = jax.jit(ng.value_and_grad(CASES["gaussian"], fisher="exact"))
    state = tx.init(p)
    for _ in range(6):
        loss, grads, rows = grad_fn(p, X, wanted)
        updates, state = tx.update(grads, state, p, statistics=rows)
        p = optax.apply_updates(p, updates)
    assert loss < 1e-20


def test_no_layers_and_no_fisher_is_value_and_grad() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss, _, nothing = ng.value_and_grad(CASES["gaussian"], fisher="none")(params(), X, Y)
    assert nothing is None and float(loss) > 0


def test_complex_parameters_are_pairs_of_real_ones() -> None:
    """log |ψ| of a complex network, and a complex log ψ as two outputs."""
    a, b = (np.random.default_rng(s).normal(size=(3, 4)) for s in (5, 6))
    whole, parts = {"w": jnp.asarray(a + 1j * b)}, {"a": jnp.asarray(a), "b": jnp.asarray(b)}
    out = lambda w, x: jnp.log(jnp.cosh(x @ w)).sum(-1)
    both = lambda z: jnp.stack([z.real, z.imag], -1)
    loss_fn = lambda w, x, y: ng.Gaussian(both(out(w, x))).nll(y)
    tx = ng.exact_ngd(1.0, damping=1e-2, momentum=0.5, weight_decay=0.1)

    def two_steps(p: Any, loss_fn: Any) -> Any:
        state = tx.init(p)
        for _ in range(2):
            _, grads, rows = ng.value_and_grad(loss_fn, fisher="exact")(p, X, Y)
            updates, state = tx.update(grads, state, p, statistics=rows)
            p = optax.apply_updates(p, updates)
        return p

    found = two_steps(whole, lambda p, x, y: loss_fn(p["w"], x, y))["w"]
    right = two_steps(parts, lambda p, x, y: loss_fn(p["a"] + 1j * p["b"], x, y))
    np.testing.assert_allclose(found, right["a"] + 1j * right["b"], atol=1e-10)
    with pytest.raises(TypeError, match=r"w has dtype complex128: .*Use ng.exact_ngd"):
        ng.find_layers(lambda p, x, y: loss_fn(p["w"], x, y), whole, X, Y)
