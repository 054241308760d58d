"""Models in the style of other people's code: covered, trained, with JAX's own gradients."""

import warnings
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import zoo_of_others
import zoo_of_others_derivatives
from flax import nnx

import natgrad_jax as ng

CASES = zoo_of_others.CASES + zoo_of_others_derivatives.CASES
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def find(problem: Any) -> ng.Layers:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ng.UncoveredWarning)
        return ng.find_layers(problem.loss_fn, problem.params, *problem.args)


@each_case
def test_parameters_are_covered(case: Any) -> None:
    layers = find(case.make())
    assert {"/".join(path) for path in layers.uncovered} <= set(case.uncovered)
    assert case.layers in (None, len(layers))


@each_case
def test_gradients_are_jaxs_own_and_a_step_is_finite(case: Any) -> None:
    problem = case.make()
    params, args = problem.params, problem.args
    layers = find(problem)
    grad_fn = ng.value_and_grad(problem.loss_fn, layers, has_aux=problem.has_aux)
    tx = ng.kfac(0.1, layers)
    if isinstance(params, nnx.Module):
        graph, tree, rest = nnx.split(params, nnx.Param, ...)
    else:
        tree = params

    @jax.jit
    def step(tree: Any, state: Any) -> Any:
        own = nnx.merge(graph, tree, rest, copy=True) if isinstance(params, nnx.Module) else tree
        loss, grads, statistics = grad_fn(own, *args, rng=jax.random.key(0), opt_state=state)
        updates, state = tx.update(grads, state, tree, statistics=statistics)
        return loss, grads, statistics, optax.apply_updates(tree, updates)

    def value(tree: Any) -> jax.Array:
        own = nnx.merge(graph, tree, rest, copy=True) if isinstance(params, nnx.Module) else tree
        out = problem.loss_fn(own, *args)
        return (out[0] if problem.has_aux else out).value

    _, grads, statistics, new = step(tree, tx.init(tree))
    wanted = jax.jit(jax.grad(value))(tree)
    scale = max(float(np.abs(x).max()) for x in jax.tree.leaves(wanted))
    for ours, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * scale)
    for x in jax.tree.leaves((statistics, new)):
        assert np.isfinite(x).all()
    for x in jax.tree.leaves(statistics.layers):
        if x.ndim > 1 and x.shape[-1] == x.shape[-2]:
            values = np.linalg.eigvalsh(np.asarray(x, float))
            assert values.min() >= -1e-5 * np.abs(values).max()
    silent = {path for path, sums in statistics.layers.items() if not np.any(np.asarray(sums.A))}
    assert silent == {("steep",)} & set(layers)  # the branch that does not run


def test_blocks_of_parameters_in_complex_functions_are_exact(float64: None) -> None:
    """Where examples' own gradients are had; products of complex numbers have squared sums."""
    problem = next(case for case in CASES if case.name == "plain: state space").make()
    params, (x, y) = jax.tree.map(lambda a: a.astype(float), problem.params), problem.args
    x = x.astype(float)
    layers = ng.find_layers(problem.loss_fn, params, x, y)
    grad_fn = jax.jit(ng.value_and_grad(problem.loss_fn, layers, fisher="exact"))
    _, _, statistics = grad_fn(params, x, y)
    logits = lambda params, x: problem.loss_fn(params, x[None], y[:1]).terms[0].raw["logits"][0]
    z = jax.jit(jax.vmap(partial(logits, params)))(x)
    J = jax.jit(jax.vmap(lambda x: jax.jacobian(logits)(params, x)))(x)
    p = jax.nn.softmax(z)
    H = jnp.einsum("ni,ij->nij", p, jnp.eye(p.shape[1])) - jnp.einsum("ni,nj->nij", p, p)
    for name in ("gain", "frequency", "log_decay", "log_step", "D"):
        wanted = jnp.einsum("nia,nij,njb->ab", J[name], H, J[name])
        found = statistics.layers[(name,)].A
        np.testing.assert_allclose(found, wanted, atol=1e-9 * float(jnp.abs(wanted).max()))


def test_a_custom_derivative_that_closes_over_the_losss_arrays_is_explained() -> None:
    """JAX differentiates it neither under jit nor under checkpoint."""

    def loss_fn(params: Any, x: jax.Array) -> ng.Loss:
        @jax.custom_vjp
        def solved(w: jax.Array) -> jax.Array:
            return x * w

        solved.defvjp(lambda w: (x * w, ()), lambda _, g: ((g * x).sum(0),))
        return ng.Gaussian(solved(params["w"])).nll(x)

    params, x = {"w": jnp.ones(3)}, jnp.ones((8, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ng.UncoveredWarning)
        layers = ng.find_layers(loss_fn, params, x)
    with pytest.raises(jax.errors.UnexpectedTracerError) as caught:
        ng.value_and_grad(loss_fn, layers)(params, x, rng=jax.random.key(0))
    assert any("jax.closure_convert" in note for note in caught.value.__notes__)


X = jax.random.normal(jax.random.key(0), (8, 4))
SCALAR_BIASES = {
    "a vector": (lambda p, x: x @ p["w"][:, 0] + p["b"], ()),
    "one column, taken before": (lambda p, x: (x @ p["w"])[:, 0] + p["b"], ()),
    "one column, taken after": (lambda p, x: (x @ p["w"] + p["b"])[:, 0], ()),
    "under vmap": (lambda p, x: jax.vmap(lambda x: x @ p["w"][:, 0] + p["b"])(x), ()),
    "its only element": (lambda p, x: x @ p["w"][:, 0] + p["b"][0], (1,)),
}


@pytest.mark.parametrize("name", SCALAR_BIASES)
def test_a_bias_of_one_number_is_in_its_layers_block(name: str, float64: None) -> None:
    """Then A is the Fisher of a linear regression, exactly."""
    forward, shape = SCALAR_BIASES[name]
    x, params = X.astype(float), {"w": jnp.ones((4, 1)), "b": jnp.zeros(shape)}

    def loss_fn(params: Any, x: jax.Array) -> ng.Loss:
        return ng.Gaussian(forward(params, x), event_ndims=0).nll(x[:, 0] ** 2)

    layers = ng.find_layers(loss_fn, params, x)
    assert len(layers) == 1 and not layers.uncovered
    grad_fn = ng.value_and_grad(loss_fn, layers, fisher="exact")
    _, grads, statistics = grad_fn(params, x)
    tx = ng.scale_by_kfac(layers, 1e-20, inverse="cholesky")
    updates, _ = tx.update(grads, tx.init(params), params, statistics=statistics)
    F = jnp.concatenate([jnp.ones((8, 1)), x], axis=1)
    wanted = jnp.linalg.solve(
        F.T @ F / 8, jnp.concatenate([jnp.ravel(grads["b"]), grads["w"][:, 0]])
    )
    found = jnp.concatenate([jnp.ravel(updates["b"]), updates["w"][:, 0]])
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
