"""Eigenvalues and condition numbers of factors in an optimizer state and of the explicit Fisher."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax.curvature.eigenbases import everywhere
from natgrad_jax.curvature.factor_averages import bias_of
from natgrad_jax.diagnostics.states import Found, found_in
from natgrad_jax.exact import explicit_fisher
from natgrad_jax.layers.collection import Layers
from natgrad_jax.layers.factor_structure import FactorStructure
from natgrad_jax.layers.layer import Layer
from natgrad_jax.losses.terms import LossFn
from natgrad_jax.reparametrization.coordinates import second_and_mean
from natgrad_jax.transforms.common.second_moments import total_moments
from natgrad_jax.utils.short_repr import printed_short
from natgrad_jax.utils.tree_paths import Path


@printed_short
class Spectra(NamedTuple):
    """Eigenvalues of one layer, ascending; its blocks count as one block-diagonal matrix.

    ``A``: of the factor over inputs, ``(*stack, inputs + bias)``; ``G``: over outputs,
    ``(*stack, outputs)``; ``block``: of both together, ``A ⊗ G`` or EKFAC's S,
    ``(*stack, parameters)``. A block that is no Kronecker product has A alone, and so do whitened
    coordinates, for which A is the covariance of the inputs.

    >>> import jax.numpy as jnp, natgrad_jax as ng
    >>> ng.diagnostics.Spectra(jnp.array([0.5, 2.0])).A.max() / 0.5
    Array(4., dtype=float32)
    """

    A: jax.Array
    G: jax.Array | None = None
    block: jax.Array | None = None


def spectra(layers: Layers, opt_state: Any) -> dict[Path, Spectra]:
    """Eigenvalues of every factor in an optimizer state, by layer path.

    Of the current averages, without damping; by ``eigh``, so too slow for every step.

    Args:
      layers: from :func:`natgrad_jax.find_layers`.
      opt_state: the state of any chain that contains a transformation of this library.

    Raises:
      ValueError: no such state, or factors of other layers.

    >>> import natgrad_jax as ng
    >>> layers = ng.Layers({})
    >>> ng.diagnostics.spectra(layers, ng.kfac(0.1, layers).init({}))
    {}
    """
    return {
        path: of_layer(found, path)
        for found in found_in(layers, opt_state)
        for path in layers
        if path in found.state.factors
    }


def of_layer(found: Found, path: Path) -> Spectra:
    """The spectra of one layer."""
    layer, factors = found.layers[path], found.factors(path)
    if found.has_coordinates and found.state.bases[path].A_scale is not None:
        second, _ = second_and_mean(layer, factors.A)
        return Spectra(_ascending(layer, layer.input_side.eigenvalues(second)))
    A = _eigenvalues(layer.input_side, factors.A, bias_of(factors))
    if layer.output_side is None or factors.G is None:
        return Spectra(_ascending(layer, A))
    G = _eigenvalues(layer.output_side, factors.G, None)
    block = A[..., :, None] * G[..., None, :]
    if found.has_moments:
        bases, moments = found.state.bases[path], total_moments(found.state, path)
        block = layer.unpack(everywhere(layer, bases, moments))
    return Spectra(*(_ascending(layer, x) for x in (A, G, block)))


def fisher_spectra(
    loss_fn: LossFn,
    params: Any,
    *args: Any,
    layers: Layers | None = None,
    fisher: str = "exact",
    rng: Any = None,
) -> Any:
    """Eigenvalues of the explicit Fisher of a small model, ascending.

    Args:
      As for :func:`natgrad_jax.fisher`.

    Returns:
      ``(P,)``; with ``layers`` a dict from layer path (and leftover parameter's path) to those of
      its block.

    Raises:
      ValueError: as :func:`natgrad_jax.fisher`.

    >>> import jax.numpy as jnp, natgrad_jax as ng
    >>> params, x, y = {"kernel": jnp.ones((4, 3))}, jnp.eye(4), jnp.zeros(4, jnp.int32)
    >>> loss_fn = lambda p, x, y: ng.Categorical(x @ p["kernel"]).nll(y)
    >>> ng.diagnostics.fisher_spectra(loss_fn, params, x, y).shape
    (12,)
    """
    F = explicit_fisher.fisher(loss_fn, params, *args, fisher=fisher, rng=rng, layers=layers)
    return jax.tree.map(jnp.linalg.eigvalsh, F)


def condition_number(values: jax.Array, damping: Any = 0.0) -> jax.Array:
    """The largest eigenvalue divided by the smallest, ``(f_max + λ) / (f_min + λ)``.

    Without damping, the smallest nonzero one: above n ε times the largest.

    Args:
      values: eigenvalues ``(*batch, n)`` of a positive semidefinite matrix; damping: λ, ``()`` or
        ``(*batch,)``.

    Returns:
      ``(*batch,)``, at least 1.

    >>> import jax.numpy as jnp
    >>> condition_number(jnp.array([0.0, 1.0, 4.0]))
    Array(4., dtype=float32)
    >>> condition_number(jnp.array([0.0, 1.0, 4.0]), damping=0.5)
    Array(9., dtype=float32)
    """
    values = jnp.asarray(values)
    damping = jnp.asarray(damping, values.dtype)
    largest = values.max(-1)
    zero = values.shape[-1] * jnp.finfo(values.dtype).eps * largest
    kept = (values > zero[..., None]) | (damping[..., None] > 0)
    least = jnp.min(jnp.maximum(values, 0), axis=-1, where=kept, initial=jnp.inf)
    return (largest + damping) / (jnp.minimum(least, largest) + damping)


def _eigenvalues(side: FactorStructure, factor: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Ascending, ``(*stack, *blocks, size)``, without the zeros of the last group's padding."""
    values = side.spread(side.eigenvalues(factor), bias)
    return jnp.sort(values, axis=-1)[..., side.packed - side.size :]


def _ascending(layer: Layer, values: jax.Array) -> jax.Array:
    return jnp.sort(values.reshape(*layer.stack_sizes, -1), axis=-1)
