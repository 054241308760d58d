"""Approximations as explicit matrices, and their errors, for small models."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from natgrad_jax.curvature.eigenbases import scaled
from natgrad_jax.curvature.inverses import operate
from natgrad_jax.diagnostics.states import found_in
from natgrad_jax.exact.explicit_fisher import check_size, fisher as explicit_fisher
from natgrad_jax.layers.approximation import WHOLE, Approximation
from natgrad_jax.layers.collection import Layers, check_layers
from natgrad_jax.layers.layer import Layer
from natgrad_jax.losses.terms import LossFn
from natgrad_jax.statistics.grad import value_and_grad
from natgrad_jax.tagging import find_layers
from natgrad_jax.transforms.common.second_moments import total_moments
from natgrad_jax.transforms.ekfac import EKFACState, scale_by_ekfac
from natgrad_jax.utils.tree_paths import Path

# Suffixes of names, and the approximations of the factors that they stand for.
FORMS = {
    "": WHOLE,
    "_sua": Approximation(convolution="sua"),
    "_reduce": Approximation(weight_sharing="reduce"),
}


def approximation_error(
    loss_fn: LossFn,
    params: Any,
    *args: Any,
    layers: Layers | None = None,
    fisher: str = "exact",
    rng: Any = None,
) -> dict[str, float]:
    """How far each approximation is from the explicit Fisher blocks of a small model.

    ``√Σ ‖F_l − F̂_l‖²`` over the layers l (Frobenius norms; blocks between layers are left out, as
    in every approximation here).

    Args:
      loss_fn, params, *args: as for :func:`natgrad_jax.find_layers`.
      layers: from :func:`natgrad_jax.find_layers`; None: found here.
      fisher: ``"exact"``, ``"mc"`` or ``"empirical"``, for all of them.
      rng: a key, needed by ``"mc"``.

    Returns:
      From name to error: ``"kfac"``, ``"ekfac"``, both with ``_sua`` (channel covariances
      alone) and ``_reduce`` (positions summed first), ``"diagonal"``, and ``"zero"`` for the norm
      of the Fisher itself.

    Raises:
      ValueError: a layer too large for an explicit block.

    Source: George et al. 2018, section 3 (EKFAC is never further than K-FAC).

    >>> import flax.linen as nn, jax, jax.numpy as jnp, natgrad_jax as ng
    >>> model, x, y = nn.Dense(3), jnp.eye(4), jnp.arange(4) % 3
    >>> params = model.init(jax.random.key(0), x)["params"]
    >>> loss_fn = lambda p, x, y: ng.Categorical(model.apply({"params": p}, x)).nll(y)
    >>> error = ng.diagnostics.approximation_error(loss_fn, params, x, y)
    >>> error["ekfac"] <= error["kfac"] <= error["zero"]
    True
    """
    layers = find_layers(loss_fn, params, *args) if layers is None else layers
    check_layers(layers)
    given = {"fisher": fisher, "rng": rng}
    blocks = explicit_fisher(loss_fn, params, *args, layers=layers, **given)
    blocks = {path: blocks[path] for path in layers}
    squared: dict[str, Any] = {"zero": sum(jnp.sum(jnp.square(F)) for F in blocks.values())}
    squared["diagonal"] = squared["zero"] - sum(
        jnp.sum(jnp.square(jnp.diagonal(F))) for F in blocks.values()
    )
    for suffix, form in FORMS.items():
        state = _measured(loss_fn, params, args, layers, form, **given)
        own = layers.approximate(form)
        kfac = lambda path, own=own, state=state: _kfac(own[path], state.factors[path])
        ekfac = lambda path, own=own, state=state: _ekfac(own[path], state, path)
        for name, matrix in (("kfac", kfac), ("ekfac", ekfac)):
            errors = [jnp.sum(jnp.square(F - matrix(path))) for path, F in blocks.items()]
            squared[name + suffix] = sum(errors)
    return {name: float(jnp.sqrt(x)) for name, x in squared.items()}


def matrices(layers: Layers, opt_state: Any) -> dict[Path, jax.Array]:
    """The Fisher blocks that an optimizer state approximates, as matrices, without damping.

    ``A ⊗ G``, EKFAC's ``Q diag(S) Qᵀ``, or the one matrix of a block that is no product. Layers
    whose inputs alone were measured (whitening) are left out.

    Args:
      layers: from :func:`natgrad_jax.find_layers`, of a small model.
      opt_state: the state of any chain that contains a transformation of this library.

    Returns:
      From layer path to ``(P, P)`` over the layer's parameters in their order, each raveled, as
      in ``ng.fisher(..., layers=layers)``.

    Raises:
      ValueError: no such state, factors of other layers, a layer too large for a matrix.

    >>> import natgrad_jax as ng
    >>> layers = ng.Layers({})
    >>> ng.diagnostics.matrices(layers, ng.kfac(0.1, layers).init({}))
    {}
    """
    found = {}
    for own in found_in(layers, opt_state):
        for path in (path for path in layers if path in own.state.factors):
            layer, factors = own.layers[path], own.factors(path)
            half = layer.output_side is not None and factors.G is None
            if half or layer.input_side.mean_included:  # inputs only, or channels with their means
                continue
            check_size(sum(p.size for p in layer.parameters))
            diagonal = own.has_moments
            found[path] = _ekfac(layer, own.state, path) if diagonal else _kfac(layer, factors)
    return found


def _measured(
    loss_fn: Any, params: Any, args: Any, layers: Layers, form: Approximation, fisher: str, rng: Any
) -> EKFACState:
    """EKFAC's state from this batch alone: one step for the bases, another for the moments."""
    tx = scale_by_ekfac(layers, decay=0.0, statistics_period=1, basis="eigh", approximation=form)
    grad_fn = value_and_grad(loss_fn, layers, fisher=fisher)

    def step(state: EKFACState) -> EKFACState:
        _, grads, statistics = grad_fn(params, *args, rng=rng, opt_state=state)
        return tx.update(grads, state, statistics=statistics)[1]

    compiled = jax.jit(step)
    return compiled(compiled(tx.init(None)))


