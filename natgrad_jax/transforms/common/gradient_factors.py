"""What SOAP and Shampoo share: Kronecker factors of gradients, of any tree of parameters."""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from natgrad_jax.curvature import factor_averages
from natgrad_jax.curvature.eigenbases import Eigenbasis, eigenbases
from natgrad_jax.curvature.factor_averages import Factors, in_full
from natgrad_jax.curvature.inverse_methods import LowRank
from natgrad_jax.curvature.inverses import keep_finite
from natgrad_jax.layers.approximation import Approximation
from natgrad_jax.layers.bundles import bundled
from natgrad_jax.layers.collection import Layers
from natgrad_jax.layers.layer import Layer, Parameter
from natgrad_jax.layers.layout import Layout
from natgrad_jax.linalg.batched_solve import solve
from natgrad_jax.utils import tree_paths
from natgrad_jax.utils.precision import of_squares
from natgrad_jax.utils.tree_paths import Path

State = TypeVar("State", bound=Any)
Shapes = tuple[tuple[Path, tuple[int, ...], Any], ...]


class Found(NamedTuple):
    """New bases and the products of eigenvalues ``d_A d_Gᵀ`` at their coordinates, by layer path,
    and the number of failures."""

    bases: dict[Path, Any]
    products: dict[Path, jax.Array]
    failures: jax.Array


def kernels_of(tree: Any, max_size: int | None) -> Layers:
    """Each array of at least two axes as a matrix, those of equal shape as one.

    The axes in front are its rows and the others its columns, divided where the two sides are the
    most equal: a kernel ``(3, 3, 64, 128)`` is 576 × 128.
    """
    leaves = {path: x for path, x in tree_paths.leaves(tree).items() if hasattr(x, "shape")}
    shapes = tuple((path, tuple(x.shape), jnp.dtype(x.dtype)) for path, x in leaves.items())
    return _kernels(shapes, max_size)


@functools.lru_cache(maxsize=256)
def _kernels(shapes: Shapes, max_size: int | None) -> Layers:
    own = (_kernel(*x, max_size) for x in shapes if sum(n > 1 for n in x[1]) > 1)
    return bundled(Layers({layer.path: layer for layer in own}))


def _kernel(path: Path, shape: tuple[int, ...], dtype: Any, max_size: int | None) -> Layer:
    wider = lambda k: max(math.prod(shape[:k]), math.prod(shape[k:]))
    k, axes = min(range(1, len(shape)), key=wider), tuple(range(len(shape)))
    return Layer(
        path=path,
        kind="dense",
        parameters=(Parameter(path, shape, dtype),),
        layouts=(Layout(shape, (), axes[:k], axes[k:]),),
        approximation=Approximation(max_size=max_size, beyond="diagonal"),
    )


def split(tree: Any, layers: Layers) -> tuple[dict[Path, jax.Array], dict[Path, jax.Array]]:
    """The arrays that are kernels, and all others, by path."""
    own = {p.path for layer in layers.values() for one in layer.each for p in one.parameters}
    given = tree_paths.leaves(tree)
    kernels = {path: x for path, x in given.items() if path in own}
    return kernels, {path: x for path, x in given.items() if path not in own}


def averaged(
    state: State, given: Mapping[Path, jax.Array], layers: Layers, decay: jax.Array, good: jax.Array
) -> State:
    """The state with ``∇ ∇ᵀ`` and ``∇ᵀ ∇`` of these matrices averaged into its factors,
    bias-corrected, if they are ``good``."""
    factors, weights = dict(state.factors), dict(state.weights)
    for path, x in given.items():
        layer = layers[path]
        new = Factors(_gram(layer.input_side, x), _gram(layer.output_side, x.mT))
        informative = jnp.broadcast_to(good, weights[path].shape)
        rate, weights[path] = factor_averages.rate(weights[path], decay, informative)
        step = functools.partial(factor_averages.step, rate)
        factors[path] = jax.tree.map(step, factors[path], new)
    return state._replace(factors=factors, weights=weights)


def _gram(side: Any, x: jax.Array) -> jax.Array:
    """``x xᵀ``, or its diagonal."""
    if len(side.shape) == 1:
        return jnp.sum(jnp.square(x), axis=-1)
    return jnp.matmul(x, x.mT, precision=of_squares())


def renewed(
    layers: Mapping[Path, Layer], state: Any, how: Eigenbasis, over: Any, known: Any
) -> Found:
    """The eigenbases of the state's factors; failures keep the old ones, with products of NaN.

    ``known(path)``: whether a layer has a basis already."""
    of = lambda path, layer: eigenbases(
        layer, in_full(layer, state.factors[path]), state.bases[path], ~known(path), how
    )
    found = solve({path: of(path, layer) for path, layer in layers.items()}, over)
    bases, failures = {}, jnp.zeros((), jnp.int32)
    for path, layer in layers.items():
        new, products = found[path]
        old, weights = state.bases[path], state.weights[path]
        bases[path], bad = keep_finite(layer, new, old, weights, checked=products)
        failures += bad
    return Found(bases, {path: products for path, (_, products) in found.items()}, failures)


def method(basis: LowRank | Eigenbasis) -> tuple[Eigenbasis, int | None]:
    """How whole bases are computed, and the rank of partial ones."""
    return (Eigenbasis(), basis.rank) if isinstance(basis, LowRank) else (basis, None)
