"""Two processes with two devices each train as one process with one device does."""

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from parallel import multi_process


@pytest.mark.parametrize("optimizer", ["kfac", "ekfac"])
def test_two_processes_train_as_one(optimizer: str, tmp_path: Path) -> None:
    options = ["--optimizer", optimizer, "--encoder", "64", "16", "4", "--batch-size", "128"]
    options += ["--steps", "5", "--statistics-period", "2", "--refresh-period", "2"]
    options += ["--damping", "0.1"]  # with less, EKFAC's steps amplify float32's rounding
    output = tmp_path / "trained.npz"
    command = [sys.executable, multi_process.__file__, *options, "--output", str(output)]
    run = subprocess.run(
        [*command, "--processes", "2", "--devices", "2"], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "2 processes, 4 devices" in run.stdout
    one = jax.make_mesh((1,), ("data",), (AxisType.Auto,), devices=jax.devices()[:1])
    expected = multi_process.train(one, multi_process.parse_arguments(options))
    assert f"step    4   loss {expected.losses[-1]:.3f}" in run.stdout
    assert expected.losses[-1] < expected.losses[0]
    flat = jax.tree_util.tree_flatten_with_path((expected.params, expected.factors))[0]
    with np.load(output) as found:
        for path, x in flat:
            ours = found[jax.tree_util.keystr(path)]
            np.testing.assert_allclose(ours, x, rtol=1e-4, atol=1e-5, err_msg=str(path))


def test_a_process_that_fails_stops_the_others() -> None:
    with pytest.raises(SystemExit) as stopped:
        multi_process.main(["--encoder", "63", "4", "--processes", "2"])
    assert stopped.value.code == 1
