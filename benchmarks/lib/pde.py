"""Differential equations with known solutions, as losses of a small network that is to solve them.

============ =========================================== ===================================
name         equation and domain                         solution
============ =========================================== ===================================
poisson-2    −Δu = f on the unit square                  sin πx sin πy
poisson-5    −Δu = f on the unit cube of 5 dimensions    Σ sin πxᵢ
heat         u_t = u_xx / 4 for t, x in [0, 1]           exp(−π²t/4) sin πx
burgers      u_t + u u_x = 0.01/π u_xx, x in [−1, 1]     from u(0, x) = −sin πx, by Cole and
                                                         Hopf's integral
============ =========================================== ===================================

A network is a list of (W, b) with tanh in between. Its loss is half the mean squared residual at
points inside, plus a weight times half the mean squared error at points where the solution is
given: on the boundary, and at t = 0.
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import natgrad_jax as ng

Params = list[tuple[jax.Array, jax.Array]]
Solution = Callable[[jax.Array], jax.Array]  # of points (N, dimensions): a number each

DIFFUSIVITY = 0.25
VISCOSITY = 0.01 / np.pi


class Points(NamedTuple):
    """Where the equation should hold, ``(N, dimensions)``, and where the solution is given."""

    interior: jax.Array
    boundary: jax.Array


class Equation(NamedTuple):
    """What is zero inside, what is given at the boundary, and what is known of the solution."""

    residual: Callable[[Solution, jax.Array], jax.Array]
    boundary: Solution
    low: tuple[float, ...]
    high: tuple[float, ...]
    faces: tuple[tuple[int, int], ...]  # (axis, 0 for its low end or 1 for its high)
    solution: Callable[[np.ndarray], np.ndarray]
    weight: float  # of the boundary's term


class Problem(NamedTuple):
    """An equation, a network and points, in one precision."""

    equation: Equation
    widths: tuple[int, ...]
    points: Points
    tested: jax.Array
    truth: jax.Array

    def init(self, seed: int) -> Params:
        """Glorot's normal weights; biases 0."""
        keys = jax.random.split(jax.random.key(seed), len(self.widths))
        shapes = itertools.pairwise(self.widths)
        glorot, dtype = jax.nn.initializers.glorot_normal(), self.tested.dtype
        return [(glorot(k, s, dtype), jnp.zeros(s[1], dtype)) for k, s in zip(keys, shapes)]

    def loss_fn(self, params: Params, points: Points) -> ng.Loss:
        u = partial(network, params)
        residual = self.equation.residual(u, points.interior)[:, None]
        error = (u(points.boundary) - self.equation.boundary(points.boundary))[:, None]
        inside = ng.Gaussian(residual).nll(jnp.zeros_like(residual))
        return inside + self.equation.weight * ng.Gaussian(error).nll(jnp.zeros_like(error))

    def error(self, params: Params) -> jax.Array:
        """Relative L2 error at the tested points."""
        difference = network(params, self.tested) - self.truth
        return jnp.linalg.norm(difference) / jnp.linalg.norm(self.truth)

    def sample(self, key: jax.Array) -> Points:
        """As many points as there are, anew."""
        counts = (len(self.points.interior), len(self.points.boundary))
        return sample(self.equation, counts, key, self.tested.dtype)


def make_problem(name: str, width: int, counts: tuple[int, int], dtype: Any) -> Problem:
    """Three hidden layers; ``counts`` of points inside and on the boundary."""
    equation = EQUATIONS[name]
    dimensions = len(equation.low)
    tested = test_points(equation)
    return Problem(
        equation,
        (dimensions, width, width, width, 1),
        sample(equation, counts, jax.random.key(1000), dtype),
        jnp.asarray(tested, dtype),
        jnp.asarray(equation.solution(tested), dtype),
    )


def network(params: Params, x: jax.Array) -> jax.Array:
    """A number for each row of x."""
    for W, b in params[:-1]:
        x = jnp.tanh(x @ W + b)
    W, b = params[-1]
    return (x @ W + b)[:, 0]


