"""A training script that may be killed at any moment.

``python resumable.py FOLDER STEPS`` starts where the checkpoints in FOLDER end, prints
each step, and after the last one a hash of all the bits that it holds.
"""

import hashlib
import sys
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import natgrad_jax as ng


class Net(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(3)(nn.tanh(nn.Dense(5)(x)))


def loss_fn(params: Any, x: jax.Array, y: jax.Array) -> ng.Loss:
    return ng.Categorical(Net().apply({"params": params}, x)).nll(y)


def batch(i: int) -> tuple[jax.Array, jax.Array]:
    random = np.random.default_rng(i)
    x = random.normal(size=(16, 4)).astype(np.float32)
    return jnp.asarray(x), jnp.asarray((x.argmax(-1) % 3).astype(np.int32))


def main(folder: str, steps: int) -> None:
    params = Net().init(jax.random.key(0), batch(0)[0])["params"]
    layers = ng.find_layers(loss_fn, params, *batch(0))
    # all that a state can hold: averages, bases that follow the last ones, moments, turns
    tx = ng.ekfac(
        0.05, layers, statistics_period=2, statistics_fraction=0.5,
        basis="qr", refresh=ng.staggered(3),
    )  # fmt: skip
    grad_fn = ng.value_and_grad(loss_fn, layers)

    @partial(jax.jit, donate_argnums=0)
    def step(state: Any, x: jax.Array, y: jax.Array, key: jax.Array) -> Any:
        params, opt_state = state["params"], state["opt_state"]
        _, grads, statistics = grad_fn(params, x, y, rng=key, opt_state=opt_state)
        updates, opt_state = tx.update(grads, opt_state, params, statistics=statistics)
        return {"params": optax.apply_updates(params, updates), "opt_state": opt_state}

    state, first = {"params": params, "opt_state": tx.init(params)}, 0
    with ocp.CheckpointManager(folder, item_handlers=ocp.StandardCheckpointHandler()) as manager:
        if (last := manager.latest_step()) is not None:
            ng.check_state(manager.item_metadata(last).tree, state)
            state = manager.restore(last, args=ocp.args.StandardRestore(state))
            first = last + 1
        for i in range(first, steps):
            state = step(state, *batch(i), jax.random.key(i))
            manager.save(i, args=ocp.args.StandardSave(state))
            print("step", i, flush=True)
    bits = b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(state))
    print("bits", hashlib.sha256(bits).hexdigest())


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
