"""The layers of a model, and what becomes of the parameters outside them."""

import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any, NamedTuple

from natgrad_jax.approximations import Approximation
from natgrad_jax.coverage import coverage_table
from natgrad_jax.layer import BLOCKS, Layer, LossTerm, Parameter, free_layer
from natgrad_jax.paths import Path, join, leaves

# What may become of a parameter that no layer's block covers.
LEFTOVER_BLOCKS = ("diagonal", "gradient", "frozen")

# Largest full block that can be asked for: its inverse takes about a second on one core.
MAX_FULL = 8192

Where = Path | str | Callable[[Path, Any], bool]


class Leftover(NamedTuple):
    """A parameter outside every layer's block, and why.

    ``block``: ``"diagonal"`` (of its Fisher), ``"gradient"`` (passes unchanged) or ``"frozen"``
    (its update is zero). ``chosen``: whether the user asked for that.
    """

    parameter: Parameter
    reason: str
    block: str = "diagonal"
    chosen: bool = False

    @property
    def path(self) -> Path:
        return self.parameter.path


class Layers(Mapping[Path, Layer]):
    """The layers of a model by path, and the parameters that no layer covers.

    Immutable and hashable. ``print(layers)`` shows every parameter once: the kind of block that
    covers it with its factor sizes, or why none does.

    >>> import natgrad_jax as ng
    >>> layers = ng.Layers({})
    >>> len(layers), layers.uncovered
    (0, ())
    """

    def __init__(
        self,
        layers: Mapping[Path, Layer],
        leftover: tuple[Leftover, ...] = (),
        terms: tuple[LossTerm, ...] = (LossTerm("any"),),
    ):
        self._layers = MappingProxyType(dict(layers))
        self._leftover = tuple(leftover)
        self._terms = tuple(terms)
        self._key = (tuple(self._layers.values()), self._leftover, self._terms)
        self._hash = hash(self._key)

    def __getitem__(self, path: Path) -> Layer:
        try:
            return self._layers[path]
        except KeyError:
            known = ", ".join(repr(p) for p in self._layers)
            raise KeyError(
                f"no layer at path {path!r}. A path is a tuple of str; the layers here are: {known}"
            ) from None

    def __contains__(self, path: object) -> bool:
        return path in self._layers

    def __iter__(self) -> Iterator[Path]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layers) and self._key == other._key

    @property
    def leftover(self) -> tuple[Leftover, ...]:
        """The parameters outside every layer's block, each with the reason."""
        return self._leftover

    @property
    def terms(self) -> tuple[LossTerm, ...]:
        """The likelihoods that the loss adds up; each counts its own examples."""
        return self._terms

    @property
    def diagonals(self) -> tuple[Parameter, ...]:
        """The leftover parameters that have the diagonal of their Fisher."""
        return tuple(x.parameter for x in self._leftover if x.block == "diagonal")

    @property
    def uncovered(self) -> tuple[Path, ...]:
        """Paths of the parameters that no block covers; empty for a model wholly covered."""
        return tuple(x.path for x in self._leftover if not x.chosen)

    def select(self, predicate: Callable[[Path, Layer], bool]) -> "Layers":
        """The layers for which ``predicate(path, layer)`` holds; the others become leftover.

        >>> import natgrad_jax as ng
        >>> len(ng.Layers({}).select(lambda path, layer: "head" not in path))
        0
        """
        kept, dropped = {}, []
        for path, layer in self._layers.items():
            if predicate(path, layer):
                kept[path] = layer
            else:
                dropped += [Leftover(p, "left out by select") for p in layer.parameters]
        return Layers(kept, self._leftover + tuple(dropped), self._terms)

    def replace(self, where: Where, block: str) -> "Layers":
        """These layers with another block where ``where`` holds.

        Args:
          where: a path (what lies at it or below: a layer, a parameter, a part of the model), a
            pattern of it as people write it (``"*/bias"``, ``"encoder/*"``), or a predicate of path
            and record (a :class:`Layer`, or the record of a leftover parameter).
          block: ``"kronecker"`` (A ⊗ G; where the layer has inputs and outputs), ``"full"`` (one
            matrix over all parameters of the layer, exact), ``"unit"`` (one for each of the layer's
            own blocks: the scale and bias of one unit of a normalization, one group of a
            convolution), ``"diagonal"`` (of the Fisher), ``"gradient"`` (the plain gradient passes)
            or ``"frozen"`` (the update is zero).

        Raises:
          ValueError: an unknown block, nothing there, or a block that cannot be had there.

        >>> import natgrad_jax as ng
        >>> ng.Layers({}).replace(lambda path, record: "norm" in path, "diagonal").uncovered
        ()
        """
        if block not in BLOCKS + LEFTOVER_BLOCKS:
            known = ", ".join(map(repr, BLOCKS + LEFTOVER_BLOCKS))
            raise ValueError(f"block must be one of {known}; got {block!r}.")
        layers: dict[Path, Layer] = {}
        leftover: list[Leftover] = []
        found = callable(where)
        for path, layer in self._layers.items():
            hit = _matches(where, path, layer)
            hits = [hit or (not callable(where) and _matches(where, p.path, layer))
                    for p in layer.parameters]  # fmt: skip
            found = found or any(hits)
            if not any(hits):
                layers[path] = layer
            elif block in BLOCKS:
                layers[path] = _with_block(layer, block)
            else:
                kept = _without(layer, hits)
                layers |= {} if kept is None else {path: kept}
                leftover += [Leftover(p, "chosen", block, True)
                             for p, h in zip(layer.parameters, hits, strict=True) if h]  # fmt: skip
        for record in self._leftover:
            if not _matches(where, record.path, record):
                leftover.append(record)
                continue
            found = True
            if block in BLOCKS:
                layers[record.path] = _with_block(free_layer(record.parameter), block)
            else:
                leftover.append(Leftover(record.parameter, "chosen", block, True))
        if not found:
            name = join(where) if isinstance(where, tuple) else where
            known = ", ".join([*map(join, self._layers), *(join(x.path) for x in self._leftover)])
            raise ValueError(f"nothing to give the block {block!r} at {name!r}; there are: {known}")
        return Layers(layers, tuple(leftover), self._terms)

    def within(self, layers: Collection[Path], diagonals: Collection[Path] = ()) -> "Layers":
        """The layers at those paths, and the leftover parameters with a diagonal at those."""
        kept = {path: layer for path, layer in self._layers.items() if path in layers}
        left = [x for x in self._leftover if x.block != "diagonal" or x.path in diagonals]
        return Layers(kept, tuple(left), self._terms)

    def of(self, params: Any) -> "Layers":
        """Those of which a parameter is in ``params``: not the layers of parameters that are masked
        out (``optax.masked``, ``optax.partition``, ``wrt=``). All of them where it has none that is
        known, as a placeholder has."""
        given = leaves(params)
        own = lambda parameters: any(p.path in given for p in parameters)
        kept = [path for path, layer in self._layers.items() if own(layer.parameters)]
        left = [p.path for p in self.diagonals if p.path in given]
        known = kept or any(x.path in given for x in self._leftover)
        return self.within(kept, left) if known else self

    def approximate(self, approximation: Approximation) -> "Layers":
        """These layers with that Kronecker approximation, where it makes a difference."""
        return _approximate(self, approximation)

    def __repr__(self) -> str:
        covered = f"{len(self)} layers, {len(self._leftover)} leftover parameters"
        return f"Layers({covered})\n{self}"

    def __str__(self) -> str:
        return coverage_table(self)


