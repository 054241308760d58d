"""Every example runs in its fast setting, and its numbers are what its page says of them."""

import csv
import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]
Numbers = dict[str, float]


def classifies(numbers: Numbers) -> None:
    assert numbers["K-FAC training loss"] < 0.7 * numbers["Adam training loss"]
    assert numbers["K-FAC accuracy"] > 0.8


def predicts_characters(numbers: Numbers) -> None:
    for loss in ("training loss", "validation loss"):
        assert 1.0 < numbers[f"K-FAC {loss}"] < numbers[f"Adam {loss}"] < 4.0


def fine_tunes(numbers: Numbers) -> None:
    classifies(numbers)
    assert numbers["K-FAC accuracy"] > 0.9  # half of it are digits that pretraining had not
    assert numbers["K-FAC trained"] < 10_000


def is_the_same_on_four_devices(numbers: Numbers) -> None:
    assert (numbers["1 rows on each"], numbers["4 rows on each"]) == (480, 120)
    assert numbers["4 training loss"] == pytest.approx(numbers["1 training loss"], rel=1e-2)
    assert numbers["4 accuracy"] > 0.9


def is_divided(numbers: Numbers) -> None:
    for what in ("weights", "state"):
        assert numbers[f"parts {what} (MB)"] < 0.3 * numbers[f"copies {what} (MB)"]
    assert numbers["parts training loss"] == pytest.approx(
        numbers["copies training loss"], rel=0.05
    )
    assert numbers["parts accuracy"] > 0.85


def trains_on_all_hosts(numbers: Numbers) -> None:
    assert numbers["devices"] == 4
    assert numbers["accuracy"] > 0.9


def solves_the_equation(errors: Numbers) -> None:
    assert errors["exact NGD"] < 0.02
    assert errors["K-FAC"] < 0.1 and errors["K-FAC"] < errors["Adam"] / 2


def finds_the_ground_state(errors: Numbers) -> None:
    assert errors["minSR"] < 1e-3 and errors["K-FAC"] < 0.01


def keeps_the_pole_up(moves: Numbers) -> None:
    assert moves["K-FAC"] > 200  # of three seeds; at first it falls after about 20


def knows_what_it_does_not_know(numbers: Numbers) -> None:
    assert numbers["gap_std"] > 3 * numbers["data_std"]
    assert numbers["beyond_laplace"] < numbers["beyond_alone"] / 5
    assert numbers["data_within"] > 0.9


def finds_wrong_labels(found: Numbers) -> None:
    assert found["influence"] > 0.5 and found["at random"] < 0.2


def reports(numbers: Numbers) -> None:
    assert numbers["last"] < 0.75 * numbers["first"] and numbers["reports"] == 10


CHECKS: dict[str, Callable[[Numbers], None]] = {
    "actor_critic": keeps_the_pole_up,
    "character_transformer": predicts_characters,
    "data_parallel": is_the_same_on_four_devices,
    "fsdp": is_divided,
    "image_classifier_equinox": classifies,
    "image_classifier_linen": classifies,
    "image_classifier_nnx": classifies,
    "influence": finds_wrong_labels,
    "laplace": knows_what_it_does_not_know,
    "lora": fine_tunes,
    "pinn": solves_the_equation,
    "several_hosts": trains_on_all_hosts,
    "tensorboard_and_csv": reports,
    "variational_monte_carlo": finds_the_ground_state,
}


@pytest.mark.parametrize("name", CHECKS)
def test_it_runs(name: str, tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    picture = tmp_path / "picture.png"
    notebooks = ["-f", "kernel.json"]  # arguments that a notebook's kernel was started with
    numbers = example.main([*notebooks, "--fast", "--output", str(picture)])
    assert np.isfinite(list(numbers.values())).all()
    CHECKS[name](numbers)
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 5_000
    if name == "tensorboard_and_csv":
        with picture.with_suffix(".csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [int(row["step"]) for row in rows] == list(range(10, 101, 10))
        assert float(rows[-1]["loss"]) == numbers["last"]


def test_every_example_is_run_and_shown() -> None:
    examples = sorted((ROOT / "examples").glob("*.py"))
    assert [path.stem for path in examples] == sorted(CHECKS)
    page = (ROOT / "docs" / "examples.md").read_text()
    for path in examples:
        for text in (page, path.read_text()):
            assert f"python examples/{path.name}" in text
        assert f"python examples/{path.name} --fast" in path.read_text()
        assert (ROOT / "docs" / "pictures" / f"{path.stem}.png").stat().st_size < 60_000
        assert f"(pictures/{path.stem}.png)" in page
