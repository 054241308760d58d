"""What factories and updates say about arguments that are missing or wrong."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from regression import quadratic

import natgrad_jax as ng

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("float64")]


def test_missing_arguments_show_the_call() -> None:
    own = quadratic()
    grads = own.params
    damped = ng.adaptive_damping(lambda d: optax.scale(d), ng.bernacchia(), own.loss_fn)
    model = ng.scale_by_quadratic_model(own.loss_fn)
    trust = ng.clip_by_trust_radius(1.0, own.loss_fn)
    for tx, message in (
        (damped, "value, args: write tx.update.*value=loss, args="),
        (model, "grad, args: write .*grad=grads, args="),
        (trust, "needs args"),
    ):
        with pytest.raises(ValueError, match=message):
            tx.update(grads, tx.init(own.params), own.params)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda x: ng.ngd(1.0, x, damping=0.0), 'inverse="eigh"'),
        (lambda x: ng.ngd(1.0, x, inverse=ng.Woodbury(3)), "give a decay"),
        (lambda x: ng.kfac(1.0, x, inverse="woodbury"), "needs the rank"),
        (lambda x: ng.kfac(1.0, x, inverse="svd"), "'low_rank'"),
        (lambda x: ng.kfac(1.0, x, inverse=ng.LowRank(0)), "whole number"),
        (lambda x: ng.kfac(1.0, x, statistics_fraction=0.0), r"in \(0, 1\]"),
        (lambda x: ng.ekfac(1.0, x, statistics_fraction=jnp.ones(())), "static_args"),
        (
            lambda x: ng.ekfac(1.0, x, refresh="staggered", refresh_period=lambda step: 20),
            "must be known",
        ),
        (lambda x: ng.kfac(1.0, x, refresh=ng.every(over=3)), "name of an axis"),
        (
            lambda x: ng.prong(
                1.0, x, refresh=ng.every(over=(jax.make_mesh((1,), ("data",)), "batch"))
            ),
            "the mesh has axes",
        ),
        (lambda x: ng.adaptive_damping(x, ng.bernacchia(), None, initial=1e9), "within bounds"),
        (lambda x: ng.levenberg_marquardt(omega=1.5), "omega"),
        (lambda x: ng.scale_by_quadratic_model(None, damping=-1.0), "not be negative"),
    ],
)
def test_errors(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(ng.Layers({}))
