"""The physics benchmark end to end on a few steps, and its equations at their own solutions."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lib import pde
from physics import pinn

pytestmark = pytest.mark.once

SOLUTIONS = {
    "poisson-2": partial(pde.product, jnp),
    "poisson-5": partial(pde.total, jnp),
    "heat": lambda x: jnp.exp(-(jnp.pi**2) * pde.DIFFUSIVITY * x[:, 0]) * jnp.sin(jnp.pi * x[:, 1]),
}


@pytest.mark.parametrize("name", SOLUTIONS)
def test_the_solution_solves_the_equation(name, float64):
    problem, u = pde.make_problem(name, 4, (20, 30), "float64"), SOLUTIONS[name]
    np.testing.assert_allclose(problem.equation.residual(u, problem.points.interior), 0, atol=1e-9)
    at = problem.points.boundary
    np.testing.assert_allclose(u(at), problem.equation.boundary(at), atol=1e-9)
    np.testing.assert_allclose(u(problem.tested), problem.truth, atol=1e-9)


def test_the_quadrature_solves_burgers_equation():
    at = np.random.default_rng(0).uniform([0.05, 0.1], [1.0, 1.0], (30, 2))
    h = 1e-4
    u, later, earlier, right, left = (
        pde.burgers_solution(at + h * np.array(shift))
        for shift in ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1))
    )
    second = (right - 2 * u + left) / h**2
    residual = (later - earlier + u * (right - left)) / (2 * h) - pde.VISCOSITY * second
    np.testing.assert_allclose(residual, 0, atol=1e-4)
    start = np.stack([np.zeros(9), np.linspace(-1, 1, 9)], axis=1)
    np.testing.assert_allclose(pde.burgers_solution(start), -np.sin(np.pi * start[:, 1]), atol=1e-9)


@pytest.mark.parametrize(
    "problem, contenders",
    [
        ("poisson-2", ["kfac-rescaled", "adam"]),
        ("burgers", ["lbfgs"]),
        ("heat", ["exact-ngd", "spring"]),
    ],
)
def test_a_tiny_race(problem, contenders, tmp_path, capsys):
    prefix = tmp_path / "new" / "pinn"
    pinn.main(["--problems", problem, "--contenders", *contenders, "--seconds", "30", "--search",
               "30", "--steps", "3", "--width", "4", "--points", "20", "12",
               "--output", str(prefix)])  # fmt: skip
    assert contenders[0] in capsys.readouterr().out
    assert prefix.with_name("pinn.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads(prefix.with_name("pinn.json").read_text())
    assert result["command"].startswith("python benchmarks/physics/pinn.py --problems")
    assert result["versions"]["jax"] == jax.__version__ and result["machine"]["device"]
    assert [run["contender"] for run in result["runs"]] == contenders
    for run in result["runs"]:
        assert run["steps"][0] == 0 and run["steps"][-1] == 3 and run["seconds"][0] == 0
        assert run["loss"][-1] != run["loss"][0] and np.all(np.isfinite(run["error"]))
    assert len({run["loss"][0] for run in result["runs"]}) == 1  # they start from the same


def test_fresh_points_are_on_the_same_faces():
    problem = pde.make_problem("heat", 4, (20, 12), "float32")
    fresh = problem.sample(jax.random.key(5))
    assert not np.array_equal(fresh.interior, problem.points.interior)
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, problem.points)
    np.testing.assert_array_equal(fresh.boundary[0::3, 0], 0)
    np.testing.assert_array_equal(fresh.boundary[1::3, 1], 0)
    np.testing.assert_array_equal(fresh.boundary[2::3, 1], 1)
