"""The benchmark script runs and says what it should; nothing here asserts a time."""

import json
from pathlib import Path

import pytest
import step_time

pytestmark = pytest.mark.once


def test_step_time_writes_ratios(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_time, "STEPS_A_ROUND", 2)
    monkeypatch.setattr(step_time, "peak_memory", lambda *_: 1.0)
    prefix = tmp_path / "out"
    step_time.main(
        ["--data", "digits", "--batch-sizes", "8", "--rounds", "1", "--output", str(prefix)]
    )
    found = json.loads(prefix.with_name("out.json").read_text())
    rows = {row["optimizer"]: row for row in found["batches"]["8"]}
    assert set(rows) == {"sgd", "adam", "kfac"}
    assert rows["sgd"]["mean_ratio"] == 1
    assert all(row["loss"] > 0 for row in rows.values())