def _kfac(layer: Layer, factors: Any) -> jax.Array:
    return dense(layer, partial(operate, layer, factors))


def _ekfac(layer: Layer, state: EKFACState, path: Path) -> jax.Array:
    bases, S = state.bases[path], total_moments(state, path)
    return dense(layer, lambda x: scaled(layer, bases, S, x))


def dense(layer: Layer, apply: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """A linear map of a layer's packed ``K̄`` as a matrix over its parameters, raveled in order.

    Args:
      layer: one of :class:`~natgrad_jax.Layers`, with the approximation of the map.
      apply: from ``K̄`` in the coordinates of its factors, ``(*factor_blocks, rows, columns)``, to
        the same.

    Returns:
      ``(P, P)`` for P parameters.

    >>> import jax.numpy as jnp, natgrad_jax as ng
    >>> params = {"scale": jnp.ones(2)}
    >>> loss_fn = lambda p, x: ng.Gaussian(x * p["scale"]).nll(x)
    >>> layer = ng.find_layers(loss_fn, params, jnp.ones((3, 2)))[()]
    >>> ng.diagnostics.dense(layer, lambda x: 2 * x)
    Array([[2., 0.],
           [0., 2.]], dtype=float32)
    """
    ends = list(itertools.accumulate(p.size for p in layer.parameters))

    def of(vector: jax.Array) -> jax.Array:
        parts = jnp.split(vector, ends[:-1])
        pairs = zip(parts, layer.parameters, strict=True)
        packed = layer.pack(layer.to_matrix(*(x.reshape(p.shape) for x, p in pairs)))
        mapped = layer.from_matrix(layer.unpack(apply(packed)))
        return jnp.concatenate([x.ravel() for x in mapped])

    return jax.jit(jax.vmap(of, out_axes=1))(jnp.eye(ends[-1], dtype=layer.factor_dtype))
