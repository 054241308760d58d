"""The layers of a model, and how the parameters outside them are treated."""

import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any, NamedTuple

from natgrad_jax.layers.approximation import Approximation
from natgrad_jax.layers.coverage import coverage_table
from natgrad_jax.layers.layer import BLOCKS, Layer, LossTerm, Parameter, approximated, free_layer
from natgrad_jax.layers.limits import MAX_FULL, MAX_NUMBERS
from natgrad_jax.utils.tree_paths import Path, join, leaves

# The possible blocks of a parameter that no layer's block covers.
LEFTOVER_BLOCKS = ("diagonal", "gradient", "frozen")

Where = Path | str | Callable[[Path, Any], bool]


class Leftover(NamedTuple):
    """A parameter outside every layer's block, and why.

    ``block``: ``"diagonal"`` (of its Fisher), ``"gradient"`` (passes unchanged) or ``"frozen"``
    (its update is zero). ``chosen``: whether the user chose that. ``layer``: the whole layer
    that it was taken out of, to which :meth:`Layers.replace` can return it.
    """

    parameter: Parameter
    reason: str
    block: str = "diagonal"
    chosen: bool = False
    layer: Layer | None = None

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
        """The likelihoods whose sum the loss is; each counts its own examples."""
        return self._terms

    @property
    def diagonals(self) -> tuple[Parameter, ...]:
        """The leftover parameters whose block is the diagonal of their Fisher."""
        return tuple(x.parameter for x in self._leftover if x.block == "diagonal")

    @property
    def uncovered(self) -> tuple[Path, ...]:
        """Paths of the parameters that no block covers; empty for a model wholly covered."""
        return tuple(x.path for x in self._leftover if not x.chosen)

    def select(self, predicate: Callable[[Path, Layer], bool]) -> "Layers":
        """The layers for which ``predicate(path, layer)`` holds; the others become leftover.

        ``path`` is a tuple of str, ``layer`` the :class:`Layer` there.

        >>> import natgrad_jax as ng
        >>> len(ng.Layers({}).select(lambda path, layer: "head" not in path))
        0
        """
        kept, dropped = {}, []
        for path, layer in self._layers.items():
            if predicate(path, layer):
                kept[path] = layer
            else:
                dropped += [Leftover(p, "left out by select", layer=layer)
                            for p in layer.parameters]  # fmt: skip
        return Layers(kept, self._leftover + tuple(dropped), self._terms)

    def replace(self, where: Where, block: str) -> "Layers":
        """These layers with another block where ``where`` holds.

        Later choices for a parameter override earlier ones: choose for many parameters first and
        for few after, ``layers.replace("*", "diagonal").replace("head", "full")``.

        Args:
          where: a path, ``("encoder", "head")`` or ``"encoder/head"``, for all that is at or below
            it (a layer, a parameter, a part of the model); a pattern of the whole path,
            ``"*/bias"`` or ``"encoder/*"``, whose ``*`` matches ``/`` too; or a predicate, called
            as ``where(path, record)``: with each layer's path and its :class:`Layer`, and with the
            path and the record of each parameter outside every block (``record.reason`` says why).
            Paths are tuples of str: ``lambda path, record: "head" in path``.
          block: ``"kronecker"`` (A ⊗ G; if the layer has inputs and outputs), ``"full"`` (one
            matrix over all parameters of the layer, exact), ``"unit"`` (one for each of the layer's
            own blocks: the scale and bias of one unit of a normalization, one group of a
            convolution), ``"diagonal"`` (of the Fisher), ``"gradient"`` (the plain gradient passes)
            or ``"frozen"`` (the update is zero). The first three are blocks of a layer, of all its
            parameters except those with another choice; the others are for single parameters.

        Raises:
          ValueError: an unknown block, no match, or a block that is not possible there.

        >>> import natgrad_jax as ng
        >>> ng.Layers({}).replace(lambda path, record: "norm" in path, "diagonal").uncovered
        ()
        """
        if block not in BLOCKS + LEFTOVER_BLOCKS:
            known = ", ".join(map(repr, BLOCKS + LEFTOVER_BLOCKS))
            raise ValueError(f"block must be one of {known}; got {block!r}.")
        outside = {x.path: x for x in self._leftover}
        layers: dict[Path, Layer] = {}
        leftover: list[Leftover] = []
        found = callable(where)  # a predicate may find nothing
        for path, whole in self._wholes().items():
            now = self._layers.get(path)
            inside = set() if now is None else {p.path for p in now.parameters}
            hits = _hits(where, whole, now, outside)
            found = found or bool(hits)
            kept = inside | hits if block in BLOCKS else inside - hits
            if now is not None and not hits:
                layers[path] = now
            elif kept:
                own = block if now is None or block in BLOCKS else now.block
                layers[path] = _part(whole, kept, own)
            leftover += [
                Leftover(p, "chosen", block, True, whole) if p.path in hits else outside[p.path]
                for p in whole.parameters
                if p.path not in kept
            ]
        if not found:
            name = where if isinstance(where, str) or callable(where) else join(_path(where))
            known = ", ".join([*map(join, self._layers), *(join(x.path) for x in self._leftover)])
            raise ValueError(f"nothing at {name!r} to give the block {block!r}; there are: {known}")
        return Layers(layers, tuple(leftover), self._terms)

    def within(self, layers: Collection[Path], diagonals: Collection[Path] = ()) -> "Layers":
        """The layers at the paths ``layers``, and the diagonal parameters at ``diagonals``."""
        kept = {path: layer for path, layer in self._layers.items() if path in layers}
        left = [x for x in self._leftover if x.block != "diagonal" or x.path in diagonals]
        return Layers(kept, tuple(left), self._terms)

    def of(self, params: Any) -> "Layers":
        """The layers with a parameter in ``params``, without those whose parameters are masked out
        (``optax.masked``, ``optax.partition``, ``wrt=``). All layers if ``params`` has no known
        parameter, as for a placeholder."""
        given = leaves(params)
        own = lambda parameters: any(p.path in given for p in parameters)
        kept = [path for path, layer in self._layers.items() if own(layer.parameters)]
        left = [p.path for p in self.diagonals if p.path in given]
        known = kept or any(x.path in given for x in self._leftover)
        return self.within(kept, left) if known else self

    def _wholes(self) -> dict[Path, Layer]:
        """Every layer by path, with all parameters that it was found with; a parameter that was
        never in a layer is a free layer."""
        wholes = dict(self._layers)
        for record in self._leftover:
            layer = record.layer or free_layer(record.parameter)
            if len(layer.parameters) > len(getattr(wholes.get(layer.path), "parameters", ())):
                wholes[layer.path] = layer
        return wholes

    def approximate(self, approximation: Approximation) -> "Layers":
        """These layers with that Kronecker approximation, as far as it applies to each."""
        return _approximate(self, approximation)

    def __repr__(self) -> str:
        covered = f"{len(self)} layers, {len(self._leftover)} leftover parameters"
        return f"Layers({covered})\n{self}"

    def __str__(self) -> str:
        return coverage_table(self)


