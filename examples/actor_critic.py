"""Actor-critic: the cart-pole, written in JAX, by Adam and by K-FAC on policy and value (ACKTR).

Many carts are simulated at once. After some moves of all of them, the policy gradient and the
critic's error make one loss; the Fisher of the policy and that of the critic make its curvature.
The trust region of K-FAC bounds how far a step moves the policy, which is what lets it go far
where that is safe.

    python examples/actor_critic.py          # a minute on one core
    python examples/actor_critic.py --fast   # fewer updates, as the tests do
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

import natgrad_jax as ng

CARTS, MOVES, DISCOUNT, LAMBDA, LONGEST = 32, 16, 0.99, 0.95, 500
BETWEEN = 10  # updates between two evaluations


class Cart(NamedTuple):
    """Position, speed, angle, angular speed; how many moves the episode has lasted."""

    physics: jax.Array
    age: jax.Array


def reset(key):
    return Cart(jax.random.uniform(key, (4,), minval=-0.05, maxval=0.05), jnp.zeros((), int))


def move(cart, action, key):
    """The cart after a push to the left or right (Barto, Sutton & Anderson 1983).

    Also whether the pole fell, and whether the episode ended, by that or after LONGEST moves.
    """
    _, v, angle, spin = cart.physics
    force, sin, cos = 20.0 * action - 10.0, jnp.sin(angle), jnp.cos(angle)
    push = (force + 0.05 * spin**2 * sin) / 1.1
    turning = (9.8 * sin - cos * push) / (0.5 * (4 / 3 - 0.1 * cos**2 / 1.1))
    speeding = push - 0.05 * turning * cos / 1.1
    new = cart.physics + 0.02 * jnp.stack([v, speeding, spin, turning])
    fell = (jnp.abs(new[0]) > 2.4) | (jnp.abs(new[2]) > np.pi / 15)
    ended = fell | (cart.age + 1 >= LONGEST)
    after = jax.tree.map(lambda a, b: jnp.where(ended, a, b), reset(key), Cart(new, cart.age + 1))
    return after, fell, ended, new


class ActorCritic(nn.Module):
    @nn.compact
    def __call__(self, physics):
        """The logits of two actions, and the value."""
        hidden = lambda: nn.Sequential([nn.Dense(64), nn.tanh, nn.Dense(64), nn.tanh])
        return nn.Dense(2)(hidden()(physics)), nn.Dense(1)(hidden()(physics))[..., 0]


model = ActorCritic()
SCALE = jnp.array([1.0, 1.0, 0.1, 1.0])
outputs = lambda params, physics: model.apply({"params": params}, physics / SCALE)


def loss_fn(params, physics, actions, advantages, returns):
    logits, values = outputs(params, physics)
    policy = ng.Categorical(logits)
    surrogate = -jnp.mean(advantages * policy.log_prob(actions))
    critic = ng.Gaussian(values, event_ndims=0).nll(returns)
    return ng.loss(surrogate, policy) + 0.5 * critic


def play(params, carts, key):
    """A batch of moves for ``loss_fn``, with generalized advantages (λ = LAMBDA)."""

    def one(carts, key):
        keys = jax.random.split(key, CARTS + 1)
        actions = jax.random.categorical(keys[0], outputs(params, carts.physics)[0])
        after, fell, ended, new = jax.vmap(move)(carts, actions, keys[1:])
        return after, (carts, actions, fell, ended, new)

    carts, (seen, actions, fell, ended, new) = jax.lax.scan(
        one, carts, jax.random.split(key, MOVES)
    )
    values, following = outputs(params, seen.physics)[1], outputs(params, new)[1]
    errors = (~fell) + DISCOUNT * jnp.where(fell, 0, following) - values

    def back(advantage, given):
        error, ended = given
        advantage = error + DISCOUNT * LAMBDA * jnp.where(ended, 0, advantage)
        return advantage, advantage

    _, advantages = jax.lax.scan(back, jnp.zeros(CARTS), (errors, ended), reverse=True)
    batch = seen.physics, actions, advantages, advantages + values
    return carts, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)


@jax.jit
def evaluate(params, key):
    """The mean number of moves of CARTS fresh episodes."""

    def one(given, key):
        carts, standing = given
        keys = jax.random.split(key, CARTS + 1)
        actions = jax.random.categorical(keys[0], outputs(params, carts.physics)[0])
        carts, fell, _, _ = jax.vmap(move)(carts, actions, keys[1:])
        standing &= ~fell
        return (carts, standing), standing.mean()

    carts = jax.vmap(reset)(jax.random.split(key, CARTS))
    given = carts, jnp.ones(CARTS, bool)
    return jax.lax.scan(one, given, jax.random.split(key, LONGEST))[1].sum()


def contender(name, layers):
    """The transformation, and what measures gradients and statistics."""
    if name == "Adam":  # of 1e-3, 3e-3 and 1e-2
        plain = jax.grad(lambda params, *batch: loss_fn(params, *batch).value)
        tx = optax.with_extra_args_support(optax.adam(3e-3))
        return tx, lambda params, batch, key, state: (plain(params, *batch), None)
    grad_fn = ng.value_and_grad(loss_fn, layers)
    natural = lambda params, batch, key, state: grad_fn(params, *batch, rng=key, opt_state=state)
    # the radius: of 2e-3 and 1e-2
    return ng.kfac(0.1, layers, trust_radius=1e-2), lambda *given: natural(*given)[1:]


def train(name, seed, updates):
    """How long fresh episodes last, every BETWEEN updates."""
    keys = jax.random.split(jax.random.key(seed), 3)
    carts = jax.vmap(reset)(jax.random.split(keys[0], CARTS))
    params = model.init(keys[1], carts.physics)["params"]
    batch = jax.eval_shape(play, params, carts, keys[2])[1]
    tx, measure = contender(name, ng.find_layers(loss_fn, params, *batch))

    @jax.jit
    def step(params, opt_state, carts, key):
        keys = jax.random.split(key)
        carts, batch = play(params, carts, keys[0])
        grads, statistics = measure(params, batch, keys[1], opt_state)
        updates, opt_state = tx.update(grads, opt_state, params, statistics=statistics)
        return optax.apply_updates(params, updates), opt_state, carts

    opt_state, lengths = tx.init(params), []
    for i in track(range(1, updates + 1), f"{name:5} seed {seed}"):
        key = jax.random.fold_in(keys[2], i)
        params, opt_state, carts = step(params, opt_state, carts, key)
        if i % BETWEEN == 0:
            lengths.append(float(evaluate(params, key)))
    return lengths


def plot(path, curves):
    """All seeds, thin, and their mean."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for (name, runs), color in zip(curves.items(), ("C0", "C1")):
        moves = CARTS * MOVES * BETWEEN * np.arange(1, runs.shape[1] + 1) / 1e3
        axes.plot(moves, runs.T, color, lw=0.7, alpha=0.5)
        axes.plot(moves, runs.mean(0), color, lw=2.5, label=f"{name}, mean of {len(runs)} seeds")
    axes.set(xlabel="thousand moves seen", ylabel="moves before the pole falls", ylim=(0, 520))
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="fewer updates and seeds")
    parser.add_argument("--output", type=Path, default=Path("actor_critic.png"))
    args, _ = parser.parse_known_args(argv)  # a notebook has arguments of its own
    updates, seeds = (100, 3) if args.fast else (300, 4)
    curves, results = {}, {}
    table = Table("moves an episode", "over all updates", "last third", "last third, worst seed")
    for name in ("Adam", "K-FAC"):
        curves[name] = np.array([train(name, seed, updates) for seed in range(seeds)])
        late = curves[name][:, -updates // BETWEEN // 3 :].mean(1)
        numbers = curves[name].mean(), late.mean(), late.min()
        results |= dict(zip((f"{name} all", name, f"{name} worst"), map(float, numbers)))
        table.add_row(name, *(f"{x:.0f}" for x in numbers))
    Console().print(table)
    plot(args.output, curves)
    return results


if __name__ == "__main__":
    main()
