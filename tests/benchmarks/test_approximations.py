"""The comparison of approximations end to end on a tiny network; nothing here asserts a time."""

import json
import math
from types import SimpleNamespace

import pytest
from lib import vgg
from rich.console import Console
from speed import approximations, approximations_report
from speed.approximations_report import Measured

pytestmark = pytest.mark.once

METHODS = ["kfac-kfc", "kfac-sua-groups", "ekfac-sua"]
TINY = ["--batch", "4", "--image-size", "4", "--channels", "8", "--group-size", "4", "--quiet"]


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    """Where a run on a network of one convolution has left its files."""
    prefix = tmp_path_factory.mktemp("approximations") / "new" / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vgg, "WIDTHS", (8, vgg.POOL))  # compiles in seconds
        approximations.main(
            [*TINY, "--rounds", "1", "--methods", *METHODS, "--output", str(prefix)]
        )
    return prefix


def test_every_method_is_measured(prefix):
    found = json.loads(prefix.with_name("out.json").read_text())
    rows = {row["method"]: row for row in found["summary"]}
    assert found["command"].startswith("python benchmarks/speed/approximations.py --batch 4")
    assert list(rows) == ["sgd", *METHODS]
    kinds = {"step", "statistics_step", "refresh", "layer_refresh"}
    for name in METHODS:
        runs = {run["kind"]: run["seconds"] for run in found["runs"] if run["method"] == name}
        assert runs.keys() == kinds and all(len(seconds) == 2 for seconds in runs.values())
        assert math.isfinite(rows[name]["loss"]) and rows[name]["once"] == []
    for part in ("factors", "state", "refresh", "layer_refresh"):
        assert rows["kfac-kfc"][f"{part}_ratio"] == 1
    assert rows["sgd"]["step_ratio"] == rows["sgd"]["mean_step_ratio"] == 1
    sizes = [rows[name]["factors_mib"] for name in ("kfac-kfc", "ekfac-sua", "kfac-sua-groups")]
    assert sizes[0] > sizes[1] > sizes[2] > 0


def test_the_picture_is_drawn(prefix):
    assert prefix.with_name("out.png").read_bytes().startswith(b"\x89PNG")


def test_methods_take_turns_and_what_takes_long_runs_once():
    calls = []

    def runner(name, taken):
        seconds = lambda kind, key: calls.append((name, kind)) or taken
        return SimpleNamespace(name=name, kinds=("step",), seconds=seconds)

    quick, slow = runner("quick", 1.0), runner("slow", 7.0)
    with approximations.progress_bar(Console(), quiet=True) as bar:
        timings = approximations.measure([quick, slow], 2, 5.0, bar)
    assert calls == [(name, "step") for name in ("quick", "slow", "quick", "quick")]
    assert timings == {("quick", "step"): [1.0, 1.0, 1.0], ("slow", "step"): [7.0]}


def test_the_mean_step_is_computed_from_the_medians_after_the_first_run():
    seconds = {"step": [9.0, 1.0, 1.0, 2.0], "statistics_step": [9.0, 3.0], "refresh": [50.0]}
    kfac = Measured("kfac-kfc", 2**21, 2**22, seconds, 1.0, 2.3)
    sgd = Measured("sgd", None, 2**20, {"step": [9.0, 0.5]}, 1.0, 2.3)
    first, second = approximations_report.summarize([sgd, kfac], every=10, refresh_every=50)
    assert second.mean_step_ms == pytest.approx(1e3 * (1 + 2 / 10 + 50 / 50))
    assert second.mean_step_ratio == pytest.approx(2.2 / 0.5)
    assert second.factors_mib == 2 and second.factors_ratio == 1 and second.once == ["refresh"]
    assert first.mean_step_ms == first.step_ms == 500 and first.state_ratio == 0.25
    assert first.factors_mib is None and second.layer_refresh_s is None


@pytest.mark.parametrize("flags", [["--methods", "sua"], ["--width", "65"], ["--batch", "0"]])
def test_bad_flags_are_told(flags, capsys):
    with pytest.raises(SystemExit) as caught:
        approximations.main(flags)
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert flags[0] in err and "Traceback" not in err
