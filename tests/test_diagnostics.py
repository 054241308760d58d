"""The report, its measures and spectra against explicit matrices, in float64."""

import functools
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import natgrad_jax as ng
from natgrad_jax.curvature.eigenbases import everywhere, scaled
from natgrad_jax.curvature.factor_averages import Factors
from natgrad_jax.curvature.inverses import operate
from natgrad_jax.diagnostics import errors, layer_measures
from natgrad_jax.layers.layer import Layer
from natgrad_jax.linalg.low_rank import LowRankInverse
from natgrad_jax.state.walk import states
from natgrad_jax.statistics.spec import parse

pytestmark = pytest.mark.once

DAMPING = 0.03


@pytest.fixture(scope="module", autouse=True)
def float64() -> Any:
    with jax.enable_x64(True):
        yield


class Net(nn.Module):
    """A convolution, a full block, a scanned stack and a readout."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.tanh(nn.Conv(4, (2, 2), strides=2, name="conv")(x))
        x = nn.LayerNorm(name="norm")(x).reshape(len(x), -1)
        x = nn.tanh(nn.Dense(5, name="mid")(x))
        scanned = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        x, _ = scanned(name="blocks")(x, None)
        return nn.Dense(3, name="head")(x)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return x + nn.tanh(nn.Dense(5, name="dense")(x)), None


model = Net()


def loss_fn(params: Any, x: jax.Array, y: jax.Array) -> ng.Loss:
    return ng.Categorical(model.apply({"params": params}, x)).nll(y)


class Run:
    """Two steps on different batches, with bases of the first: the state, updates and gradients."""

    def __init__(self, make: Any, **kwargs: Any):
        random = np.random.default_rng(0)
        x = jnp.asarray(random.normal(size=(24, 4, 4, 2)))
        y = jnp.arange(24) % 3
        with jax.enable_x64(True):
            params = jax.jit(model.init)(jax.random.key(0), x)["params"]
        self.params = jax.tree.map(lambda p: jnp.asarray(random.normal(size=p.shape) / 2), params)
        self.layers = ng.find_layers(loss_fn, self.params, x, y).replace("mid/bias", "diagonal")
        self.tx = make(self.layers, **kwargs)
        grad_fn = ng.value_and_grad(loss_fn, self.layers, fisher="exact")

        def step(state: Any, x: jax.Array, y: jax.Array) -> Any:
            _, grads, statistics = grad_fn(self.params, x, y, opt_state=state)
            updates, state = self.tx.update(grads, state, self.params, statistics=statistics)
            return updates, grads, state

        self.step = jax.jit(step)
        _, _, state = self.step(self.tx.init(self.params), x[:12], y[:12])
        self.updates, self.grads, self.opt_state = self.step(state, x[12:], y[12:])
        (self.state,) = states(self.opt_state)
        form = parse(self.state.request).approximation
        self.own = self.layers.approximate(form)
        self.report = ng.diagnostics.report(
            self.layers, self.opt_state, updates=self.updates, grads=self.grads, spectra=True
        )

    def row(self, path: Any) -> dict[str, np.ndarray]:
        """One layer's numbers, for the first element of a stack."""
        (name,) = [x for x in self.report.order if x.split("/")[1] == ".".join(path)]
        first = lambda x: np.asarray(x).ravel()[0]
        return {key: first(x) for key, x in self.report.rows[name].items()}

    def one(self, path: Any) -> tuple[Layer, Any]:
        """A layer without its stack, and from trees of it to their first elements."""
        layer = self.own[path]
        for _ in layer.stack:
            shapes = [p._replace(shape=p.shape[1:]) for p in layer.parameters]
            layer = layer.__class__(**{**vars_of(layer), "stack": (), "parameters": tuple(shapes)})
        cut = (lambda t: jax.tree.map(lambda x: x[0], t)) if self.own[path].stack else lambda t: t
        return layer, cut

    def flat(self, tree: Any, path: Any) -> np.ndarray:
        """The layer's part of a tree of parameters, raveled."""
        _, cut = self.one(path)
        leaves = []
        for parameter in self.own[path].parameters:
            leaf = tree
            for key in parameter.path:
                leaf = leaf[key]
            leaves.append(np.ravel(cut(leaf)))
        return np.concatenate(leaves)


