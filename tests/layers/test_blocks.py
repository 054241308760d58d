"""Blocks beyond one call of one layer: chosen ones, shared and tied weights, cells, LoRA pairs."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import natgrad_jax as ng
from natgrad_jax.losses.output_cotangents import sample_targets

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("float64")]

N, KEY = 4, jax.random.key(5)


def random(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def filled(module: nn.Module, *args: Any) -> Any:
    shapes = jax.eval_shape(module.init, KEY, *args)["params"]
    return jax.tree.map(lambda s: random(s.size, *s.shape) / 2, shapes)


def categorical(module: nn.Module) -> Any:
    def loss_fn(params: Any, x: Any) -> ng.Loss:
        logits = module.apply({"params": params}, x)
        return ng.Categorical(logits).nll(jnp.zeros(logits.shape[:-1], int))

    return loss_fn


def steps(
    tx: Any, loss_fn: Any, params: Any, x: Any, layers: Any, count: int = 1, **kw: Any
) -> Any:
    """Gradients, updates, the last statistics and the state, on one batch with one key."""
    grad_fn = ng.value_and_grad(loss_fn, layers, **kw)

    @jax.jit
    def step(state: Any) -> Any:
        _, grads, statistics = grad_fn(params, x, rng=KEY, opt_state=state)
        return grads, *tx.update(grads, state, params, statistics=statistics), statistics

    state = tx.init(params)
    for _ in range(count):
        grads, updates, state, statistics = step(state)
    return grads, updates, state, statistics


def close(a: Any, b: Any, tolerance: float = 1e-10) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------- chosen blocks


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.LayerNorm(name="norm", param_dtype=jnp.float64)(x)
        return nn.Dense(3, name="head", param_dtype=jnp.float64)(jnp.tanh(x))


@pytest.mark.parametrize(
    "transformation",
    [ng.scale_by_kfac, ng.scale_by_ekfac, partial(ng.scale_by_ekfac, basis=ng.LowRank(1))],
    ids=["kfac", "ekfac", "ekfac, rank 1"],
)
@pytest.mark.parametrize("width", [4, 70])
def test_a_full_block_is_the_exact_fisher(transformation: Any, width: int) -> None:
    """Also where a side of as many rows would be inverted at low rank."""
    loss_fn, x = categorical(Normed()), random(0, N, width)
    params = filled(Normed(), x)
    layers = ng.find_layers(loss_fn, params, x, blocks={"head": "full"})
    tx = transformation(layers, damping=0.1)
    grads, updates, _, _ = steps(tx, loss_fn, params, x, layers, fisher="exact")
    blocks = ng.fisher(loss_fn, params, x, layers=layers)
    for path, F in blocks.items():
        names = [p.path[-1] for p in layers[path].parameters]
        flat = lambda t, p=path, n=names: np.concatenate([np.ravel(t[p[0]][i]) for i in n])
        expected = np.linalg.solve(F + 0.1 * np.eye(len(F)), flat(grads))
        np.testing.assert_allclose(flat(updates), expected, rtol=1e-8, atol=1e-12)


class Wide(nn.Module):
    """A full block of ``width`` units, or numbers, between two dense layers."""

    width: int
    kind: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(self.width)(x)
        if self.kind == "norm":
            x = nn.LayerNorm()(x)
        else:
            x = x + self.param("shift", nn.initializers.zeros, (self.width,))
        return nn.Dense(3)(nn.relu(x))


@pytest.mark.parametrize(
    "kind, width, computed",
    [("norm", 64, False), ("norm", 65, True), ("norm", 192, False),
     ("param", 128, False), ("param", 129, True), ("param", 192, False)],
)  # fmt: skip
def test_blocks_of_any_width_train_at_the_defaults(kind: str, width: int, computed: bool) -> None:
    """Of more than 128 numbers, which is where inverses of low rank begin, and of no more."""
    loss_fn, x = categorical(Wide(width, kind)), random(0, N, 5).astype(jnp.float32)
    shapes = jax.eval_shape(Wide(width, kind).init, KEY, x)["params"]
    params = jax.tree.map(lambda s: random(s.size, *s.shape).astype(jnp.float32) / 9, shapes)
    layers = ng.find_layers(loss_fn, params, x)
    run = lambda: steps(ng.kfac(0.1, layers), loss_fn, params, x, layers)[1]
    assert jax.tree.structure(jax.eval_shape(run)) == jax.tree.structure(params)
    if computed:
        new = jax.tree.map(jnp.add, params, run())
        assert loss_fn(new, x).value < loss_fn(params, x).value


def test_units_of_a_normalization_have_their_own_blocks() -> None:
    loss_fn, x = categorical(Normed()), random(0, N, 4)
    params = filled(Normed(), x)
    layers = ng.find_layers(loss_fn, params, x, blocks={("norm",): "unit"})
    assert "4 × F 2²" in str(layers)
    tx = ng.scale_by_kfac(layers, damping=0.1)
    grads, updates, state, _ = steps(tx, loss_fn, params, x, layers, fisher="exact")
    F = np.asarray(ng.fisher(loss_fn, params, x, layers=layers)[("norm",)])  # scale, then bias
    for i in range(4):
        own = F[np.ix_([i, 4 + i], [i, 4 + i])]
        np.testing.assert_allclose(ng.factors(state)[("norm",)].A[i], own, rtol=1e-9)
        g = [grads["norm"]["scale"][i], grads["norm"]["bias"][i]]
        found = [updates["norm"]["scale"][i], updates["norm"]["bias"][i]]
        np.testing.assert_allclose(found, np.linalg.solve(own + 0.1 * np.eye(2), g), rtol=1e-8)


def test_frozen_and_plain_gradients() -> None:
    loss_fn, x = categorical(Normed()), random(0, N, 4)
    params = filled(Normed(), x)
    layers = ng.find_layers(loss_fn, params, x)
    chosen = layers.replace("*/bias", "frozen").replace(
        lambda path, record: path == ("norm",), "gradient"
    )
    assert chosen.uncovered == () and chosen[("head",)].bias is None
    tx = ng.scale_by_kfac(chosen, damping=0.1, trust_radius=1e-9)
    grads, updates, _, statistics = steps(tx, loss_fn, params, x, chosen)
    np.testing.assert_array_equal(updates["head"]["bias"], 0)
    np.testing.assert_array_equal(updates["norm"]["bias"], 0)  # frozen first, and it stays
    np.testing.assert_array_equal(updates["norm"]["scale"], grads["norm"]["scale"])
    assert statistics.leftover == {} and np.any(updates["head"]["kernel"] != 0)
    assert "frozen" in str(chosen) and "gradient" in str(chosen)


def normed_layers() -> ng.Layers:
    x = random(0, N, 4)
    return ng.find_layers(categorical(Normed()), filled(Normed(), x), x)


def table_of(layers: ng.Layers) -> dict[str, str]:
    """The block of every parameter."""
    blocks = {"/".join(p.path): layer.block for layer in layers.values() for p in layer.parameters}
    return blocks | {"/".join(x.path): x.block for x in layers.leftover}


EVERY = ("norm/scale", "norm/bias", "head/kernel", "head/bias")

# choices one after another, and what becomes of EVERY parameter
CHOICES: dict[str, tuple[list[tuple[Any, str]], tuple[str, ...]]] = {
    "few after all": ([("*", "diagonal"), ("head", "full")],
                      ("diagonal", "diagonal", "full", "full")),
    "all after few": ([("head", "full"), ("*", "diagonal")], ("diagonal",) * 4),
    "frozen, then a layer again": ([("*", "frozen"), ("head", "kronecker"), ("norm", "full")],
                                   ("full", "full", "kronecker", "kronecker")),
    "a bias, then its layer": ([("*/bias", "frozen"), ("head", "kronecker")],
                               ("full", "frozen", "kronecker", "kronecker")),
    "a bias, then its kernel": ([("*/bias", "frozen"), ("head/kernel", "full")],
                                ("full", "frozen", "full", "frozen")),
    "a bias, then another block of its layer": ([("head/bias", "gradient"), ("head", "full"),
                                                 ("head/bias", "frozen")],
                                                ("full", "full", "full", "frozen")),
    "a bias back into its layer": ([("head/bias", "frozen"), ("head/bias", "kronecker")],
                                   ("full", "full", "kronecker", "kronecker")),
    "scale and bias apart": ([("norm/scale", "frozen"), ("norm/bias", "unit")],
                             ("frozen", "unit", "kronecker", "kronecker")),
    "a predicate of layers": ([(lambda path, record: path == ("head",), "full")],
                              ("full", "full", "full", "full")),
    "a predicate of what is left": ([("*/bias", "frozen"), (
        lambda path, record: getattr(record, "block", "") == "frozen" and "head" in path, "diagonal"
    )], ("full", "frozen", "kronecker", "diagonal")),
}  # fmt: skip


@pytest.mark.parametrize("name", CHOICES)
def test_the_last_choice_holds(name: str) -> None:
    choices, wanted = CHOICES[name]
    layers = normed_layers()
    for where, block in choices:
        layers = layers.replace(where, block)
    assert table_of(layers) == dict(zip(EVERY, wanted, strict=True))
    assert layers.uncovered == ()


def test_layers_come_back_whole() -> None:
    """Those that choices or select took out are again what was found."""
    found = normed_layers()
    out = found.replace("head/bias", "gradient").replace("*", "frozen")
    assert not out and dict(out.replace("head", "kronecker").replace("norm", "full")) == dict(found)
    left = found.select(lambda path, layer: path != ("head",))
    assert left.uncovered and dict(left.replace("head", "kronecker")) == dict(found)


@pytest.mark.parametrize("name", ["head", "head/bias", "."])
def test_a_string_without_wildcards_is_the_path(name: str) -> None:
    """What lies there and below, in blocks= as in replace."""
    path = tuple(name.split("/")) if name != "." else ()
    x = random(0, N, 4)
    loss_fn, params = categorical(Normed()), filled(Normed(), x)
    found = normed_layers()
    by_name, by_path = (ng.find_layers(loss_fn, params, x, blocks={where: "gradient"})
                        for where in (name, path))  # fmt: skip
    assert by_name == by_path == found.replace(name, "gradient") == found.replace(path, "gradient")
    changed = {p for p, block in table_of(by_name).items() if block == "gradient"}
    assert changed == {p for p in EVERY if name == "." or f"{p}/".startswith(f"{name}/")}
    with pytest.raises(ValueError, match="there are: norm, head"):
        found.replace("hea", "gradient")


def test_blocks_that_cannot_be_had_are_refused() -> None:
    loss_fn, x = categorical(Normed()), random(0, N, 4)
    layers = ng.find_layers(loss_fn, filled(Normed(), x), x)
    with pytest.raises(ValueError, match="must be one of 'kronecker', 'unit', 'full', 'diagonal'"):
        layers.replace("head", "dense")
    with pytest.raises(ValueError, match="there are: norm, head"):
        layers.replace(("tail",), "full")
    with pytest.raises(ValueError, match="no inputs and outputs"):
        layers.replace("norm", "kronecker")
    with pytest.raises(ValueError, match="cannot leave the block without its bias"):
        layers.replace(("head", "kernel"), "frozen")
    wide = nn.Dense(100)
    layers = ng.find_layers(categorical(wide), filled(wide, jnp.ones((2, 100))), jnp.ones((2, 100)))
    for block in ("full", "unit"):  # of a dense layer one and the same
        with pytest.raises(ValueError, match=f'"{block}" would be 1 × .* 10,100².*limit is 8,192²'):
            layers.replace(lambda path, layer: True, block)
    with pytest.raises(ValueError, match="nor its bias have a block alone"):
        normed_layers().replace("*", "diagonal").replace("head/bias", "full")


def test_blocks_that_are_too_many_are_refused() -> None:
    groups = nn.Conv(2**16, (3, 3), feature_group_count=2**9)  # 512 blocks of 1280²
    x = jax.ShapeDtypeStruct((1, 4, 4, 2**9), jnp.float32)
    params = jax.eval_shape(groups.init, KEY, x)["params"]
    loss_fn = lambda p, x: ng.Gaussian(groups.apply({"params": p}, x), event_ndims=3).nll(
        jnp.zeros((1, 4, 4, 2**16))
    )
    layers = ng.find_layers(loss_fn, params, x)
    with pytest.raises(ValueError, match=r"512 × a matrix of 1,280².* 2 GB together"):
        layers.replace(".", "unit")


def test_a_free_parameter_has_the_outer_product_of_its_gradient() -> None:
    loss_fn = lambda p, x: ng.Gaussian(jnp.sin(x * jnp.exp(p["scale"]) + p["shift"] ** 2)).nll(
        jnp.zeros_like(x)
    )
    params, x = {"scale": random(1, 3), "shift": random(2, 3)}, random(0, 1, 3)
    layers = ng.find_layers(loss_fn, params, x)
    assert layers.uncovered == () and "free, full" in str(layers)
    tx = ng.scale_by_kfac(layers, damping=0.1)
    _, _, state, _ = steps(tx, loss_fn, params, x, layers, fisher="empirical")
    F = ng.fisher(loss_fn, params, x, layers=layers, fisher="empirical")  # exact for one example
    close({path: f.A for path, f in ng.factors(state).items()}, F)


def test_a_parameter_multiplied_and_indexed_has_the_rows_of_both_uses() -> None:
    loss_fn = lambda p, x: ng.Gaussian(x @ p["w"] + x[:, :1] * p["w"][0, 0]).nll(x[:, :2])
    params, x = {"w": random(1, 3, 2)}, random(0, 1, 3)
    layers = ng.find_layers(loss_fn, params, x)
    grad_fn = ng.value_and_grad(loss_fn, layers, fisher="empirical")
    (sums,) = grad_fn(params, x)[2].layers.values()
    (F,) = ng.fisher(loss_fn, params, x, layers=layers, fisher="empirical").values()
    np.testing.assert_allclose(sums.A, F, atol=1e-12)  # exact for one example


# ----------------------------------------------------------------------- shared and tied weights


class Twice(nn.Module):
    """One dense layer on two inputs, one after the other."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dense = nn.Dense(3, name="dense", param_dtype=jnp.float64)
        return jnp.tanh(dense(jnp.tanh(dense(x))))


