"""What every transformation does around its own mathematics: blocks of a gradient tree, the
diagonal of leftover parameters, the trust region, and the checks of what came in."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from natgrad_jax import averages, paths
from natgrad_jax.layers import Layer, Layers
from natgrad_jax.paths import Path, join
from natgrad_jax.statistics import Statistics

BlockMap = Callable[[Path, jax.Array], jax.Array]


def map_blocks(
    updates: optax.Updates, layers: Layers, of_layer: BlockMap, of_leftover: BlockMap
) -> tuple[optax.Updates, jax.Array]:
    """Map each layer's ``K̄`` and each leftover parameter; also ``Σ new · old`` over all of them.

    Layers whose parameters are all masked out (``optax.masked``, ``optax.partition``) are skipped.
    Results keep the dtypes of ``updates``; the mathematics runs in the factors' dtype.
    """
    given = paths.leaves(updates)
    _check_paths(given, layers)
    new: dict[Path, jax.Array] = {}
    inner = jnp.zeros((), float)
    for path, layer in layers.items():
        arrays = _parameters_of(layer, given)
        if arrays is None:
            continue
        old = layer.to_matrix(*arrays)
        mapped = of_layer(path, old)
        inner += jnp.sum(mapped * old).astype(inner.dtype)
        for parameter, x in zip(layer.parameters, layer.from_matrix(mapped), strict=False):
            assert x is not None
            new[parameter.path] = x.astype(given[parameter.path].dtype)
    for u in layers.leftover:
        path = u.parameter.path
        if path in given:
            old = given[path].astype(jnp.promote_types(given[path].dtype, jnp.float32))
            mapped = of_leftover(path, old)
            inner += jnp.sum(mapped * old).astype(inner.dtype)
            new[path] = mapped.astype(given[path].dtype)
    return paths.replace(updates, new), inner


def trust_region(updates: optax.Updates, quadratic: jax.Array, radius: jax.Array) -> optax.Updates:
    """Scale by ``min(1, √(κ / ΔᵀFΔ))``."""
    positive = jnp.where(quadratic > 0, quadratic, 1)
    scale = jnp.where(quadratic > 0, jnp.minimum(1, jnp.sqrt(radius / positive)), 1)
    return jax.tree.map(lambda x: x * scale.astype(x.dtype), updates)


def zero_diagonals(layers: Layers) -> dict[Path, jax.Array]:
    """Diagonal Fishers of the leftover parameters before anything was measured."""
    leftover = [u.parameter for u in layers.leftover]
    return {p.path: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)) for p in leftover}


def update_diagonals(
    diagonal: dict[Path, jax.Array],
    weights: dict[Path, jax.Array],
    statistics: Statistics,
    decay: jax.Array,
) -> tuple[dict[Path, jax.Array], dict[Path, jax.Array], jax.Array]:
    """The averages after this batch, their weights, and how many were not finite and dropped."""
    assert statistics.leftover is not None  # checked where statistics come in
    new, later, rejected = {}, {}, jnp.zeros((), jnp.int32)
    measured = statistics.examples > 0
    for path, old in diagonal.items():
        value = statistics.leftover[path] / jnp.where(measured, statistics.examples, 1)
        good = jnp.isfinite(jnp.sum(value)) & measured
        new[path], later[path] = averages.update(old, value, weights[path], decay, good)
        rejected += jnp.where(measured & ~good, 1, 0)
    return new, later, rejected


def check_statistics(statistics: Any, layers: Layers, name: str, outputs: bool = True) -> None:
    """Raise unless ``statistics`` were measured for ``layers`` (with a Fisher pass)."""
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
    if set(statistics.layers) != set(layers):
        strange = sorted(map(join, set(statistics.layers) ^ set(layers)))
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
        sums = statistics.layers[path]
        shapes = {"A": layer.input_factor_shape, "G": layer.output_factor_shape}
        for name_of, shape in shapes.items():
            factor, wanted = getattr(sums, name_of), layer.stack_sizes + shape
            if factor is not None and tuple(factor.shape) != wanted:
                raise ValueError(
                    f"statistics of layer {join(path)} have {name_of} of shape "
                    f"{tuple(factor.shape)}, these Layers need {wanted}: they were measured on "
                    "another model."
                )


def _check_paths(given: dict[Path, Any], layers: Layers) -> None:
    known = {p.path: p.shape for layer in layers.values() for p in layer.parameters}
    known |= {u.parameter.path: u.parameter.shape for u in layers.leftover}
    for path, x in given.items():
        if path not in known or tuple(x.shape) != known[path]:
            had = f"shape {known[path]}" if path in known else "no such parameter"
            raise ValueError(
                f"the gradients have {join(path)} of shape {tuple(x.shape)}; these Layers have "
                f"{had}. Call find_layers again with this model's params."
            )
    if known and not given:
        raise ValueError("the gradients hold no arrays: everything is masked out or missing.")


def _parameters_of(
    layer: Layer, given: dict[Path, jax.Array]
) -> tuple[jax.Array, jax.Array | None] | None:
    """The layer's gradients in its factors' dtype; None where all of them are masked out."""
    present = [p for p in layer.parameters if p.path in given]
    if not present:
        return None
    if len(present) < len(layer.parameters):
        absent = next(p for p in layer.parameters if p.path not in given)
        raise ValueError(
            f"layer {join(layer.path)} is masked in part: {join(absent.path)} is missing, and its "
            "block spans all of the layer. Mask whole layers, or freeze the parameter after this "
            "transformation."
        )
    arrays = [given[p.path].astype(layer.factor_dtype) for p in layer.parameters]
    return arrays[0], (arrays[1] if len(arrays) > 1 else None)
