"""Each example runs fast, writes its picture, and gets to where it says it gets."""

import csv
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.once

EXAMPLES = Path(__file__).parents[2] / "examples"
# What the numbers that an example returns have to fulfil after --fast.
CHECKS: dict[str, Callable[[dict[str, float]], bool]] = {
    "pinn": lambda r: r["exact NGD"] < 0.02 and r["K-FAC"] < 0.1 and r["K-FAC"] < r["Adam"] / 2,
    "variational_monte_carlo": lambda r: r["minSR"] < 1e-3 and r["K-FAC"] < 0.01,
    "actor_critic": lambda r: r["K-FAC"] > 200,  # at first the pole falls after about 20 moves
    "laplace": lambda r: (
        r["gap_std"] > 3 * r["data_std"]
        and r["beyond_laplace"] < r["beyond_alone"] / 5
        and r["data_within"] > 0.9
    ),
    "influence": lambda r: r["influence"] > 0.5 and r["at random"] < 0.2,
    "tensorboard_and_csv": lambda r: r["last"] < 0.75 * r["first"] and r["reports"] == 10,
}


@pytest.mark.parametrize("name", CHECKS)
def test_example(name: str, tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    picture = tmp_path / f"{name}.png"
    numbers = module.main(["--fast", "--output", str(picture)])
    assert all(map(math.isfinite, numbers.values())), numbers
    assert CHECKS[name](numbers), numbers
    assert picture.stat().st_size > 5000
    if name == "tensorboard_and_csv":
        with picture.with_suffix(".csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [int(row["step"]) for row in rows] == list(range(10, 101, 10))
        assert float(rows[-1]["loss"]) == numbers["last"]