def test_a_layer_called_twice_is_reduced_over_its_calls() -> None:
    module, x = Twice(), random(0, N, 2, 3)
    loss_fn = lambda p, x: ng.Gaussian(module.apply({"params": p}, x).reshape(N, -1)).nll(
        jnp.zeros((N, 6))
    )
    params = filled(module, x)
    layers = ng.find_layers(loss_fn, params, x)
    assert layers[("dense",)].calls == 2
    tx = ng.scale_by_kfac(
        layers, decay=0.0, approximation=ng.Approximation(weight_sharing="reduce")
    )
    _, _, state, _ = steps(tx, loss_fn, params, x, layers, fisher="empirical")

    W, b = params["dense"]["kernel"], params["dense"]["bias"]
    second = lambda s: jnp.tanh(jnp.tanh(s) @ W + b)
    first = x @ W + b
    inner = jnp.tanh(first) @ W + b
    g2 = jax.grad(lambda s: (jnp.tanh(s) ** 2).sum() / 2)(inner)
    g1 = jax.grad(lambda s: (second(s) ** 2).sum() / 2)(first)
    ones = jnp.ones((N, 2, 1))
    inputs = jnp.concatenate([x, ones, jnp.tanh(first), ones], axis=-1).reshape(N, 4, 4)
    a, g = inputs.mean(1), (g1 + g2).sum(1)
    factors = ng.factors(state)[("dense",)]
    close((factors.A, factors.G), (a.T @ a / N, g.T @ g / N), 1e-9)


