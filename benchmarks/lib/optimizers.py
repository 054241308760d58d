"""The optimizers that the benchmarks compare: a new one is one line in ``OPTIMIZERS``.

An entry takes a learning rate, a loss function, parameters and a batch (to look at, not to train
on), and gives a :class:`Contender`: how to start, and one step.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import optax

import natgrad_jax as ng


class Contender(NamedTuple):
    """An optimizer bound to a loss, as two pure functions."""

    init: Callable[[Any], Any]  # params -> opt_state
    step: Callable[..., tuple[Any, Any, jax.Array]]  # params, opt_state, batch, key -> …, loss


def first_order(alias: Callable) -> Callable[..., Contender]:
    """A contender from a plain optax alias, learning rate first."""

    def make(learning_rate, loss_fn, params, batch):
        del params, batch
        tx = alias(learning_rate)
        grad_fn = jax.value_and_grad(lambda params, batch: loss_fn(params, batch).value)

        def step(params, opt_state, batch, key):
            del key
            loss, grads = grad_fn(params, batch)
            updates, opt_state = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, loss

        return Contender(tx.init, step)

    return make


def natural(alias: Callable, fisher: str = "mc") -> Callable[..., Contender]:
    """A contender from an alias of this library: learning rate, then layers."""

    def make(learning_rate, loss_fn, params, batch):
        layers = ng.find_layers(loss_fn, params, batch)
        tx = alias(learning_rate, layers)
        grad_fn = ng.value_and_grad(loss_fn, layers, fisher=fisher)

        def step(params, opt_state, batch, key):
            loss, grads, statistics = grad_fn(params, batch, rng=key, opt_state=opt_state)
            updates, opt_state = tx.update(grads, opt_state, params, statistics=statistics)
            # A Loss also carries its distributions: only the scalar leaves the step.
            return optax.apply_updates(params, updates), opt_state, getattr(loss, "value", loss)

        return Contender(tx.init, step)

    return make


OPTIMIZERS = {
    "kfac": natural(lambda learning_rate, layers: ng.kfac(learning_rate, layers)),
    "kfac-at-once": natural(partial(ng.kfac, refresh="every", statistics_fraction=1.0)),
    "kfac-wide": natural(partial(ng.kfac, trust_radius=1e-2)),  # what its docstring tells for these
    "kfac-exact": natural(partial(ng.kfac, inverse="cholesky")),
    "kfac-full": natural(partial(ng.kfac, inverse="cholesky", statistics_period=1, decay=0.95)),
    "ekfac": natural(lambda learning_rate, layers: ng.ekfac(learning_rate, layers)),
    "ekfac-whole": natural(partial(ng.ekfac, basis="eigh")),
    "sgd": first_order(lambda learning_rate: optax.sgd(learning_rate, momentum=0.9)),
    "adam": first_order(optax.adam),
}

# Lowest training loss after the default number of steps of race.py, seed 0, constant rate, over
#   digits   sgd 0.01 0.02 [0.03] 0.05 0.1         adam 1e-3 2e-3 3e-3 [5e-3] 1e-2
#   mnist    sgd 0.001 0.003 [0.005] 0.01          adam 5e-4 [1e-3] 2e-3 3e-3
#   cifar10  sgd [3e-4] 1e-3                       adam 1e-4 [3e-4] 1e-3
# fashion has mnist's shapes and takes its rates. SGD's next larger rate is unstable in each.
FIRST_ORDER = {
    "digits": {"sgd": 0.03, "adam": 5e-3},
    "mnist": {"sgd": 5e-3, "adam": 1e-3},
    "fashion": {"sgd": 5e-3, "adam": 1e-3},
    "cifar10": {"sgd": 3e-4, "adam": 3e-4},
}
# Natural gradients are not tuned.
LEARNING_RATES = {
    name: {key: rates.get(key, 0.1) for key in OPTIMIZERS} for name, rates in FIRST_ORDER.items()
}
