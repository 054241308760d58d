"""The benchmark script runs and says what it should; nothing here asserts a time."""

import json
import os
from pathlib import Path

import pytest
from lib import report
from rich.console import Console
from speed import step_time

pytestmark = pytest.mark.once


def test_step_time_writes_ratios(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    monkeypatch.setattr(step_time, "STEPS_A_ROUND", 2)
    monkeypatch.setattr(step_time, "peak_memory", lambda *_: 1.0)
    prefix = tmp_path / "out"
    step_time.main(
        ["--model", "digits", "--batch-sizes", "8", "--rounds", "1", "--output", str(prefix)]
    )
    found = json.loads(prefix.with_name("out.json").read_text())
    rows = {row["optimizer"]: row for row in found["batches"]["8"]}
    assert set(rows) == {"sgd", "adam", "kfac"}
    assert rows["sgd"]["mean_ratio"] == 1
    assert all(row["loss"] > 0 for row in rows.values())
    assert found["machine"]["environment"]["OPENBLAS_NUM_THREADS"] == "1"
    assert " OPENBLAS_NUM_THREADS=1" in capsys.readouterr().out.splitlines()[-1]


def test_variables_that_decide_speed_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        os, "environ", {"HOME": "/", "XLA_FLAGS": "--a [b]", "MKL_NUM_THREADS": "2"}
    )
    assert report.variables() == {"MKL_NUM_THREADS": "2", "XLA_FLAGS": "--a [b]"}
    report.tell_files(Console(), Path("a.json"), Path("a.png"))
    monkeypatch.setattr(os, "environ", {"HOME": "/"})
    report.tell_files(Console(), Path("a.json"))
    first, on_first, _, on_second = capsys.readouterr().out.splitlines()
    assert first == "written: a.json a.png"
    assert on_first.startswith("measured on ") and " cores, " in on_first
    assert on_first.endswith("; MKL_NUM_THREADS=2 XLA_FLAGS=--a [b]")
    assert on_second.endswith("; no variables set")
    assert report.describe_machine()["environment"] == "no variables set"


def test_every_benchmark_ends_by_telling_them() -> None:
    """By the one line that names the files, and nowhere on its own."""
    scripts = Path(report.__file__).parents[1].rglob("*.py")
    assert {s.name for s in scripts if '"written: ' in s.read_text()} == {"report.py"}
