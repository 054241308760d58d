"""The script that measures compiling, on one block."""

import json
from pathlib import Path

import pytest
from speed import compiling

pytestmark = pytest.mark.once


def test_it_writes_ratios_to_adam(tmp_path: Path) -> None:
    compiling.main(["--blocks", "1", "--optimizers", "sgd", "--output", str(tmp_path / "x")])
    found = json.loads((tmp_path / "x.json").read_text())["blocks"]["1"]
    assert found["adam"]["ratio"] == 1 and found["sgd"]["lines"] < found["adam"]["lines"]
