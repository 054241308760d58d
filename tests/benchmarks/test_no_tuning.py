"""The comparison without tuning end to end on a few steps, its tasks, and its arithmetic."""

import json
import math
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from lib import data, report, rivals, tasks
from lib.large import LARGE_TASKS
from races import no_tuning
from races.no_tuning_report import Found, ahead, overview, table_of
from rich.console import Console

import natgrad_jax as ng

pytestmark = pytest.mark.once

TASK = tasks.Task(None, None, None, 4, 2, "image", (0.1,))
SHAPES = {"mnist": (28, 28, 1), "cifar10": (32, 32, 3)}


def noise(name, data_dir):
    """A small data set of that shape."""
    if name not in SHAPES:
        return data.load(name, data_dir)
    images = np.random.default_rng(0).random((32, *SHAPES[name]), np.float32)
    labels = np.arange(16, dtype=np.int32) % data.CLASSES
    return data.Dataset(name, images[:16], labels, images[16:], labels)


@pytest.mark.parametrize("name", tasks.TASKS | LARGE_TASKS)
def test_every_layer_of_a_task_is_covered(name, monkeypatch):
    monkeypatch.setattr(data, "load_or_exit", noise)
    task = (tasks.TASKS | LARGE_TASKS)[name](None)
    batch = jax.tree.map(lambda x: x[:4], task.examples)
    params = jax.eval_shape(lambda: task.problem.init(0))
    layers = ng.find_layers(task.problem.loss_fn, params, batch)
    assert not layers.uncovered
    assert min(task.floors) >= 0 and len(task.sgd) in (3, 4)
    assert task.sgd == tuple(sorted(task.sgd))
    counts = {len(x) for x in jax.tree.leaves(task.examples)}
    assert len(counts) == 1 and (counts == {16} or counts.pop() >= task.batch_size)


@pytest.mark.parametrize("name", tasks.TASKS)
def test_what_is_held_out_is_like_the_examples_and_none_of_them(name, monkeypatch):
    monkeypatch.setattr(data, "load_or_exit", noise)
    task = tasks.TASKS[name](None)
    kind = lambda tree: jax.tree.map(lambda x: (x.shape[1:], x.dtype), tree)
    assert kind(task.validation) == kind(task.examples)
    inputs = lambda x: (x["input"] if isinstance(x, dict) else x).reshape(no_tuning.count(x), -1)
    seen, held_out = ({x.tobytes() for x in inputs(part)} for part in task[1:3])
    repeated = seen & held_out  # a few windows of the text are all dashes or blanks
    assert len(held_out) > 10 and len(repeated) <= (
        len(held_out) // 20 if name == "characters" else 0
    )


def test_characters_follow_one_another():
    examples = tasks.TASKS["characters"](None).examples
    assert examples["input"].size > 300_000 and examples["input"].max() < tasks.ALPHABET
    flat = {key: x.reshape(-1) for key, x in examples.items()}
    np.testing.assert_array_equal(flat["input"][1:], flat["target"][:-1])


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """One tiny comparison; the prefix of its files."""
    prefix = tmp_path_factory.mktemp("compared") / "new" / "tabular"
    no_tuning.main(["--tasks", "tabular", "--steps", "10", "--search", "0.5", "--seeds", "0,3",
                    "--optimizers", "adam,sgd", "--output", str(prefix)])  # fmt: skip
    return prefix


def test_the_comparison_writes_every_number(compared):
    result = json.loads(compared.with_name("tabular.json").read_text())
    task = result["tasks"]["tabular"]
    assert result["untuned_rate"] == 0.1 and task["steps"] == 10 and task["batch_size"] == 128
    assert {name: len(losses) for name, losses in task["search"].items()} == {"adam": 5, "sgd": 4}
    assert len(task["runs"]) == 8 and task["reference"] in ("adam", "sgd")
    for run in task["runs"]:
        assert run["steps"] == list(range(11)) and np.all(np.diff(run["seconds"]) > 0)
        assert run["loss"][-1] < run["loss"][0] and run["error"] is None  # no classifier
        assert len(run["validation"]) == 11 and run["validation"] != run["loss"]
        tried = task["search"].get(run["optimizer"], {"0.1": 0})
        assert run["learning_rate"] == float(min(tried, key=tried.get))
    assert len({(run["seed"], run["loss"][0]) for run in task["runs"]}) == 2
    assert task["against"].keys() == {"adam", "sgd"}
    assert compared.with_name("tabular.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_asked_for_is_searched(compared, tmp_path, monkeypatch, capsys):
    kron = lambda rate: print("many words") or optax.sgd(rate)
    monkeypatch.setitem(sys.modules, "psgdax", SimpleNamespace(kron=kron))
    monkeypatch.setitem(sys.modules, "soap_jax", None)  # cannot be imported
    asked = ["muon", "soap", "psgd-kron"]
    prefix = tmp_path / "asked"
    no_tuning.main(["--tasks", "tabular", "--steps", "8", "--search", "1", "--trust-radius", "1e-4",
                    "--optimizers", ",".join(asked), "--output", str(prefix)])  # fmt: skip
    result = json.loads(prefix.with_name("asked.json").read_text())
    told = capsys.readouterr().out
    assert result["absent"] == ["soap-port"] and "cannot be imported: soap-port" in told
    assert result["trust_radius"] == 1e-4
    runs = {run["optimizer"]: run for run in result["tasks"]["tabular"]["runs"]}
    assert list(runs) == ["kfac", "ekfac", *asked]
    assert all(min(run["loss"]) < run["loss"][0] for run in runs.values())
    usual = json.loads(compared.with_name("tabular.json").read_text())
    first = usual["tasks"]["tabular"]["runs"][0]["loss"]  # K-FAC's, which takes a longer step
    assert runs["kfac"]["loss"][0] == first[0] and runs["kfac"]["loss"][1] > first[1]
    assert "soap-port" not in rivals.searched(tasks.TASKS["tabular"](None))
    with pytest.raises(SystemExit):
        no_tuning.main(["--optimizers", "soap-port"])


def test_every_searched_optimizer_takes_a_rate():
    params = {"Dense_0": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}
    found = rivals.searched(TASK)
    assert set(found) == {*rivals.INSIDE, *rivals.outside()}
    for one in found.values():
        tx = rivals.injected(one.alias)(one.rates[0])
        state = tx.init(params)
        assert state.hyperparams["learning_rate"] == np.float32(min(one.rates))
        updates, _ = jax.eval_shape(tx.update, params, state, params)
        assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)


