"""The script that reads compiled programs, on the smallest of its models."""

import json
from pathlib import Path

import pytest
from speed import program

pytestmark = pytest.mark.once


def test_it_tells_what_is_due_apart(tmp_path: Path) -> None:
    given = ["--models", "bag", "--batch-size", "8", "--optimizers", "kfac"]
    program.main([*given, "--output", str(tmp_path / "x")])
    found = json.loads((tmp_path / "x.json").read_text())["models"]["bag"]["optimizers"]
    steps = found["kfac"]["steps"]
    kinds = [steps[kind] for kind in ("ordinary", "measuring", "refreshing")]
    assert all(step["branches"] == 0 for step in kinds)
    assert kinds[0]["operations"] < min(step["operations"] for step in kinds[1:])
    assert found["kfac"]["statistics"] < found["kfac"]["state"] < found["adam"]["state"]