@functools.lru_cache(maxsize=256)
def _approximate(layers: Layers, approximation: Approximation) -> Layers:
    def of(layer: Layer) -> Layer:
        own = approximation
        if layer.block != "kronecker":
            own = Approximation()
        if not layer.kind.startswith("conv"):
            own = own._replace(convolution="kfc", centred=False)
        if not layer.shares:
            own = own._replace(weight_sharing="expand")
        return replace(layer, approximation=own)

    own = {path: of(layer) for path, layer in layers.items()}
    return Layers(own, layers.leftover, layers.terms)


def _matches(where: Where, path: Path, record: Any) -> bool:
    if callable(where):
        return bool(where(path, record))
    if isinstance(where, str):
        return fnmatchcase(join(path), where)
    return path[: len(where)] == tuple(where)


def _with_block(layer: Layer, block: str) -> Layer:
    if block == "kronecker" and layer.kind in ("norm", "free"):
        raise ValueError(
            f"{join(layer.path)} ({layer.kind}) has no inputs and outputs to make a Kronecker "
            'product of: choose "full", "unit" or "diagonal".'
        )
    if block == "full" and layer.size > MAX_FULL:
        raise ValueError(
            f"{join(layer.path)} has {layer.size:,} parameters: its full block would be a matrix "
            f"of that size squared. The limit is {MAX_FULL:,}; choose another block."
        )
    return replace(layer, block=block)


def _without(layer: Layer, dropped: list[bool]) -> Layer | None:
    """The layer without these parameters; None where nothing of it is left."""
    if all(dropped):
        return None
    if dropped[0] and layer.kind != "norm":
        raise ValueError(
            f"{join(layer.path)}: its kernel cannot leave the block without its bias; name the "
            "layer, or the bias alone."
        )
    kept = [not d for d in dropped]
    return replace(
        layer,
        parameters=tuple(p for p, k in zip(layer.parameters, kept, strict=True) if k),
        layouts=tuple(x for x, k in zip(layer.layouts, kept, strict=True) if k),
    )


def check_layers(layers: Any) -> None:
    """Raise unless ``layers`` is a :class:`Layers`."""
    if not isinstance(layers, Layers):
        raise TypeError(
            "layers must be what find_layers(loss_fn, params, batch) returns; got "
            f"{type(layers).__name__}. The order of arguments is value_and_grad(loss_fn, layers), "
            "scale_by_kfac(layers) and kfac(learning_rate, layers)."
        )
