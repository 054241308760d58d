"""When each layer is refreshed, and by which device: one schedule for all transformations."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from natgrad_jax.layers.layer import Layer
from natgrad_jax.linalg.distributed import DeviceAxes, Devices, balanced, devices
from natgrad_jax.state.clock import due
from natgrad_jax.utils.hyperparams import Scalar, at, check_period
from natgrad_jax.utils.tree_paths import Path

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Refresh:
    """When each layer is refreshed, and which devices share the work: made by :func:`every` or
    :func:`staggered`.

    ``period``: steps from one refresh of a layer to its next; None: the transformation's own, or
    its ``refresh_period``. ``staggered``: whether layers are refreshed at different steps of a
    period; None: the transformation's default if no ``refresh_period`` is given. ``over``: devices.
    """

    period: int | None = None
    staggered: bool | None = None
    over: DeviceAxes = None

    def __post_init__(self) -> None:
        known = isinstance(self.period, int | float) and not isinstance(self.period, bool)
        if self.period is not None and not known:
            raise ValueError(
                "the period of ng.every and ng.staggered must be a number, known when the "
                f"transformation is made; got {self.period!r}. Schedules and traced numbers go "
                "into the keyword refresh_period."
            )
        check_period(period=1 if self.period is None else self.period)
        devices(self.over)

    def __repr__(self) -> str:
        name = "staggered" if self.staggered else "every"
        given = [] if self.period is None else [repr(self.period)]
        return f"{name}({', '.join(given + ([f'over={self.over!r}'] if self.over else []))})"


def every(period: int | None = None, *, over: DeviceAxes = None) -> Refresh:
    """Refresh all layers in the same step, once in each period.

    Args:
      period: T, in steps; None: the transformation's own, or its keyword ``refresh_period``.
      over: the devices that share the work of a refresh: the name of an axis inside shard_map or
        pmap, ``"data"``, or a mesh and its axis under jit, ``(mesh, "data")``; None: every device
        does all of it.

    Returns:
      A value for the keyword ``refresh`` of a transformation.

    Raises:
      ValueError: ``period`` is no whole number of at least 1; ``over`` names no axis.

    >>> import natgrad_jax as ng
    >>> tx = ng.kfac(0.1, ng.Layers({}), refresh=ng.every(50))
    """
    return Refresh(period, False, over)


def staggered(period: int | None = None, *, over: DeviceAxes = None) -> Refresh:
    """Refresh each layer once in a period, at different steps, so that steps take equally long.

    Args:
      period, over: as in :func:`every`. With few layers per step there is little to divide
        among devices.

    Returns:
      A value for the keyword ``refresh`` of a transformation.

    Raises:
      ValueError: as :func:`every`.

    >>> import natgrad_jax as ng
    >>> tx = ng.kfac(0.1, ng.Layers({}), refresh=ng.staggered(50))
    """
    return Refresh(period, True, over)


PERIOD = 20  # steps, where none is given
USUAL = staggered(PERIOD)


class RefreshSchedule(NamedTuple):
    """A checked choice. ``period``: a float, an array or a schedule, in steps; ``staggered``:
    whether layers are refreshed at different steps; ``over``: the devices that share the work."""

    period: Scalar
    staggered: bool = False
    over: Devices | None = None


def refresh_record(refresh: Refresh | str | None) -> Refresh:
    """The record for ``refresh=``; raises ValueError with the possible values."""
    shorthands = {None: Refresh(), "every": every(), "staggered": staggered()}
    if not isinstance(refresh, Refresh):
        if refresh not in shorthands:
            raise ValueError(
                f"refresh must be ng.every(20), ng.staggered(20), or 'every' or 'staggered' with "
                f"the usual period; got {refresh!r}. A number goes into refresh_period."
            )
        return shorthands[refresh]
    return refresh


def refresh_schedule(
    refresh: Refresh | str | None, refresh_period: Scalar | None, default: Refresh
) -> RefreshSchedule:
    """The schedule given by the keywords ``refresh`` and ``refresh_period``; raises ValueError."""
    refresh = refresh_record(refresh)
    if refresh.period is not None and refresh_period is not None:
        raise ValueError(
            f"refresh={refresh!r} and refresh_period={refresh_period!r} both give a period: leave "
            "one of them out."
        )
    is_staggered = refresh.staggered
    if is_staggered is None:
        is_staggered = bool(default.staggered) and refresh_period is None
    given = refresh_period if refresh.period is None else refresh.period
    period = default.period if given is None else given
    assert period is not None
    check_period(refresh_period=period)
    if is_staggered and not isinstance(period, int | float):
        raise ValueError(
            "staggered refreshes give each layer its own step of the period, which must be known "
            f"when the transformation is made: write refresh=ng.staggered(20); got {period!r}."
        )
    return RefreshSchedule(period, is_staggered, devices(refresh.over))


def phases(layers: Mapping[Path, Layer], when: RefreshSchedule) -> list[dict[Path, Layer]]:
    """The layers refreshed at each step of a period: all at the first, or equal work at each.

    Staggered refreshes begin with the second half of the period, since all layers were refreshed at
    step 0 and factors have moved little in the first half. The period's first step, which measures
    too, is used last."""
    if not when.staggered:
        return [dict(layers)]
    assert isinstance(when.period, int | float)
    period, half = int(when.period), int(when.period) // 2
    found: list[dict[Path, Layer]] = [{} for _ in range(period)]
    steps = [*range(half + 1, period), *range(1, half + 1), 0]
    shares = balanced([cost(layer) for layer in layers.values()], period)
    for (path, layer), i in zip(layers.items(), shares, strict=True):
        found[steps[i]][path] = layer
    return found


def cost(layer: Layer) -> float:
    """The work of factorising a layer's matrices: the cubes of their sizes."""
    copies = math.prod((*layer.stack_sizes, *layer.factor_blocks))
    return copies * sum(side.cost for side in (layer.input_side, layer.output_side) if side)


def refresh_due(
    layers: Mapping[Path, Layer],
    when: RefreshSchedule,
    step: jax.Array,
    first: jax.Array,
    old: Mapping[Path, T],
    renew: Callable[[Mapping[Path, Layer]], tuple[dict[Path, T], jax.Array]],
) -> tuple[dict[Path, T], jax.Array]:
    """``renew`` of the layers that are due, ``old`` of the others; and the number of failures.

    ``first``: whether something was measured for the first time; all layers are due then.
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
