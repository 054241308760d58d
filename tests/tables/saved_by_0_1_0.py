"""States as users of version 0.1.0 saved them, and what that version did next.

``python saved_by_0_1_0.py FOLDER``, with natgrad_jax 0.1.0 installed, made
``tests/data/state_0_1_0``:
``orbax.zip`` (a folder of StandardCheckpointer, less the files that its store leaves unused) and
``states.msgpack.gz`` (Flax's bytes) hold ``{name: {"params": …, "opt_state": …}}`` after
``SAVED_AT`` steps, ``updates.npz`` the updates of the steps after that. They are not to be made
again: they stand for what users have on their disks.
"""

import gzip
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.flatten_util import ravel_pytree

import natgrad_jax as ng

SAVED_AT, AFTER = 3, 2  # steps
EXAMPLES, CHANNELS, CLASSES = 8, 4, 3


class OwnNorm(nn.LayerNorm):
    """Of no type that the library knows: its parameters are left over."""


class Repeated(nn.Module):
    """What a scan stacks."""

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return nn.tanh(nn.Dense(CHANNELS + 2)(x)), None


class Net(nn.Module):
    """A convolution in groups, a norm, a scan, a wide layer, and a parameter that is left over.

    ``heads``: outputs, one likelihood each.
    """

    heads: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, wide: jax.Array) -> Any:
        conv = nn.Conv(CHANNELS, (2, 2), feature_group_count=2, padding="VALID", name="conv")
        x = nn.Conv(CHANNELS, (1, 1), name="pointwise")(nn.tanh(conv(x)))
        x = nn.LayerNorm(name="norm")(x.mean((1, 2)))
        x = jnp.concatenate([x, nn.Dense(2, use_bias=False, name="wide")(wide)], -1)
        x = OwnNorm(use_bias=False, name="own")(x)
        stacked = {"length": 2, "variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        x, _ = nn.scan(Repeated, **stacked)(name="stack")(x, None)
        out = tuple(nn.Dense(CLASSES, name=f"head_{i}")(x) for i in range(self.heads))
        return out[0] if self.heads == 1 else out


class Batch(NamedTuple):
    x: jax.Array
    wide: jax.Array
    y: jax.Array


def batch(seed: int, width: int) -> Batch:
    """Few of the wide layer's inputs are ever on, so that files are small."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(EXAMPLES, 3, 3, CHANNELS)).astype(np.float32)
    wide = np.zeros((EXAMPLES, width), np.float32)
    wide[:, ::12] = random.normal(size=wide[:, ::12].shape)
    y = (10 * x.sum((1, 2, 3)) % CLASSES).astype(np.int32)
    return Batch(*map(jnp.asarray, (x, wide, y)))


class Saved(NamedTuple):
    """``make(layers, loss_fn)``: the transformation. ``width``: inputs of the wide layer."""

    make: Callable[[ng.Layers, Any], optax.GradientTransformation]
    width: int = 20
    heads: int = 1


def _kfac_in_part(layers: ng.Layers, _: Any) -> Any:
    labels = lambda params: {x: "adam" if x in ("wide", "own") else "kfac" for x in params}
    return optax.partition({"kfac": _kfac(layers), "adam": optax.adam(0.01)}, labels)


# 2e-3 and 0.8: the defaults of 0.1.0
def _kfac(layers: ng.Layers, **kwargs: Any) -> Any:
    usual = {"statistics_period": 2, "refresh_period": 2, "rank": 8, "trust_radius": 2e-3}
    return ng.kfac(0.1, layers, **usual | {"decay": 0.8} | kwargs)


def _ekfac(layers: ng.Layers, **kwargs: Any) -> Any:
    usual = {"statistics_period": 1, "refresh_period": 2, "rank": 8, "trust_radius": 2e-3}
    return ng.ekfac(0.1, layers, **usual | kwargs)


TABLE = {
    "kfac": Saved(lambda layers, _: _kfac(layers), width=132),
    "kfac, groups": Saved(
        lambda layers, _: _kfac(
            layers, convolution="sua", group_size=2, weight_sharing="reduce", weight_decay=1e-3,
            trust_radius=1e-2,
        )
    ),
    "kfac, masked": Saved(_kfac_in_part),
    "kfac, two terms": Saved(lambda layers, _: _kfac(layers), heads=2),
    "ekfac": Saved(lambda layers, _: _ekfac(layers), width=132),
    "ekfac, running average": Saved(lambda layers, _: _ekfac(layers, moments="running_average")),
    "ekfac, two terms": Saved(lambda layers, _: _ekfac(layers), heads=2),
    "ngd": Saved(lambda layers, _: ng.ngd(0.5, layers)),
    "prong": Saved(
        lambda layers, _: ng.prong(0.1, layers, rank=2, statistics_period=2, refresh_period=2)
    ),
    "in_coordinates": Saved(
        lambda layers, _: ng.in_coordinates(
            optax.adam(0.01, eps=1e-3), layers, coordinates="both_sides", statistics_period=1,
            refresh_period=2,
        )
    ),
    "adaptive_kfac": Saved(lambda layers, loss_fn: ng.adaptive_kfac(layers, loss_fn, rank=8)),
    "adaptive_damping": Saved(
        lambda layers, loss_fn: ng.adaptive_damping(
            lambda damping: _ekfac(layers, damping=damping), ng.levenberg_marquardt(2), loss_fn
        )
    ),
}  # fmt: skip


class Setting(NamedTuple):
    """``step(params, state, i)`` → updates and state."""

    tx: optax.GradientTransformationExtraArgs
    params: Any
    step: Callable[[Any, Any, int], Any]


def setting(name: str) -> Setting:
    """A row of the table, and parameters to start from."""
    make, width, heads = TABLE[name]
    net, first = Net(heads), batch(0, width)

    def loss_fn(params: Any, batch: Batch) -> ng.Loss:
        out = net.apply({"params": params}, batch.x, batch.wide)
        if heads == 1:
            return ng.Categorical(out).nll(batch.y)
        return ng.Categorical(out[0]).nll(batch.y) + ng.Gaussian(out[1]).nll(batch.x[:, 0, 0, 1:])

    shapes = jax.eval_shape(net.init, jax.random.key(0), first.x, first.wide)["params"]
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda s: jnp.asarray(random.normal(size=s.shape) / 2, s.dtype), shapes)
    # a norm of the user's own was left over in 0.1.0
    layers = ng.find_layers(loss_fn, params, first, blocks={"own": "diagonal"})
    tx = optax.with_extra_args_support(make(layers, loss_fn))
    # by all labels: nothing that depends on how a version draws some
    grad_fn = ng.value_and_grad(loss_fn, layers, fisher="exact")

    @jax.jit
    def step(params: Any, state: Any, batch: Batch, key: Any) -> Any:
        loss, grads, statistics = grad_fn(params, batch, rng=key, opt_state=state)
        return tx.update(
            grads, state, params, statistics=statistics, value=loss, grad=grads, args=(batch,),
            value_fn=lambda params: loss_fn(params, batch).value,
        )  # fmt: skip

    def numbered(params: Any, state: Any, i: int) -> Any:
        return step(params, state, batch(i, width), jax.random.key(i))

    return Setting(tx, params, numbered)


def go_on(s: Setting, params: Any, state: Any, steps: range) -> tuple[Any, Any, list[np.ndarray]]:
    """Parameters and state after those steps, and the updates of each in a row."""
    found = []
    for i in steps:
        updates, state = s.step(params, state, i)
        params = optax.apply_updates(params, updates)
        found.append(np.asarray(ravel_pytree(updates)[0]))
    return params, state, found


def main(folder: Path) -> None:
    saved, updates = {}, {}
    for name in TABLE:
        s = setting(name)
        params, state, _ = go_on(s, s.params, s.tx.init(s.params), range(SAVED_AT))
        saved[name] = {"params": params, "opt_state": state}
        updates[name] = go_on(s, params, state, range(SAVED_AT, SAVED_AT + AFTER))[2]
    with tempfile.TemporaryDirectory() as made:
        with ocp.StandardCheckpointer() as to:
            to.save(Path(made) / "orbax", saved)
        shutil.make_archive(str(folder / "orbax"), "zip", Path(made) / "orbax")
    with gzip.GzipFile(folder / "states.msgpack.gz", "wb", mtime=0) as file:
        file.write(flax.serialization.to_bytes(saved))
    np.savez_compressed(folder / "updates.npz", **updates)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
