"""Curvature from the state of an optimizer."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from natgrad_jax.curvature.eigenbases import Eigenbasis, eigenbases, initial
from natgrad_jax.curvature.factor_averages import FactorsLike, in_full
from natgrad_jax.layers.collection import Layers, check_layers
from natgrad_jax.layers.layer import Layer
from natgrad_jax.linalg.batched_solve import solve
from natgrad_jax.posterior.record import Curvature, covered
from natgrad_jax.state.walk import plain, states
from natgrad_jax.statistics.spec import decode
from natgrad_jax.transforms.common.estimators import diagonal_of
from natgrad_jax.transforms.common.kronecker import KFACState
from natgrad_jax.transforms.common.second_moments import has_basis, total_moments
from natgrad_jax.transforms.ekfac import EKFACState
from natgrad_jax.utils.hyperparams import is_concrete
from natgrad_jax.utils.tree_paths import Path, join


def from_state(opt_state: PyTree, layers: Layers) -> Curvature:
    """The curvature that an optimizer has measured: its moving averages, undamped.

    From K-FAC (and NGD) the eigenvectors of its factors and ``S = d_A d_Gᵀ``; from EKFAC its bases
    and second moments S, of leading eigenvectors too. Exact for what the state holds, which is an
    average over the last batches: :func:`from_data` measures a whole data set at θ*.

    Args:
      opt_state: the state of any optax chain, wrapper or NNX optimizer that contains a state of
        kfac, ekfac, adaptive_kfac or ngd, after at least one step.
      layers: from :func:`natgrad_jax.find_layers`, those that the transformation was made with.

    Returns:
      A :class:`Curvature`. Under jit, where it cannot be known whether a layer has been measured,
      the eigenvalues of one that has not are NaN.

    Raises:
      ValueError: no such state, two for one layer, other layers, or a layer never measured.

    Source: Ritter et al. 2018, section 2 (the factors of K-FAC); George et al. 2018 (EKFAC).

    >>> import jax.numpy as jnp, natgrad_jax as ng
    >>> params, x, y = {"kernel": jnp.ones((4, 3))}, jnp.eye(4), jnp.arange(4) % 3
    >>> loss_fn = lambda p, x, y: ng.Categorical(x @ p["kernel"]).nll(y)
    >>> layers = ng.find_layers(loss_fn, params, x, y)
    >>> tx = ng.ekfac(0.1, layers)
    >>> grad_fn, opt_state = ng.value_and_grad(loss_fn, layers, fisher="exact"), tx.init(params)
    >>> _, grads, statistics = grad_fn(params, x, y, opt_state=opt_state)
    >>> _, opt_state = tx.update(grads, opt_state, params, statistics=statistics)
    >>> ng.posterior.from_state(opt_state, layers).eigenvalues[()].shape
    (4, 3)
    """
    check_layers(layers)
    found = [s for s in states(plain(opt_state)) if isinstance(s, KFACState | EKFACState)]
    if not found:
        raise ValueError(
            "opt_state holds no factors of the Fisher; pass the state of a chain that contains "
            "kfac, ekfac, adaptive_kfac or ngd, or measure: ng.posterior.from_data."
        )
    parts = [_of_one(state, layers) for state in found]
    twice = [path for path in covered(layers) if sum(path in covered(x.layers) for x in parts) > 1]
    if twice:
        raise ValueError(
            f"opt_state holds several states with the curvature of {join(twice[0])}: pass the "
            "state of one of them."
        )
    own = {path: layer for x in parts for path, layer in x.layers.items()}
    bases = {path: Q for x in parts for path, Q in x.bases.items()}
    eigenvalues = {path: S for x in parts for path, S in x.eigenvalues.items()}
    diagonal = {path: d for x in parts for path, d in x.diagonal.items()}
    leftover = layers.within(own, diagonal).leftover
    return Curvature(Layers(own, leftover, layers.terms), bases, eigenvalues, diagonal)


def _of_one(state: Any, layers: Layers) -> Curvature:
    own = layers.approximate(decode(state.request).approximation)
    for path, factors in state.factors.items():
        if path not in own or not _fits(own[path], factors):
            raise ValueError(
                f"opt_state has factors of {join(path)} that do not fit these Layers. Pass the "
                "Layers that its transformation was made with."
            )
    own = own.within(state.factors, state.diagonal)
    in_bases = isinstance(state, EKFACState)
    if in_bases:
        bases = dict(state.bases)
        values = {path: total_moments(state, path) for path in own}
    else:
        bases, values = _eigen(own, {path: state.factors[path] for path in own})
    for path in own:
        known = has_basis(state, path) if in_bases else state.weights[path] > 0
        values[path] = _measured(path, values[path], known & (state.weights[path] > 0))
    diagonal = {
        path: _measured(path, diagonal_of(state, path), jnp.any(state.diagonal_weights[path] > 0))
        for path in (p.path for p in own.diagonals)
    }
    return Curvature(own, bases, values, diagonal)


@partial(jax.jit, static_argnums=0)  # one program: op by op, every shape would compile on its own
def _eigen(
    layers: Layers, factors: dict[Path, FactorsLike]
) -> tuple[dict[Path, FactorsLike], dict[Path, Float[Array, "..."]]]:
    """Eigenvectors of the factors and the products of their eigenvalues, by path."""
    of = lambda path, x: eigenbases(
        x, in_full(x, factors[path]), initial(x)[0], jnp.ones(x.stack_sizes, bool), Eigenbasis()
    )
    found = solve({path: of(path, x) for path, x in layers.items()})
    return {path: Q for path, (Q, _) in found.items()}, {path: S for path, (_, S) in found.items()}


def _fits(layer: Layer, factors: FactorsLike) -> bool:
    shapes = [(factors.A, layer.input_factor_shape), (factors.G, layer.output_factor_shape)]
    return all(shape is None or x.shape == layer.stack_sizes + shape for x, shape in shapes)


def _measured(
    path: Path, values: Float[Array, "..."], known: Bool[Array, "*stack"]
) -> Float[Array, "..."]:
    """The values, NaN where they are not known; raises ValueError if that can be seen."""
    if is_concrete(known) and not known.all():
        raise ValueError(
            f"opt_state has not measured {join(path)} yet. Take at least one step with statistics "
            "of every layer, tx.update(grads, opt_state, params, statistics=statistics), or use "
            "ng.posterior.from_data."
        )
    return jnp.where(jnp.expand_dims(known, tuple(range(known.ndim, values.ndim))), values, jnp.nan)
