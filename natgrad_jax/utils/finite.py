"""Updates of which one is not finite: none of them is taken."""

import jax
import jax.numpy as jnp
import optax


def only_finite(updates: optax.Updates) -> tuple[optax.Updates, jax.Array]:
    """The updates and 0; zeros and 1 where any number in them is not finite."""
    finite = jnp.ones((), bool)
    for x in jax.tree.leaves(updates):
        finite &= jnp.all(jnp.isfinite(x))
    return zeros_unless(finite, updates), 1 - finite.astype(jnp.int32)


def zeros_unless(finite: jax.Array, updates: optax.Updates) -> optax.Updates:
    """The updates, or zeros."""
    return jax.tree.map(lambda x: jnp.where(finite, x, jnp.zeros_like(x)), updates)