def vars_of(layer: Layer) -> dict[str, Any]:
    return {name: getattr(layer, name) for name in layer.__dataclass_fields__}


def sides(layer: Layer, operator: Any) -> dict[str, np.ndarray]:
    """``A ⊗ I`` and ``I ⊗ G`` over the layer's parameters."""
    eye = lambda side: side.identity(layer.factor_blocks, layer.factor_dtype)
    bias = getattr(operator, "bias", None)
    if operator.G is None:
        return {"A": np.asarray(errors.dense(layer, partial(operate, layer, operator)))}
    one = None if bias is None else jnp.ones_like(bias)
    rebuilt = lambda A, G, b: Factors(A, G) if b is None else operator._replace(A=A, G=G, bias=b)
    of = lambda pair: np.asarray(errors.dense(layer, partial(operate, layer, pair)))
    return {
        "A": of(rebuilt(operator.A, eye(layer.output_side), bias)),
        "G": of(rebuilt(eye(layer.input_side), operator.G, one)),
    }


def split(means: dict[str, float], equal: bool) -> dict[str, float]:
    """Damping of each factor, by the mean eigenvalues."""
    if len(means) == 1:
        return {"A": DAMPING}
    pi = 1.0 if equal else np.sqrt(means["A"] / means["G"])
    return {"A": pi * np.sqrt(DAMPING), "G": np.sqrt(DAMPING) / pi}


COMMON = {"damping": DAMPING, "decay": 0.5, "statistics_period": 1, "refresh_period": 50}


@functools.cache
def kfac_run() -> Run:
    """The run that most tests look at."""
    return Run(partial(ng.scale_by_kfac, **COMMON))


KRONECKER = {
    "kfac": None,  # :func:`kfac_run`
    "kfac, sua": partial(ng.scale_by_kfac, convolution="sua", **COMMON),
    "kfac, groups": partial(ng.scale_by_kfac, group_size=3, **COMMON),
    "kfac, low rank": partial(ng.scale_by_kfac, inverse="low_rank", rank=4, **COMMON),
    "ngd": lambda layers: ng.ngd(1.0, layers, **COMMON),
}


@pytest.mark.parametrize("name", KRONECKER)
def test_inverses_against_explicit_matrices(name: str) -> None:
    run = Run(KRONECKER[name]) if KRONECKER[name] else kfac_run()
    for path in run.layers:
        layer, cut = run.one(path)
        row, factors = run.row(path), cut(run.state.factors[path])
        held = jax.tree.map(
            lambda x: x.as_matrix() if isinstance(x, LowRankInverse) else x,
            cut(run.state.bases[path]),
            is_leaf=lambda x: isinstance(x, LowRankInverse),
        )
        F, M = sides(layer, factors), sides(layer, held)
        means = {k: np.trace(x) / len(x) for k, x in F.items()}
        on = split(means, name == "ngd")
        for k, x in F.items():
            size = {"A": layer.input_side, "G": layer.output_side}[k].size
            if layer.output_side is None:
                size = len(x)
            np.testing.assert_allclose(row[f"scale_{k}"], means[k], rtol=1e-9)
            share = np.trace(x) ** 2 / np.sum(x**2) / len(x)
            np.testing.assert_allclose(row[f"rank_{k}"] / size, share, rtol=1e-9)
            np.testing.assert_allclose(row[f"damping_{k}"], on[k], rtol=1e-9)
            damped = x + on[k] * np.eye(len(x))
            off = np.linalg.norm(damped @ M[k] - np.eye(len(x))) / np.sqrt(len(x))
            np.testing.assert_allclose(row[f"drift_{k}"], off, rtol=1e-7, atol=1e-12)
            np.testing.assert_allclose(row[f"condition_{k}"], np.linalg.cond(damped), rtol=1e-6)
        whole = np.asarray(errors.dense(layer, partial(operate, layer, factors)))
        update = run.flat(run.updates, path)
        np.testing.assert_allclose(row["kl"], update @ whole @ update / 2, rtol=1e-9)


