"""Whom ``compare.py`` compares: optimizers of this library and kfac-jax, on arrays both can read.

Each is imported by its own function alone, so that an interpreter needs only one of the two.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax


class Setting(NamedTuple):
    """kfac-jax's fixed setting: nothing adapts, statistics every step.

    ``damping`` is split by π between the factors; ``trust_radius`` is its norm constraint.
    """

    learning_rate: float = 0.1
    damping: float = 0.1
    decay: float = 0.95
    momentum: float = 0.9
    trust_radius: float = 1e-2
    refresh_period: int = 5


# kfac-jax's own example of this autoencoder, examples/autoencoder_mnist, without its l2 penalty
ADAPTIVE = {
    "use_adaptive_learning_rate": True,
    "use_adaptive_momentum": True,
    "use_adaptive_damping": True,
    "damping_adaptation_interval": 5,
    "damping_adaptation_decay": 0.95,
    "initial_damping": 150.0,
    "min_damping": 1e-5,
    "max_damping": 1000.0,
    "num_burnin_steps": 5,
}


class Problem(NamedTuple):
    """The autoencoder as arrays; ``layers``: its first kernels and biases, from the pixels on."""

    images: np.ndarray
    evaluated: np.ndarray
    order: np.ndarray
    rates: dict[str, float]
    setting: Setting
    layers: list[tuple[np.ndarray, np.ndarray]]

    def batch(self, i: int) -> jax.Array:
        return jnp.asarray(self.images[self.order[i % len(self.order)]])


class Optimizer(NamedTuple):
    """An optimizer on a problem.

    ``loss(params, batch)``, in nats per image; ``init(params, batch)`` gives a state;
    ``step(i, params, state, batch, key)`` gives params and state, and has compiled all that it
    needs after ``warmup`` steps.
    """

    params: Any
    loss: Callable[[Any, jax.Array], jax.Array]
    init: Callable[[Any, jax.Array], Any]
    step: Callable[..., tuple[Any, Any]]
    warmup: int = 1


def ours(name: str, problem: Problem) -> Optimizer:
    """An optimizer of ``lib/optimizers.py``, or K-FAC at the peer's setting, on the Flax model."""
    from lib import autoencoder
    from lib.optimizers import OPTIMIZERS, natural

    import natgrad_jax as ng

    setting = problem.setting
    as_peer = lambda rate, layers: ng.kfac(
        rate,
        layers,
        damping=setting.damping,
        decay=setting.decay,
        statistics_period=1,
        statistics_fraction=None,
        refresh=ng.every(setting.refresh_period),
        inverse=AS_PEER[name],
        momentum=setting.momentum,
        nesterov=False,
        trust_radius=setting.trust_radius,
    )
    to_code = problem.layers[: len(problem.layers) // 2]
    encoder = (to_code[0][0].shape[0], *(bias.size for _, bias in to_code))
    loss_fn = autoencoder.Problem(autoencoder.Autoencoder(encoder), problem.images).loss_fn
    params = {
        f"Dense_{i}": {"kernel": jnp.array(kernel), "bias": jnp.array(bias)}
        for i, (kernel, bias) in enumerate(problem.layers)
    }
    make = natural(as_peer) if name in AS_PEER else OPTIMIZERS[name]
    rate = problem.rates.get(name, setting.learning_rate)
    contender = make(rate, loss_fn, params, problem.batch(0))
    step = jax.jit(contender.step, donate_argnums=(0, 1))
    return Optimizer(
        params,
        lambda params, batch: loss_fn(params, batch).value,
        lambda params, batch: contender.init(params),
        lambda i, *arguments: step(*arguments)[:2],
    )


def logits_of(params: list[dict[str, jax.Array]], x: jax.Array) -> jax.Array:
    """The autoencoder of ``lib/autoencoder.py`` without Flax."""
    for i, layer in enumerate(params):
        x = x @ layer["kernel"] + layer["bias"]
        if i + 1 not in (len(params) // 2, len(params)):
            x = jnp.tanh(x)
    return x


def cross_entropy(logits: jax.Array, images: jax.Array) -> jax.Array:
    return optax.sigmoid_binary_cross_entropy(logits, images).sum(-1).mean()


def plain_loss(params: Any, batch: jax.Array) -> jax.Array:
    return cross_entropy(logits_of(params, batch), batch)


def plain_params(problem: Problem) -> Any:
    return [{"kernel": jnp.array(kernel), "bias": jnp.array(b)} for kernel, b in problem.layers]


def sgd_there(problem: Problem) -> Optimizer:
    """SGD with momentum in the peer's interpreter: what the versions there make of a step."""
    tx = optax.sgd(problem.rates["sgd"], momentum=0.9)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, batch: jax.Array) -> Any:
        updates, state = tx.update(jax.grad(plain_loss)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    return Optimizer(
        plain_params(problem),
        plain_loss,
        lambda params, batch: tx.init(params),
        lambda i, params, state, batch, key: step(params, state, batch),
    )


def kfac_jax(problem: Problem, cholesky: bool = False, adaptive: bool = False) -> Optimizer:
    """The peer: by its default inverse (LU) or Cholesky's, at its fixed or its adaptive setting."""
    import kfac_jax as peer

    def loss(params: Any, batch: jax.Array) -> jax.Array:
        logits = logits_of(params, batch)
        peer.register_sigmoid_cross_entropy_loss(logits, batch)
        return cross_entropy(logits, batch)

    setting = problem.setting
    fixed = {
        "learning_rate_schedule": lambda _: jnp.asarray(setting.learning_rate),
        "momentum_schedule": lambda _: jnp.asarray(setting.momentum),
        "damping_schedule": lambda _: jnp.asarray(setting.damping),
        "norm_constraint": setting.trust_radius,
        "num_burnin_steps": 0,
    }
    peer.utils.set_use_cholesky_inversion(cholesky)  # read when a step is traced
    optimizer = peer.Optimizer(
        jax.value_and_grad(loss),
        l2_reg=0.0,
        curvature_ema=setting.decay,
        inverse_update_period=setting.refresh_period,
        **(ADAPTIVE if adaptive else fixed),
    )

    def step(i: int, params: Any, state: Any, batch: jax.Array, key: jax.Array) -> Any:
        batches = [batch]
        if adaptive and i == 0:  # the burn-in measures batches first, and may overwrite them
            batches = [jnp.copy(batch) for _ in range(ADAPTIVE["num_burnin_steps"])] + batches
        data = iter(batches)
        return optimizer.step(params, state, key, data_iterator=data, global_step_int=i)[:2]

    return Optimizer(
        plain_params(problem),
        plain_loss,
        lambda params, batch: optimizer.init(params, jax.random.key(0), batch),
        step,
        ADAPTIVE["damping_adaptation_interval"] if adaptive else 1,
    )


# K-FAC at the peer's setting, by its inverses: full ones, as the peer has them, or our default's
AS_PEER = {"kfac-as-peer": "cholesky", "kfac-as-peer-low-rank": "low_rank"}
OURS = {name: partial(ours, name) for name in ("sgd", "adam", "kfac", *AS_PEER)}
THEIRS = {
    "sgd-there": sgd_there,
    "kfac-jax": kfac_jax,
    "kfac-jax-cholesky": partial(kfac_jax, cholesky=True),
    "kfac-jax-adaptive": partial(kfac_jax, adaptive=True),
}
