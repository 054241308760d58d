"""Static choices: records, their shorthands, and 0.1.0's keywords, which warn."""

import dataclasses
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
import pytest
from transformations import batch, run_steps, setting

import natgrad_jax as ng

pytestmark = pytest.mark.once

Make = Callable[..., Any]

# What 0.1.0 wrote, what is written now, and the spelling that the warning must show.
OLD: dict[str, tuple[Make, dict[str, Any], dict[str, Any], str]] = {
    "rank": (ng.kfac, {"rank": 2}, {"inverse": ng.LowRank(2)}, "inverse=ng.LowRank(rank=2)"),
    "woodbury": (
        ng.kfac,
        {"inverse": "woodbury", "rank": 2, "statistics_period": 1},
        {"inverse": ng.Woodbury(2), "statistics_period": 1},
        "inverse=ng.Woodbury(rank=2)",
    ),
    "cutoff": (
        ng.ngd,
        {"inverse": "eigh", "cutoff": 1e-3},
        {"inverse": ng.Eigh(1e-3)},
        "inverse=ng.Eigh(cutoff=0.001)",
    ),
    "spread": (
        ng.kfac,
        {"refresh_period": 2, "spread": True},
        {"refresh": ng.staggered(2)},
        "refresh=ng.staggered()",
    ),
    "at once": (ng.ekfac, {"spread": False}, {"refresh": ng.every()}, "refresh=ng.every()"),
    "beside a shorthand": (
        ng.kfac,
        {"refresh": "staggered", "refresh_over": None, "rank": 2},
        {"refresh": ng.staggered(), "inverse": ng.LowRank(2)},
        "refresh=ng.staggered()",
    ),
    "approximation": (
        ng.scale_by_kfac,
        {"group_size": 3, "weight_sharing": "reduce"},
        {"approximation": ng.Approximation(group_size=3, weight_sharing="reduce")},
        "approximation=ng.Approximation(group_size=3, weight_sharing='reduce')",
    ),
    "sua": (
        ng.ekfac,
        {"convolution": "sua"},
        {"approximation": "sua"},
        "approximation=ng.Approximation(convolution='sua')",
    ),
    "tolerance": (
        ng.ekfac,
        {"basis": "qr", "basis_tolerance": 0.1},
        {"basis": ng.Eigenbasis("qr", 0.1)},
        "basis=ng.Eigenbasis(method='qr', tolerance=0.1)",
    ),
    "prong": (
        ng.prong,
        {"convolution": "kfc"},
        {"approximation": "kfc"},
        "approximation=ng.Approximation()",
    ),
}


def made(make: Make, given: dict[str, Any]) -> Any:
    own = {} if "scale_by" in make.__name__ else {"learning_rate": 0.1}
    return make(layers=setting().layers, **own, **given)


@pytest.mark.parametrize("name", OLD)
def test_old_keywords_mean_what_the_warning_says(name: str) -> None:
    make, old, new, spelled = OLD[name]
    with pytest.warns(DeprecationWarning) as caught:
        was = made(make, old)
    assert spelled in str(caught[0].message) and caught[0].filename == __file__
    results = [run_steps(tx, setting(), [batch(0), batch(1)]) for tx in (was, made(make, new))]
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_old_keywords_under_inject_hyperparams() -> None:
    with pytest.warns(DeprecationWarning, match="LowRank"):
        tx = optax.inject_hyperparams(ng.kfac, static_args=("rank",))(0.1, setting().layers, rank=2)
        state = tx.init(setting().params)
    assert "rank" not in state.hyperparams and "damping" in state.hyperparams


def test_records_pass_inject_hyperparams_untouched() -> None:
    given = {"inverse": ng.LowRank(2), "refresh": ng.staggered(2),
             "approximation": ng.Approximation("sua", 3)}  # fmt: skip
    tx = optax.inject_hyperparams(ng.kfac)(0.1, setting().layers, **given)
    plain = ng.kfac(0.1, setting().layers, **given)
    results = [run_steps(x, setting(), [batch(0)])[0] for x in (tx, plain)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *results)


def test_what_one_takes_all_take() -> None:
    """K-FAC's options are those of EKFAC (its ``basis`` is its ``inverse``), NGD and the rest."""
    shared = {"approximation", "refresh", "statistics_fraction", "factor_dtype", "decay",
              "statistics_period", "refresh_period", "trust_radius"}  # fmt: skip
    for make in (ng.kfac, ng.ekfac, ng.ngd, ng.adaptive_kfac, ng.scale_by_kfac, ng.scale_by_ekfac):
        assert shared <= set(inspect.signature(make).parameters), make.__name__


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda x: ng.kfac(0.1, x, ranks=3), "unexpected keyword argument 'ranks'"),
        (lambda x: ng.ekfac(0.1, x, cutoff=0.1), "unexpected keyword argument 'cutoff'"),
        (lambda x: ng.kfac(0.1, x, inverse=3), "a record such as ng.LowRank"),
        (lambda x: ng.kfac(0.1, x, inverse="cholesky", rank=3), "does not go with"),
        (lambda x: ng.kfac(0.1, x, approximation="kfac"), "a record such as ng.Approximation"),
        (lambda x: ng.kfac(0.1, x, refresh=20), "A number goes into refresh_period"),
        (lambda x: ng.kfac(0.1, x, refresh=ng.every(3), refresh_period=3), "leave one of them out"),
        (lambda x: ng.every(lambda step: 3), "go into the keyword refresh_period"),
        (lambda x: ng.every(0.5), "whole number"),
        (lambda x: ng.Approximation("suaa"), "'kfc' or 'sua'"),
        (lambda x: ng.Approximation(group_size=True), "whole number"),
        (lambda x: ng.Eigenbasis("svd"), "'eigh' or 'qr'"),
        (lambda x: ng.prong(0.1, x, refresh=ng.staggered(3)), "change in one step"),
        (lambda x: ng.prong(0.1, x, approximation=ng.Approximation(group_size=3)), "group_size"),
    ],
)
def test_errors_say_what_to_write(make: Make, message: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with pytest.raises((TypeError, ValueError), match=message):
            make(setting().layers)


def test_records_are_values() -> None:
    for record in (ng.LowRank(3), ng.Cholesky(), ng.Approximation("sua"), ng.staggered(3)):
        assert dataclasses.replace(record) == record and hash(record) == hash(record)
        assert not callable(record)
    assert ng.Cholesky() != ng.Eigh() and ng.LowRank(2) != ng.Woodbury(2)
    assert repr(ng.staggered(20, over="data")) == "staggered(20, over='data')"
    assert repr(ng.staggered(early=[1, 2])) == "staggered(early=(1, 2))"
