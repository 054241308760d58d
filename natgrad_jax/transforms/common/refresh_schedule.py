"""When each layer is refreshed, and by which device: one schedule for all transformations."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from natgrad_jax.layers.bundles import part_of
from natgrad_jax.layers.layer import Layer
from natgrad_jax.linalg.distributed import DeviceAxes, Devices, balanced, devices
from natgrad_jax.state import members
from natgrad_jax.state.clock import due
from natgrad_jax.utils.hyperparams import Scalar, at, check_period
from natgrad_jax.utils.tree_paths import Path

State = TypeVar("State", bound=Any)


@dataclasses.dataclass(frozen=True)
class Refresh:
    """When each layer is refreshed, and which devices share the work: made by :func:`every` or
    :func:`staggered`.

    ``period``: steps from one refresh of a layer to its next; None: the transformation's own, or
    its ``refresh_period``. ``staggered``: whether layers are refreshed at different steps of a
    period; None: the transformation's default if no ``refresh_period`` is given. ``over``: devices.
    ``early``: steps on which all layers are measured and refreshed too.
    """

    period: int | None = None
    staggered: bool | None = None
    over: DeviceAxes = None
    early: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        known = isinstance(self.period, int | float) and not isinstance(self.period, bool)
        if self.period is not None and not known:
            raise ValueError(
                "the period of ng.every and ng.staggered must be a number, known when the "
                f"transformation is made; got {self.period!r}. Schedules and traced numbers go "
                "into the keyword refresh_period."
            )
        check_period(period=1 if self.period is None else self.period)
        if not all(type(step) is int and step > 0 for step in self.early):
            raise ValueError(
                "early must be steps, whole numbers from 1 on, such as early=(1, 2, 4, 8); got "
                f"{self.early!r}."
            )
        devices(self.over)

    def __repr__(self) -> str:
        name = "staggered" if self.staggered else "every"
        given = [] if self.period is None else [repr(self.period)]
        more = {"over": self.over, "early": self.early}
        return f"{name}({', '.join(given + [f'{k}={x!r}' for k, x in more.items() if x])})"


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


def staggered(
    period: int | None = None, *, over: DeviceAxes = None, early: Sequence[int] = ()
) -> Refresh:
    """Refresh each layer once in a period, at different steps, so that steps take equally long.

    Args:
      period, over: as in :func:`every`. With few layers per step there is little to divide
        among devices.
      early: steps on which all layers are refreshed too (and measured, by K-FAC, EKFAC and NGD),
        such as ``(1, 2, 4, 8)``: curvature soon differs from that of the initial parameters.

    Returns:
      A value for the keyword ``refresh`` of a transformation.

    Raises:
      ValueError: as :func:`every`.

    >>> import natgrad_jax as ng
    >>> tx = ng.kfac(0.1, ng.Layers({}), refresh=ng.staggered(50))
    """
    return Refresh(period, True, over, tuple(early))


PERIOD = 20  # steps, where none is given
USUAL = staggered(PERIOD)
EARLY = staggered(PERIOD, early=(1, 2, 4, 8))


def early_if_bounded(bound: Any, refresh: Refresh | str | None, *periods: Scalar | None) -> Any:
    """:data:`EARLY` if a trust region bounds the first steps and no refresh and no period was
    chosen, else ``refresh``."""
    given = [x for x in (refresh, *periods) if x is not None]
    return refresh if bound is None or given else EARLY


class RefreshSchedule(NamedTuple):
    """A checked choice. ``period``: a float, an array or a schedule, in steps; ``staggered``:
    whether layers are refreshed at different steps; ``over``: the devices that share the work;
    ``early``: steps on which all layers are measured and refreshed too."""

    period: Scalar
    staggered: bool = False
    over: Devices | None = None
    early: tuple[int, ...] = ()

    def is_early(self, step: jax.Array) -> jax.Array:
        """Whether all layers are measured and refreshed, whatever their turn."""
        return functools.reduce(
            jnp.logical_or, (step == early for early in self.early), jnp.bool_(False)
        )


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
    return RefreshSchedule(period, is_staggered, devices(refresh.over), refresh.early)


class Turns(NamedTuple):
    """When the members of one bundle are refreshed: ``size`` of them in each turn, one turn in each
    phase of ``phases``, which ascend; a phase may have several turns, or none."""

    size: int
    phases: tuple[int, ...]


def turns(layers: Mapping[Path, Layer], period: int) -> dict[Path, Turns]:
    """Equal work at each step of a period, for staggered refreshes.

    They begin with the second half of the period, since all layers were refreshed at step 0 and
    factors have moved little in the first half. The period's first step, which measures too, is
    used last."""
    half = period // 2
    steps = [*range(half + 1, period), *range(1, half + 1), 0]
    sizes = {path: _share(len(layer.each), period) for path, layer in layers.items()}
    counts = {path: len(layer.each) // sizes[path] for path, layer in layers.items()}
    of_turn = {path: cost(layer) / counts[path] for path, layer in layers.items()}
    places = iter(balanced([of_turn[p] for p, n in counts.items() for _ in range(n)], period))
    own = {path: sorted(steps[next(places)] for _ in range(n)) for path, n in counts.items()}
    return {path: Turns(sizes[path], tuple(own[path])) for path in layers}


def _share(members: int, period: int) -> int:
    """The largest divisor of a number of members that needs at least one turn a step."""
    return max(n for n in range(1, -(-members // period) + 1) if members % n == 0)


def cost(layer: Layer) -> float:
    """The work of factorising a layer's matrices: the cubes of their sizes."""
    copies = math.prod((*layer.stack_sizes, *layer.factor_blocks))
    return copies * sum(side.cost for side in (layer.input_side, layer.output_side) if side)