@pytest.mark.parametrize("how", [{}, {"rank": 1}, {"group_size": 3}], ids=str)
def test_moments_against_explicit_matrices(how: Any) -> None:
    run = Run(partial(ng.scale_by_ekfac, **how, **COMMON))
    for path in run.layers:
        layer, cut = run.one(path)
        of = lambda name, cut=cut, path=path: cut(getattr(run.state, name)[path])
        factors, bases, S, row = of("factors"), of("bases"), of("moments"), run.row(path)
        apply = lambda x, layer=layer, bases=bases, S=S: scaled(layer, bases, S, x)
        block = np.asarray(errors.dense(layer, apply))
        update = run.flat(run.updates, path)
        np.testing.assert_allclose(row["kl"], update @ block @ update / 2, rtol=1e-9)
        if "group_size" in how:
            assert row["condition"] >= 1 and row["drift_A"] > 0
            continue
        values = np.linalg.eigvalsh(block) + DAMPING
        np.testing.assert_allclose(row["condition"], values[-1] / values[0], rtol=1e-9)
        along = []
        for F, Q, name in zip(factors, bases, "AG"):
            if F is None:
                continue
            product = F @ Q
            values = np.sum(Q * product, axis=0)
            off = np.linalg.norm(product - Q * values) / np.linalg.norm(product)
            np.testing.assert_allclose(row[f"drift_{name}"], off, rtol=1e-7)
            others = len(F) - len(values)  # of a partial basis, at the mean of their eigenvalues
            rest = (np.trace(F) - values.sum()) / max(others, 1)
            along.append(np.append(values, [rest] * others))
        if len(along) == 2:
            S = everywhere(layer, bases, S)
            missed = np.linalg.norm(S - np.outer(*along)) / np.linalg.norm(S)
            np.testing.assert_allclose(row["kfac_error"], missed, rtol=1e-7)


def test_what_kfac_gets_wrong_is_the_difference_of_the_errors() -> None:
    """``‖F − K-FAC‖² = ‖F − EKFAC‖² + ‖S − b_A b_Gᵀ‖²`` in a fresh eigenbasis."""
    run = Run(ng.scale_by_ekfac)
    random = np.random.default_rng(1)
    batch = jnp.asarray(random.normal(size=(12, 4, 4, 2))), jnp.arange(12) % 3
    # single calls: of a stack there are no examples' gradients, and S is no projection
    layers = run.layers.select(lambda path, layer: layer.block == "kronecker" and not layer.stack)
    form = errors.FORMS[""]
    state = errors._measured(loss_fn, run.params, batch, layers, form, "exact", None)
    rows = ng.diagnostics.report(layers, state).rows
    missed = sum(
        float(rows[f"ekfac/{'.'.join(path)}"]["kfac_error"]) ** 2
        * float(jnp.sum(jnp.square(state.moments[path])))
        for path in layers
    )
    error = ng.diagnostics.approximation_error(loss_fn, run.params, *batch, layers=layers)
    assert error["ekfac"] < 0.95 * error["kfac"]
    np.testing.assert_allclose(missed, error["kfac"] ** 2 - error["ekfac"] ** 2, rtol=1e-7)


