"""What is put into a traced loss: taps after equations, and rows where parameters meet examples."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from natgrad_jax.tracing.dependence import Key
from natgrad_jax.tracing.examples import Axis


class Meeting(NamedTuple):
    """Where a function of parameters alone, an equation's ``operand``, first meets the examples,
    which lie along ``axis`` of the result; or where a scan over examples gets it."""

    key: Key
    operand: int
    axis: Axis

    @property
    def examples(self) -> int:
        return self.axis.examples


class Tap(NamedTuple):
    """After the equation at ``key``: ``read(slot, weight, operands, scale, result) → result``.

    ``slot``: its name; ``at``: the elements of the slot's leading axes at which this equation
    is; None for an axis that one of ``scans`` slices. ``operand``: the parameter's. ``weight``: the
    name of the rows' weights among the slots."""

    key: Key
    slot: Any
    operand: int
    at: tuple[int | None, ...]
    scans: tuple[Key, ...]
    read: Callable[..., Any]
    weight: Any = None


class Instruments(NamedTuple):
    """``taps`` and ``meetings`` by the key of their equation; ``chain``: equations that rows and
    scales go through; ``touched``: all of these, and the equations around them."""

    taps: Mapping[Key, Sequence[Tap]]
    meetings: Mapping[Key, Sequence[Meeting]]
    chain: frozenset[Key]
    touched: frozenset[Key]


def instruments(
    taps: Sequence[Tap], meetings: Sequence[Meeting], chain: frozenset[Key]
) -> Instruments:
    taps_at: dict[Key, list[Tap]] = {}
    meetings_at: dict[Key, list[Meeting]] = {}
    for tap in taps:
        taps_at.setdefault(tap.key, []).append(tap)
    for meeting in meetings:
        meetings_at.setdefault(meeting.key, []).append(meeting)
    keys = {*taps_at, *meetings_at, *chain}
    around = {k[:n] for k in keys for n in range(1, len(k) + 1)}
    return Instruments(taps_at, meetings_at, chain, frozenset(around))