class Recurrent(nn.Module):
    """The same cell over three steps, scanned or not."""

    cell: Any
    scanned: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        cell = self.cell(3, name="cell", param_dtype=jnp.float64)
        if self.scanned:
            x = nn.RNN(cell, name="rnn")(x)[:, -1]
        else:
            carry = cell.initialize_carry(KEY, x[:, 0].shape)
            for t in range(x.shape[1]):
                carry, out = cell(carry, x[:, t])
            x = out
        return nn.Dense(3, name="head", param_dtype=jnp.float64)(x)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_a_scanned_cell_is_the_unrolled_one(sharing: str) -> None:
    x, found = random(0, N, 3, 2), []
    params = filled(Recurrent(nn.GRUCell), x)
    for scanned in (True, False):
        loss_fn = categorical(Recurrent(nn.GRUCell, scanned))
        layers = ng.find_layers(loss_fn, params, x)
        assert {x.calls for path, x in layers.items() if path[0] == "cell"} == {3}
        tx = ng.scale_by_ekfac(
            layers, statistics_period=1, approximation=ng.Approximation(weight_sharing=sharing)
        )
        found.append(steps(tx, loss_fn, params, x, layers, 2)[2])
    close(*(ng.factors(state) for state in found))
    close(*(state.moments for state in found), 1e-7)


