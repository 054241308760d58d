"""States come back from checkpoints: whole, onto other devices, after a kill, or not at all."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import resumable
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from leftover import HIDDEN, setting, training_step
from saving import assert_same_bits, restore, save, scrambled
from transformations import TABLE, setting as setting_of_table

import natgrad_jax as ng

STEPS = 12


@pytest.mark.parametrize("name", TABLE)
def test_every_state_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    own = setting_of_table()
    fresh = TABLE[name].make(own).init(own.params)
    state = scrambled(fresh)
    save(tmp_path, state)
    assert_same_bits(restore(tmp_path, fresh), state)


def test_a_state_of_four_devices_goes_on_on_one_and_on_two(tmp_path: Path) -> None:
    params, layers, grad_fn = setting()
    x, y = jnp.ones((8, 4)), jnp.arange(8) % 3
    tx = ng.ekfac(0.1, layers, statistics_period=10)
    step = training_step(tx, grad_fn)

    def placed(devices: int, tree: Any, *spec: str) -> Any:
        own = jax.devices()[:devices]
        mesh = jax.make_mesh((devices,), ("data",), (AxisType.Auto,), devices=own)
        return jax.device_put(tree, NamedSharding(mesh, P(*spec)))

    def go_on(state: Any, devices: int) -> Any:
        return step(*state, *placed(devices, (x, y), "data"), placed(devices, jax.random.key(1)))

    start = placed(4, (params, tx.init(params)))
    state = go_on(start, 4)[:2]
    save(tmp_path, state)
    expected = go_on(state, 4)
    for devices in (1, 2):
        restored = restore(tmp_path, placed(devices, (params, tx.init(params))))
        assert_same_bits(restored, state)
        assert all(len(leaf.devices()) == devices for leaf in jax.tree.leaves(restored))
        for a, b in zip(*map(jax.tree.leaves, (go_on(restored, devices), expected)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def without(state: Any, field: str) -> Any:
    return {name: x for name, x in state._asdict().items() if name != field}


def test_a_state_of_something_else_is_refused_by_name(tmp_path: Path) -> None:
    params, layers, _ = setting()
    fresh = ng.scale_by_kfac(layers).init(params)
    save(tmp_path / "older", {"opt_state": without(fresh, "rejected")})
    with pytest.raises(ValueError, match="opt_state/rejected: not in what was saved"):
        restore(tmp_path / "older", {"opt_state": fresh})
    save(tmp_path / "newer", {"opt_state": {**fresh._asdict(), "drift": jnp.zeros(())}})
    with pytest.raises(ValueError, match="opt_state/drift: saved, and not there now"):
        restore(tmp_path / "newer", {"opt_state": fresh})
    save(tmp_path / "now", {"opt_state": fresh})
    fewer = ng.scale_by_kfac(layers.select(lambda path, layer: path == HIDDEN)).init(params)
    with pytest.raises(ValueError, match=r"opt_state/bases/\('head',\)/A: saved, and not there"):
        restore(tmp_path / "now", {"opt_state": fewer})
    in_groups = ng.scale_by_kfac(layers, approximation=ng.Approximation(group_size=2)).init(params)
    with pytest.raises(ValueError, match=r"\('hidden',\)/A: saved with shape \(5, 5\), now"):
        restore(tmp_path / "now", {"opt_state": in_groups})
    thinned = ng.scale_by_kfac(layers, statistics_fraction=0.5).init(params)
    with pytest.raises(ValueError, match="opt_state/request/stride=2: not in what was saved"):
        restore(tmp_path / "now", {"opt_state": thinned})


def command(folder: Path) -> list[str]:
    return [sys.executable, resumable.__file__, str(folder), str(STEPS)]


def bits(folder: Path) -> tuple[str, int]:
    """What a run ends with, and how many steps it took."""
    run = subprocess.run(command(folder), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    *steps, last = run.stdout.splitlines()
    assert last.startswith("bits ")
    return last, len(steps)


def test_killed_and_resumed_ends_with_the_same_bits(tmp_path: Path) -> None:
    """Two whole runs end alike, and so does one that was killed twice, amid whatever it did."""
    whole, taken = bits(tmp_path / "whole")
    assert taken == STEPS
    assert bits(tmp_path / "again") == (whole, STEPS)
    for at in (2, 6):
        with subprocess.Popen(
            command(tmp_path / "killed"), stdout=subprocess.PIPE, text=True
        ) as run:
            assert run.stdout is not None
            while f"step {at}\n" != run.stdout.readline():
                assert run.poll() is None
            time.sleep(random.random() / 50)  # a checkpoint is being written
            run.kill()
        assert run.returncode == -signal.SIGKILL
    resumed, taken = bits(tmp_path / "killed")
    assert 1 <= taken < STEPS
    assert resumed == whole