def test_the_error_of_a_classifier_is_that_on_all_that_is_held_out():
    def wrong(params, batch):
        return batch % params == 0

    loss_fn = lambda params, batch: SimpleNamespace(value=batch.mean())
    task = tasks.Task(SimpleNamespace(loss_fn=loss_fn), np.arange(8), np.arange(11), 1, 1, "label",
                      (0.1,), wrong=wrong)  # fmt: skip
    field = no_tuning.make_field(task)
    assert field.error(5) == pytest.approx(3 / 11)
    assert field.evaluate(5) == np.mean([0, 2, 4, 6])
    assert field.validate(5) == np.mean([0, 3, 6, 9])
    assert no_tuning.make_field(task._replace(wrong=None)).error(5) is None


def test_muon_takes_kernels_as_matrices():
    params = {
        "query": {"kernel": np.ones((6, 2, 3)), "bias": np.ones((2, 3))},
        "out": {"kernel": np.ones((2, 3, 6))},
        "Embed_0": {"embedding": np.ones((9, 6))},
        "Dense_0": {"kernel": np.ones((6, 4))},
        "Conv_0": {"kernel": np.ones((3, 3, 2, 4))},
    }
    grads = jax.tree.map(lambda x: np.random.default_rng(0).normal(size=x.shape), params)
    tx = rivals.muon(0.1)
    updates, state = tx.update(grads, tx.init(params), params)
    momenta = state.inner_states["muon"].inner_state[0].mu
    held = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(momenta)}
    assert held == {f"['{name}']['kernel']" for name in ("query", "out", "Dense_0", "Conv_0")}
    of = {"query": (6, 6), "out": (6, 6), "Dense_0": (6, 4), "Conv_0": (18, 4)}
    for name, shape in of.items():  # its singular values are made equal
        values = np.linalg.svd(np.reshape(updates[name]["kernel"], shape), compute_uv=False)
        assert values.min() > 0.3 * values.max()


def run(name, loss, pace, validation=(9.0, 9.0)):
    seconds = [0.0, pace, 2 * pace]
    return report.Run(name, 0, 0.1, 1.0, [0, 1, 2], seconds, [9.0, *loss], [9.0, *validation])


def test_the_lowest_of_the_others_is_the_reference_and_the_sooner_is_ahead():
    runs = [run("kfac", (3, 1), 1.5), run("ekfac", (4, 3), 2.5),
            run("adam", (5, 4), 2.0), run("sgd", (5, math.inf), 1.0)]  # fmt: skip
    found = {"a": Found(TASK, runs, {"adam": {}, "sgd": {}})}
    assert found["a"].reference == "adam"
    assert ahead(found) == {"kfac": ["a"], "ekfac": ["a"]}
    found["a"].runs[1] = run("ekfac", (8, 4), 2.5)
    assert ahead(found) == {"kfac": ["a"], "ekfac": []}


def test_kfac_against_each_rival():
    runs = [run("kfac", (3, 1), 1.5, (5, 7)), run("ekfac", (4, 3), 2.5),
            run("adam", (5, 4), 2.0, (6, 8)), run("sgd", (2, 0.5), 1.0, (6, 4)),
            run("muon", (5, math.nan), 1.0)]  # fmt: skip
    found = Found(TASK, runs, {"adam": {}, "sgd": {}, "muon": {}})
    # to 4 after a step of 1.5 for 4.0 seconds; to the 6 that Adam had before its 8 for 2.0 seconds
    assert found.against("adam") == {"loss": 1.5 / 4, "validation": 1.5 / 2}
    assert found.against("sgd") == {"loss": None, "validation": None}
    assert all(math.isnan(ratio) for ratio in found.against("muon").values())
    kfac = found.rows["kfac"]
    assert (kfac.validation_loss, kfac.lowest_validation, kfac.validation_error) == (7, 5, None)
    console = Console(width=80, record=True)
    console.print(overview({"a": found}), table_of("a", found))
    told = console.export_text()
    assert "adam 0.1" in told and "0.75" in told and "never" in told and "…" not in told


def test_all_advance_in_turn():
    seen = []

    def counting(name, end):
        for i in range(end):
            seen.append(name)
            yield i

    assert no_tuning.in_turn({"a": counting("a", 3), "b": counting("b", 1)}) == {"a": 2, "b": 0}
    assert seen == ["a", "b", "a", "a"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--tasks", "tabular,svhn"],
        ["--search", "0"],
        ["--steps", "0"],
        ["--seeds", "a"],
        ["--optimizers", "adam,lion"],
        ["--trust-radius", "wide"],
    ],
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
