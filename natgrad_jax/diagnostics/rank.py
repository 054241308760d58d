"""The rank that low-rank inverses need, computed from measured factors."""

from typing import Any

import jax
import jax.numpy as jnp

from natgrad_jax.curvature import damping_split
from natgrad_jax.curvature.factor_averages import bias_of
from natgrad_jax.diagnostics.states import found_in
from natgrad_jax.layers.collection import Layers
from natgrad_jax.layers.factor_structure import FactorStructure


def rank_for(
    opt_state: Any, layers: Layers, *, damping: float = 1e-2, neglected: float = 1.0
) -> int:
    """The rank at which the error of ``inverse="low_rank"`` is small against the damping.

    The smallest k such that, in every factor, all eigenvalues except the k largest are at most
    ``neglected`` times the damping of that factor, ``π√λ`` for A and ``√λ/π`` for G. A rank is a
    shape, which a compiled step cannot change: take a few steps, call this, and make a new
    transformation with the result.

    Args:
      opt_state: a state with K-FAC's factors, such as that of :func:`natgrad_jax.kfac`.
      layers: the Layers of that transformation.
      damping: λ; neglected: a positive multiple of each factor's damping.

    Returns:
      k, at least 1. A factor whose size is at most ``2 k`` is inverted exactly.

    Raises:
      ValueError: no state with factors; nothing measured yet.

    Source: Martens & Grosse 2015, section 6.3, for π.

    >>> import flax.linen as nn, jax, jax.numpy as jnp, natgrad_jax as ng
    >>> model, x = nn.Dense(2), jnp.ones((4, 6))
    >>> params = model.init(jax.random.key(0), x)["params"]
    >>> loss_fn = lambda params, x: ng.Gaussian(model.apply({"params": params}, x)).nll(x[:, :2])
    >>> layers = ng.find_layers(loss_fn, params, x)
    >>> tx, grad_fn = ng.kfac(0.1, layers), ng.value_and_grad(loss_fn, layers, fisher="exact")
    >>> loss, grads, statistics = grad_fn(params, x)
    >>> updates, state = tx.update(grads, tx.init(params), params, statistics=statistics)
    >>> ng.rank_for(state, layers)  # A has rank one, both outputs have variance one
    2
    """
    ranks = [1]
    given = ((own, path) for own in found_in(layers, opt_state) for path in own.state.factors)
    for own, path in given:
        layer, factors = own.layers[path], own.factors(path)
        if layer.output_side is None or factors.G is None:
            continue
        sides = (layer.input_side, layer.output_side)
        means = [
            side.trace(factor, bias_of(factors) if side is layer.input_side else None) / side.size
            for side, factor in zip(sides, (factors.A, factors.G), strict=True)
        ]
        if not bool(jnp.all(means[0] > 0)):
            raise ValueError("rank_for needs measured factors: take a few steps first.")
        split = damping_split.rule(damping_split.DEFAULT)
        on = split(means[0], means[1], jnp.asarray(damping))
        ranks += [
            _above(side, factor, neglected * d)
            for side, factor, d in zip(sides, (factors.A, factors.G), on, strict=True)
        ]
    return max(ranks)


def _above(side: FactorStructure, factor: jax.Array, threshold: jax.Array) -> int:
    """The largest number of eigenvalues above the threshold in any one matrix."""
    if not side.supports_low_rank:
        return 1
    return int(jnp.max(jnp.sum(side.eigenvalues(factor) > threshold[..., None], axis=-1)))
