"""How damping is divided between the two factors of a Kronecker product."""

import jax
import jax.numpy as jnp


def equal(a: jax.Array, g: jax.Array, damping: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``(√λ, √λ)``, whatever the factors are.

    Arguments and result as in :func:`split`. Source: Bernacchia et al. 2018, section 5.
    """
    root = jnp.sqrt(damping)
    return jnp.broadcast_to(root, a.shape), jnp.broadcast_to(root, g.shape)


def split(a: jax.Array, g: jax.Array, damping: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Damping of each factor: ``(A + π√λ I) ⊗ (G + (√λ/π) I) ≈ A ⊗ G + λ I``.

    ``π² = (tr A / dim A) / (tr G / dim G)`` makes the cross terms smallest for the trace norm.

    Args:
      a, g: mean eigenvalues ``tr A / dim A`` and ``tr G / dim G``, ``(*batch,)``; damping: λ, a
        scalar.

    Returns:
      ``(π√λ, √λ/π)``, each ``(*batch,)``. Where a factor is zero, π = 1.

    Source: Martens & Grosse 2015, section 6.3.
    """
    known = (a > 0) & (g > 0)
    pi = jnp.sqrt(jnp.where(known, a, 1) / jnp.where(known, g, 1))
    root = jnp.sqrt(damping).astype(pi.dtype)
    return pi * root, root / pi
