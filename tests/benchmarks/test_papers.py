"""The papers' experiments run, on a few steps, and write what they say; nothing asserts a time."""

import json
from pathlib import Path
from typing import Any

import pytest
from lib.autoencoder import ENCODERS
from papers import (
    deep_linear,
    kfc_cifar,
    prong_autoencoder as prong,
    prong_cifar,
    prong_conditioning as conditioning,
)
from races import tuning
from speed import inverses

pytestmark = pytest.mark.once


def numbers(prefix: Path) -> Any:
    assert prefix.with_name(prefix.name + ".png").read_bytes().startswith(b"\x89PNG")
    return json.loads(prefix.with_name(prefix.name + ".json").read_text())


def test_conditioning(tmp_path: Path) -> None:
    prefix = tmp_path / "conditioning"
    conditioning.main(
        ["--steps", "10", "--points", "2", "--examples", "60", "--output", str(prefix)]
    )
    found = numbers(prefix)
    assert found["fall"] > 0.8 and set(found["curves"]) == {*conditioning.RATES}
    assert found["curves"]["prong"]["condition"][0] < found["curves"]["sgd"]["condition"][0]


def test_autoencoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENCODERS, "digits", (64, 12, 4))
    one_rate = {name: method._replace(rates=(1e-3,)) for name, method in prong.METHODS.items()}
    monkeypatch.setattr(prong, "METHODS", one_rate)
    prefix = tmp_path / "autoencoder"
    args = ["--updates", "4", "--search", "2", "--batch-size", "50", "--output", str(prefix)]
    prong.main(args)
    found = numbers(prefix)
    assert [run["optimizer"] for run in found["runs"]] == [*prong.METHODS]
    assert all(run["loss"][-1] < run["loss"][0] for run in found["runs"])
    assert abs(found["reparametrization_share"]) < 1


@pytest.mark.parametrize(
    "script, names", [(prong_cifar, ("batch norm", "prong")), (kfc_cifar, ("groups",))]
)
def test_cifar(
    script: Any, names: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = {name: script.METHODS[name]._replace(rates=(0.01,)) for name in names}
    monkeypatch.setattr(script, "METHODS", methods)
    prefix = tmp_path / "cifar"
    script.main(["--data", "digits", "--updates", "12", "--search", "2", "--evaluations", "2",
                 "--batch-size", "100", "--width", "4", "--trust-radius", "1e-3",
                 "--output", str(prefix)])  # fmt: skip
    curves = numbers(prefix)["curves"]
    assert set(curves) == {*names}
    for curve in curves.values():
        assert curve["updates"] == [6, 12] and 0 < curve["test_error"][-1] < 1
        assert curve["train_loss"][-1] < curve["train_loss"][0]


def test_deep_linear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(deep_linear.NETWORKS, "A", (4, 5, 6, 4))
    monkeypatch.setattr(deep_linear, "RATES", (0.02,))
    prefix = tmp_path / "linear"
    deep_linear.main(
        ["--networks", "A", "--steps", "30", "--passes", "6", "--examples", "400",
         "--batch-size", "100", "--output", str(prefix)]
    )  # fmt: skip
    result = numbers(prefix)["networks"]["A"]
    assert abs(result["exact"]["slope_over_theory"] - 1) < 0.02
    assert result["batches"]["ngd"]["loss"][-1] < result["batches"]["sgd"]["loss"][-1]


def test_inverses(tmp_path: Path) -> None:
    inverses.main(["--sizes", "32", "--repetitions", "1", "--output", str(tmp_path / "inverses")])
    found = json.loads((tmp_path / "inverses.json").read_text())["summary"]
    errors = {row["way"]: row["error"] for row in found}
    assert all(errors[way] < 1e-3 for way in ("cholesky", "eigh", "woodbury", "sherman-morrison"))
    assert errors["low rank"] < 0.7


def test_tuning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENCODERS, "digits", (64, 12, 4))
    monkeypatch.setitem(tuning.SQUARED, "digits", (64, 8))
    monkeypatch.setattr(tuning, "GRIDS", {"sgd": (0.01,), "adam": (1e-3,), "nag": (0.005,)})
    prefix = tmp_path / "tuning"
    tuning.main(["--passes", "2", "--batch-size", "100", "--stages", "2", "--steps", "4",
                 "--baseline-steps", "4", "--recovery-steps", "4",
                 "--output", str(prefix)])  # fmt: skip
    runs = numbers(prefix)["experiments"]
    assert len(runs) == 11
    for name, run in runs.items():
        assert run["loss"][-1] <= run["loss"][0], name
