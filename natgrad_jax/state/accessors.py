"""Read factors, their inverses and the damping out of the state of any optax chain."""

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Float, PyTree

from natgrad_jax.state.walk import plain, states
from natgrad_jax.utils.tree_paths import Path


@runtime_checkable
class HasFactors(Protocol):
    """The factors of one layer, as in every state of this library."""

    @property
    def A(self) -> Float[Array, "..."]: ...  # noqa: N802 the factor's name
    @property
    def G(self) -> Float[Array, "..."] | None: ...  # noqa: N802


def factors(opt_state: PyTree) -> dict[Path, HasFactors]:
    """The Kronecker factors by layer path: ``factors(s)[path].A`` and ``.G``, bias-corrected.

    They are zero before the first measurement.

    Args:
      opt_state: the state of any optax chain, wrapper or NNX optimizer that contains a state of
        this library.

    Returns:
      A dict from layer path to ``A (*stack, *blocks, inputs + bias, inputs + bias)`` and
      ``G (*stack, *blocks, outputs, outputs)``. An embedding has the diagonal of A, a block of one
      matrix F has A = F and no G, and other approximations have factors of other shapes.

    Raises:
      ValueError: ``opt_state`` contains no state with factors.

    >>> import natgrad_jax as ng
    >>> ng.factors(ng.kfac(0.1, ng.Layers({})).init({}))
    {}
    """
    return _merged(opt_state, "factors")


def bases(opt_state: PyTree) -> dict[Path, Any]:
    """What the last refresh computed from the factors, by layer path; for K-FAC, A⁻¹ and G⁻¹.

    Args:
      opt_state: as for :func:`factors`.

    Returns:
      A dict from layer path to the damped inverses (K-FAC, NGD; low-rank ones are
      ``V inner Vᵀ + shift I``), the eigenvectors in columns (EKFAC; all, or the leading
      ones), or the :class:`Coordinates` (:func:`in_coordinates`).

    Raises:
      ValueError: ``opt_state`` contains no state with bases.

    >>> import natgrad_jax as ng
    >>> ng.bases(ng.prong(0.1, ng.Layers({})).init({}))
    {}
    """
    return _merged(opt_state, "bases")


def damping(opt_state: PyTree) -> Float[Array, ""]:
    """The damping λ of the last step; before the first step, that of the first.

    Args:
      opt_state: as for :func:`factors`.

    Returns:
      λ, ``()``, in the units of the Fisher (loss per parameter squared).

    Raises:
      ValueError: ``opt_state`` contains no state with a damping, or several.

    >>> import natgrad_jax as ng
    >>> round(float(ng.damping(ng.kfac(0.1, ng.Layers({}), damping=0.5).init({}))), 2)
    0.5
    """
    found = _states(opt_state, "damping")
    if len(found) > 1:
        raise ValueError(
            f"opt_state contains {len(found)} transformations with a damping: pass the state of "
            "one of them."
        )
    return found[0]


def _merged(opt_state: PyTree, field: str) -> dict[Path, Any]:
    """``field``, a dict by layer path, merged over all states of this library."""
    return {path: x for found in _states(opt_state, field) for path, x in found.items()}


def _states(opt_state: PyTree, field: str) -> list[Any]:
    """``field`` of every state of this library inside ``opt_state``."""
    values = [getattr(x, field) for x in states(plain(opt_state)) if hasattr(x, field)]
    if not values:
        raise ValueError(
            f"opt_state holds no natgrad_jax state with {field}; pass the state of a chain that "
            "contains scale_by_kfac or another transformation of this library."
        )
    return values