def test_coordinates_against_the_network_itself() -> None:
    """Activations of the batch, whitened by coordinates of another."""
    make = partial(ng.in_coordinates, optax.sgd(0.1), decay=0.0, statistics_period=1, epsilon=0.1)
    run = Run(make)
    x = np.random.default_rng(0).normal(size=(24, 4, 4, 2))[12:]
    eye = jnp.eye(5)  # as kernel of the readout, its columns show the readout's inputs

    def inputs(columns: slice) -> np.ndarray:
        readout = {"kernel": eye[:, columns], "bias": jnp.zeros(3)}
        return np.asarray(model.apply({"params": {**run.params, "head": readout}}, x))

    h = np.concatenate([inputs(slice(0, 3)), inputs(slice(2, 5))[:, 1:]], axis=1)
    own, row = ng.bases(run.opt_state)["head",], run.row(("head",))
    covariance = np.cov(h.T, bias=True)
    white = np.asarray(own.U) @ covariance @ np.asarray(own.U).T
    np.testing.assert_allclose(row["variance_A"], np.diag(white).max(), rtol=1e-9)
    B = np.asarray(own.A).T @ covariance @ np.asarray(own.A)
    off = np.linalg.norm(B - np.diag(np.diag(B))) / np.linalg.norm(B)
    np.testing.assert_allclose(row["drift_A"], off, rtol=1e-8)
    moved = np.linalg.norm(h.mean(0) - own.mean) / np.sqrt(np.trace(covariance))
    np.testing.assert_allclose(row["drift_mean"], moved, rtol=1e-8)
    np.testing.assert_allclose(row["condition_A"], np.linalg.cond(covariance), rtol=1e-6)
    assert off > 0.01 and "kl" not in row
    fresh = ng.diagnostics.report(
        run.layers, run.step(run.tx.init(run.params), x, jnp.arange(12) % 3)[2]
    )
    assert float(fresh.rows["in_coordinates/head"]["drift_A"]) < 1e-9
    assert 0.5 < float(fresh.rows["in_coordinates/head"]["variance_A"]) < 1


def test_both_sides_have_a_kl_and_a_variance_of_gradients() -> None:
    run = Run(partial(ng.in_coordinates, optax.sgd(0.1), coordinates="both_sides", decay=0.5))
    row, factors = run.row(("head",)), run.state.factors["head",]
    layer = run.own["head",]
    whole = np.asarray(errors.dense(layer, partial(operate, layer, factors)))
    update = run.flat(run.updates, ("head",))
    np.testing.assert_allclose(row["kl"], update @ whole @ update / 2, rtol=1e-9)
    assert row["variance_G"] > 0 and "kl" not in run.row(("conv",))


def test_many_inputs_are_probed() -> None:
    """64 random directions of 200 tell the drift of the whole inverse."""
    random = np.random.default_rng(0)
    z = random.normal(size=(150, 200))
    layers = ng.find_layers(
        lambda p, x: ng.Gaussian(nn.Dense(2).apply({"params": p}, x)).nll(x[:, :2]),
        {"kernel": jnp.zeros((200, 2)), "bias": jnp.zeros(2)},
        jnp.asarray(z),
    )
    (layer,) = layers.values()
    A = np.cov(z.T)
    A = np.pad(A, (0, 1)) + np.eye(201) * 0.1
    M = np.linalg.inv(A * random.uniform(0.5, 1.5))
    factors, held = Factors(jnp.asarray(A), jnp.eye(2)), Factors(jnp.asarray(M), jnp.eye(2))
    on = {"A": jnp.asarray(0.2), "G": jnp.asarray(0.0)}
    found = layer_measures.of_inverses(layer, factors, held, on)
    exact = np.linalg.norm((A + 0.2 * np.eye(201)) @ M - np.eye(201)) / np.sqrt(201)
    np.testing.assert_allclose(found["drift_A"], exact, rtol=0.1)
    assert float(found["drift_G"]) == 0


