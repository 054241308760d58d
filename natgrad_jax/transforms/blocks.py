"""What every transformation does around its own mathematics: blocks of a gradient tree, the trust
region, and the checks of what came in."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from natgrad_jax.curvature.layer_sums import Sums
from natgrad_jax.layers.collection import Layers
from natgrad_jax.layers.gradients import BlockMap, check_paths, map_layers
from natgrad_jax.layers.layer import Layer
from natgrad_jax.statistics import Statistics
from natgrad_jax.utils import tree_paths
from natgrad_jax.utils.finite import zeros_unless
from natgrad_jax.utils.precision import at_least_float32
from natgrad_jax.utils.tree_paths import Path, join


def map_blocks(
    updates: optax.Updates, layers: Layers, of_layer: BlockMap, of_diagonal: BlockMap
) -> tuple[optax.Updates, jax.Array]:
    """Map each layer's packed ``K̄`` and each diagonal parameter; also ``Σ new · old`` over them.

    Layers whose parameters are all masked out (``optax.masked``, ``optax.partition``) are skipped.
    Results keep the dtypes of ``updates``; the mathematics runs in the factors' dtype. Where a
    result is not finite all of them are zero, so that no momentum sees it, and the sum is NaN.
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
    finite &= jnp.isfinite(inner)  # what is not finite makes its product with the old so
    return zeros_unless(finite, tree_paths.replace(updates, new)), jnp.where(finite, inner, jnp.nan)


def trust_region(
    updates: optax.Updates, layers: Layers, quadratic: jax.Array, radius: jax.Array
) -> optax.Updates:
    """Scale by ``min(1, √(κ / ΔᵀFΔ))``; plain gradients, of unknown F, stay as they are.

    A quadratic form that is NaN belongs to updates that are zero."""
    positive = jnp.where(quadratic > 0, quadratic, 1)
    scale = jnp.where(quadratic > 0, jnp.minimum(1, jnp.sqrt(radius / positive)), 1)
    plain = {x.path for x in layers.leftover if x.block == "gradient"}
    scaled = {
        path: x * scale.astype(x.dtype)
        for path, x in tree_paths.leaves(updates).items()
        if path not in plain
    }
    return tree_paths.replace(updates, scaled)


def check_statistics(
    statistics: Any, layers: Mapping[Path, Layer], name: str, outputs: bool = True
) -> None:
    """Raise unless ``statistics`` were measured for ``layers``; with a Fisher pass (``outputs``),
    or else for those of them at least that have inputs."""
    if statistics is None:
        raise ValueError(
            f"{name} needs this batch's curvature: write loss, grads, statistics = "
            "ng.value_and_grad(loss_fn, layers)(params, batch, rng=key, opt_state=opt_state), then "
            "tx.update(grads, opt_state, params, statistics=statistics)."
        )
    if not isinstance(statistics, Statistics):
        raise TypeError(
            f"statistics must be what ng.value_and_grad returns as its third result; got "
            f"{type(statistics).__name__}."
        )
    measured = {*statistics.layers, *statistics.reduced}
    if set(layers) - measured:
        strange = sorted(map(join, measured ^ set(layers)))
        raise ValueError(
            f"{name} and value_and_grad were given different Layers: {', '.join(strange)} are in "
            "one and not in the other. Pass the same Layers to both."
        )
    if outputs and statistics.leftover is None:
        raise ValueError(
            f'{name} needs output statistics, and value_and_grad(fisher="none") measures '
            'inputs alone. Use fisher="mc" (the default), "exact" or "empirical".'
        )
    for path, layer in layers.items():
        for sums in (statistics.layers.get(path), statistics.reduced.get(path)):
            if sums is not None:
                _check_shapes(layer, sums)


def _check_shapes(layer: Layer, sums: Sums) -> None:
    """Raise unless the sums are of this layer: its own factors, or whole ones."""
    sides = {"A": layer.input_side, "G": layer.output_side}
    own = layer.stack_sizes + ((layer.uses,) if layer.uses > 1 else ()) + layer.factor_blocks
    terms = (len(layer.terms),) if len(layer.terms) > 1 else ()
    for name, side in sides.items():
        factor = getattr(sums, name)
        if factor is None or side is None:
            continue
        lead = terms + own if layer.mixed or name == "G" else own
        wanted = [lead + side.shape, (*lead, side.size, side.size)]
        if tuple(factor.shape) not in wanted:
            raise ValueError(
                f"statistics of layer {join(layer.path)} have {name} of shape "
                f"{tuple(factor.shape)}, these Layers need {wanted[0]}: they were measured on "
                "another model, or for another group_size or convolution."
            )
