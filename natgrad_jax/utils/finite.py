"""Replace updates by zeros if any of them is not finite."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int, PyTree


def only_finite(updates: optax.Updates) -> tuple[optax.Updates, Int[Array, ""]]:
    """The updates and 0, or zeros and 1 if any number in them is not finite."""
    finite = all_finite(updates)
    return zeros_unless(finite, updates), 1 - finite.astype(jnp.int32)


def all_finite(tree: PyTree) -> Bool[Array, ""]:
    """Whether every number is finite."""
    finite = jnp.ones((), bool)
    for x in jax.tree.leaves(tree):
        finite &= jnp.all(jnp.isfinite(x))
    return finite


def zeros_unless(finite: Bool[Array, ""], updates: optax.Updates) -> optax.Updates:
    """The updates if ``finite``, else zeros."""
    return jax.tree.map(lambda x: jnp.where(finite, x, jnp.zeros_like(x)), updates)
