"""States that version 0.1.0 saved come back, and go on as they would have there."""

import functools
import gzip
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from leftover import setting as setting_of_optax
from saved_by_0_1_0 import AFTER, SAVED_AT, TABLE, Setting, go_on, setting as make_setting
from saving import assert_same_bits, manager, save, scrambled
from transformations import TABLE as TABLE_OF_NOW, setting as setting_of_table, setting_nnx

import natgrad_jax as ng
from natgrad_jax.state import checkpoints, named_leaves
from natgrad_jax.utils import tree_paths

# what made the states is written as 0.1.0 had it
pytestmark = [pytest.mark.once, pytest.mark.filterwarnings("ignore:.*old keywords")]

DATA = Path(__file__).parents[1] / "data/state_0_1_0"

setting: Callable[[str], Setting] = functools.cache(make_setting)


def fresh(name: str) -> dict[str, Any]:
    """Before any step."""
    s = setting(name)
    return {"params": s.params, "opt_state": s.tx.init(s.params)}


@functools.cache
def from_bytes() -> Any:
    return flax.serialization.msgpack_restore(
        gzip.decompress((DATA / "states.msgpack.gz").read_bytes())
    )


@pytest.fixture(scope="session")
def from_orbax(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("state_0_1_0")
    shutil.unpack_archive(DATA / "orbax.zip", folder)
    with ocp.StandardCheckpointer() as of:
        return of.restore(folder)


@pytest.mark.parametrize("name", TABLE)
def test_a_state_of_0_1_0_goes_on_as_there(name: str, from_orbax: Any) -> None:
    start, updates = fresh(name), np.load(DATA / "updates.npz")[name]
    restored = ng.restore_state(from_bytes()[name], start)
    assert jax.tree.structure(restored) == jax.tree.structure(start)
    assert_same_bits(ng.restore_state(from_orbax[name], start), restored)
    steps = range(SAVED_AT, SAVED_AT + AFTER)
    _, _, found = go_on(setting(name), restored["params"], restored["opt_state"], steps)
    for now, then in zip(found, updates, strict=True):
        # Adam, in coordinates, divides by what is almost zero
        accuracy = 1e-3 if name == "in_coordinates" else 3e-5
        np.testing.assert_allclose(now, then, rtol=0, atol=accuracy * np.abs(then).max())


def test_terms_share_what_0_1_0_kept_for_all() -> None:
    """Curvature is what it was, whichever terms a layer depends on."""
    saved, start = from_bytes()["ekfac, two terms"], fresh("ekfac, two terms")
    then, now = saved["opt_state"]["0"], ng.restore_state(saved, start)["opt_state"][0]
    assert now.clock.statistics_due.shape == now.examples.shape == (2,)
    for path in now.factors:
        factors, old = now.factors[path], then["factors"][str(path)]
        np.testing.assert_array_equal(factors.A, old["A"])
        np.testing.assert_array_equal(now.weights[path], then["weights"][str(path)])
        moments = now.moments[path]
        if "head" in path[0]:  # of one term
            np.testing.assert_array_equal(moments, then["moments"][str(path)])
            continue
        key = "A" if factors.G is None else "G"
        np.testing.assert_allclose(getattr(factors.shares, key).sum(0), old[key])
        for weight in factors.weights:
            np.testing.assert_array_equal(weight, then["weights"][str(path)])
        if factors.G is not None:
            np.testing.assert_allclose(moments.sum(0), then["moments"][str(path)])


# ------------------------------------------------------------------------------ states of now


@pytest.mark.parametrize("name", TABLE_OF_NOW)
def test_every_state_of_now_comes_back(name: str) -> None:
    own = setting_of_table()
    start = TABLE_OF_NOW[name].make(own).init(own.params)
    state = scrambled(start)
    data = flax.serialization.to_bytes(state)
    assert_same_bits(ng.restore_state(flax.serialization.msgpack_restore(data), start), state)


def test_states_of_flax_and_of_nnx_come_back(tmp_path: Path) -> None:
    params, layers, _ = setting_of_optax()
    tx, key = ng.kfac(0.1, layers), jax.random.key(3)
    start = {"train": ng.TrainState.create(apply_fn=None, params=params, tx=tx), "key": key}
    state = {"train": start["train"].replace(step=7), "key": jax.random.key(4)}
    s = setting_nnx()
    optimizer = nnx.Optimizer(s.params, ng.kfac(0.1, s.layers), wrt=nnx.Param)
    start["nnx"], state["nnx"] = nnx.state(optimizer), scrambled(nnx.state(optimizer))
    save(tmp_path, state)
    with manager(tmp_path) as of:  # as docs/checkpoints.md says
        restored = ng.restore_state(of.restore(0, args=ocp.args.StandardRestore()), start)
    raw = lambda tree: jax.tree.map(named_leaves.raw, tree)
    assert restored["train"].step == 7 and isinstance(restored["nnx"], nnx.State)
    restored["train"], state["train"] = restored["train"].params, state["train"].params
    assert_same_bits(raw(restored), raw(state))


def test_restored_arrays_are_where_the_fresh_ones_are() -> None:
    saved = {"x": np.arange(8.0, dtype=np.float32), "key": np.zeros(2, np.uint32)}
    mesh = jax.make_mesh((4,), ("data",), (jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    start = {"x": jax.device_put(jnp.zeros(8), split), "key": jax.random.key(1)}
    restored = ng.restore_state(saved, start)
    assert restored["x"].sharding == split and not restored["key"].committed
    again = ng.restore_state(restored, {**start, "x": jnp.zeros(8)})
    assert not again["x"].committed
    jax.jit(lambda x: 2 * x, donate_argnums=0)(ng.restore_state(restored, start)["x"])
    np.testing.assert_array_equal(restored["x"], saved["x"])


# --------------------------------------------------------------------------------- what is not


def refused(saved: Any, start: Any, *parts: str) -> None:
    with pytest.raises(ValueError) as error:
        ng.restore_state(saved, start)
    assert all(part in str(error.value) for part in parts), error.value


def at(tree: Any, *keys: str) -> Any:
    return functools.reduce(lambda x, key: x[key], keys, tree)


def changed(*keys: str, to: Any = None) -> Any:
    """The saved state of "kfac" with another value there; without one for None."""
    saved = jax.tree.map(lambda x: x, from_bytes()["kfac"])
    at(saved, *keys[:-1]).pop(keys[-1])
    if to is not None:
        at(saved, *keys[:-1])[keys[-1]] = to
    return saved


OURS = ("opt_state", "0")


@pytest.mark.parametrize(
    ("saved", "parts"),
    [
        (
            lambda: from_bytes()["kfac, two terms"],
            [
                "opt_state/0/factors/('wide',)/A: saved as float32 of shape (20, 20), now float32 "
                "of shape (132, 132)",
                "('head_1',)/A: saved, and not there now",
                "; and 8 more. Make the model and the transformation as in the run that saved it",
            ],
        ),
        (
            lambda: from_bytes()["ngd"],
            ["request/stride=None: not in what was saved, now requested", "and 15 more"],
        ),
        (lambda: {}, ["not in what was saved", "start from tx.init"]),
        (
            lambda: changed(*OURS, "factors", "('wide',)", "A"),
            ["opt_state/0/factors/('wide',)/A: not in what was saved, now float32", "(132, 132)"],
        ),
        (
            lambda: changed(*OURS, "clock", "step", to=np.zeros(3, np.int32)),
            ["opt_state/0/clock/step: saved as int32 of shape (3,), now int32 of shape ()"],
        ),
        (
            lambda: changed(*OURS, "damping", to=np.float64(0.1)),
            ["opt_state/0/damping: saved as float64 of shape (), now float32 of shape ()"],
        ),
        (
            lambda: changed(*OURS, "clock", "step", to=2.5),
            ["opt_state/0/clock/step: saved as float of shape (), now int32"],
        ),
        (
            lambda: changed(*OURS, "request", to={"stride=2": {}}),
            ["request/stride=None: not in what was", "request/stride=2: saved, and not there now"],
        ),
        (
            lambda: changed(*OURS, "damping", to={}),
            ["opt_state/0/damping: not in what was saved, now float32 of shape ()"],
        ),
        (
            lambda: changed(*OURS, "weights", "('wide',)", to=np.full((), np.nan, np.float32)),
            ["non-finite numbers in opt_state/0/weights/('wide',). Restore an earlier checkpoint"],
        ),
        (
            lambda: changed("params", "wide", "kernel", to=np.full((132, 2), np.inf, np.float32)),
            ["non-finite numbers in params/wide/kernel"],
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(saved: Callable[[], Any], parts: list[str]) -> None:
    refused(saved(), fresh("kfac"), *parts)


def test_no_arrays_and_no_names_are_refused() -> None:
    saved, start = from_bytes()["kfac"], fresh("kfac")
    with pytest.raises(TypeError, match=r"state holds no array at opt_state/0/.*ShapeDtypeStruct"):
        ng.restore_state(saved, jax.eval_shape(lambda: start))
    with pytest.raises(TypeError, match=r"saved holds no array at .*Give it the arrays that were"):
        ng.restore_state(jax.eval_shape(lambda: start), start)
    x = np.zeros(())
    with pytest.raises(ValueError, match=r"two values have one path: a/b\. Rename"):
        ng.restore_state({"a/b": x, "a": {"b": x}}, start)


def test_nothing_stands_in_for_what_a_state_of_now_lacks() -> None:
    """Averages of several terms are made of others only in a state that knew no terms."""
    start = fresh("kfac, two terms")
    saved = flax.serialization.to_state_dict(start)
    saved["opt_state"]["0"]["factors"]["('wide',)"].pop("shares")
    refused(saved, start, "factors/('wide',)/shares/G: not in what was saved")


def test_what_is_not_in_our_states_gets_no_terms() -> None:
    start, saved = fresh("kfac, two terms"), dict(from_bytes()["kfac, two terms"])
    x = np.zeros(3, np.float32)
    refused(saved | {"weights": x}, start | {"weights": jnp.zeros((2, 3))}, "weights: saved as")


def test_a_mask_takes_away_only_layers() -> None:
    start = fresh("kfac, masked")
    saved = jax.tree.map(lambda x: x, from_bytes()["kfac, masked"])
    at(saved, "opt_state", "inner_states", "kfac", "inner_state", "0")["drift"] = np.zeros(())
    refused(saved, start, "inner_state/0/drift: saved, and not there now")


def test_a_line_for_each_renaming(monkeypatch: pytest.MonkeyPatch) -> None:
    """What later versions will do: fields renamed twice, added, removed; words of a request too."""
    params, layers, _ = setting_of_optax()
    state = ng.scale_by_kfac(layers, statistics_fraction=0.5).init(params)
    saved = flax.serialization.to_state_dict(scrambled(state))
    saved["time"] = {"step": saved["clock"]["step"], "ready": saved["clock"]["statistics_due"]}
    saved["request"] = {"thinned=2": {}}
    saved["drift"] = np.zeros(3)
    del saved["clock"], saved["rejected"]
    refused(saved, state, "clock/step: not in what was saved", "drift: saved, and not there now")
    lines = (
        (r"/time/", "/watch/"),
        (r"/watch/ready$", "/watch/statistics_due"),
        (r"/watch/", "/clock/"),
        (r"/request/thinned=", "/request/stride="),
    )
    monkeypatch.setattr(checkpoints, "RENAMED", lines)
    monkeypatch.setattr(checkpoints, "ADDED", frozenset(["rejected"]))
    monkeypatch.setattr(checkpoints, "REMOVED", frozenset(["drift"]))
    restored = ng.restore_state({"optimizer": saved}, {"optimizer": state})["optimizer"]
    assert_same_bits(restored, scrambled(state)._replace(rejected=state.rejected))


def test_a_renaming_leaves_alone_what_has_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "RENAMED", ((r"/step$", "/count"),))
    state = optax.ScaleByScheduleState(count=jnp.zeros(())), {"step": jnp.zeros(())}
    saved = [{"step": np.ones((), np.float32)}, {"step": np.ones((), np.float32)}]
    restored = ng.restore_state(saved, state)
    assert tree_paths.leaves(restored) == {("0", "count"): 1, ("1", "step"): 1}
