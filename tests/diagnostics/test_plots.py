"""Pictures are drawn without warnings, with units on their axes, and lines told apart by style."""

import subprocess
import sys
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest

import natgrad_jax as ng
from natgrad_jax.diagnostics import plots


@pytest.fixture(autouse=True)
def closed() -> Any:
    yield
    plt.close("all")


def drawn(ax: Any) -> Any:
    """The axes, after the whole figure has been rendered (where many warnings come from)."""
    ax.figure.canvas.draw()
    return ax


def looks(ax: Any) -> list[Any]:
    return [(x.get_linestyle(), x.get_marker(), x.get_fillstyle()) for x in ax.get_lines()]


PARAMS = {"a": {"bias": np.zeros(2), "kernel": np.zeros((3, 2))}, "b": {"kernel": np.zeros((2, 1))}}


def test_fisher_shows_magnitudes_and_layers() -> None:
    F = np.diag([1.0, -4.0, *np.ones(8)])
    ax = drawn(plots.fisher(F, params=PARAMS))
    shown = np.asarray(ax.get_images()[0].get_array())
    np.testing.assert_allclose(shown[:2, :2], [[0.25, 1e-4], [1e-4, 1]])
    assert [x.get_text() for x in ax.get_xticklabels()] == ["a", "b"]
    assert {x.get_xdata()[0] for x in ax.get_lines() if x.get_xdata()[0] != 0} == {7.5}
    assert "layer" in ax.get_xlabel() and "parameter" in ax.get_ylabel()
    assert ax.figure.axes[1].get_ylabel() == "|F| / max |F|"


def test_a_zero_matrix_is_white() -> None:
    ax = drawn(plots.fisher(np.zeros((3, 3)), title="none"))
    assert np.all(np.asarray(ax.get_images()[0].get_array()) == 1e-4)
    assert ax.get_title() == "none\ncondition number nan"


def test_whitening_is_a_pair_with_condition_numbers() -> None:
    axes = plt.figure().subplots(1, 2)
    left, right = plots.whitening(np.diag([1.0, 9.0]), np.diag([1.0, 3.0]), axes)
    assert left is axes[0] and right is axes[1]
    assert drawn(left).get_title().endswith("condition number 9")
    assert right.get_title().endswith("condition number 3")


def test_spectra_are_ordered_and_leave_zeros_out() -> None:
    values = {"A": np.array([0.0, 2.0, 1e-20, 5.0]), "G": np.array([1.0, 0.5])}
    ax = drawn(plots.spectra(values, damping=0.1))
    np.testing.assert_array_equal(ax.get_lines()[0].get_ydata(), [5, 2])
    assert ax.get_yscale() == "log" and "squared parameter" in ax.get_ylabel()
    labels = [x.get_text() for x in ax.get_legend().get_texts()]
    assert labels == ["A", "G", "damping 0.1"] and len(set(looks(ax)[:2])) == 2
    assert plots.spectra(values, unit="squared units").get_ylabel() == "eigenvalue (squared units)"


@pytest.mark.parametrize(("against", "label"), [("steps", "steps"), ("seconds", "(seconds)")])
def test_races(against: str, label: str) -> None:
    curve = {"steps": [0, 10, 20], "seconds": [0.0, 0.2, 0.4], "loss": [4.0, 3.0, 2.5]}
    ax = drawn(plots.race({"K-FAC": curve, "Adam": curve}, against=against, floor=2.0))
    np.testing.assert_array_equal(ax.get_lines()[0].get_xdata(), curve[against])
    np.testing.assert_array_equal(ax.get_lines()[1].get_ydata(), [2, 1, 0.5])
    assert ax.get_xlabel().endswith(label) and "nats per example" in ax.get_ylabel()
    ten = drawn(plots.race({str(i): curve for i in range(10)}, against=against))
    assert len(set(looks(ten))) == 10
    with pytest.raises(ValueError, match='"steps" or "seconds"'):
        plots.race({}, against="epochs")


def test_damping_leaves_out_what_was_not_recorded() -> None:
    ax = drawn(plots.damping({"λ": np.array([1.0, 2.0, np.nan])}))
    np.testing.assert_array_equal(ax.get_lines()[0].get_ydata(), [1, 2])
    assert "λ" in ax.get_ylabel() and ax.get_xlabel() == "steps"


def test_own_axes_are_used_and_returned() -> None:
    ax = plt.figure().subplots()
    assert plots.spectra({"F": np.ones(3)}, ax) is ax
    assert plots.damping({"λ": np.ones(3)}, ax) is ax


def test_matplotlib_is_optional_and_asked_for_by_name() -> None:
    """The library comes without it; the module says what to install."""
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "import natgrad_jax\n"
        "assert 'natgrad_jax.diagnostics.plots' not in sys.modules\n"
        "try:\n    import natgrad_jax.diagnostics.plots\n"
        "except ImportError as error:\n    print(error)\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'natgrad-jax[plots]'" in found.stdout
    assert ng.plots is plots and "plots" in dir(ng)
