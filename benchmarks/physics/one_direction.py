"""How far one step along a direction gets, where the loss differentiates its model.

    python benchmarks/physics/one_direction.py

A network 2-12-12-1 (tanh), 400 points, float64. For every way of differentiating, at the start and
after 300 steps of Adam, three seeds: the share of the best decrease of the quadratic model
``∇ᵀd + ½ dᵀ(F + λ)d`` that the best step along a direction reaches, F the Gauss-Newton matrix of
all layers together, λ = 1e-4. The directions: the plain gradient; Kronecker factors from the pooled
rows of all uses; from the partial traces of the examples' gradient matrices; this library's
(``curvature/example_matrices.py``); EKFAC in its bases. Damping is λ beside each eigenvalue of the
product A ⊗ G.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import jet

import natgrad_jax as ng

DAMPING = 1e-4
AXES = tuple(np.eye(2))


def network(params: Any, x: jax.Array) -> jax.Array:
    for W, b in params[:-1]:
        x = jnp.tanh(x @ W + b)
    return (x @ params[-1][0] + params[-1][1])[0]


def _twice(u: Any, x: jax.Array, v: jax.Array) -> jax.Array:
    return jax.jvp(lambda x: jax.jvp(u, (x,), (v,))[1], (x,), (v,))[1]


def _slope_and_value(u: Any, x: jax.Array, by: Callable[..., jax.Array]) -> jax.Array:
    return jnp.sum(by(u)(x) ** 2)


MODES: dict[str, Callable[[Any, jax.Array], jax.Array]] = {
    "Laplacian, jvp of jvp": lambda u, x: sum(_twice(u, x, v) for v in AXES),
    "Laplacian, hessian": lambda u, x: jnp.trace(jax.hessian(u)(x)),
    "Laplacian, grad of grad": lambda u, x: sum(
        jax.grad(lambda x, v=v: jax.grad(u)(x) @ v)(x) @ v for v in AXES
    ),
    "Laplacian, Taylor mode": lambda u, x: sum(
        jet.jet(u, (x,), ((v, jnp.zeros(2)),))[1][1] for v in AXES
    ),
    "squared gradient, grad": lambda u, x: _slope_and_value(u, x, jax.grad),
    "squared gradient, jacfwd": lambda u, x: _slope_and_value(u, x, jax.jacfwd),
    "squared gradient, linearize": lambda u, x: jnp.sum(
        jax.vmap(jax.linearize(u, x)[1])(jnp.eye(2)) ** 2
    ),
    "gradient penalty": lambda u, x: jnp.sqrt(1e-12 + jnp.sum(jax.grad(u)(x) ** 2)) - 1.0,
}


def shares(mode: str, seed: int, width: int, points: int, steps: int) -> list[dict[str, float]]:
    """At the start, and after ``steps`` of Adam."""
    random = np.random.default_rng(seed)
    sizes = [(2, width), (width, width), (width, 1)]
    params = [(jnp.asarray(random.normal(size=s) / np.sqrt(s[0])), jnp.zeros(s[1])) for s in sizes]
    x = jnp.asarray(random.uniform(size=(points, 2)))
    source = lambda x: 2 * jnp.pi**2 * jnp.prod(jnp.sin(jnp.pi * x))
    target = source if mode.startswith("Lap") else lambda x: 0.0 if "penalty" in mode else 1.0
    residual = lambda params, x: MODES[mode](lambda x: network(params, x), x) + target(x)

    def loss_fn(params: Any, x: jax.Array) -> ng.Loss:
        found = jax.vmap(lambda x: residual(params, x))(x)
        return ng.Gaussian(found[:, None]).nll(jnp.zeros((len(x), 1)))

    measure = jax.jit(lambda params: jax.vmap(jax.grad(residual), (None, 0))(params, x))
    values = jax.jit(lambda params: jax.vmap(lambda x: residual(params, x))(x))
    layers = ng.find_layers(loss_fn, params, x, blocks={"2/1": "gradient"})
    plain = ng.Layers({k: replace(v, matrices=False) for k, v in layers.items()}, layers.leftover)
    ours, pooled = (factors_of(loss_fn, own, x) for own in (layers, plain))
    now = _shares(ours, pooled, params, measure(params), values(params))
    adam = optax.adam(3e-3)

    @jax.jit
    def train(params: Any) -> Any:
        value = lambda params: loss_fn(params, x).value

        def step(carry: Any, _: Any) -> Any:
            params, state = carry
            updates, state = adam.update(jax.grad(value)(params), state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, adam.init(params)), length=steps)[0][0]

    params = train(params)
    return [now, _shares(ours, pooled, params, measure(params), values(params))]


def _shares(
    ours: Any, pooled: Any, params: Any, own: Any, residuals: jax.Array
) -> dict[str, float]:
    matrices = [np.concatenate([W, b[:, None]], axis=1) for W, b in own[:-1]] + [
        np.asarray(own[-1][0])
    ]
    J = np.concatenate([M.reshape(len(M), -1) for M in matrices], axis=1)
    gradients = [np.einsum("nio,n->io", M, residuals) / len(M) for M in matrices]
    gradient = np.concatenate([g.ravel() for g in gradients])
    F = J.T @ J / len(J) + DAMPING * np.eye(J.shape[1])
    best = gradient @ np.linalg.solve(F, gradient)

    def share(directions: list[np.ndarray]) -> float:
        d = np.concatenate([x.ravel() for x in directions])
        return float((gradient @ d) ** 2 / (d @ F @ d) / best)

    forms = {
        "pooled": pooled(params),
        "partial traces": [_partial_traces(M) for M in matrices],
        "this library": ours(params),
    }
    found = {"gradient": share(gradients)}
    for name, pairs in forms.items():
        found[name] = share([_damped(*p, g) for p, g in zip(pairs, gradients, strict=True)])
    pairs = zip(forms["this library"], gradients, matrices, strict=True)
    found["EKFAC"] = share([_damped(*p, g, M) for p, g, M in pairs])
    return found


def factors_of(loss_fn: Any, layers: ng.Layers, x: jax.Array) -> Callable[[Any], list[Any]]:
    """From parameters to A and G of each layer."""
    tx = ng.scale_by_kfac(layers, decay=0.0, statistics_period=1)
    grad_fn = ng.value_and_grad(loss_fn, layers, fisher="exact")

    @jax.jit
    def measure(params: Any) -> Any:
        _, grads, statistics = grad_fn(params, x, rng=jax.random.key(0))
        return ng.factors(tx.update(grads, tx.init(params), params, statistics=statistics)[1])

    def of(params: Any) -> list[Any]:
        found = sorted(measure(params).items())
        pairs = [(np.asarray(own.A), np.asarray(own.G)) for _, own in found]
        # a kernel that is only used transposed has its outputs for inputs
        return [(A, G) if len(G) == W.shape[1] else (G, A)
                for (A, G), (W, *_) in zip(pairs, params, strict=True)]  # fmt: skip

    return of


def _partial_traces(M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    L, R = np.einsum("nio,njo->ij", M, M) / len(M), np.einsum("nio,nip->op", M, M) / len(M)
    return L, R / np.trace(L)


def _damped(A: np.ndarray, G: np.ndarray, g: np.ndarray, M: Any = None) -> np.ndarray:
    """The gradient over A ⊗ G + λ; with ``M`` over the second moments in their eigenbases."""
    (a, Q), (b, P) = np.linalg.eigh(A), np.linalg.eigh(G)
    S = np.outer(a, b) if M is None else np.mean((Q.T @ M @ P) ** 2, axis=0)
    return Q @ ((Q.T @ g @ P) / (np.maximum(S, 0) + DAMPING)) @ P.T


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--width", type=int, default=12)
    parser.add_argument("--points", type=int, default=400)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--modes", nargs="*", default=list(MODES))
    parser.add_argument("--out", type=Path, default=Path("one-direction.json"))
    given = parser.parse_args(arguments)
    jax.config.update("jax_enable_x64", True)
    result: dict[str, Any] = {}
    for mode in given.modes:
        runs = [shares(mode, s, given.width, given.points, given.steps) for s in range(given.seeds)]
        for when, own in zip(("start", "trained"), zip(*runs, strict=True), strict=True):
            row = {name: float(np.mean([run[name] for run in own])) for name in own[0]}
            result[f"{mode}, {when}"] = row
            shown = "  ".join(f"{name} {value:.2f}" for name, value in row.items())
            print(f"{mode + ', ' + when:38} {shown}", flush=True)
    given.out.write_text(
        json.dumps({"settings": vars(given) | {"out": None}, "shares": result}, indent=1)
    )
    return result


if __name__ == "__main__":
    main()