@functools.lru_cache(maxsize=256)
def _approximate(layers: Layers, approximation: Approximation) -> Layers:
    own = {path: approximated(layer, approximation) for path, layer in layers.items()}
    return Layers(own, layers.leftover, layers.terms)


def _hits(
    where: Where, whole: Layer, now: Layer | None, outside: Mapping[Path, Leftover]
) -> set[Path]:
    """The parameters of a layer that ``where`` selects; ``now``: the part with a block, if any."""
    own = [p.path for p in whole.parameters]
    if not callable(where):
        return {path for path in own if names(where, path) or names(where, whole.path)}
    hits = {path for path in own if path in outside and where(path, outside[path])}
    if now is not None and where(now.path, now):
        hits |= {p.path for p in now.parameters}
    return hits


def _path(keys: tuple[Any, ...]) -> Path:
    return tuple(map(str, keys))


def names(where: Path | str, path: Path) -> bool:
    """Whether a path or a pattern selects ``path``; a path selects all below it too."""
    if not isinstance(where, str):
        return path[: len(where)] == _path(where)
    if any(c in where for c in "*?["):
        return fnmatchcase(join(path), where)
    return where == "." or f"{join(path)}/".startswith(where.rstrip("/") + "/")


def _part(whole: Layer, kept: set[Path], block: str) -> Layer:
    """The layer with the parameters ``kept``, as a block of kind ``block``."""
    if whole.kernel.path not in kept and whole.traits.has_sides:
        raise ValueError(
            f"{join(whole.path)}: its kernel cannot leave the block without its bias, nor its bias "
            'have a block alone. Name the whole layer, or give the bias alone "diagonal", '
            '"gradient" or "frozen".'
        )
    pairs = zip(whole.parameters, whole.layouts, strict=True)
    parameters, layouts = zip(*(pair for pair in pairs if pair[0].path in kept), strict=True)
    return _with_block(replace(whole, parameters=parameters, layouts=layouts), block)


def _with_block(layer: Layer, block: str) -> Layer:
    if block == "kronecker" and not layer.traits.has_sides:
        raise ValueError(
            f"{join(layer.path)} ({layer.kind}) has no inputs and outputs for a Kronecker "
            'product: choose "full", "unit" or "diagonal".'
        )
    layer = replace(layer, block=block)
    n = layer.input_side.width
    copies = math.prod(layer.stack_sizes + layer.factor_blocks)
    if block != "kronecker" and (n > MAX_FULL or copies * n**2 > MAX_NUMBERS):
        raise ValueError(
            f'{join(layer.path)}: its block "{block}" would be {copies:,} × a matrix of {n:,}². '
            f"The limit is {MAX_FULL:,}², and {4 * MAX_NUMBERS >> 30} GB together: choose another."
        )
    return layer


def check_layers(layers: Any) -> None:
    """Raise unless ``layers`` is a :class:`Layers`."""
    if not isinstance(layers, Layers):
        raise TypeError(
            "layers must be what find_layers(loss_fn, params, batch) returns; got "
            f"{type(layers).__name__}. The order of arguments is value_and_grad(loss_fn, layers), "
            "scale_by_kfac(layers) and kfac(learning_rate, layers)."
        )
