"""The script that looks at K-FAC's steps, for two of them."""

import json
from pathlib import Path

import pytest
from races import trust

pytestmark = pytest.mark.once


def test_signal_and_noise_are_what_the_step_is_made_of(tmp_path: Path) -> None:
    trust.main(["--tasks", "tabular", "--at", "0,2", "--output", str(tmp_path / "x")])
    first, last = json.loads((tmp_path / "x.json").read_text())["seen"]
    assert (first["step"], last["step"]) == (0, 2) and last["loss"] < first["loss"]
    assert last["square"] == pytest.approx(last["signal"] + last["noise"], rel=1e-4)
    assert last["assumed"] > 0 and last["ratio"] > 0
