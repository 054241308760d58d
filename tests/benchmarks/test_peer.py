"""The comparison with kfac-jax on a tiny problem: what both interpreters say to one another."""

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from lib.autoencoder import ENCODERS
from peer import compare as peer, gauss_newton
from peer.optimizers import OURS, Problem, Setting

import natgrad_jax as ng

pytestmark = pytest.mark.once


@pytest.fixture(autouse=True)
def small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENCODERS, "digits", (64, 16, 4))
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")  # in the workers too


def compare(prefix: Path, *more: str) -> Any:
    peer.main(["--data", "digits", "--batch-size", "50", "--rounds", "1", "--round", "2",
               "--target", "4", "--output", str(prefix), *more])  # fmt: skip
    return json.loads(prefix.with_name(prefix.name + ".json").read_text())


def test_the_other_interpreter_trains_the_same_thing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGD needs no kfac-jax, so any interpreter serves: here this one, without Flax."""
    memory_of = peer.peak_memory  # of one; the others would each compile once more
    monkeypatch.setattr(peer, "peak_memory", lambda worker, name, file: (
        memory_of(worker, name, file) if name == "sgd-there" else 1.0))  # fmt: skip
    found = compare(
        tmp_path / "out", "--peer-python", sys.executable, "--optimizers", "sgd", "sgd-there"
    )
    assert found["agreement"]["loss"] < 1e-5 and found["agreement"]["gradient"] < 1e-5
    rows = {row["optimizer"]: row for row in found["steps"]}
    assert set(rows) == {"sgd", "adam", "sgd-there"} and rows["sgd"]["mean_ratio"] == 1
    assert rows["sgd-there"]["loss"] == pytest.approx(rows["sgd"]["loss"], rel=1e-5)
    assert rows["sgd-there"]["peak_memory_mib"] > 10
    assert all(row["loss"] > 0 and row["mean_ms"] > 0 for row in rows.values())
    assert set(found["step_ratios"]) == {"sgd-there / sgd"}
    (adam,) = found["runs"]
    assert adam["steps"] == [0, 1, 2, 3, 4] and adam["loss"][-1] < adam["loss"][0]
    assert tmp_path.joinpath("out.png").read_bytes().startswith(b"\x89PNG")


def test_without_the_peer_ours_is_measured_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = compare(tmp_path / "out", "--parts", "race", "--optimizers", "kfac", "kfac-jax",
                    "--setting", "damping=0.5", "refresh_period=2")  # fmt: skip
    setting = found["peer_setting"]
    assert (setting["damping"], setting["refresh_period"], setting["momentum"]) == (0.5, 2, 0.9)
    assert "no --peer-python: kfac-jax is left out" in capsys.readouterr().out
    assert [run["optimizer"] for run in found["runs"]] == ["kfac", "adam"]
    assert found["agreement"] is None and "steps" not in found


@pytest.mark.skipif(importlib.util.find_spec("kfac_jax") is not None, reason="kfac-jax is here")
@pytest.mark.parametrize("python, found", [
    (sys.executable, "No module named 'kfac_jax'"), ("no/such/python", "No such file"),
])  # fmt: skip
def test_a_python_without_kfac_jax_is_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], python: str, found: str
) -> None:
    with pytest.raises(SystemExit):
        compare(tmp_path / "out", "--peer-python", python)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"{python}: expected") and found in line


@pytest.mark.skipif("PEER_PYTHON" not in os.environ, reason="PEER_PYTHON: a Python with kfac-jax")
def test_kfac_jax_itself(tmp_path: Path) -> None:
    names = ["kfac-jax", "kfac-jax-cholesky", "kfac-jax-adaptive", "kfac-as-peer"]
    prefix = tmp_path / "out"
    found = compare(prefix, "--peer-python", os.environ["PEER_PYTHON"], "--optimizers", *names)
    assert found["agreement"]["gradient"] < 1e-5 and "kfac-jax" in found["versions_there"]
    assert {row["optimizer"] for row in found["steps"]} == {*names, "sgd", "adam"}
    assert "kfac-as-peer / kfac-jax" in found["step_ratios"]
    assert [run["optimizer"] for run in found["runs"]] == ["adam", *names[::2]]
    assert all(run["loss"][-1] < run["loss"][0] for run in found["runs"])


def test_our_kfac_at_the_peers_setting() -> None:
    """Measures and inverts as it is told, by whole inverses, whatever the defaults are."""
    rng = np.random.default_rng(0)
    images = rng.random((6, 5)).astype(np.float32)
    layers = [(rng.normal(size=(a, b)), np.zeros(b)) for a, b in ((5, 3), (3, 5))]
    order = np.arange(6).reshape(1, 6)
    problem = Problem(images, images, order, {}, Setting(refresh_period=2), layers)
    optimizer = OURS["kfac-as-peer"](problem)
    batch = problem.batch(0)
    params, state = optimizer.params, optimizer.init(optimizer.params, batch)
    seen = []
    for i in range(3):
        params, state = optimizer.step(i, params, state, batch, jax.random.key(i))
        of_layer = (read(state)["Dense_0",].G for read in (ng.factors, ng.bases))
        seen.append([np.array(x) for x in of_layer])  # the next step overwrites its state
        assert seen[-1][1].shape == (3, 3)
    (G0, inverse0), (G1, inverse1), (G2, inverse2) = seen
    assert not np.allclose(G0, G1) and not np.allclose(G1, G2)
    assert np.array_equal(inverse0, inverse1) and not np.array_equal(inverse1, inverse2)


def test_gauss_newton_without_somax(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gauss_newton.main(["--rounds", "1", "--size", "16", "--output", str(tmp_path / "out")])
    assert "exact-ngd" in capsys.readouterr().out
    rows = json.loads((tmp_path / "out.json").read_text())["runs"]
    exact = [row for row in rows if row["optimizer"] == "exact-ngd"]
    assert [row["task"] for row in exact] == ["regression", "digits"]
    assert all(row["loss"] < row["curve"][0] / 2 for row in exact)
