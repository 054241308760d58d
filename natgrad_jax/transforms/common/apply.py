"""What all transformations share: mapping the blocks of a gradient tree, and the trust region."""

import jax
import jax.numpy as jnp
import optax

from natgrad_jax.layers.collection import Layers
from natgrad_jax.layers.gradients import BlockMap, check_paths, map_layers
from natgrad_jax.utils import tree_paths
from natgrad_jax.utils.finite import zeros_unless
from natgrad_jax.utils.precision import at_least_float32
from natgrad_jax.utils.tree_paths import Path


def map_blocks(
    updates: optax.Updates, layers: Layers, of_layer: BlockMap, of_diagonal: BlockMap
) -> tuple[optax.Updates, jax.Array]:
    """Map each layer's packed ``K̄`` and each diagonal parameter; also return ``Σ new · old``.

    Layers whose parameters are all masked out (``optax.masked``, ``optax.partition``) are skipped.
    Results keep the dtypes of ``updates``; the mathematics runs in the factors' dtype. If any
    result is non-finite, all results are zero, to keep it out of momentum, and the sum is NaN.
    """
    given = tree_paths.leaves(updates)
    check_paths(given, layers)
    inner, finite = jnp.zeros((), float), jnp.ones((), bool)

    def noted(path: Path, x: jax.Array) -> jax.Array:
        nonlocal inner
        mapped = of_layer(path, x)
        inner += jnp.sum(mapped * x).astype(inner.dtype)
        return mapped

    updates = map_layers(updates, layers, noted)
    new: dict[Path, jax.Array] = {}
    for leftover in layers.leftover:
        path = leftover.path
        if path not in given:
            continue
        if leftover.block == "frozen":
            new[path] = jnp.zeros_like(given[path])
        elif leftover.block == "diagonal":
            old = given[path].astype(at_least_float32(given[path].dtype))
            mapped = of_diagonal(path, old)
            inner += jnp.sum(mapped * old).astype(inner.dtype)
            new[path] = mapped.astype(given[path].dtype)
        else:
            finite &= jnp.all(jnp.isfinite(given[path]))
    finite &= jnp.isfinite(inner)  # a non-finite result makes the sum of products non-finite
    return zeros_unless(finite, tree_paths.replace(updates, new)), jnp.where(finite, inner, jnp.nan)


def trust_region(
    updates: optax.Updates, layers: Layers, quadratic: jax.Array, radius: jax.Array
) -> optax.Updates:
    """Scale by ``min(1, √(κ / ΔᵀFΔ))``; plain gradients, whose F is unknown, are not scaled.

    Where the quadratic form is NaN, the updates are zero already."""
    positive = jnp.where(quadratic > 0, quadratic, 1)
    scale = jnp.where(quadratic > 0, jnp.minimum(1, jnp.sqrt(radius / positive)), 1)
    plain = {x.path for x in layers.leftover if x.block == "gradient"}
    scaled = {
        path: x * scale.astype(x.dtype)
        for path, x in tree_paths.leaves(updates).items()
        if path not in plain
    }
    return tree_paths.replace(updates, scaled)
