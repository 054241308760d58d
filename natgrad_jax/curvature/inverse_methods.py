"""How the damped inverse of a factor is computed: one small record per method."""

import dataclasses
from typing import Any

import jax

from natgrad_jax.layers.factor_structure import FactorStructure
from natgrad_jax.layers.layer import Layer
from natgrad_jax.linalg.batched_solve import Problem
from natgrad_jax.linalg.cholesky import damped_inverse
from natgrad_jax.linalg.low_rank import is_cheaper
from natgrad_jax.linalg.newton_schulz import newton_schulz_inverse
from natgrad_jax.linalg.pseudo_inverse import pseudo_inverse
from natgrad_jax.linalg.retry import raised

RANK = 32  # eigenpairs, if no number is given


@dataclasses.dataclass(frozen=True)
class InverseMethod:
    """The interface of a method; defaults are those of Cholesky."""

    def exact(self, factor: jax.Array, damping: jax.Array, old: Any) -> Problem:
        """The whole inverse of ``factor + damping · I``; ``old`` is the last one."""
        return Problem(raised, (factor, damping), (("op", damped_inverse),), fills=True)

    def low_rank(self, layer: Layer, side: FactorStructure) -> int:
        """The rank of the inverse of that factor; 0: exact."""
        return 0

    @property
    def update_rank(self) -> int:
        """The rank of the updates between refreshes; 0: no updates."""
        return 0


@dataclasses.dataclass(frozen=True)
class Cholesky(InverseMethod):
    """Exact inverses by Cholesky factorisation.

    >>> import natgrad_jax as ng
    >>> tx = ng.kfac(0.1, ng.Layers({}), inverse=ng.Cholesky())
    """


@dataclasses.dataclass(frozen=True)
class Eigh(InverseMethod):
    """Moore–Penrose inverses by eigendecomposition.

    Args:
      cutoff: eigenvalues at or below ``cutoff`` times the largest count as zero; None: n times the
        precision's ε.

    >>> import natgrad_jax as ng
    >>> tx = ng.ngd(1.0, ng.Layers({}), inverse=ng.Eigh(cutoff=1e-6), damping=0.0)
    """

    cutoff: float | None = None

    def exact(self, factor: jax.Array, damping: jax.Array, old: Any) -> Problem:
        return Problem(pseudo_inverse, (factor, damping), (("cutoff", self.cutoff),))


@dataclasses.dataclass(frozen=True)
class LowRank(InverseMethod):
    """The leading eigenpairs of each factor, warm-started, and the mean of all other eigenvalues.

    Factors of at most twice the rank, and blocks with one matrix, are treated exactly.

    Args:
      rank: eigenpairs kept; ``inverse="low_rank"`` stands for 32, ``basis="low_rank"`` for 64;
        :func:`natgrad_jax.rank_for` computes what a model needs.

    Raises:
      ValueError: ``rank`` is no whole number of at least 1.

    Source: Halko, Martinsson & Tropp 2011, algorithms 4.4 and 5.3 (the eigenpairs).

    >>> import natgrad_jax as ng
    >>> tx = ng.kfac(0.1, ng.Layers({}), inverse=ng.LowRank(rank=64))
    """

    rank: int

    def __post_init__(self) -> None:
        _check_rank(self.rank)

    def low_rank(self, layer: Layer, side: FactorStructure) -> int:
        # a block with one matrix is inverted exactly, whatever its size
        may_be = layer.output_side is not None and side.supports_low_rank
        return self.rank if may_be and is_cheaper(self.rank, side.width) else 0


@dataclasses.dataclass(frozen=True)
class NewtonSchulz(InverseMethod):
    """Inverses by matrix products alone, iterated from the last inverse.

    Source: Schulz 1933; Pan & Reif 1985 for the start.

    >>> import natgrad_jax as ng
    >>> tx = ng.kfac(0.1, ng.Layers({}), inverse=ng.NewtonSchulz())
    """

    def exact(self, factor: jax.Array, damping: jax.Array, old: Any) -> Problem:
        return Problem(newton_schulz_inverse, (factor, damping, old), fills=True)


@dataclasses.dataclass(frozen=True)
class Woodbury(InverseMethod):
    """Cholesky at a refresh, and a low-rank update for each measured batch in between.

    Between refreshes the damping, that of the last refresh, fades with the factors' decay.

    Args:
      rank: of the updates.

    Raises:
      ValueError: ``rank`` is no whole number of at least 1.

    Source: Woodbury 1950; Tropp, Yurtsever, Udell & Cevher 2017, algorithm 3 (a factor's root).

    >>> import natgrad_jax as ng
    >>> tx = ng.kfac(0.1, ng.Layers({}), inverse=ng.Woodbury(rank=32))
    """

    rank: int

    def __post_init__(self) -> None:
        _check_rank(self.rank)

    @property
    def update_rank(self) -> int:
        return self.rank


Inverse = Cholesky | Eigh | LowRank | NewtonSchulz | Woodbury


def _check_rank(rank: object) -> None:
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(
            "rank, the number of directions kept, must be a whole number of at least 1; got "
            f"{rank!r}."
        )


# What the shorthands stand for.
METHODS: dict[str, Inverse] = {
    "cholesky": Cholesky(),
    "eigh": Eigh(),
    "low_rank": LowRank(RANK),
    "newton_schulz": NewtonSchulz(),
}
