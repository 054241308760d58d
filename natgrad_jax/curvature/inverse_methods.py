"""How the damped inverse of a factor is computed: one small record a method."""

import dataclasses

RANK = 64  # eigenpairs, where no number is given


@dataclasses.dataclass(frozen=True)
class Cholesky:
    """Exact inverses by Cholesky factorisation.

    >>> import natgrad_jax as ng
    >>> tx = ng.kfac(0.1, ng.Layers({}), inverse=ng.Cholesky())
    """


@dataclasses.dataclass(frozen=True)
class Eigh:
    """Moore–Penrose inverses by eigendecomposition.

    Args:
      cutoff: eigenvalues at or below ``cutoff`` times the largest count as zero; None: n times the
        precision's ε.

    >>> import natgrad_jax as ng
    >>> tx = ng.ngd(1.0, ng.Layers({}), inverse=ng.Eigh(cutoff=1e-6), damping=0.0)
    """

    cutoff: float | None = None


@dataclasses.dataclass(frozen=True)
class LowRank:
    """The leading eigenpairs of each factor, warm-started, and all others at their mean.

    Factors of at most twice the rank, and blocks with one matrix, are treated exactly.

    Args:
      rank: eigenpairs kept; :func:`natgrad_jax.rank_for` tells what a trained model needs.

    Raises:
      ValueError: ``rank`` is no whole number of at least 1.

    >>> import natgrad_jax as ng
    >>> tx = ng.kfac(0.1, ng.Layers({}), inverse=ng.LowRank(rank=32))
    """

    rank: int = RANK

    def __post_init__(self) -> None:
        _check_rank(self.rank)


@dataclasses.dataclass(frozen=True)
class NewtonSchulz:
    """Inverses by matrix products alone, iterated from the last inverse.

    >>> import natgrad_jax as ng
    >>> tx = ng.kfac(0.1, ng.Layers({}), inverse=ng.NewtonSchulz())
    """


@dataclasses.dataclass(frozen=True)
class Woodbury:
    """Cholesky at a refresh, and an update of low rank for each measured batch in between.

    Between refreshes the damping of the last one fades with the factors' decay.

    Args:
      rank: of the updates.

    Raises:
      ValueError: ``rank`` is no whole number of at least 1.

    >>> import natgrad_jax as ng
    >>> tx = ng.kfac(0.1, ng.Layers({}), inverse=ng.Woodbury(rank=32))
    """

    rank: int

    def __post_init__(self) -> None:
        _check_rank(self.rank)


Inverse = Cholesky | Eigh | LowRank | NewtonSchulz | Woodbury

# The shorthands of the methods.
METHODS: dict[str, type[Inverse]] = {
    "cholesky": Cholesky,
    "eigh": Eigh,
    "low_rank": LowRank,
    "newton_schulz": NewtonSchulz,
    "woodbury": Woodbury,
}


def _check_rank(rank: object) -> None:
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(
            f"rank is how many directions are kept, a whole number of at least 1; got {rank!r}."
        )
