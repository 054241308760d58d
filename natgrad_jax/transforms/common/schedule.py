"""When each layer is refreshed, and by which device."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from natgrad_jax.layers.layer import Layer
from natgrad_jax.linalg.distributed import Devices, balanced, devices
from natgrad_jax.state.clock import due
from natgrad_jax.utils.hyperparams import Scalar, at, check_period
from natgrad_jax.utils.tree_paths import Path

T = TypeVar("T")

PERIOD = 20  # steps, where none is given


class Turns(NamedTuple):
    """``period``: steps from one refresh of a layer to its next; ``spread``: whether the layers
    take turns within it instead of all at once; ``over``: the devices that divide the work."""

    period: Scalar
    spread: bool = False
    over: Devices | None = None


def turns(period: Scalar | None, spread: bool | None, over: Any) -> Turns:
    """The checked choice, in turn where no period is given; raises ValueError."""
    spread = period is None if spread is None else spread
    period = PERIOD if period is None else period
    check_period(refresh_period=period)
    if spread and not isinstance(period, int | float):
        raise ValueError(
            "spread=True gives each layer its own step of the period, which must be known when the "
            f"transformation is made: refresh_period=20 and not {period!r}. (Under "
            "optax.inject_hyperparams name it in static_args.)"
        )
    return Turns(period, spread, devices(over))


def phases(layers: Mapping[Path, Layer], when: Turns) -> list[dict[Path, Layer]]:
    """The layers of each step of the period, of about equal work; all in the first if together.

    In turn the second half of a period comes first: in the first half of the first one factors have
    hardly moved since all layers were refreshed. Last comes its first step, which measures too."""
    if not when.spread:
        return [dict(layers)]
    assert isinstance(when.period, int | float)
    period, half = int(when.period), int(when.period) // 2
    found: list[dict[Path, Layer]] = [{} for _ in range(period)]
    steps = [*range(half + 1, period), *range(1, half + 1), 0]
    turn = balanced([cost(layer) for layer in layers.values()], period)
    for (path, layer), i in zip(layers.items(), turn, strict=True):
        found[steps[i]][path] = layer
    return found


def cost(layer: Layer) -> float:
    """What factorising a layer's matrices takes: the cubes of their sizes."""
    copies = math.prod((*layer.stack_sizes, *layer.factor_blocks))
    return copies * sum(side.cost for side in (layer.input_side, layer.output_side) if side)


def in_turn(
    layers: Mapping[Path, Layer],
    when: Turns,
    step: jax.Array,
    first: jax.Array,
    old: Mapping[Path, T],
    renew: Callable[[Mapping[Path, Layer]], tuple[dict[Path, T], jax.Array]],
) -> tuple[dict[Path, T], jax.Array]:
    """What ``renew`` makes of the layers whose turn it is, ``old`` of the others, and how many
    failed.

    ``first``: whether something was measured for the first time: then all are due.
    """
    found: dict[Path, T] = {}
    rejected = jnp.zeros((), jnp.int32)
    period = at(when.period, step).astype(jnp.int32)
    for phase, members in enumerate(phases(layers, when)):
        if not members:
            continue
        kept = {path: old[path] for path in members}
        none = jnp.zeros((), jnp.int32)
        is_due = due(step - phase, period) | first
        new, bad = jax.lax.cond(
            is_due, lambda m=members: renew(m), lambda kept=kept, none=none: (kept, none)
        )
        found |= new
        rejected += bad
    return {path: found[path] for path in layers}, rejected
