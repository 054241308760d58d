"""States to disk and back, as users do it with orbax."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

import natgrad_jax as ng


def manager(folder: Path) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(folder, item_handlers=ocp.StandardCheckpointHandler())


def save(folder: Path, state: Any) -> None:
    with manager(folder) as to:
        to.save(0, args=ocp.args.StandardSave(state))


def restore(folder: Path, state: Any) -> Any:
    """What docs/checkpoints.md tells users to do."""
    with manager(folder) as of:
        ng.check_state(of.item_metadata(0).tree, state)
        return of.restore(0, args=ocp.args.StandardRestore(state))


def assert_same_bits(actual: Any, desired: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(desired)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def scrambled(state: Any) -> Any:
    """Other numbers in every array of a state."""
    rng = np.random.default_rng(0)
    other = lambda x: jnp.asarray((rng.normal(size=x.shape) * 9).astype(x.dtype))
    return jax.tree.map(other, state)
