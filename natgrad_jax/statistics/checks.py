"""Whether layers, parameters, losses and statistics belong together."""

from collections.abc import Mapping
from typing import Any

import jax

from natgrad_jax.curvature.layer_sums import Sums
from natgrad_jax.layers.collection import Layers
from natgrad_jax.layers.layer import Layer
from natgrad_jax.losses.terms import Loss
from natgrad_jax.statistics.batch_statistics import Statistics
from natgrad_jax.utils import compat, tree_paths
from natgrad_jax.utils.tree_paths import Path, join


def check_statistics(
    statistics: Any, layers: Mapping[Path, Layer], name: str, outputs: bool = True
) -> None:
    """Raise unless ``statistics`` were measured for ``layers``, and, with ``outputs``, by a Fisher
    pass."""
    if statistics is None:
        raise ValueError(
            f"{name} needs the statistics of this batch: write loss, grads, statistics = "
            "ng.value_and_grad(loss_fn, layers)(params, batch, rng=key, opt_state=opt_state), then "
            "tx.update(grads, opt_state, params, statistics=statistics)."
        )
    if not isinstance(statistics, Statistics):
        raise TypeError(
            f"statistics must be what ng.value_and_grad returns as its third result; got "
            f"{type(statistics).__name__}."
        )
    measured = {path for own in statistics.shapes.sums.values() for path in own}
    if set(layers) - measured:
        strange = sorted(map(join, measured ^ set(layers)))
        raise ValueError(
            f"{name} and value_and_grad were given different Layers: {', '.join(strange)} are in "
            "one and not in the other. Pass the same Layers to both."
        )
    if outputs and statistics.shapes.leftover is None:
        raise ValueError(
            f'{name} needs output statistics, and value_and_grad(fisher="none") measures '
            'inputs only. Use fisher="mc" (the default), "exact" or "empirical".'
        )
    for path, layer in layers.items():
        for own in statistics.shapes.sums.values():
            if path in own:
                _check_shapes(layer, own[path])


def _check_shapes(layer: Layer, sums: Sums) -> None:
    """Raise unless the sums have the shapes of this layer's own factors, or of whole ones."""
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
                "another model, or for another approximation. Make Layers and gradients with one "
                "model, and write grad_fn(…, opt_state=opt_state)."
            )


def check_params(layers: Layers, tree: Any) -> None:
    """Raise unless the layers belong to these parameters."""
    given = tree_paths.leaves(tree)
    wanted = [p for layer in layers.values() for p in layer.parameters]
    wanted += [u.parameter for u in layers.leftover]
    for parameter in wanted:
        leaf = given.get(parameter.path)
        if leaf is None or tuple(leaf.shape) != parameter.shape:
            came = "no such parameter" if leaf is None else f"shape {tuple(leaf.shape)}"
            raise ValueError(
                f"these Layers were found on another model: they have "
                f"{tree_paths.join(parameter.path)} of shape {parameter.shape}, params has {came}. "
                "Call find_layers again with this model's params."
            )


def check_terms(layers: Layers, loss: Loss) -> None:
    """Raise if the loss has another number of terms than the one that the layers were found on."""
    if len(layers.terms) != len(loss.terms) and (layers or layers.leftover):
        names = lambda terms: ", ".join(type(t.distribution).__name__ for t in terms)
        before = ", ".join(term.distribution for term in layers.terms)
        raise ValueError(
            f"these Layers were found on a loss of {len(layers.terms)} terms ({before}), and "
            f"loss_fn returned one of {len(loss.terms)} ({names(loss.terms)}). Each term has "
            "its own curvature: always return the same terms, and leave a task out of a batch "
            "by nll(targets, where=mask)."
        )


def check_axes(tree: Any, args: Any, axes: tuple[str, ...]) -> None:
    """Raise if the batch varies over a mesh axis that ``axis_name`` does not name."""

    def varying(values: Any) -> set[Any]:
        leaves = (x for x in jax.tree.leaves(values) if isinstance(x, jax.Array))
        return set().union(*(compat.varying_axes(x) for x in leaves))

    missing = varying(args) - varying(tree) - set(axes)
    if missing:
        names = ", ".join(map(repr, sorted(map(str, missing))))
        raise ValueError(
            f"the batch varies over the mesh axis {names} here, inside shard_map: pass "
            f"axis_name={names} to value_and_grad, so that its results are the global ones."
        )
