"""Every layer kind against brute force, in float64: factors, and the preconditioned update."""

import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import CASES, LINEN_ONLY, Case
from flax import nnx

import natgrad_jax as ng
from natgrad_jax import seeds
from natgrad_jax.paths import leaves

EXAMPLES = 4
DISTRIBUTIONS = {
    "categorical": lambda z: ng.Categorical(z),
    "bernoulli": lambda z: ng.Bernoulli(z),
    "gaussian": lambda z: ng.Gaussian(
        z, jnp.array([[0.5, 0.1, 0], [0.1, 1.0, 0.2], [0, 0.2, 2.0]])
    ),
}


@pytest.fixture
def float64() -> Any:
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


class Setup(NamedTuple):
    """A network of one layer under a fixed readout, and everything brute force needs."""

    loss_fn: Any
    params: Any  # the tree, or the NNX model
    tree: Any  # {"kernel": …, "bias": …}
    output: Any  # (tree, x) → s
    natural: Any  # s → natural output of the distribution
    batch: Any


def build(case: Case, framework: str, distribution: str, dtype: Any) -> Setup:
    # NumPy's randomness: compiling JAX's for every shape would take most of the suite's time
    random = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(random.normal(size=shape), dtype)
    x = normal(EXAMPLES, *case.shape)
    if framework == "linen":
        module = case.linen()
        abstract = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
        output = lambda tree, x: module.apply({"params": tree}, x)
    else:
        model = nnx.eval_shape(lambda: case.nnx(nnx.Rngs(0)))
        abstract = {path[-1]: v for path, v in leaves(nnx.state(model, nnx.Param)).items()}

        def output(tree: Any, x: jax.Array) -> jax.Array:
            return with_parameters(model, tree)(x)

    tree = {k: normal(*v.shape) / np.sqrt(v.shape[0]) for k, v in abstract.items()}
    s = jax.eval_shape(output, tree, x).shape
    lead = s[:-1] if case.tokens else s[:1]
    readout = normal(int(np.prod(s[len(lead) :])), 3)
    natural = lambda s: jnp.tanh(s).reshape(*s.shape[: len(lead)], -1) @ readout
    make = DISTRIBUTIONS[distribution]
    categorical = distribution == "categorical"
    y = jnp.asarray(random.integers(3, size=lead) if categorical else random.random((*lead, 3)))
    if framework == "linen":
        loss_fn = lambda tree, b: make(natural(output(tree, b[0]))).nll(b[1])
        return Setup(loss_fn, tree, tree, output, natural, (x, y))
    loss_fn = lambda model, b: make(natural(model(b[0]))).nll(b[1])
    return Setup(loss_fn, with_parameters(model, tree), tree, output, natural, (x, y))


def with_parameters(model: nnx.Module, tree: Any) -> nnx.Module:
    copy = nnx.clone(model)
    for name, value in tree.items():
        setattr(copy, name, nnx.Param(value))
    return copy


def output_gradients(setup: Setup, fisher: str, rng: Any, arrange: Any) -> np.ndarray:
    """``∂(−log p)/∂s`` for every seed, one example at a time: ``(seeds, T, B, O)``."""
    x, _ = setup.batch
    s = jax.jit(setup.output)(setup.tree, x)
    term = setup_loss(setup).terms[0]
    if fisher == "exact":
        columns = oracle.seed_columns(term.distribution)
        spots = [np.unravel_index(i, term.distribution.examples) for i in range(len(columns))]
        wanted = [(spot, c) for spot, cs in zip(spots, columns, strict=True) for c in cs]
    else:
        if fisher == "mc":
            targets = seeds.sample_targets(term, (), jax.random.split(rng, 1)[0])
        else:
            targets = term.targets
        total = lambda z: term.distribution.with_natural(z).nll_per_example(targets).sum()
        gradient = np.asarray(jax.grad(total)(term.distribution.natural))
        wanted = [((n,), gradient[n]) for n in range(EXAMPLES)]
    batch_seeds = np.zeros((len(wanted), *term.distribution.natural.shape), s.dtype)
    for i, (spot, value) in enumerate(wanted):
        batch_seeds[(i, *spot)] = value
    pull = jax.jit(jax.vmap(lambda seed: jax.vjp(setup.natural, s)[1](seed)[0]))
    found = np.asarray(pull(batch_seeds))
    return np.stack([arrange(g[spot[0]]) for g, (spot, _) in zip(found, wanted, strict=True)])


def setup_loss(setup: Setup) -> ng.Loss:
    return jax.jit(lambda batch: setup.loss_fn(setup.params, batch))(setup.batch)


def check(
    case: Case, framework: str, distribution: str, fisher: str, dtype: Any, tolerance: float
) -> None:
    setup = build(case, framework, distribution, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layers = ng.find_layers(setup.loss_fn, setup.params, setup.batch)
    assert layers.uncovered == ()
    rng, damping = jax.random.key(3), 0.05
    grad_fn = ng.value_and_grad(setup.loss_fn, layers, fisher=fisher)
    tx = ng.scale_by_kfac(layers, damping=damping, decay=0.0)

    @jax.jit
    def step(batch: Any) -> Any:
        _, grads, statistics = grad_fn(setup.params, batch, rng=rng)
        updates, state = tx.update(grads, tx.init(grads), statistics=statistics)
        return grads, updates, ng.factors(state)

    grads, updates, found = step(setup.batch)
    (factors,) = found.values()

    jacobians = oracle.jacobians(setup.output, setup.tree, setup.batch[0], case.arrange)
    g = output_gradients(setup, fisher, rng, case.arrange)
    examples = setup_loss(setup).terms[0].count
    F = oracle.kronecker(jacobians, g, float(examples))
    (layer,) = layers.values()
    ours = oracle.as_matrix(layer, *factors, setup.tree)
    assert oracle.relative(ours, F) <= tolerance

    a, b = (np.trace(f, axis1=-2, axis2=-1) / f.shape[-1] for f in factors)
    pi = np.sqrt(a / b)
    eye = lambda f: np.eye(f.shape[-1], dtype=f.dtype)
    damped = [
        np.asarray(factors.A) + np.asarray(pi)[..., None, None] * np.sqrt(damping) * eye(factors.A),
        np.asarray(factors.G)
        + np.asarray(1 / pi)[..., None, None] * np.sqrt(damping) * eye(factors.G),
    ]
    direct = oracle.as_matrix(layer, *damped, setup.tree)
    gradient, update = (
        np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]) for t in (grads, updates)
    )
    assert oracle.relative(update, np.linalg.solve(direct, gradient)) <= tolerance


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
@pytest.mark.parametrize("case", CASES + LINEN_ONLY, ids=lambda c: c.name)
def test_linen(case: Case, fisher: str, float64: None) -> None:
    check(case, "linen", "categorical", fisher, jnp.float64, 1e-10)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_nnx(case: Case, float64: None) -> None:
    check(case, "nnx", "categorical", "mc", jnp.float64, 1e-10)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_float32(case: Case) -> None:
    check(case, "linen", "categorical", "mc", jnp.float32, 1e-4)


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
@pytest.mark.parametrize("distribution", ["bernoulli", "gaussian"])
def test_other_distributions(distribution: str, fisher: str, float64: None) -> None:
    check(CASES[0], "linen", distribution, fisher, jnp.float64, 1e-10)