def sample(equation: Equation, counts: tuple[int, int], key: jax.Array, dtype: Any) -> Points:
    """Uniformly; those on the boundary take turns among its faces."""
    low, high = jnp.asarray(equation.low, dtype), jnp.asarray(equation.high, dtype)
    keys = jax.random.split(key)
    inside, edge = (
        jax.random.uniform(k, (count, len(low)), dtype, low, high) for k, count in zip(keys, counts)
    )
    rows = np.arange(counts[1])
    axes, ends = np.asarray(equation.faces)[rows % len(equation.faces)].T
    return Points(inside, edge.at[rows, axes].set(jnp.where(ends, high[axes], low[axes])))


def test_points(equation: Equation) -> np.ndarray:
    """A grid of about 10,000 in two dimensions; as many random ones in more."""
    low, high = np.asarray(equation.low), np.asarray(equation.high)
    if len(low) > 2:
        return np.random.default_rng(7).uniform(low, high, (10_000, len(low)))
    axes = [np.linspace(a, b, 101) for a, b in zip(low, high)]
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)


def along(u: Solution, axis: int) -> Solution:
    """The derivative of u by one coordinate."""

    def derivative(x: jax.Array) -> jax.Array:
        direction = jnp.zeros_like(x).at[:, axis].set(1)
        return jax.jvp(u, (x,), (direction,))[1]

    return derivative


def poisson_residual(u: Solution, x: jax.Array, source: Solution) -> jax.Array:
    return sum(along(along(u, i), i)(x) for i in range(x.shape[1])) + source(x)


def heat_residual(u: Solution, x: jax.Array) -> jax.Array:
    return along(u, 0)(x) - DIFFUSIVITY * along(along(u, 1), 1)(x)


def burgers_residual(u: Solution, x: jax.Array) -> jax.Array:
    return along(u, 0)(x) + u(x) * along(u, 1)(x) - VISCOSITY * along(along(u, 1), 1)(x)


def burgers_solution(points: np.ndarray) -> np.ndarray:
    """Cole and Hopf: the heat equation's integrals, by Gauss and Hermite's quadrature."""
    nodes, weights = np.polynomial.hermite.hermgauss(200)
    t, x = np.asarray(points, np.float64).T
    moved = x[:, None] - np.sqrt(4 * VISCOSITY * t)[:, None] * nodes
    exponent = -np.cos(np.pi * moved) / (2 * np.pi * VISCOSITY)
    kernel = weights * np.exp(exponent - exponent.max(axis=1, keepdims=True))
    return -(np.sin(np.pi * moved) * kernel).sum(axis=1) / kernel.sum(axis=1)


def poisson(dimensions: int, u: Callable, source: Solution, weight: float) -> Equation:
    faces = tuple(itertools.product(range(dimensions), (0, 1)))
    low, high = (0.0,) * dimensions, (1.0,) * dimensions
    residual = partial(poisson_residual, source=source)
    return Equation(residual, partial(u, jnp), low, high, faces, partial(u, np), weight)


def in_time(residual: Any, start: Solution, left: float, solution: Any, weight: float) -> Equation:
    """Given at t = 0; the solution vanishes at both ends of x."""
    given = lambda x: jnp.where(x[:, 0] == 0, start(x[:, 1]), 0)
    faces = ((0, 0), (1, 0), (1, 1))
    return Equation(residual, given, (0.0, left), (1.0, 1.0), faces, solution, weight)


def product(xp: Any, x: Any) -> Any:
    return xp.prod(xp.sin(np.pi * x), axis=-1)


def total(xp: Any, x: Any) -> Any:
    return xp.sum(xp.sin(np.pi * x), axis=-1)


def heat_solution(x: np.ndarray) -> np.ndarray:
    return np.exp(-(np.pi**2) * DIFFUSIVITY * x[:, 0]) * np.sin(np.pi * x[:, 1])


sine = lambda x: jnp.sin(jnp.pi * x)
EQUATIONS: dict[str, Equation] = {
    "poisson-2": poisson(2, product, lambda x: 2 * np.pi**2 * product(jnp, x), 100.0),
    "poisson-5": poisson(5, total, lambda x: np.pi**2 * total(jnp, x), 100.0),
    "heat": in_time(heat_residual, sine, 0.0, heat_solution, 10.0),
    "burgers": in_time(burgers_residual, lambda x: -sine(x), -1.0, burgers_solution, 10.0),
}
