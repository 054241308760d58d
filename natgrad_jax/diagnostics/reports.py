"""A report on the curvature while training: a table to read, scalars to log."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from natgrad_jax.curvature.eigenbases import everywhere
from natgrad_jax.diagnostics import layer_measures
from natgrad_jax.diagnostics.layer_measures import Measures
from natgrad_jax.diagnostics.spectrum import condition_number, of_layer
from natgrad_jax.diagnostics.states import Found, found_in
from natgrad_jax.diagnostics.table import table
from natgrad_jax.layers import gradients
from natgrad_jax.layers.collection import Layers, check_layers
from natgrad_jax.state.walk import instances, plain
from natgrad_jax.statistics.spec import decode
from natgrad_jax.transforms.adaptive_damping import AdaptiveDampingState
from natgrad_jax.transforms.common.estimators import diagonal_of
from natgrad_jax.transforms.common.second_moments import total_moments
from natgrad_jax.transforms.quadratic_model import QuadraticModelState
from natgrad_jax.utils import tree_paths
from natgrad_jax.utils.hyperparams import is_concrete
from natgrad_jax.utils.tree_paths import Path

# Fields of other states in a report: numbers, and counted events.
OTHERS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "adaptive_damping": (AdaptiveDampingState, ("step", "level", "ratio", "refused")),
    "quadratic_model": (QuadraticModelState, ("step", "learning_rate", "momentum", "predicted")),
}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Report:
    """What :func:`report` measured: ``print`` it, or log its :meth:`scalars`. A pytree.

    ``totals``: by transformation, ``"kfac"``. ``rows``: by transformation and layer,
    ``"kfac/encoder.Dense_0"``; each a dict of numbers, ``(*stack,)`` if layers are stacked by
    ``scan`` or ``vmap``. ``order``: of the rows, static.

    >>> import jax.numpy as jnp, natgrad_jax as ng
    >>> ng.diagnostics.Report({"kfac": {"damping": jnp.asarray(0.5)}}, {}, ()).scalars()
    {'kfac/damping': 0.5}
    """

    totals: dict[str, Measures]
    rows: dict[str, Measures]
    order: tuple[str, ...] = field(metadata={"static": True})

    def scalars(self) -> dict[str, Any]:
        """Every number by its name, ``"kfac/encoder.Dense_0/drift_A"``, ready for any logger.

        Python numbers, or scalar arrays under ``jit``. Elements of a stack have their index in the
        name, ``"kfac/Blocks_0.Dense_0[3]/drift_A"``.
        """
        traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(self))
        own = self if traced else jax.device_get(self)
        found: dict[str, Any] = {}
        for name in (*own.totals, *own.order):
            for key, x in {**own.totals, **own.rows}[name].items():
                for index in np.ndindex(x.shape):
                    at = f"[{','.join(map(str, index))}]" if index else ""
                    found[f"{name}{at}/{key}"] = x[index] if traced else x[index].item()
        return found

    def __repr__(self) -> str:
        # leaves may be anything: JAX's errors print reports of tracers, shapes or plain objects
        known = all(
            isinstance(x, jax.Array | np.ndarray) and is_concrete(x) for x in jax.tree.leaves(self)
        )
        return table(self.scalars()) if known else f"Report of {', '.join(self.order)}"


def report(
    layers: Layers,
    opt_state: Any,
    *,
    updates: Any = None,
    grads: Any = None,
    spectra: bool = False,
) -> Report:
    """The curvature in an optimizer state, in a few numbers per layer.

    For each layer, where they apply, with the current factors F (A and G):

    - ``update_norm``, ``gradient_norm``: ``‖Δ‖`` and ``‖∇‖``; ``decrease``: ``−∇ᵀΔ``, the
      first-order decrease of the loss.
    - ``kl``: ``½ ΔᵀFΔ``, how far the update moves the model's distribution, in nats per example: F
      is A ⊗ G, EKFAC's diagonal, one matrix, or a leftover parameter's diagonal.
    - ``scale_A``, ``scale_G``: mean eigenvalues, ``tr F / n``. ``rank_A``, ``rank_G``: effective
      ranks, ``(tr F)² / ‖F‖²``, between 1 and n.
    - ``damping_A``, ``damping_G`` (K-FAC, NGD): the damping of each factor, ``π√λ`` and ``√λ/π``
      (NGD: ``√λ``); λ itself if a block has one matrix.
    - ``drift_A``, ``drift_G``: how far the factors have moved since the last refresh; 0 just after
      it. For inverses M: ``‖(F + d I) M − I‖ / √n``, above n = 64 by 64 random directions; it
      includes what a low-rank inverse neglects, and the null space of a pseudo-inverse. For
      eigenbases Q: ``‖B − diag B‖ / ‖B‖``, ``B = QᵀFQ``. ``drift_mean`` (whitening):
      ``‖E[h] − c‖ / √(tr Σ)``.
    - ``kfac_error`` (EKFAC): ``‖S − b_A b_Gᵀ‖ / ‖S‖``, ``b = diag B``: the error of K-FAC that
      EKFAC corrects, relative to S. ``condition`` (EKFAC): of ``S + λ``.
    - ``variance_A``, ``variance_G`` (coordinates): the largest variance of a whitened unit, at most
      1 in fresh coordinates; if it is larger, steps are longer by as much.
    - ``condition_A``, ``condition_G``: of the damped factors; for EKFAC and coordinates, of the
      factors, over their nonzero eigenvalues. Only with ``spectra=True``.

    ``totals`` has sums over layers, λ and the counted events: ``rejected``, non-finite measurements
    and inverses that were dropped, and ``refused``, updates that adaptive damping zeroed.

    Without ``spectra`` it costs a few matrix products per layer, about as long as an ordinary step:
    it can be called every 20 steps or so throughout. It also runs inside ``jit``.

    Args:
      layers: from :func:`natgrad_jax.find_layers`.
      opt_state: the state of any chain that contains a transformation of this library.
      updates: from ``tx.update``; without them there are no norms of updates and no KL.
      grads: the gradients, likewise.
      spectra: whether to add condition numbers, by an eigendecomposition of every factor.

    Returns:
      A :class:`Report`.

    Raises:
      ValueError: no state of this library, or one of other layers; trees of another model.

    >>> import flax.linen as nn, jax, jax.numpy as jnp, natgrad_jax as ng
    >>> model, x, y = nn.Dense(3), jnp.eye(4), jnp.arange(4) % 3
    >>> params = model.init(jax.random.key(0), x)["params"]
    >>> loss_fn = lambda p, x, y: ng.Categorical(model.apply({"params": p}, x)).nll(y)
    >>> layers = ng.find_layers(loss_fn, params, x, y)
    >>> tx = ng.kfac(0.1, layers)
    >>> grad_fn = jax.jit(ng.value_and_grad(loss_fn, layers))
    >>> _, grads, statistics = grad_fn(params, x, y, rng=jax.random.key(0))
    >>> updates, opt_state = tx.update(grads, tx.init(params), params, statistics=statistics)
    >>> report = ng.diagnostics.report(layers, opt_state, updates=updates)
    >>> print(report)  # doctest: +ELLIPSIS
    kfac  step 1  damping 0.01  update norm ...  kl ...  rejected 0
    layer  update norm  kl  ...
    >>> report.scalars()["kfac/rejected"]
    0
    """
    check_layers(layers)
    for tree in (updates, grads):
        if tree is not None:
            gradients.check_paths(tree_paths.leaves(tree), layers)
    return _report(layers, plain(opt_state), plain(updates), plain(grads), spectra)


@partial(jax.jit, static_argnums=(0, 4))
def _report(layers: Layers, opt_state: Any, updates: Any, grads: Any, spectra: bool) -> Report:
    totals: dict[str, Measures] = {}
    rows: dict[str, Measures] = {}
    for found in found_in(layers, opt_state):
        own = _rows(found, updates, grads, spectra)
        rows |= {f"{found.name}/{'.'.join(path)}": x for path, x in own.items()}
        totals[found.name] = _total(found.state, list(own.values()))
    for name, (kind, fields) in OTHERS.items():
        for i, state in enumerate(instances(opt_state, kind)):
            numbered = f"{name}_{i}" if i else name
            totals[numbered] = {key: getattr(state, key) for key in fields}
    return Report(totals, rows, tuple(rows))


def _rows(found: Found, updates: Any, grads: Any, spectra: bool) -> dict[Path, Measures]:
    """The rows of one state: every layer, then the leftover parameters."""
    layers, state = found.layers, found.state
    change, gradient = ({} if x is None else gradients.packed(x, layers) for x in (updates, grads))
    rows = {}
    for path, layer in layers.items():
        given = change.get(path), gradient.get(path)
        rows[path] = layer_measures.of_update(*given, len(layer.stack))
        if path in state.factors:
            rows[path] |= _of_kind(found, path, given[0])
            rows[path] |= _conditions(found, path) if spectra else {}
    change, gradient = ({} if x is None else tree_paths.leaves(x) for x in (updates, grads))
    diagonal = getattr(state, "diagonal", {})
    for x in layers.leftover:
        given = change.get(x.path), gradient.get(x.path)
        rows[x.path] = layer_measures.of_update(*given, 0)
        if x.path in diagonal and given[0] is not None:
            own = diagonal_of(state, x.path)
            rows[x.path]["kl"] = jnp.sum(own * jnp.square(given[0])) / 2
    return rows


def _of_kind(found: Found, path: Path, update: jax.Array | None) -> Measures:
    """One layer's measures, of its factors and of the inverses or bases computed from them."""
    state, layer = found.state, found.layers[path]
    factors, bases = found.factors(path), state.bases[path]
    if found.has_coordinates:
        own = layer_measures.of_coordinates(layer, factors, bases)
        if (
            factors.G is None or layer.input_side.mean_included
        ):  # inputs only, or channels with their means
            return own
        return own | _with_kl(layer_measures.kl, layer, factors, update=update)
    own = layer_measures.of_factors(layer, factors)
    if found.has_moments:
        drifts, diagonals = layer_measures.of_bases(layer, factors, bases)
        S = total_moments(state, path)
        whole = everywhere(layer, bases, S)
        own |= drifts | layer_measures.of_moments(layer, whole, diagonals, state.damping)
        return own | _with_kl(layer_measures.kl_of_moments, layer, bases, S, update=update)
    split = decode(state.request).split
    damping = layer_measures.dampings(layer, factors, state.damping, split)
    own |= layer_measures.of_inverses(layer, factors, bases, damping)
    return own | _with_kl(layer_measures.kl, layer, factors, update=update)


