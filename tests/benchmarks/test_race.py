"""The race end to end on a few steps, and the arithmetic of its summary."""

import json

import jax
import numpy as np
import pytest
from lib import data, report, training
from lib.autoencoder import ENCODERS, entropy
from races import race

pytestmark = pytest.mark.once


@pytest.fixture(scope="module", autouse=True)
def small_model():
    """Compiles in seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ENCODERS, "digits", (64, 16, 4))
        yield


@pytest.fixture(scope="module")
def raced(tmp_path_factory, small_model):
    """One tiny race of every optimizer; the prefix of its files."""
    prefix = tmp_path_factory.mktemp("race") / "new" / "digits"
    race.main(["--steps", "6", "--batch-size", "50", "--seeds", "0,3", "--lr", "adam=0.002",
               "--output", str(prefix), "--quiet"])  # fmt: skip
    return prefix


def test_race_writes_every_number(raced):
    result = json.loads(raced.with_name("digits.json").read_text())
    assert result["steps"] == 6 and result["batch_size"] == 50 and result["seeds"] == [0, 3]
    assert result["command"].startswith("python benchmarks/races/race.py --steps 6")
    assert result["versions"]["jax"] == jax.__version__ and result["machine"]["device"]
    assert [row["optimizer"] for row in result["summary"]] == ["kfac", "sgd", "adam"]
    assert len(result["runs"]) == 6
    for run in result["runs"]:
        assert run["steps"] == list(range(7))
        assert run["seconds"][0] == 0 and np.all(np.diff(run["seconds"]) > 0)
        assert run["loss"][-1] < run["loss"][0] and min(run["loss"]) > result["entropy"]
        assert run["setup_seconds"] > 0
    starts = {(run["seed"], run["loss"][0]) for run in result["runs"]}
    assert len(starts) == 2  # the same initialization for every optimizer, another for each seed
    assert {run["learning_rate"] for run in result["runs"] if run["optimizer"] == "adam"} == {2e-3}


def test_race_draws_the_picture(raced):
    assert raced.with_name("digits.png").read_bytes().startswith(b"\x89PNG")


def test_same_seed_same_curve(raced, tmp_path, capsys):
    race.main(["--steps", "6", "--batch-size", "50", "--optimizers", "sgd", "--seed", "3",
               "--output", str(tmp_path / "again")])  # fmt: skip
    assert "steps/s" in capsys.readouterr().out
    again = json.loads((tmp_path / "again.json").read_text())["runs"][0]
    first = json.loads(raced.with_name("digits.json").read_text())["runs"]
    (sgd,) = [run for run in first if run["optimizer"] == "sgd" and run["seed"] == 3]
    np.testing.assert_allclose(again["loss"], sgd["loss"], rtol=1e-5)


def test_a_race_that_diverges_is_told(tmp_path, capsys):
    race.main(["--steps", "20", "--optimizers", "adam,sgd", "--lr", "sgd=1e38",
               "--output", str(tmp_path / "wild"), "--quiet"])  # fmt: skip
    assert "diverged" in capsys.readouterr().out
    result = json.loads((tmp_path / "wild.json").read_text())
    assert result["summary"][1]["loss_after_steps"] is None


def test_minibatches_cover_every_epoch():
    order = training.minibatches(10, 3, 7, seed=0)
    assert order.shape == (7, 3) and order.dtype == np.int32
    for epoch in (order[:3], order[3:6]):
        assert len(np.unique(epoch)) == 9
    np.testing.assert_array_equal(order, training.minibatches(10, 3, 7, seed=0))
    assert not np.array_equal(order, training.minibatches(10, 3, 7, seed=1))


def test_summary_compares_with_the_reference_of_the_same_seed():
    def run(name, seed, loss, pace):
        steps = [0, 10, 20, 30]
        return report.Run(name, seed, 0.1, 1.0, steps, [pace * step for step in steps], loss)

    runs = [
        run("kfac", 0, [9, 4, 3, 1], 2.0),
        run("kfac", 1, [9, 8, 5, 2], 2.0),
        run("adam", 0, [9, 7, 5, 4], 1.0),
        run("adam", 1, [9, 8, 7, 6], 1.0),
        run("sgd", 0, [9, 8, 7, 4], 1.0),
        run("sgd", 1, [9, 8, 7, 7], 1.0),
    ]
    assert report.equal_seconds(runs) == 30
    kfac, adam, sgd = report.summarize(runs, "adam")
    assert kfac.loss_after_steps == 1.5
    assert kfac.loss_after_seconds == 6  # what each had at step 10, as step 20 took 40 seconds
    assert kfac.steps_to_target == 15 and kfac.seconds_to_target == 30
    assert kfac.milliseconds == 2000
    assert adam.steps_to_target == 30 and adam.loss_after_steps == 5
    assert sgd.steps_to_target is None  # one seed never got there


def test_entropy_bounds_the_loss():
    images = np.array([[0.0, 1.0, 0.5], [0.25, 0.25, 1.0]])
    quarter = -(0.25 * np.log(0.25) + 0.75 * np.log(0.75))
    np.testing.assert_allclose(entropy(images), (np.log(2) + 2 * quarter) / 2, atol=1e-9)


@pytest.mark.parametrize(
    "flags",
    [["--optimizers", "adam,lion"], ["--lr", "adam"], ["--steps", "0"], ["--lr", "adam=fast"],
     ["--batch-size", "1501"], ["--data", "svhn"], ["--seeds", "a"]],
)  # fmt: skip
def test_bad_flags_are_told_before_training(flags, capsys):
    with pytest.raises(SystemExit) as caught:
        race.main(flags)
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert flags[0] in err and "Traceback" not in err


def test_every_data_set_has_its_settings():
    from lib.optimizers import LEARNING_RATES, OPTIMIZERS

    for name in data.DATASETS:
        assert name in training.SCALES and name in race.ENCODERS
        assert LEARNING_RATES[name].keys() == OPTIMIZERS.keys()