def test_the_fused_lstm_cell_is_the_plain_one() -> None:
    x, found = random(0, N, 3, 2), []
    params = filled(Recurrent(nn.LSTMCell), x)
    for cell in (nn.LSTMCell, nn.OptimizedLSTMCell):
        loss_fn = categorical(Recurrent(cell))
        layers = ng.find_layers(loss_fn, params, x)
        assert layers.uncovered == () and len(layers) == 9
        tx = ng.scale_by_kfac(layers)
        grads, _, state, _ = steps(tx, loss_fn, params, x, layers)
        found.append((grads, ng.factors(state)))
    close(*found)


def test_moments_of_a_shared_layer_are_squares_of_the_summed_gradient() -> None:
    """With one example that is exact."""
    module, x = Twice(), random(0, 1, 3)
    loss_fn, params = categorical(module), filled(module, x)
    layers = ng.find_layers(loss_fn, params, x)
    tx = ng.scale_by_ekfac(layers, decay=0.0, statistics_period=1)
    _, _, state, _ = steps(tx, loss_fn, params, x, layers, 2)
    Q_A, Q_G = ng.bases(state)[("dense",)]
    y = sample_targets(loss_fn(params, x).terms[0], (), jax.random.split(KEY, 1)[0])
    v = jax.grad(lambda p: ng.Categorical(module.apply({"params": p}, x)).nll(y).value)(params)
    matrix = jnp.concatenate([v["dense"]["kernel"], v["dense"]["bias"][None]])
    close(state.moments[("dense",)], (Q_A.T @ matrix @ Q_G) ** 2, 1e-8)


