"""Read the explicit state out of any optax chain."""

from typing import Any

import jax

from natgrad_jax.state.walk import plain, states


def factors(opt_state: Any) -> dict[Any, Any]:
    """The Kronecker factors by layer path: ``factors(s)[path].A`` and ``.G``, bias-corrected.

    Zero before the first measurement.

    Args:
      opt_state: of any chain, wrapper or NNX optimizer that has a state of this library in it.

    Returns:
      From path to ``A (*stack, *blocks, inputs + bias, inputs + bias)`` and
      ``G (*stack, *blocks, outputs, outputs)``; in another form where the approximation says so.

    Raises:
      ValueError: there is no state of this library that has factors.

    >>> import natgrad_jax as ng
    >>> ng.factors(ng.kfac(0.1, ng.Layers({})).init({}))
    {}
    """
    return _merged(opt_state, "factors")


def bases(opt_state: Any) -> dict[Any, Any]:
    """The coordinates by layer path as of the last refresh; for K-FAC the damped inverses A⁻¹, G⁻¹.

    Args:
      opt_state: as for :func:`factors`.

    Returns:
      From path to the inverses (K-FAC, NGD; those of low rank as ``V diag(gains) Vᵀ + shift I``),
      the eigenvectors in columns (EKFAC; all, or the leading ones), or the :class:`Coordinates`
      (:func:`in_coordinates`).

    Raises:
      ValueError: there is no state of this library that has bases.

    >>> import natgrad_jax as ng
    >>> ng.bases(ng.prong(0.1, ng.Layers({})).init({}))
    {}
    """
    return _merged(opt_state, "bases")


def damping(opt_state: Any) -> jax.Array:
    """λ of the last step (before any: of the first), ``()``.

    Args:
      opt_state: as for :func:`factors`.

    Raises:
      ValueError: there is no state of this library that has a damping, or there are several.

    >>> import natgrad_jax as ng
    >>> round(float(ng.damping(ng.kfac(0.1, ng.Layers({}), damping=0.5).init({}))), 2)
    0.5
    """
    found = _states(opt_state, "damping")
    if len(found) > 1:
        raise ValueError(
            f"opt_state holds {len(found)} transformations with a damping: read each state itself."
        )
    return found[0]


def _merged(opt_state: Any, field: str) -> dict[Any, Any]:
    return {path: x for found in _states(opt_state, field) for path, x in found.items()}


def _states(opt_state: Any, field: str) -> list[Any]:
    """That field of every state of this library inside ``opt_state``: the ones with a clock."""
    values = [getattr(x, field) for x in states(plain(opt_state)) if hasattr(x, field)]
    if not values:
        raise ValueError(
            f"opt_state holds no natgrad_jax state with {field}; pass the state of a chain that "
            "has scale_by_kfac (or another transformation of this library) in it."
        )
    return values
