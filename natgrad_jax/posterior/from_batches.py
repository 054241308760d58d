"""Curvature measured on a data set, at fixed parameters."""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray, PyTree

from natgrad_jax.curvature.eigenbases import Eigenbasis
from natgrad_jax.layers.approximation import WHOLE
from natgrad_jax.layers.collection import Layers, check_layers
from natgrad_jax.layers.layer import Layer
from natgrad_jax.losses.terms import LossFn
from natgrad_jax.posterior.from_optimizer import from_state
from natgrad_jax.posterior.record import Curvature
from natgrad_jax.statistics.batch_statistics import Statistics
from natgrad_jax.statistics.grad import value_and_grad
from natgrad_jax.tracing import model
from natgrad_jax.transforms.common import estimators, second_moments
from natgrad_jax.transforms.common.refresh_schedule import RefreshSchedule
from natgrad_jax.transforms.ekfac import EKFACState, scale_by_ekfac
from natgrad_jax.transforms.kfac import scale_by_kfac

KINDS = ("kfac", "ekfac", "diagonal")


def from_data(
    loss_fn: LossFn,
    params: PyTree,
    batches: Iterable[Any],
    layers: Layers,
    *,
    kind: str = "kfac",
    fisher: str = "mc",
    rng: PRNGKeyArray | None = None,
) -> Curvature:
    """The curvature at θ* over a data set, one batch after another, undamped.

    Every example counts the same, however the data are divided into batches. ``"kfac"``: factors
    ``A = Σ ā āᵀ / N`` and ``G = Σ g gᵀ / N`` of each layer, in one pass over the batches.
    ``"ekfac"``: then, in a second pass with the same labels, the second moments
    ``S = Σ (Q_Aᵀ ∇K̄ₙ Q_G)² / N`` in their eigenbasis, never further from the Fisher than K-FAC.
    ``"diagonal"``: ``Σ (∇K̄ₙ)² / N`` of every parameter that a layer's block covers, in one pass.

    Args:
      loss_fn, params, layers: as for :func:`natgrad_jax.value_and_grad`. An NNX model is not
        changed; it should be in evaluation mode, ``model.eval()``.
      batches: the tuples of arguments of ``loss_fn`` after params, ``[(x, y), …]``, all arrays.
        ``"ekfac"`` goes through them twice: a list or a data loader, no generator.
      kind: ``"kfac"``, ``"ekfac"`` or ``"diagonal"``.
      fisher: ``"mc"``, ``"exact"`` or ``"empirical"``, as for :func:`natgrad_jax.value_and_grad`:
        where labels come from. A posterior deserves ``"exact"``, a pass for each class.
      rng: a key, needed by ``"mc"``; ``"exact"`` and ``"empirical"`` draw signs from it for
        parameters outside of all layers, whose diagonal is an estimate.

    Returns:
      A :class:`Curvature`.

    Raises:
      ValueError: an unknown ``kind`` or ``fisher``, a missing rng, no batches, or a generator for
        ``"ekfac"``; a layer that no example reaches.
      TypeError: a batch that is no tuple of arguments; as for :func:`natgrad_jax.value_and_grad`.

    Source: Ritter et al. 2018, section 2; George et al. 2018, section 3; Grosse et al. 2023.

    >>> import jax.numpy as jnp, natgrad_jax as ng
    >>> params, x, y = {"kernel": jnp.ones((4, 3))}, jnp.eye(4), jnp.arange(4) % 3
    >>> loss_fn = lambda p, x, y: ng.Categorical(x @ p["kernel"]).nll(y)
    >>> layers = ng.find_layers(loss_fn, params, x, y)
    >>> batches = [(x[:2], y[:2]), (x[2:], y[2:])]
    >>> curvature = ng.posterior.from_data(
    ...     loss_fn, params, batches, layers, kind="ekfac", fisher="exact")
    >>> curvature.eigenvalues[()].shape
    (4, 3)
    """
    check_layers(layers)
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(map(repr, KINDS))}; got {kind!r}.")
    if kind == "ekfac" and isinstance(batches, Iterator):
        raise ValueError(
            'kind="ekfac" goes through the batches twice, for the bases and for the moments in '
            f"them; got a {type(batches).__name__}, which is empty after once. Pass "
            "list(batches), or an object that starts anew in each loop."
        )
    if fisher == "none" or (fisher == "mc" and rng is None):
        raise ValueError(
            f'from_data got fisher="{fisher}" and rng={rng!r}. Pass rng=key, from which "mc" draws '
            'labels, or fisher="exact"; with "none" there is no curvature.'
        )
    layers = layers.approximate(WHOLE)  # as the transformations below, by default
    total = partial(_total, loss_fn, params, batches, layers, fisher, rng)
    zero = jnp.zeros(())
    once: dict[str, Any] = {"decay": zero, "statistics_period": 1}
    if kind == "kfac":
        state = scale_by_kfac(layers, **once).init(None)
        return from_state(estimators.update(state, total(state), layers, zero)[0], layers)
    start: Any = scale_by_ekfac(layers, basis="eigh", **once).init(None)
    if kind == "diagonal":  # the moments in the basis of the parameters themselves
        known = {path: jnp.ones_like(x) for path, x in start.moment_weights.items()}
        statistics = total(start)
        state = start._replace(moment_weights=known)
        state = second_moments.measure(state, statistics, layers, zero)
        return _diagonal(estimators.update(state, statistics, layers, zero)[0], layers)
    first = total(scale_by_kfac(layers, **once).init(None))
    state = estimators.update(start, first, layers, zero)[0]
    now = jnp.ones((), bool)
    state = second_moments.refresh(state, layers, zero, now, Eigenbasis(), RefreshSchedule(1))
    return from_state(second_moments.measure(state, total(state), layers, zero), layers)


def _total(
    loss_fn: LossFn,
    params: PyTree,
    batches: Iterable[Any],
    layers: Layers,
    fisher: str,
    rng: PRNGKeyArray | None,
    state: Any,
) -> Statistics:
    """The sums over all batches of what the state needs."""
    tree, rest = model.split(params)
    grad_fn = value_and_grad(loss_fn, layers, fisher=fisher)

    @jax.jit
    def measure(tree: PyTree, rest: PyTree, args: Any, rng: Any, state: Any) -> Statistics:
        return grad_fn(model.merge(tree, rest), *args, rng=rng, opt_state=state)[2]

    total = None
    for i, args in enumerate(batches):
        if not isinstance(args, tuple | list):
            raise TypeError(
                "each of the batches must be the tuple of loss_fn's arguments after params, as in "
                f"[(x, y), …]; got {type(args).__name__}."
            )
        key = None if rng is None else jax.random.fold_in(rng, i)
        found = measure(tree, rest, tuple(args), key, state)
        total = found if total is None else jax.tree.map(jnp.add, total, found)
    if total is None:
        raise ValueError("there are no batches: pass tuples of loss_fn's arguments, [(x, y), …].")
    return total


def _diagonal(state: EKFACState, layers: Layers) -> Curvature:
    """The curvature of every layer as the diagonal of its parameters."""
    whole = from_state(state, layers)
    diagonal = dict(whole.diagonal)
    for path, layer in layers.items():
        S = whole.eigenvalues[path]
        if layer.output_side is None:
            S = jnp.diagonal(state.factors[path].A, axis1=-2, axis2=-1)[..., None]
        arrays = layer.from_matrix(layer.unpack(S))
        diagonal |= {p.path: x for p, x in zip(layer.parameters, arrays, strict=True)}
    own = layers.replace(lambda path, record: isinstance(record, Layer), "diagonal")
    return Curvature(own, {}, {}, diagonal)
