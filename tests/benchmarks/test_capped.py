"""The script that measures what a cap on factors costs, for two steps."""

import json
from pathlib import Path

import pytest
from races import capped

pytestmark = pytest.mark.once


def test_it_compares_with_no_cap(tmp_path: Path) -> None:
    given = ["--task", "tabular", "--steps", "2", "--sizes", "32", "--seeds", "0"]
    capped.main([*given, "--output", str(tmp_path / "x")])
    found = json.loads((tmp_path / "x.json").read_text())["more_than_uncapped"]
    assert found["no cap"] == [0]
    assert found["max_size=32"] != [0] and found["max_size=32"] != found["max_size=32, diagonal"]
