"""The uses of parameters in a traced loss: what following them finds."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from natgrad_jax.tracing.contractions import Geometry
from natgrad_jax.tracing.dependence import Key
from natgrad_jax.tracing.examples import Axis
from natgrad_jax.tracing.instruments import Meeting
from natgrad_jax.tracing.views import View


class Use(NamedTuple):
    """One equation that contracts an input with a parameter.

    ``key``: where the equation stands. ``operand``: which operand the parameter is. ``calls``: how
    often it runs for one element of the stack; ``scans``: those that slice it. ``axis``: where the
    examples are in its output, None if that is not known. ``out``: the output's shape. ``scaled``:
    whether the parameter was multiplied by a scalar before.
    """

    key: Key
    parameter: int
    operand: int
    geometry: Geometry
    calls: int
    scans: tuple[Key, ...]
    axis: Axis | None
    out: tuple[int, ...]
    scaled: bool
    inside_shard_map: bool

    @property
    def cut(self) -> tuple[int, int, int] | None:
        """(axis, start, size) of the output that belongs to this parameter, None for all of it."""
        return getattr(getattr(self.geometry.call, "outputs_part", None), "cut", None)

    @property
    def own_out(self) -> tuple[int, ...]:
        """The shape of that part."""
        sizes = list(self.out)
        if self.cut is not None:
            sizes[self.cut[0]] = self.cut[2]
        return tuple(sizes)


class Addition(NamedTuple):
    """A parameter added to the outputs of uses: the bias's view and the outputs'."""

    bias: View
    outputs: tuple[View, ...]
    key: Key


@dataclass
class Uses:
    """What following finds. ``uses``: the contractions. ``meetings``: by parameter the equations in
    which it meets the examples. ``additions``: of biases to outputs. ``elementwise``: by parameter
    the operations that use it so; ``events``: how often. ``ends``: why a parameter is not in
    ``uses`` alone; ``lost``: why the examples' own gradients cannot be had. ``chain``: the
    equations that parameters go through. ``marked``: parameters of which the user said what
    is done with them. ``contracted``: those that meet the examples in a contraction."""

    uses: list[Use] = field(default_factory=list)
    meetings: dict[int, list[Meeting]] = field(default_factory=dict)
    additions: list[Addition] = field(default_factory=list)
    ends: dict[int, list[str]] = field(default_factory=dict)
    lost: dict[int, str] = field(default_factory=dict)
    elementwise: dict[int, set[str]] = field(default_factory=dict)
    events: Counter[int] = field(default_factory=Counter)
    chain: set[Key] = field(default_factory=set)
    marked: set[int] = field(default_factory=set)
    contracted: set[int] = field(default_factory=set)

    def end(self, parameters: Iterable[int], reason: str) -> None:
        """These parameters have other than Kronecker uses."""
        for p in (p for p in parameters if p >= 0):
            if reason not in self.ends.setdefault(p, []):
                self.ends[p].append(reason)

    def lose(self, parameters: frozenset[int], reason: str) -> None:
        """These parameters go where they are not followed."""
        self.end(parameters, reason)
        self.events.update(parameters)
        for p in parameters:
            self.lost.setdefault(max(p, behind(p)), reason)


def behind(parameter: int) -> int:
    """The mark of a parameter where its own use has been noted, but not yet with examples: in a
    function of parameters and constants alone. Its own inverse."""
    return -1 - parameter