class Tied(nn.Module):
    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        embed = nn.Embed(5, 3, name="embed", dtype=jnp.float64, param_dtype=jnp.float64)
        return embed.attend(jnp.tanh(embed(ids)))


def test_a_tied_embedding_counts_both_uses() -> None:
    """``A ⊗ G = tr_G F ⊗ tr_A F / tr F`` of ``F = A₁ ⊗ G₁ + A₂ ⊗ G₂``."""
    ids = jnp.asarray([[0, 1, 1], [2, 0, 4], [1, 1, 1], [4, 3, 0]])
    module = Tied()
    loss_fn, params = categorical(module), filled(module, ids)
    layers = ng.find_layers(loss_fn, params, ids)
    assert layers[("embed",)].uses == 2
    tx = ng.scale_by_kfac(layers, decay=0.0)
    _, _, state, _ = steps(tx, loss_fn, params, ids, layers)

    E, rows = params["embed"]["embedding"], ids.size
    h = jnp.tanh(E[ids])
    labels = sample_targets(loss_fn(params, ids).terms[0], (), jax.random.split(KEY, 1)[0])
    g_out = jax.nn.softmax(h @ E.T) - jax.nn.one_hot(labels, 5)
    g_in = (g_out @ E) * (1 - h**2)
    square = lambda x: x.reshape(rows, -1).T @ x.reshape(rows, -1)
    uses = [
        (np.bincount(ids.ravel(), minlength=5) / rows, square(g_in) / rows),
        ((g_out.reshape(rows, -1) ** 2).sum(0) / rows, square(h) / rows),
    ]
    F = sum(np.kron(np.diag(a), g) for a, g in uses).reshape(5, 3, 5, 3)
    on_tokens, on_features = np.einsum("ioip->op", F), np.einsum("iojo->ij", F)
    found = ng.factors(state)[("embed",)]
    product = np.kron(np.diag(found.A), found.G)
    close(product, np.kron(on_features, on_tokens) / np.trace(on_tokens))


def test_reduce_needs_the_same_examples_in_every_call() -> None:
    module, x = nn.Dense(3, param_dtype=jnp.float64), random(0, N, 3)
    apply = lambda p, x: module.apply({"params": p}, x)
    uneven = lambda p, x: ng.Gaussian(
        jnp.concatenate([apply(p, x[:1]), apply(p, apply(p, x[1:]))])
    ).nll(jnp.zeros((N, 3)))
    params = filled(module, x)
    layers = ng.find_layers(uneven, params, x)
    tx = ng.scale_by_kfac(layers, approximation=ng.Approximation(weight_sharing="reduce"))
    with pytest.raises(ValueError, match=r"\[1, 3\] examples"):
        steps(tx, uneven, params, x, layers)


# ---------------------------------------------------------------------------------- LoRA pairs


