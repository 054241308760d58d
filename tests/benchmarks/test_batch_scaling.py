"""Steps against batch size end to end on a few steps, and its arithmetic."""

import json

import jax
import numpy as np
import pytest
from lib import training
from races import batch_scaling
from races.batch_scaling import Reached

pytestmark = pytest.mark.once


def test_batch_scaling_writes_every_number(tmp_path, monkeypatch):
    monkeypatch.setitem(batch_scaling.ENCODERS, "digits", (64, 16, 4))
    monkeypatch.setitem(batch_scaling.RATES, "sgd", (0.01, 0.05))
    prefix = tmp_path / "new" / "scaling"
    batch_scaling.main(["--data", "digits", "--batch-sizes", "32,128", "--target", "30",
                        "--most-steps", "60", "--output", str(prefix)])  # fmt: skip
    result = json.loads(prefix.with_name("scaling.json").read_text())
    found = {(one["optimizer"], one["batch_size"]): one for one in result["reached"]}
    assert found.keys() == {(name, size) for name in ("sgd", "kfac") for size in (32, 128)}
    for one in found.values():
        assert 0 < one["steps"] <= 60 and one["seconds"] > 0
        assert one["tried"][f"{one['rate']:g}"] == one["steps"]
    assert set(found["sgd", 32]["tried"]) == {"0.01", "0.05"}
    assert len(found["sgd", 128]["tried"]) == 1  # the other is no neighbour
    assert prefix.with_name("scaling.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("target", "expected"), [(191.5, 9), (137.5, 63), (102.5, 100), (99, None)]
)
def test_the_first_evaluated_step_at_the_target(target, expected):
    """A loss that falls by 1 a step from 200, looked at every 5 %, and at the last step."""

    class Falling:
        init = staticmethod(lambda seed: np.float32(200))

    step = lambda params, *_: (params - 1, None, params)
    compiled = training.Compiled(lambda params: None, step, 0.0)
    found, seconds = batch_scaling.steps_to(
        target, 100, compiled, Falling, np.zeros(8), 4, evaluate=lambda params: params
    )
    assert found == expected and seconds > 0


def test_a_loss_that_is_not_finite_ends_the_run():
    calls = []

    def step(params, *_):
        calls.append(params)
        return params * np.nan, None, params

    compiled = training.Compiled(lambda params: None, step, 0.0)
    problem = type("P", (), {"init": staticmethod(lambda seed: np.float32(1))})
    images = jax.numpy.zeros(8)
    assert batch_scaling.steps_to(0, 40, compiled, problem, images, 4, lambda p: p)[0] is None
    assert len(calls) == 1


def test_gains_are_between_neighbouring_sizes():
    steps = {32: 100, 64: 50, 128: 40, 256: None, 512: 20}
    found = [Reached("sgd", size, 0.1, count, 1.0, {}) for size, count in steps.items()]
    assert batch_scaling.gains(found, "sgd") == [None, 2.0, 1.25, None, None]
