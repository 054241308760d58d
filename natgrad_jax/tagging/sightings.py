"""What a search saw: one sighting for each layer called, and how it becomes a record."""

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from natgrad_jax.layers import Layer, Layout, Parameter
from natgrad_jax.paths import Path
from natgrad_jax.tagging.modules import UnsupportedError, describe


class Sighting(NamedTuple):
    """A layer as one of its calls saw it: shapes are what is left after scans and vmaps sliced."""

    kind: str
    kernel_layout: Layout
    bias_layout: Layout | None
    probe_shape: tuple[int, ...]
    kernel_shape: tuple[int, ...]


@dataclass(eq=False)
class Sightings:
    """Collected while ``loss_fn`` is traced abstractly.

    ``owners``: the type of the module at each tagged path; ``layers``: sightings; ``refused``:
    why a known layer has no block.
    """

    owners: dict[Path, type] = field(default_factory=dict)
    layers: dict[Path, Sighting] = field(default_factory=dict)
    refused: dict[Path, str] = field(default_factory=dict)
    _refusal: str | None = None

    @contextlib.contextmanager
    def refusing(self, reason: str) -> Iterator[None]:
        """Layers called inside have no block, for this reason."""
        outer, self._refusal = self._refusal, reason
        try:
            yield
        finally:
            self._refusal = outer

    def record(
        self,
        path: Path,
        probe: Any,
        kernel_shape: tuple[int, ...],
        bias: bool,
        module: Any,
        module_type: type,
        args: Any,
        kwargs: Any,
    ) -> None:
        """Note one call; called twice, a layer must have the same geometry both times."""
        if self._refusal is not None:
            self.refused[path] = self._refusal
        try:
            geometry = describe(module, module_type, kernel_shape, bias, args, kwargs)
        except UnsupportedError as e:
            self.refused[path] = str(e)
            return
        sighting = Sighting(
            geometry.kind,
            geometry.kernel,
            geometry.bias,
            tuple(probe.shape),
            tuple(kernel_shape),
        )
        if self.layers.setdefault(path, sighting) != sighting:
            self.refused[path] = "it is called in two ways that read its kernel differently"


def stack_candidates(whole: tuple[int, ...], seen: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Every choice of axes whose removal turns shape ``whole`` into ``seen``, leading first."""
    removed = len(whole) - len(seen)
    return [
        axes
        for axes in itertools.combinations(range(len(whole)), max(removed, 0))
        if tuple(n for i, n in enumerate(whole) if i not in axes) == seen
    ]


def to_layer(
    path: Path, sighting: Sighting, kernel: Parameter, bias: Parameter | None, axes: tuple[int, ...]
) -> Layer:
    """The record of a sighted layer whose parameters are stacked over ``axes``.

    A bias that is no parameter is a constant: the layer then counts as one without.
    """
    if sighting.bias_layout is None:
        bias = None
    # the last axis of a kernel is the last one of its bias too, and no other counts alike there
    last = len(kernel.shape) - 1
    stack = tuple((-1 if axis == last else axis, kernel.shape[axis]) for axis in axes)
    return Layer(
        path=path,
        kind=sighting.kind,
        kernel=kernel,
        bias=bias,
        kernel_layout=sighting.kernel_layout,
        bias_layout=None if bias is None else sighting.bias_layout,
        stack=stack,
    )
