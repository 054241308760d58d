"""docs/losses.md: losses that are more than a likelihood of labels: their Fisher; that they train.

A contextual bandit, the transverse-field Ising chain by enumeration, two moons: all of it numpy.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import natgrad_jax as ng

PAGE = Path(__file__).parents[2] / "docs/losses.md"
(definitions,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
LOSSES: dict[str, Any] = {}
exec(compile(definitions, str(PAGE), "exec"), LOSSES)
net, Laplace, KEY = LOSSES["net"], LOSSES["Laplace"], jax.random.key(0)
float64 = pytest.mark.usefixtures("float64")


def weights(inputs: int, hidden: int, outputs: int, seed: int = 0) -> Any:
    r = np.random.default_rng(seed)
    w, head = r.normal(size=(inputs, hidden)), r.normal(size=(hidden, outputs))
    return {"w": w / inputs**0.5, "b": np.zeros(hidden), "head": head / hidden**0.5}


def moons(n: int, seed: int = 0) -> np.ndarray:
    r = np.random.default_rng(seed)
    angle, side = np.pi * r.random(n), np.arange(n) % 2
    x = np.stack([np.cos(angle) * (1 - 2 * side) + side, np.sin(angle) * (1 - 2 * side)], 1)
    return x + [-0.5, 0] + 0.05 * r.normal(size=(n, 2))


def robust(p: Any, x: Any, y: Any) -> ng.Loss:
    return Laplace(net(p["net"], x), p["log_scale"]).nll(y)


# the Ising chain: −Σ z z' − h Σ x, by enumeration of all configurations
SPINS, FIELD = 5, 1.0
STATES = 1.0 - 2 * ((np.arange(2**SPINS)[:, None] >> np.arange(SPINS)) & 1)
FLIPPED = np.arange(2**SPINS)[:, None] ^ (1 << np.arange(SPINS))
DIAGONAL = -(STATES * np.roll(STATES, 1, 1)).sum(1)


def ground_state() -> float:
    H = np.diag(DIAGONAL)
    H[np.arange(2**SPINS)[:, None], FLIPPED] -= FIELD
    return float(np.linalg.eigvalsh(H)[0])


def local_energies(p: Any) -> tuple[Any, Any]:
    """Those of all configurations, and ``|ψ|²``."""
    z = net(p, STATES)[:, 0]
    energies = DIAGONAL - FIELD * jnp.exp(z[FLIPPED] - z[:, None]).sum(1)
    return energies, jax.nn.softmax(2 * z)


# the bandit: −|a − target(s)|², actions drawn from the policy
def rewards(states: Any, actions: Any) -> Any:
    return -((actions - jnp.stack([jnp.sin(states[:, 0]), states[:, 1]], 1)) ** 2).sum(-1)


def rollout(p: Any, key: Any) -> tuple[Any, ...]:
    """States, actions, their old log-probability, advantages and returns."""
    of_states, of_actions = jax.random.split(key)
    states = jax.random.normal(of_states, (64, 3))
    policy = ng.Gaussian(net(p["actor"], states), jnp.exp(2 * p["log_std"]))
    actions = policy.sample(of_actions)
    returns = rewards(states, actions)[:, None]
    advantages = (returns - net(p["critic"], states))[:, 0]
    log_prob = policy.log_prob(actions).sum(-1)
    return states, actions, log_prob, (advantages - advantages.mean()) / advantages.std(), returns


def actor_critic(hidden: int) -> Any:
    own = {"actor": weights(3, hidden, 2), "critic": weights(3, hidden, 1, 1)}
    return own | {"log_std": np.zeros(2)}


class Part(NamedTuple):
    """Outputs ``(examples, …)`` of the parameters, and the Fisher over those of one example."""

    outputs: Callable[[Any], Any]
    H: Callable[[Any], Any]
    scale: float = 1.0
    weights: Any = None
    centred: bool = False


class Problem(NamedTuple):
    loss_fn: Callable[..., ng.Loss]
    params: Any
    args: tuple[Any, ...]
    parts: tuple[Part, ...]


def softmax_fisher(z: Any) -> Any:
    q = jax.nn.softmax(z)
    return jnp.diag(q) - jnp.outer(q, q)


sigmoid_fisher = lambda z: jnp.diag(jax.nn.sigmoid(z) * jax.nn.sigmoid(-z))
identity = lambda z: jnp.eye(len(z))
beside = lambda x, shared: jnp.concatenate([x, jnp.broadcast_to(shared, x.shape)], 1)
unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def problems() -> dict[str, Problem]:
    r = np.random.default_rng(2)
    data, noise, t, x = (
        moons(8),
        r.normal(size=(8, 2)),
        r.uniform(size=(8, 1)),
        r.normal(size=(8, 3)),
    )
    others, z = data + 0.1 * r.normal(size=(8, 2)), weights(2, 4, 3)
    p, opponent = actor_critic(3), weights(2, 4, 1)
    old = r.normal(size=8) - 3.0  # so that some ratios are clipped
    play = (x, noise, old, r.normal(size=8), r.normal(size=(8, 1)))
    chain, scaled = weights(SPINS, 4, 1), {"net": weights(3, 4, 2), "log_scale": np.zeros(2)}
    energies = r.normal(size=2**SPINS)
    probabilities = r.random(2**SPINS)
    noisy = np.concatenate([np.cos(t) * data + np.sin(t) * noise, t], 1)
    return {
        "ppo": Problem(LOSSES["ppo"], p, play, (
            Part(lambda p: beside(net(p["actor"], x), p["log_std"]),
                 lambda z: jnp.diag(jnp.append(jnp.exp(-2 * z[2:]), jnp.full(2, 2.0)))),
            Part(lambda p: net(p["critic"], x), identity, 0.5))),
        "variational_monte_carlo": Problem(LOSSES["variational_monte_carlo"], chain,
            (STATES, energies, probabilities),
            (Part(lambda p: net(p, STATES), identity, 1.0, probabilities, True),)),
        "contrastive": Problem(LOSSES["contrastive"], z, (data, others),
            (Part(lambda p: unit(net(p, data)) @ unit(net(p, others)).T / 0.1, softmax_fisher),)),
        "discriminator": Problem(LOSSES["discriminator"], opponent, (data, noise),
            (Part(lambda p: net(p, data), sigmoid_fisher),
             Part(lambda p: net(p, noise), sigmoid_fisher))),
        "generator": Problem(LOSSES["generator"], weights(2, 4, 2), (noise, opponent),
            (Part(lambda p: net(p, noise), identity),)),
        "diffusion": Problem(LOSSES["diffusion"], weights(3, 4, 2), (data, noise, t),
            (Part(lambda p: net(p, noisy), identity, 1.0, np.sin(t[:, 0]) ** 2),)),
        "Laplace": Problem(robust, scaled, (x, noise),
            (Part(lambda p: beside(net(p["net"], x), p["log_scale"]),
                  lambda z: jnp.diag(jnp.append(jnp.exp(-2 * z[2:]), jnp.ones(2)))),)),
    }  # fmt: skip


def by_hand(problem: Problem) -> np.ndarray:
    theta, unravel = ravel_pytree(problem.params)

    @jax.jit
    def whole(theta: Any) -> Any:
        total = jnp.zeros((theta.size, theta.size))
        for part in problem.parts:
            outputs = lambda theta, part=part: part.outputs(unravel(theta))
            J, H = jax.jacfwd(outputs)(theta), jax.vmap(part.H)(outputs(theta))
            w = jnp.ones(len(J)) if part.weights is None else part.weights
            w = w / w.sum()
            J = J - jnp.einsum("n,nop->op", w, J) if part.centred else J
            total += part.scale * jnp.einsum("n,nop,noq,nqr->pr", w, J, H, J)
        return total

    return np.asarray(whole(theta))


def close(a: Any, b: Any, tolerance: float) -> None:
    flat = lambda tree: np.asarray(ravel_pytree(tree)[0])
    assert np.linalg.norm(flat(a) - flat(b)) <= tolerance * np.linalg.norm(flat(b))


@float64
@pytest.mark.parametrize("name", problems())
def test_gradient_and_fisher(name: str) -> None:
    loss_fn, p, args, _ = problem = problems()[name]
    layers = ng.find_layers(loss_fn, p, *args)
    assert layers.uncovered == ()
    tx = ng.scale_by_exact_ngd(1e-3)

    @jax.jit
    def found(p: Any, args: Any) -> Any:
        grads = ng.value_and_grad(loss_fn, layers)(p, *args, rng=KEY)[1]
        _, exact, rows = ng.value_and_grad(loss_fn, fisher="exact")(p, *args)
        step = tx.update(exact, tx.init(p), p, statistics=rows)[0]
        return ng.fisher(loss_fn, p, *args), grads, exact, step

    F, grads, exact, step = found(jax.tree.map(jnp.asarray, p), args)
    gradient, wanted = jax.jit(jax.grad(lambda p: loss_fn(p, *args).value))(p), by_hand(problem)
    close(F, wanted, 1e-8)
    close(grads, gradient, 1e-10)
    close(exact, gradient, 1e-10)
    damped = wanted + 1e-3 * np.eye(len(F))
    close(step, np.linalg.solve(damped, ravel_pytree(gradient)[0]), 1e-8)


def trained(which: str, loss_fn: Any, p: Any, *args: Any, **options: Any) -> tuple[Any, Any]:
    """The optimizer's state, and a step under jit."""
    if which == "exact_ngd":
        tx, grad_fn = ng.exact_ngd(**options), ng.value_and_grad(loss_fn, fisher="exact")
    else:
        layers = ng.find_layers(loss_fn, p, *args)
        tx, grad_fn = (
            getattr(ng, which)(layers=layers, **options),
            ng.value_and_grad(loss_fn, layers),
        )

    @jax.jit
    def step(p: Any, state: Any, key: Any, *args: Any) -> Any:
        loss, grads, statistics = grad_fn(p, *args, rng=key, opt_state=state)
        updates, state = tx.update(grads, state, p, statistics=statistics)
        return optax.apply_updates(p, updates), state, loss

    return tx.init(p), step


