"""Every transformation and option on networks of real widths: traced, never computed.

The shapes that a program has at its defaults and beyond, on both sides of every constant of size:
after an update a state has the types of the state before, and updates those of the parameters.
"""

import dataclasses
import functools
import itertools
from typing import Any

import abstract_zoo as zoo
import jax.numpy as jnp
import optax
import pytest
from abstract_networks import WHOLE
from transformations import TABLE, Row, assert_types_stay

import natgrad_jax as ng
from natgrad_jax.curvature.inverse_methods import RANK
from natgrad_jax.transforms.common.options import EIGENVECTORS

pytestmark = pytest.mark.no_cover  # that would take half as long again, and other tests cover it

RATE = {"learning_rate": 0.1}


def approximated(**fields: Any) -> dict[str, Any]:
    return {"approximation": ng.Approximation(**fields)}


# Values beside the defaults, by what they decide: two of one line exclude each other.
SHARED: dict[str, list[dict[str, Any]]] = {
    "convolution": [approximated(convolution="sua")],
    "group_size": [approximated(group_size=n) for n in (RANK, 3 * RANK // 2, 1)],
    "weight_sharing": [approximated(weight_sharing="reduce")],
    "max_size": [approximated(max_size=2 * EIGENVECTORS)],
    "factor_dtype": [{"factor_dtype": jnp.bfloat16}],
    "statistics_fraction": [{"statistics_fraction": 0.5}],
    "refresh": [{"refresh": ng.every(20)}, {"refresh": ng.staggered(3)}],
}
KFAC = {
    "inverse": [
        {"inverse": "cholesky"}, {"inverse": "eigh"}, {"inverse": "newton_schulz"},
        {"inverse": ng.Woodbury(RANK), "statistics_period": 1}, {"inverse": ng.LowRank(1)},
        {"inverse": ng.LowRank(2 * RANK)},
    ],
    **SHARED,
}  # fmt: skip
EKFAC = {
    "basis": [
        {"basis": "eigh"}, {"basis": "qr"}, {"basis": ng.Eigenbasis("qr", 0.1)},
        {"basis": ng.LowRank(1)}, {"basis": ng.LowRank(2 * RANK)},
    ],
    "moments": [{"moments": "running_average"}],
    **SHARED,
}  # fmt: skip
NGD = {
    "inverse": [
        {"inverse": "low_rank"}, {"inverse": "eigh", "damping": 0.0},
        {"inverse": "newton_schulz"}, {"inverse": ng.Woodbury(1), "decay": 0.9},
    ],
}  # fmt: skip
PRONG = {
    "plus": [{"plus": True}],
    "rank": [{"rank": RANK}],
    "convolution": [approximated(convolution="kfc")],
    "weight_sharing": [approximated(convolution="sua", weight_sharing="reduce")],
    "samples": [{"samples": 1000}],
}
FAMILIES: dict[str, tuple[Any, dict[str, list[dict[str, Any]]]]] = {
    "kfac": (functools.partial(ng.kfac, **RATE), KFAC),
    "ekfac": (functools.partial(ng.ekfac, **RATE), EKFAC),
    "ngd": (functools.partial(ng.ngd, **RATE), NGD),
    "prong": (functools.partial(ng.prong, **RATE), PRONG),
    **{
        f"in_coordinates, {coordinates}": (
            functools.partial(ng.in_coordinates, optax.adam(1e-3), coordinates=coordinates),
            {"convolution": [approximated(convolution="kfc")]},
        )
        for coordinates in ("whitening", "whitening_plus", "both_sides", "eigenbasis", "identity")
    },
}


def row(family: str, *chosen: dict[str, Any]) -> Row:
    factory, given = FAMILIES[family][0], {k: v for one in chosen for k, v in one.items()}
    forms = [one["approximation"] for one in chosen if "approximation" in one]
    if len(forms) > 1:
        fields = {k: v for form in forms for k, v in chosen_fields(form).items()}
        given |= approximated(**fields)
    return Row(factory, lambda s: {"layers": s.layers, **given})


def chosen_fields(record: Any) -> dict[str, Any]:
    """What is not default in a record."""
    own = {x.name: (getattr(record, x.name), x.default) for x in dataclasses.fields(record)}
    return {name: value for name, (value, usual) in own.items() if value != usual}


def told(family: str, *chosen: dict[str, Any]) -> str:
    values = []
    for k, v in (item for one in chosen for item in one.items()):
        if isinstance(v, ng.Approximation):
            values += [f"{name}={value}" for name, value in chosen_fields(v).items()]
        else:
            values.append(f"{k}={getattr(v, '__name__', v)}")
    return ", ".join([family, *values])


# What each transformation does where nothing is said.
DEFAULTS = {name: row(name) for name in FAMILIES} | {
    name: TABLE[name]
    for name in ("adaptive_kfac", "adaptive_damping", "scale_by_quadratic_model",
                 "clip_by_trust_radius")
}  # fmt: skip
SINGLES = {
    told(family, one): (row(family, one), option)
    for family, (_, choices) in FAMILIES.items()
    for option, values in choices.items()
    for one in values
}
PAIRS = {
    told(family, one, other): row(family, one, other)
    for family in ("kfac", "ekfac")
    for first, second in itertools.combinations(FAMILIES[family][1].values(), 2)
    for one, other in itertools.product(first[:-1] or first, second[:-1] or second)
}


def check(row: Row, network: zoo.Network) -> None:
    assert_types_stay(row.make(network.setting), network.setting, network.batch)


@pytest.mark.parametrize("name", DEFAULTS)
@pytest.mark.parametrize("kind", zoo.KINDS)
def test_defaults_at_every_width(kind: str, name: str) -> None:
    widths = zoo.EVERY if name in ("kfac", "ekfac") else zoo.SIDES
    check(DEFAULTS[name], zoo.small(kind, zoo.MAIN if zoo.KINDS[kind].many else widths))


@pytest.mark.once
@pytest.mark.parametrize(
    "kind, name",
    [(kind, name) for kind, how in zoo.KINDS.items() for name, (_, option) in SINGLES.items()
     if option not in how.without],
)  # fmt: skip
def test_every_option_on_both_sides(kind: str, name: str) -> None:
    """Of low rank and whole; where that is all that is asked, or all there is, of every form."""
    (own, option), how = SINGLES[name], zoo.KINDS[kind]
    forms = option in ("inverse", "basis", "rank") or "group_size" in how.without
    check(own, zoo.small(kind, zoo.SIDES if forms and not how.many else zoo.MAIN))


@pytest.mark.once
@pytest.mark.parametrize("name", PAIRS)
def test_pairs_of_options(name: str) -> None:
    check(PAIRS[name], zoo.mixed())


@pytest.mark.once
@pytest.mark.parametrize("edge", zoo.EDGES)
def test_depths_batches_and_chosen_blocks(edge: str) -> None:
    network = zoo.EDGES[edge]()
    for name in ("kfac", "ekfac", "ngd"):
        check(DEFAULTS[name], network)
    for name in ("kfac, weight_sharing=reduce", "ekfac, statistics_fraction=0.5"):
        check(SINGLES[name][0], network)


@functools.cache
def network(name: str, whole: bool) -> zoo.Network:
    return WHOLE[name](whole)


@pytest.mark.once
@pytest.mark.parametrize("name", DEFAULTS)
@pytest.mark.parametrize("published", WHOLE)
def test_published_networks_at_the_defaults(published: str, name: str) -> None:
    check(DEFAULTS[name], network(published, whole=name == "kfac"))