def test_spectra_and_condition_numbers() -> None:
    run = Run(partial(ng.scale_by_kfac, group_size=3, **COMMON))
    explicit = ng.diagnostics.matrices(run.layers, run.opt_state)
    for path, found in ng.diagnostics.spectra(run.layers, run.opt_state).items():
        layer, cut = run.one(path)
        factors = cut(run.state.factors[path])
        found = cut(found)
        whole = np.asarray(errors.dense(layer, partial(operate, layer, factors)))
        of = found.A if found.block is None else found.block
        np.testing.assert_allclose(of, np.linalg.eigvalsh(whole), atol=1e-12)
        if not run.own[path].stack:
            np.testing.assert_allclose(explicit[path], whole, atol=1e-12)
        for k, x in sides(layer, factors).items():
            repeated = np.repeat(getattr(found, k), len(x) // len(getattr(found, k)))
            np.testing.assert_allclose(repeated, np.linalg.eigvalsh(x), atol=1e-12)
    x, y = jnp.ones((6, 4, 4, 2)) * jnp.arange(1, 7)[:, None, None, None], jnp.arange(6) % 3
    F = ng.fisher(loss_fn, run.params, x, y)
    values = ng.diagnostics.fisher_spectra(loss_fn, run.params, x, y)
    np.testing.assert_allclose(values, np.linalg.eigvalsh(F), atol=1e-10)
    blocks = ng.diagnostics.fisher_spectra(loss_fn, run.params, x, y, layers=run.layers)
    assert blocks["mid", "bias"].shape == (5,) and set(run.layers) < set(blocks)
    condition = ng.diagnostics.condition_number
    damped = np.asarray(F) + 0.1 * np.eye(len(F))
    np.testing.assert_allclose(condition(values, 0.1), np.linalg.cond(damped), rtol=1e-6)
    np.testing.assert_allclose(condition(jnp.array([[0.0, 2, 3], [1, 1, 5]])), [1.5, 5])


def test_matrices_leave_out_what_has_inputs_alone() -> None:
    run = Run(partial(ng.in_coordinates, optax.sgd(0.1)))
    assert ng.diagnostics.matrices(run.layers, run.opt_state) == {}
    run = Run(partial(ng.in_coordinates, optax.sgd(0.1), coordinates="both_sides"))
    assert set(ng.diagnostics.matrices(run.layers, run.opt_state)) == {
        ("mid",), ("blocks", "dense"), ("head",)
    }  # fmt: skip


def test_totals_are_sums_and_events_are_counted() -> None:
    run = kfac_run()
    rows, total = run.report.rows, run.report.totals["kfac"]
    leaves = jax.tree.leaves
    norm = np.sqrt(sum(np.sum(np.square(x)) for x in leaves(run.updates)))
    np.testing.assert_allclose(total["update_norm"], norm, rtol=1e-12)
    slope = sum(np.sum(u * g) for u, g in zip(leaves(run.updates), leaves(run.grads)))
    np.testing.assert_allclose(total["decrease"], -slope, rtol=1e-12)
    np.testing.assert_allclose(total["kl"], sum(np.sum(row["kl"]) for row in rows.values()))
    diagonal, update = run.state.diagonal["mid", "bias"], run.updates["mid"]["bias"]
    own = rows["kfac/mid.bias"]
    np.testing.assert_allclose(own["kl"], np.sum(diagonal * update**2) / 2, rtol=1e-12)
    assert total["rejected"] == 0 and total["step"] == 2 and total["damping"] == DAMPING
    x = jnp.full((12, 4, 4, 2), jnp.nan)
    _, _, state = run.step(run.opt_state, x, jnp.arange(12) % 3)
    after = ng.diagnostics.report(run.layers, state).scalars()
    assert after["kfac/rejected"] > 0 and after["kfac/mid/drift_A"] == pytest.approx(
        float(rows["kfac/mid"]["drift_A"]))  # fmt: skip


def test_scalars_are_flat_and_the_table_is_aligned() -> None:
    run = kfac_run()
    scalars = run.report.scalars()
    assert all(isinstance(x, float | int) for x in scalars.values())
    assert scalars["kfac/step"] == 2 and "kfac/blocks.dense[1]/drift_G" in scalars
    head, columns, *lines = str(run.report).splitlines()
    assert head.startswith("kfac  step 2  damping 0.03  update norm ")
    assert head.endswith("rejected 0")
    names = ["conv", "norm", "mid", "blocks.dense[0]", "blocks.dense[1]", "head", "mid.bias"]
    assert sorted(line.split()[0] for line in lines) == sorted(names)
    end = columns.index("update norm") + len("update norm")
    assert {line[end - 1 : end + 1].strip().isalnum() for line in lines} == {True}
    assert all(line[end : end + 2] == "  " for line in (columns, *lines))


def test_reports_inside_jit_inside_chains_and_beside_others() -> None:
    make = lambda layers: optax.chain(
        ng.scale_by_kfac(layers, **COMMON), ng.scale_by_kfac(layers, **COMMON), optax.trace(0.9)
    )
    run = kfac_run()
    tx = make(run.layers)
    reported = lambda state, updates: ng.diagnostics.report(run.layers, state, updates=updates)
    state = (run.state, run.state, optax.TraceState(run.updates))
    outside, inside = reported(state, run.updates), jax.jit(reported)(state, run.updates)
    assert list(outside.totals) == ["kfac", "kfac_1"] and outside.order == inside.order
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9), outside, inside)
    inner = jax.jit(lambda *args: reported(*args).scalars())(state, run.updates)
    np.testing.assert_allclose(inner["kfac_1/head/drift_A"], outside.scalars()["kfac/head/drift_A"])
    before = ng.diagnostics.report(run.layers, tx.init(run.params))
    assert all(np.isfinite(x) for x in before.scalars().values())