float32 = lambda *x: jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), x)
TRUSTED = {"learning_rate": 0.3, "damping": 1e-2, "trust_radius": 0.02}
OPTIONS = {  # in 48 steps, none of them for a warm-up
    "kfac": {"learning_rate": 0.1, "trust_radius": ng.PerExample()},
    "ekfac": {"learning_rate": 0.1, "trust_radius": 2e-3},
    "exact_ngd": TRUSTED,
}


@pytest.mark.parametrize("which", OPTIONS)
def test_a_policy_learns(which: str) -> None:
    (p,), roll = float32(actor_critic(16)), jax.jit(rollout)
    state, step = trained(which, LOSSES["ppo"], p, *roll(p, KEY), **OPTIONS[which])
    reward = []
    for i in range(24):
        play = roll(p, jax.random.key(i))
        reward.append(float(play[-1].mean()))
        for _ in range(2):  # the second is off-policy
            p, state, _ = step(p, state, jax.random.key(i), *play)
    assert reward[0] < -4 and np.mean(reward[-3:]) > -0.8
    assert (p["log_std"] < -0.2).all()


@pytest.mark.parametrize("which, options", [("kfac", {"learning_rate": 0.05, "trust_radius": 2e-3,
                                                      "statistics_period": 10}),
                                            ("exact_ngd", {"learning_rate": 0.1})])  # fmt: skip