# The new entries of each field of a state, by path, and the number of failures.
Renewed = tuple[dict[str, dict[Path, Any]], jax.Array]
Renew = Callable[[Mapping[Path, Layer], Any], Renewed]


def refresh_due(
    layers: Mapping[Path, Layer],
    when: RefreshSchedule,
    state: State,
    first: jax.Array,
    renew: Renew,
    fields: tuple[str, ...] = ("bases",),
) -> State:
    """The state with what ``renew`` returns for the layers that are due, given their part of it.

    ``first``: whether something was measured for the first time; all layers are due then, and on
    early steps.
    ``fields``: those of the state that ``renew`` returns.
    """
    step, period = state.clock.step, at(when.period, state.clock.step).astype(jnp.int32)
    first = first | when.is_early(step)
    if not when.staggered:
        return _at_once(layers, due(step, period) | first, state, renew, fields)
    assert isinstance(when.period, int | float)
    for path, own in turns(layers, int(when.period)).items():
        if len(own.phases) == 1:
            is_due = (step % period == own.phases[0]) | first
            state = _at_once({path: layers[path]}, is_due, state, renew, fields)
        else:
            state = _in_turn(layers[path], own, step % period, first, state, renew, fields)
    return state


def _at_once(
    layers: Mapping[Path, Layer],
    is_due: jax.Array,
    state: State,
    renew: Renew,
    fields: tuple[str, ...],
) -> State:
    """The state with all of these layers refreshed, if they are due."""

    def renewed() -> Renewed:
        new, bad = renew(layers, state)
        return new, state.rejected + bad

    kept = {name: {path: getattr(state, name)[path] for path in layers} for name in fields}
    new, rejected = jax.lax.cond(is_due, renewed, lambda: (kept, state.rejected))
    merged = {name: getattr(state, name) | own for name, own in new.items()}
    return state._replace(**merged, rejected=rejected)


def _in_turn(
    bundle: Layer,
    own: Turns,
    phase: jax.Array,
    first: jax.Array,
    state: State,
    renew: Renew,
    fields: tuple[str, ...],
) -> State:
    """The state with those members of a bundle refreshed whose turn it is: one program for all."""
    path, few = bundle.path, part_of(bundle, own.size)

    def turn(i: jax.Array, carry: Any) -> Any:
        entries, rejected = carry
        now = state._replace(**{name: {path: x} for name, x in entries.items()})
        start = i * own.size
        new, bad = renew({path: few}, members.part(now, path, start, own.size))
        put = lambda name: members.with_part(now, name, path, start, new[name][path])
        return {name: put(name) for name in fields}, rejected + bad

    last = max(own.phases) + 1
    begin = jnp.asarray(np.searchsorted(own.phases, np.arange(last + 2)))
    phase = jnp.minimum(phase, last)
    start = jnp.where(first, 0, begin[phase])
    end = jnp.where(first, len(own.phases), begin[phase + 1])
    kept = {name: getattr(state, name)[path] for name in fields}
    new, rejected = jax.lax.fori_loop(start, end, turn, (kept, state.rejected))
    merged = {name: getattr(state, name) | {path: x} for name, x in new.items()}
    return state._replace(**merged, rejected=rejected)
