"""The comparison without tuning end to end on a few steps, its tasks, and its arithmetic."""

import json
import math

import jax
import numpy as np
import optax
import pytest
from lib import data, report, tasks
from races import no_tuning
from races.no_tuning_report import Found, ahead

import natgrad_jax as ng

pytestmark = pytest.mark.once

SHAPES = {"mnist": (28, 28, 1), "cifar10": (32, 32, 3)}


def noise(name, data_dir):
    """A small data set of that shape."""
    if name not in SHAPES:
        return data.load(name, data_dir)
    images = np.random.default_rng(0).random((16, *SHAPES[name]), np.float32)
    labels = np.arange(16, dtype=np.int32) % data.CLASSES
    return data.Dataset(name, images, labels, images, labels)


@pytest.mark.parametrize("name", tasks.TASKS)
def test_every_layer_of_a_task_is_covered(name, monkeypatch):
    monkeypatch.setattr(data, "load_or_exit", noise)
    task = tasks.TASKS[name](None)
    batch = jax.tree.map(lambda x: x[:4], task.examples)
    params = jax.eval_shape(lambda: task.problem.init(0))
    layers = ng.find_layers(task.problem.loss_fn, params, batch)
    assert not layers.uncovered
    assert task.floor >= 0 and len(task.sgd) in (3, 4) and task.sgd == tuple(sorted(task.sgd))
    counts = {len(x) for x in jax.tree.leaves(task.examples)}
    assert len(counts) == 1 and (counts == {16} or counts.pop() >= task.batch_size)


def test_characters_follow_one_another():
    examples = tasks.characters(None).examples
    assert examples["input"].size > 300_000 and examples["input"].max() < tasks.ALPHABET
    flat = {key: x.reshape(-1) for key, x in examples.items()}
    np.testing.assert_array_equal(flat["input"][1:], flat["target"][:-1])


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """One tiny comparison with everything searched; the prefix of its files."""
    prefix = tmp_path_factory.mktemp("compared") / "new" / "tabular"
    no_tuning.main(["--tasks", "tabular", "--steps", "10", "--search", "0.5", "--seeds", "0,3",
                    "--output", str(prefix)])  # fmt: skip
    return prefix


def test_the_comparison_writes_every_number(compared):
    result = json.loads(compared.with_name("tabular.json").read_text())
    task = result["tasks"]["tabular"]
    assert result["untuned_rate"] == 0.1 and task["steps"] == 10 and task["batch_size"] == 128
    assert {name: len(losses) for name, losses in task["search"].items()} == {"adam": 4, "sgd": 4}
    assert len(task["runs"]) == 8 and task["reference"] in ("adam", "sgd")
    for run in task["runs"]:
        assert run["steps"] == list(range(11)) and np.all(np.diff(run["seconds"]) > 0)
        assert run["loss"][-1] < run["loss"][0]
        tried = task["search"].get(run["optimizer"], {"0.1": 0})
        assert run["learning_rate"] == float(min(tried, key=tried.get))
    assert len({(run["seed"], run["loss"][0]) for run in task["runs"]}) == 2
    assert compared.with_name("tabular.png").read_bytes().startswith(b"\x89PNG")


def test_rivals_are_those_that_optax_has(tmp_path, capsys):
    prefix = tmp_path / "rivals"
    no_tuning.main(["--rivals", "--tasks", "tabular", "--steps", "8", "--search", "1",
                    "--output", str(prefix)])  # fmt: skip
    result = json.loads(prefix.with_name("rivals.json").read_text())
    has = lambda name: hasattr(optax, name) or hasattr(optax.contrib, name)
    missing = [name for name in no_tuning.RIVALS if not has(name)]
    assert result["not_in_optax"] == missing and has("muon")
    assert all(name in capsys.readouterr().out.splitlines()[0] for name in missing[:1])
    runs = {run["optimizer"]: run for run in result["tasks"]["tabular"]["runs"]}
    assert runs.keys() == {"kfac", "ekfac", "adam", *no_tuning.RIVALS} - set(missing)
    assert all(min(run["loss"]) < run["loss"][0] for run in runs.values())


def test_muon_takes_kernels_as_matrices():
    params = {
        "query": {"kernel": np.ones((6, 2, 3)), "bias": np.ones((2, 3))},
        "out": {"kernel": np.ones((2, 3, 6))},
        "Embed_0": {"embedding": np.ones((9, 6))},
        "Dense_0": {"kernel": np.ones((6, 4))},
        "Conv_0": {"kernel": np.ones((3, 3, 1, 4))},
    }
    state = no_tuning.muon(0.1).init(params)
    momenta = state.inner_states["muon"].inner_state[0].mu
    held = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(momenta)}
    assert held == {"['Dense_0']['kernel']", "['out']['kernel']", "['query']['kernel']"}


def test_the_lowest_of_the_others_is_the_reference_and_the_sooner_is_ahead():
    def run(name, loss, pace):
        return report.Run(name, 0, 0.1, 1.0, [0, 1, 2], [0.0, pace, 2 * pace], [9.0, *loss])

    task = tasks.Task(None, None, 4, 2, "image", (0.1,))
    runs = [run("kfac", (3, 1), 1.5), run("ekfac", (4, 3), 2.5),
            run("adam", (5, 4), 2.0), run("sgd", (5, math.inf), 1.0)]  # fmt: skip
    found = {"a": Found(task, runs, {"adam": {}, "sgd": {}})}
    assert found["a"].reference == "adam"
    assert ahead(found) == {"kfac": ["a"], "ekfac": ["a"]}
    found["a"].runs[1] = run("ekfac", (8, 4), 2.5)
    assert ahead(found) == {"kfac": ["a"], "ekfac": []}


def test_all_advance_in_turn():
    seen = []

    def counting(name, end):
        for i in range(end):
            seen.append(name)
            yield i

    assert no_tuning.in_turn({"a": counting("a", 3), "b": counting("b", 1)}) == {"a": 2, "b": 0}
    assert seen == ["a", "b", "a", "a"]


@pytest.mark.parametrize(
    "flags", [["--tasks", "tabular,svhn"], ["--search", "0"], ["--steps", "0"], ["--seeds", "a"]]
)
def test_bad_flags_are_told(flags, capsys):
    with pytest.raises(SystemExit) as caught:
        no_tuning.main(flags)
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert flags[0] in err and "Traceback" not in err


def test_missing_images_are_told(capsys):
    with pytest.raises(SystemExit):
        no_tuning.main(["--tasks", "mnist-cnn"])
    assert "--data-dir" in capsys.readouterr().err