class Pair(nnx.Module):
    """What LoRA computes, with two plain layers."""

    def __init__(self, lora: nnx.LoRALinear):
        self.base = nnx.Linear(4, 3, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        self.a, self.b = (
            nnx.Linear(*shape, use_bias=False, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
            for shape in ((4, 2), (2, 3))
        )
        for own, value in (
            (self.base.kernel, lora.kernel),
            (self.base.bias, lora.bias),
            (self.a.kernel, lora.lora.lora_a),
            (self.b.kernel, lora.lora.lora_b),
        ):
            own[...] = value[...]

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.base(x) + self.b(self.a(x))


def test_a_lora_pair_is_two_dense_layers() -> None:
    lora = nnx.LoRALinear(4, 3, lora_rank=2, param_dtype=jnp.float64,
                          lora_param_dtype=jnp.float64, rngs=nnx.Rngs(1))  # fmt: skip
    lora.lora.lora_b[...] = random(3, 2, 3)
    plain, x, found = Pair(lora), random(0, N, 4), []
    loss_fn = lambda model, x: ng.Categorical(model(x)).nll(jnp.zeros(N, int))
    for model in (lora, plain):
        layers = ng.find_layers(loss_fn, model, x)
        assert layers.uncovered == ()
        _, _, statistics = ng.value_and_grad(loss_fn, layers)(model, x, rng=KEY)
        found.append(statistics.layers)
    names = {(): ("base",), ("lora", "lora_a"): ("a",), ("lora", "lora_b"): ("b",)}
    close(*zip(*((found[0][ours], found[1][theirs]) for ours, theirs in names.items())))


# ------------------------------------------------------------------- what has no row of the table


def test_a_circular_transposed_convolution_is_covered_with_its_bias_apart() -> None:
    """Its rows are those before the wrap, so that its bias is added to something else."""
    module, x = nn.ConvTranspose(3, (3,), (2,), "CIRCULAR", param_dtype=float), random(0, 3, 4, 2)
    loss_fn = lambda p, x: ng.Gaussian(jnp.tanh(module.apply({"params": p}, x)).reshape(3, -1)).nll(
        jnp.zeros((3, 24))
    )
    params = filled(module, x)
    layers = ng.find_layers(loss_fn, params, x)
    assert layers.uncovered == () and [x.kind for x in layers.values()] == ["conv", "bias"]
    tx = ng.scale_by_ekfac(layers, basis="eigh", decay=0.0, statistics_period=1, refresh_period=1)
    grad_fn = ng.value_and_grad(loss_fn, layers, fisher="exact")
    state = tx.init(params)
    for i in range(2):
        _, grads, statistics = grad_fn(params, x, rng=jax.random.key(i), opt_state=state)
        _, state = tx.update(grads, state, params, statistics=statistics)
    F = ng.fisher(loss_fn, params, x, layers=layers)
    conv, bias = list(layers)
    np.testing.assert_allclose(state.moments[conv].sum(), F[conv].trace(), rtol=1e-9)
    np.testing.assert_allclose(ng.factors(state)[bias].A, F[bias], rtol=1e-9, atol=1e-12)


def test_a_layer_that_cannot_be_looked_into_is_what_its_user_says() -> None:
    @jax.custom_vjp
    def fused(x: jax.Array, w: jax.Array, b: jax.Array) -> jax.Array:
        return x @ w + b

    back = lambda r, g: (g @ r[1].T, r[0].T @ g, g.sum(0))
    fused.defvjp(lambda x, w, b: (x @ w + b, (x, w)), back)
    plain = lambda x, w, b: x @ w + b
    told = lambda x, w, b: ng.as_layer(fused(x, w, b), plain, x, w, b)

    def loss_of(dense: Any) -> Any:
        def loss_fn(p: Any, x: jax.Array) -> ng.Loss:
            hidden = jnp.tanh(dense(x, p["w"], p["b"]))
            return ng.Categorical(hidden @ p["head"]).nll(jnp.zeros(len(x), int))

        return loss_fn

    params = {"w": random(0, 4, 3), "b": random(1, 3), "head": random(2, 3, 2)}
    x, found = random(3, 5, 4), []
    for dense in (told, plain):
        layers = ng.find_layers(loss_of(dense), params, x)
        assert [len(layer.parameters) for layer in layers.values()] == [2, 1]
        grad_fn = ng.value_and_grad(loss_of(dense), layers)
        found.append(grad_fn(params, x, rng=jax.random.key(0)))
    close(*found)
    with pytest.raises(ValueError, match=r"y has shape .* Give the function"):
        ng.as_layer(x, plain, x, params["w"], params["b"])
    unknown = ng.find_layers(loss_of(fused), params, x, blocks={"w": "diagonal", "b": "diagonal"})
    assert {u.path for u in unknown.leftover} == {("w",), ("b",)}
