"""The states of this library in an optimizer state, each with its layers."""

from typing import Any, NamedTuple

from natgrad_jax.curvature import damping_split
from natgrad_jax.curvature.factor_averages import in_full
from natgrad_jax.layers.collection import Layers, check_layers
from natgrad_jax.state.walk import plain, states
from natgrad_jax.statistics.spec import decode
from natgrad_jax.transforms.common.coordinate_state import InCoordinatesState
from natgrad_jax.transforms.common.kronecker import KFACState
from natgrad_jax.transforms.ekfac import EKFACState
from natgrad_jax.utils.tree_paths import Path, join


class Found(NamedTuple):
    """``kind``: ``"kfac"``, ``"ngd"``, ``"ekfac"`` or ``"in_coordinates"``; ``name``: the same, or
    ``"kfac_1"`` for the second one; ``layers``: all layers, in the form of the state's factors
    (layers without coordinates have none there)."""

    kind: str
    name: str
    state: Any
    layers: Layers

    @property
    def has_inverses(self) -> bool:
        """Whether its bases are damped inverses."""
        return isinstance(self.state, KFACState)

    @property
    def has_moments(self) -> bool:
        """Whether its bases are eigenvectors, with second moments at their coordinates."""
        return isinstance(self.state, EKFACState)

    @property
    def has_coordinates(self) -> bool:
        """Whether its bases are coordinates in which another transformation runs."""
        return isinstance(self.state, InCoordinatesState)

    def factors(self, path: Path) -> Any:
        """The factors of one layer, in full precision."""
        return in_full(self.layers[path], self.state.factors[path])


def found_in(layers: Layers, opt_state: Any) -> list[Found]:
    """Every state of this library, in order; raises ValueError for none, or for other layers."""
    check_layers(layers)
    found: list[Found] = []
    for state in states(plain(opt_state)):
        strange = set(state.factors) - set(layers)
        if strange:
            raise ValueError(
                f"opt_state has factors of {', '.join(sorted(map(join, strange)))}, but these "
                "Layers have no such layers: pass the Layers that it was made with."
            )
        request = decode(state.request)
        kind = _kind(state, request.split)
        before = sum(x.kind == kind for x in found)
        name = f"{kind}_{before}" if before else kind
        found.append(Found(kind, name, state, layers.approximate(request.approximation)))
    if not found:
        raise ValueError(
            "opt_state holds no natgrad_jax state; pass the state of a chain that contains "
            "scale_by_kfac or another transformation of this library."
        )
    return found


def _kind(state: Any, split: str) -> str:
    if isinstance(state, EKFACState):
        return "ekfac"
    if isinstance(state, InCoordinatesState):
        return "in_coordinates"
    return "kfac" if split == damping_split.DEFAULT else "ngd"
