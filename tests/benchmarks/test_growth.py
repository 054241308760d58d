"""The growth of K-FAC on two tiny sizes; nothing here asserts a time."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from speed import growth, growth_report

pytestmark = pytest.mark.once


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "WIDTH", 8)
    monkeypatch.setattr(growth, "DEPTH", 2)


def run(prefix: Path, *more: str) -> Any:
    growth.main(["--batch-size", "16", "--rounds", "1", "--output", str(prefix), *more])
    return json.loads(prefix.with_name(prefix.name + ".json").read_text())


def test_growth_writes_every_number(tmp_path: Path, small: None) -> None:
    found = run(tmp_path / "out", "--series", "width", "scanned", "--methods", "sgd", "kfac",
                "--widths", "16", "8", "--depths", "2", "4")  # fmt: skip
    points = {(p["series"], p["size"], p["method"]): p for p in found["summary"]}
    sizes = [("width", 8), ("width", 16), ("scanned", 2), ("scanned", 4)]
    assert list(points) == [(*size, method) for size in sizes for method in ("sgd", "kfac")]
    assert all(p["step_ms"] > 0 and p["compile_s"] > 0 for p in points.values())
    # momentum, and nothing else that grows: exactly as many numbers as parameters
    for series, size, of in [("width", 8, 8), ("width", 16, 16), ("scanned", 4, 8)]:
        depth = size if series == "scanned" else 2
        mib = depth * (of + 1) * of * 4 / 2**20
        assert points[series, size, "sgd"]["state_mib"] == pytest.approx(mib, rel=1e-4)
        assert points[series, size, "kfac"]["state_mib"] > mib
    slopes = {(s["series"], s["method"], s["quantity"]): s for s in found["exponents"]}
    state = slopes["width", "sgd", "state_mib"]
    assert state["fitted"] == pytest.approx(np.log2(17 * 16 / (9 * 8)), rel=1e-4)
    assert found["skipped"] == []
    assert tmp_path.joinpath("out.png").read_bytes().startswith(b"\x89PNG")


def test_what_takes_too_long_is_left_out_and_named(
    tmp_path: Path, small: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """After two sizes: before them nothing is known of the growth."""
    found = run(tmp_path / "out", "--series", "depth", "--methods", "sgd", "--limit-seconds", "0",
                "--depths", "2", "3", "4")  # fmt: skip
    assert [p["size"] for p in found["summary"]] == [2, 3]
    assert [(s["size"], s["method"]) for s in found["skipped"]] == [(4, "sgd")]
    assert "skipped: sgd at depth 4" in capsys.readouterr().out


def test_one_program_takes_every_kind_of_step() -> None:
    """Schedules of both periods: refresh and statistics, statistics alone, neither."""
    steps = np.arange(12)
    due = lambda period: [int(step) % int(period(np.int32(step))) == 0 for step in steps]
    assert due(growth.refreshes) == ([True] + [False] * 5) * 2
    assert due(growth.measures) == ([True] * 2 + [False] * 4) * 2


def test_exponents_are_slopes_of_logarithms() -> None:
    of = lambda n: growth_report.Point("width", n, "m", n**2.0, n, None, -1.0, n**3.0, 5, n, 0)
    found = {s.quantity: s for s in growth_report.exponents([of(n) for n in (2, 4, 16)])}
    assert set(found) == {"mean_step_ms", "step_ms", "state_mib", "peak_mib", "compile_s"}
    assert found["state_mib"].fitted == pytest.approx(3) == found["state_mib"].last
    assert found["peak_mib"].fitted == pytest.approx(0)
