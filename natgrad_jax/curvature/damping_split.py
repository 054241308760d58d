"""Rules, by name, that divide the damping between the two factors of a Kronecker product."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Rule = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def pi(a: jax.Array, g: jax.Array, damping: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``(π√λ, √λ/π)``: ``(A + π√λ I) ⊗ (G + (√λ/π) I) ≈ A ⊗ G + λ I``.

    ``π² = (tr A / dim A) / (tr G / dim G)`` makes the cross terms smallest for the trace norm.

    Args:
      a, g: mean eigenvalues ``tr A / dim A`` and ``tr G / dim G``, ``(*batch,)``; damping: λ, a
        scalar.

    Returns:
      The damping of A and that of G, each ``(*batch,)``. Where a factor is zero, π = 1.

    Source: Martens & Grosse 2015, section 6.3.
    """
    known = (a > 0) & (g > 0)
    ratio = jnp.sqrt(jnp.where(known, a, 1) / jnp.where(known, g, 1))
    root = jnp.sqrt(damping).astype(ratio.dtype)
    return ratio * root, root / ratio


def equal(a: jax.Array, g: jax.Array, damping: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``(√λ, √λ)`` for all factors.

    Arguments and result as in :func:`pi`. Source: Bernacchia et al. 2018, section 5.
    """
    root = jnp.sqrt(damping)
    return jnp.broadcast_to(root, a.shape), jnp.broadcast_to(root, g.shape)


RULES: dict[str, Rule] = {"pi": pi, "equal": equal}
DEFAULT = "pi"


def rule(name: str) -> Rule:
    """The rule of that name; raises ValueError listing the known names.

    >>> rule("half")
    Traceback (most recent call last):
      ...
    ValueError: damping is split by 'pi' or 'equal'; got 'half'.
    """
    if name not in RULES:
        raise ValueError(f"damping is split by {' or '.join(map(repr, RULES))}; got {name!r}.")
    return RULES[name]