def test_the_ground_state_of_a_chain(which: str, options: Any) -> None:
    p, states = float32(weights(SPINS, 8, 1), STATES)
    loss_fn, local, exact = (
        LOSSES["variational_monte_carlo"],
        jax.jit(local_energies),
        ground_state(),
    )
    state, step = trained(which, loss_fn, p, states, *local(p), **options)
    for i in range(100):
        p, state, _ = step(p, state, jax.random.key(i), states, *local(p))
    energies, probabilities = local(p)
    assert exact * (1 + 1e-5) < energies @ probabilities < exact * (1 - 1e-3)


def distance(a: Any, b: Any) -> float:
    """The energy distance of two samples."""
    mean = lambda x, y: np.linalg.norm(x[:, None] - y[None], axis=-1).mean()
    return 2 * mean(a, b) - mean(a, a) - mean(b, b)


@pytest.mark.parametrize("which", ["kfac", "exact_ngd"])
def test_a_generator_finds_the_moons(which: str) -> None:
    fake, real, data, noise = float32(
        weights(2, 16, 2), weights(2, 16, 1, 1), moons(128), np.random.default_rng(0).normal(
            size=(60, 128, 2)))  # fmt: skip
    options = OPTIONS[which] | ({"momentum": None} if which == "kfac" else {})
    of_fake, step_fake = trained(which, LOSSES["generator"], fake, noise[0], real, **options)
    of_real, step_real = trained(which, LOSSES["discriminator"], real, data, noise[0], **options)
    apart = [distance(net(fake, noise[0]), data)]
    for i, z in enumerate(noise):
        key = jax.random.key(i)
        real, of_real, _ = step_real(real, of_real, key, data, net(fake, z))
        fake, of_fake, _ = step_fake(fake, of_fake, key, z, real)
        apart.append(distance(net(fake, z), data))
    assert apart[0] > 0.2 and np.mean(apart[-5:]) < 0.06


FIXED = {"contrastive": ("ekfac", 0.5), "diffusion": ("kfac", 0.2), "Laplace": ("exact_ngd", 0.1)}


@pytest.mark.parametrize("name", FIXED)
def test_a_fixed_loss_falls(name: str) -> None:
    which, share = FIXED[name]
    r, n = np.random.default_rng(2), 24 if name == "contrastive" else 128
    data, noise, t, x = (
        moons(n),
        r.normal(size=(n, 2)),
        r.uniform(0, 1.5, (n, 1)),
        r.normal(size=(n, 3)),
    )
    y = np.stack([x[:, 0] + x[:, 1] ** 2, np.sin(2 * x[:, 2])], 1) + 0.1 * r.laplace(size=(n, 2))
    loss_fn, p, args = {
        "contrastive": (LOSSES["contrastive"], weights(2, 16, 4), (data, data + 0.1 * noise)),
        "diffusion": (LOSSES["diffusion"], weights(3, 16, 2), (data, noise, t)),
        "Laplace": (robust, {"net": weights(3, 16, 2), "log_scale": np.zeros(2)}, (x, y)),
    }[name]
    p, args = float32(p, args)
    state, step = trained(which, loss_fn, p, *args, **OPTIONS[which])
    losses = []
    for i in range(40):
        p, state, loss = step(p, state, jax.random.key(i), *args)
        losses.append(float(loss))
    assert losses[-1] < share * losses[0]
