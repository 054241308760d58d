"""The optimizers whose rate the races search, each with its grid.

Two are found outside this repository and may be missing: ``psgd-kron``, PSGD with Kronecker
factors, is in the package psgdax; ``soap-port``, SOAP, in github.com/haydn-jones/SOAP_JAX.
"""

import contextlib
import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from lib.tasks import Task

import natgrad_jax as ng

ADAM = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
MUON = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
INSIDE = ("adam", "sgd", "muon", "soap", "shampoo")
OUTSIDE = {"psgd-kron": ("psgdax", "kron"), "soap-port": ("soap_jax", "soap")}  # modules, names


class Searched(NamedTuple):
    """An optimizer with a rate still to be found."""

    alias: Callable[[Any], optax.GradientTransformation]
    rates: tuple[float, ...]


def searched(task: Task) -> dict[str, Searched]:
    """All that is here for a task."""
    adams, muons = (tuple(task.scale * rate for rate in rates) for rates in (ADAM, MUON))
    inside = {
        "adam": Searched(optax.adam, adams),
        "sgd": Searched(partial(optax.sgd, momentum=0.9), task.sgd),
        "muon": Searched(muon, muons),
        "soap": Searched(ng.soap, adams),
        "shampoo": Searched(ng.shampoo, adams),
    }
    return inside | {name: Searched(quiet(alias), adams) for name, alias in outside().items()}


def outside() -> dict[str, Callable[..., Any]]:
    """Those of OUTSIDE that can be imported."""
    found = {}
    for name, (module, attribute) in OUTSIDE.items():
        with contextlib.suppress(ImportError):
            found[name] = getattr(importlib.import_module(module), attribute)
    return found


def quiet(alias: Callable[..., Any]) -> Callable[[Any], optax.GradientTransformation]:
    """The alias, whose ``init`` prints nothing and gives arrays that nobody else holds."""

    def make(rate: Any) -> optax.GradientTransformation:
        tx = alias(rate)

        def init(params: Any) -> Any:
            with contextlib.redirect_stdout(None):
                return jax.tree.map(jnp.copy, tx.init(params))

        return optax.GradientTransformation(init, tx.update)

    return make


def muon(rate: Any) -> optax.GradientTransformation:
    """Muon for all kernels, as matrices; Adam for embeddings, biases and scales."""

    def of(path: Any, x: jax.Array) -> Any:
        name, layer = path[-1].key, path[-2].key
        if name != "kernel":
            return None
        rows = x.ndim - 1 if layer == "out" or x.ndim == 4 else 1  # attention's; convolutions'
        axes = tuple(range(x.ndim))
        return optax.contrib.MuonDimensionNumbers(axes[:rows], axes[rows:])

    dimensions = partial(jax.tree.map_with_path, of)
    return optax.contrib.muon(rate, muon_weight_dimension_numbers=dimensions)


def injected(alias: Callable[[Any], Any]) -> Callable[[float], Any]:
    """The alias with its rate as a part of the state: one compiled step serves all rates."""
    return optax.inject_hyperparams(lambda learning_rate: alias(learning_rate))