def _with_kl(of: Any, *given: Any, update: jax.Array | None) -> Measures:
    return {} if update is None else {"kl": of(*given, update)}


def _conditions(found: Found, path: Path) -> Measures:
    values, damping = of_layer(found, path), {}
    layer, factors = found.layers[path], found.factors(path)
    if found.has_inverses:
        split = decode(found.state.request).split
        damping = layer_measures.dampings(layer, factors, found.state.damping, split)
        stack = len(layer.stack)
        damping = {k: x.reshape(*x.shape[:stack], -1).mean(-1) for k, x in damping.items()}
    return {
        f"condition_{name}": condition_number(x, damping.get(name, 0.0))
        for name, x in (("A", values.A), ("G", values.G))
        if x is not None
    }


def _total(state: Any, rows: list[Measures]) -> Measures:
    """Sums over the rows, and the state's counters."""
    total: Measures = {"step": state.clock.step, "rejected": state.rejected}
    if hasattr(state, "damping"):
        total["damping"] = state.damping
    for name in ("update_norm", "gradient_norm", "decrease", "kl"):
        own = [row[name] for row in rows if name in row]
        squared = name.endswith("_norm")
        if own:
            summed = jnp.stack([jnp.sum(x**2 if squared else x) for x in own]).sum()
            total[name] = jnp.sqrt(summed) if squared else summed
    return total
