"""The soak runs, and its verdict tells what drifts; nothing here asserts a time."""

import json
from pathlib import Path

import pytest
from races import soak

pytestmark = pytest.mark.once


def test_soak_writes_its_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "SLOWER", 1e9)
    monkeypatch.setattr(soak, "LARGER", 1e9)
    prefix = tmp_path / "new" / "soak"
    soak.main(["--steps", "60", "--window", "6", "--batch-size", "10", "--output", str(prefix)])
    found = json.loads(prefix.with_name("soak.json").read_text())
    assert [row["step"] for row in found["samples"]] == list(range(6, 61, 6))
    assert all(row["compiled"] > 0 and row["resident_mib"] > 0 for row in found["samples"])
    assert found["verdict"]["programs_more"]["value"] == 0
    assert found["samples"][-1]["loss"] < found["samples"][0]["loss"]
    assert prefix.with_name("soak.png").read_bytes().startswith(b"\x89PNG")


STEADY = [soak.Sample(i, 1.0, 0.5, 1.0, 100.0, 10, 5, 1.0) for i in range(30)]
DRIFTS = {
    "step_time_ratio": lambda s: s._replace(fast_ms=1 + s.step / 30),
    "memory_growth_mib": lambda s: s._replace(resident_mib=100 + s.step / 10),
    "arrays_more": lambda s: s._replace(live_arrays=s.step),
    "programs_more": lambda s: s._replace(compiled=s.step),
    "losses_not_finite": lambda s: s._replace(loss=float("nan")),
}


def test_a_steady_run_passes() -> None:
    assert all(row["ok"] for row in soak.verdict(STEADY).values())


def test_a_slow_machine_is_no_drift() -> None:
    slow = [s._replace(fast_ms=1 + s.step / 9, gradient_ms=(1 + s.step / 9) / 2) for s in STEADY]
    assert all(row["ok"] for row in soak.verdict(slow).values())


@pytest.mark.parametrize("name", DRIFTS)
def test_each_drift_is_seen(name: str) -> None:
    found = soak.verdict([DRIFTS[name](s) for s in STEADY])
    assert [key for key, row in found.items() if not row["ok"]] == [name]


def test_a_drift_is_an_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "soak", lambda *_: [DRIFTS["programs_more"](s) for s in STEADY])
    with pytest.raises(SystemExit) as caught:
        soak.main(["--output", str(tmp_path / "soak")])
    assert caught.value.code == 1
