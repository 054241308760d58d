"""Models in the style of other people's code: covered, trained, with JAX's own gradients."""

import warnings
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
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(wanted))
    for ours, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * scale)
    for x in jax.tree.leaves((statistics, new)):
        assert bool(jnp.isfinite(x).all())
    silent = {path for path, sums in statistics.layers.items() if not jnp.any(sums.A != 0)}
    assert silent == {("steep",)} & set(layers)  # the branch that does not run
