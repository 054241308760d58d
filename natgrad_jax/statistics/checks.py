"""Whether statistics are of the layers of the transformation that got them."""

from collections.abc import Mapping
from typing import Any

from natgrad_jax.curvature.layer_sums import Sums
from natgrad_jax.layers.layer import Layer
from natgrad_jax.statistics.grad import Statistics
from natgrad_jax.utils.tree_paths import Path, join


def check_statistics(
    statistics: Any, layers: Mapping[Path, Layer], name: str, outputs: bool = True
) -> None:
    """Raise unless ``statistics`` were measured for ``layers``; with a Fisher pass (``outputs``),
    or else for those of them at least that have inputs."""
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
    measured = {*statistics.layers, *statistics.reduced}
    if set(layers) - measured:
        strange = sorted(map(join, measured ^ set(layers)))
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
        for sums in (statistics.layers.get(path), statistics.reduced.get(path)):
            if sums is not None:
                _check_shapes(layer, sums)


def _check_shapes(layer: Layer, sums: Sums) -> None:
    """Raise unless the sums are of this layer: its own factors, or whole ones."""
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
                "another model, or for another group_size or convolution."
            )