def test_what_tunes_itself_is_reported() -> None:
    run = kfac_run()
    tx = ng.adaptive_kfac(run.layers, loss_fn, initial=2.0)
    scalars = ng.diagnostics.report(run.layers, tx.init(run.params)).scalars()
    assert scalars["adaptive_damping/level"] == 2 and scalars["adaptive_damping/refused"] == 0
    assert scalars["kfac/step"] == scalars["quadratic_model/step"] == 0


def test_nnx_optimizers_are_read() -> None:
    network = nnx.Linear(3, 2, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    own_loss = lambda m, x: ng.Gaussian(m(x)).nll(x[:, :2])
    x = jnp.arange(12.0).reshape(4, 3)
    layers = ng.find_layers(own_loss, network, x)
    optimizer = nnx.Optimizer(network, ng.kfac(0.1, layers), wrt=nnx.Param)
    grad_fn = ng.value_and_grad(own_loss, layers)
    _, grads, statistics = grad_fn(network, x, rng=jax.random.key(0), opt_state=optimizer.opt_state)
    optimizer.update(network, grads, statistics=statistics)
    scalars = ng.diagnostics.report(layers, optimizer.opt_state, grads=grads).scalars()
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads)))
    assert scalars["kfac/gradient_norm"] == pytest.approx(float(norm))
    assert ng.diagnostics.spectra(layers, optimizer.opt_state)[()].A.shape == (4,)


def test_errors_teach() -> None:
    run = kfac_run()
    report = ng.diagnostics.report
    with pytest.raises(ValueError, match="no natgrad_jax state"):
        report(run.layers, optax.sgd(0.1).init(run.params))
    with pytest.raises(ValueError, match="factors of head"):
        report(run.layers.select(lambda path, _: path != ("head",)), run.opt_state)
    with pytest.raises(ValueError, match="Call find_layers again"):
        report(run.layers, run.opt_state, updates={"other": jnp.ones(2)})
    with pytest.raises(TypeError, match="layers must be what find_layers"):
        report(run.opt_state, run.layers)
