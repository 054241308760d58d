"""Whitening of a network's parameters, and its inverse."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from natgrad_jax.curvature.loss_terms import batch_factors
from natgrad_jax.layers.approximation import Approximation
from natgrad_jax.layers.collection import Layers, check_layers
from natgrad_jax.layers.gradients import map_layers
from natgrad_jax.layers.layer import Layer
from natgrad_jax.linalg.batched_solve import solve
from natgrad_jax.reparametrization import change_of_basis, coordinates as charts
from natgrad_jax.reparametrization.coordinates import Coordinates
from natgrad_jax.statistics.batch_statistics import Statistics
from natgrad_jax.statistics.checks import check_statistics
from natgrad_jax.utils.hyperparams import check_positive
from natgrad_jax.utils.tree_paths import Path


def whitening(
    statistics: Statistics, layers: Layers, epsilon: float = 1e-2
) -> dict[Path, Coordinates]:
    """The centred whitening of each layer's inputs on these statistics, by layer path.

    ``c = E[h]``, ``E[(h−c)(h−c)ᵀ] = Ũ diag(σ) Ũᵀ``, ``U = diag(σ + ε)^{-1/2} Ũᵀ``. Convolutions
    whiten across channels, with the same U at every kernel offset. Layers without coordinates
    (normalizations, free parameters) are left out.

    Args:
      statistics: from ``value_and_grad`` (``fisher="none"`` is enough), of one batch or several.
      layers: from :func:`natgrad_jax.find_layers`.
      epsilon: ε > 0, in the units of the inputs' variances.

    Returns:
      From path to :class:`Coordinates`.

    Raises:
      ValueError: statistics of other layers; ε not positive.

    Source: Desjardins et al. 2015, section 3.

    >>> import natgrad_jax as ng
    >>> statistics = ng.Statistics(jnp.ones(()), {"expand": {}, "reduce": {}}, None, None)
    >>> ng.whitening(statistics, ng.Layers({}))
    {}
    """
    check_layers(layers)
    check_positive(epsilon=epsilon)
    form = Approximation(convolution="sua", centred=True)
    own = {path: x for path, x in layers.approximate(form).items() if charts.applies(x)}
    check_statistics(statistics, own, "whitening", outputs=False)
    statistics = statistics.ready()
    found = {}
    for path, layer in own.items():
        factors = batch_factors(layer, statistics.layers[path], statistics.examples).factors
        found[path] = charts.white_inputs(layer, factors, jnp.asarray(epsilon, float))
    return solve(found)


def whiten(
    params: Any, layers: Mapping[Path, Layer], coordinates: Mapping[Path, Coordinates]
) -> Any:
    """Parameters in the coordinates: ``V = U⁻ᵀ K``, ``d = b + cᵀ K``; the function is unchanged.

    Args:
      params: a tree of parameters, or of updates.
      layers: from :func:`natgrad_jax.find_layers`.
      coordinates: from :func:`whitening`, or ``ng.bases(opt_state)`` of :func:`in_coordinates`;
        layers without an entry are unchanged.

    Returns:
      A tree of the same structure, shapes and dtypes, for the network of :class:`WhitenedDense`
      and :class:`WhitenedConv`.

    Raises:
      ValueError: coordinates of a layer that is not in ``layers``.

    Source: Desjardins et al. 2015, equation 4.

    >>> import natgrad_jax as ng
    >>> ng.whiten({}, ng.Layers({}), {})
    {}
    """
    own = _with_coordinates(layers, coordinates)
    return map_layers(
        params, own, lambda path, x: change_of_basis.to_whitened(own[path], coordinates[path], x)
    )


def unwhiten(
    params: Any, layers: Mapping[Path, Layer], coordinates: Mapping[Path, Coordinates]
) -> Any:
    """The inverse of :func:`whiten`: ``K = Uᵀ V``, ``b = d − cᵀ K``.

    Args, Returns, Raises: as :func:`whiten`.

    Source: Desjardins et al. 2015, equation 4.

    >>> import natgrad_jax as ng
    >>> ng.unwhiten({}, ng.Layers({}), {})
    {}
    """
    own = _with_coordinates(layers, coordinates)
    return map_layers(
        params, own, lambda path, x: change_of_basis.from_whitened(own[path], coordinates[path], x)
    )


def whitening_variables(coordinates: Mapping[Path, Coordinates]) -> dict[str, Any]:
    """The ``"whitening"`` collection of a network of whitened layers: ``U`` and ``c`` of each.

    ``model.apply({"params": ng.whiten(params, layers, coordinates), "whitening":
    ng.whitening_variables(coordinates)}, x)``.

    Args:
      coordinates: from :func:`whitening`.

    Returns:
      Nested dicts like the parameters, with ``U (n, n)`` and ``c (n,)`` in place of each kernel.

    Raises:
      ValueError: coordinates that whiten no inputs.

    >>> import natgrad_jax as ng
    >>> eye = ng.Coordinates(jnp.eye(2), jnp.ones(2), jnp.zeros(2))
    >>> sorted(ng.whitening_variables({("Dense_0",): eye})["Dense_0"])
    ['U', 'c']
    """
    tree: dict[str, Any] = {}
    for path, own in coordinates.items():
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        mean = jnp.zeros(own.U.shape[:-1], own.U.dtype) if own.mean is None else own.mean
        node |= {"U": own.U, "c": mean}
    return tree


def _with_coordinates(
    layers: Mapping[Path, Layer], coordinates: Mapping[Path, Coordinates]
) -> dict[Path, Layer]:
    strange = set(coordinates) - set(layers)
    if strange:
        raise ValueError(
            f"there are coordinates for {sorted(strange)}, but no such layers: pass the Layers "
            "that they were computed with."
        )
    return {path: layers[path] for path in coordinates}
