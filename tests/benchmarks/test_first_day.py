"""The first day's script end to end on two steps of a tiny network; its networks, traced."""

import json

import jax
import pytest
from races import first_day

import natgrad_jax as ng

pytestmark = pytest.mark.once


@pytest.mark.parametrize("name", first_day.TASKS)
def test_every_layer_is_covered(name: str) -> None:
    task = first_day.TASKS[name]()
    batch = jax.tree.map(lambda x: x[: task.batch_size], task.examples)
    params = jax.eval_shape(lambda: task.problem.init(0))
    assert not ng.find_layers(task.problem.loss_fn, params, batch).uncovered
    assert len(task.sgd) == 3


def test_the_script_writes_every_number(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(first_day, "PAIRS", 256)
    monkeypatch.setitem(first_day.TASKS, "tiny", lambda: first_day.resnet((2, 4)))
    prefix = tmp_path / "new" / "first-day"
    first_day.main(["--task", "tiny", "--steps", "2", "--output", str(prefix)])
    result = json.loads(prefix.with_name("first-day.json").read_text())
    task = result["tasks"]["tiny"]
    assert [run["optimizer"] for run in task["runs"]] == ["kfac", "sgd"]
    assert all(len(run["loss"]) == len(run["seconds"]) == 3 for run in task["runs"])
    assert task["runs"][0]["loss"][0] == task["runs"][1]["loss"][0]
    assert all(len(run["validation"]) == 3 and 0 < run["error"] <= 1 for run in task["runs"])
    assert len(task["search"]["sgd"]) == 3 and result["untuned_rate"] == 0.1
    assert result["command"] in capsys.readouterr().out.replace("\n", "")
