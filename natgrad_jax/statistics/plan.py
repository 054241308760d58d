"""What one backward pass measures, given what the transformations need."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax

from natgrad_jax.curvature.factor_averages import Factors
from natgrad_jax.layers.approximation import Approximation
from natgrad_jax.layers.collection import Layers
from natgrad_jax.layers.kinds.regrouped import regrouped
from natgrad_jax.layers.layer import Layer, Parameter
from natgrad_jax.layers.limits import MAX_ROWS
from natgrad_jax.statistics.example_matrices import MatricesReader
from natgrad_jax.statistics.example_rows import RowsReader
from natgrad_jax.statistics.layer_statistics import LayerReader
from natgrad_jax.statistics.row_weights import row_weights, term_weights
from natgrad_jax.statistics.spec import specs
from natgrad_jax.tagging.assemble import Kernel
from natgrad_jax.tagging.tagged import Tagged
from natgrad_jax.tracing.instruments import Instruments, Meeting, Tap, instruments
from natgrad_jax.tracing.slots import tap
from natgrad_jax.utils.tree_paths import Path, join


class Plan(NamedTuple):
    """What one backward pass measures, by layer path.

    ``readers``: which statistics are taken from each call of a layer. ``bases``: eigenbases for
    moments. ``blocks``, ``moments``: layers whose examples' gradients are not available, so that
    full blocks and moments come from squared sums. ``diagonals``: parameters with a diagonal block.
    ``in_bases``: whether a transformation needs moments at all. ``fisher``: where labels come from,
    ``"none"`` also if no transformation needs more than inputs. ``every_step``: whether it is known
    that this step measures. ``examples``: for each term of the loss, the axis of its outputs that
    counts examples. ``passes``: the terms of each backward pass; terms that depend on the same
    parameter are in different passes. ``stride``: k, to measure every k-th example
    (:func:`stride_for`), of a batch that is divided into ``parts``.
    """

    readers: dict[Path, Any]
    bases: dict[Path, Any]
    blocks: dict[Path, Layer]
    moments: dict[Path, Layer]
    diagonals: tuple[Parameter, ...]
    in_bases: bool
    fisher: str
    every_step: bool
    examples: tuple[int | None, ...]
    passes: tuple[tuple[int, ...], ...]
    stride: int | None
    parts: int

    @property
    def from_sums(self) -> bool:
        """Whether anything comes from squared sums over examples."""
        return bool(self.blocks or self.moments or self.diagonals)


def make_plan(layers: Layers, opt_state: Any, fisher: str, parts: int = 1) -> Plan:
    """What to measure for the transformations in ``opt_state``, in one of ``parts`` of a batch.

    Only layers that they keep are measured, not parameters that are masked out. Without a state, or
    if several transformations need different forms, whole factors are measured, with both weight
    sharings: every other form can be cut out of those. (Except that layers called several times
    have "reduce" measured only if a transformation needs it.)
    """
    requested = [] if opt_state is None else specs(opt_state)
    if requested:
        kept = lambda field: {path for _, s in requested for path in getattr(s, field, ())}
        layers = layers.within(kept("factors"), kept("diagonal"))
    if requested and all(spec.inputs_only for spec, _ in requested):
        fisher = "none"
    examples = tuple(term.examples for term in layers.terms)
    if fisher == "exact" and None in examples:  # a pass for each example, of every term
        examples = (None,) * len(examples)
    alone = fisher == "exact" and None in examples
    forms = {spec.approximation for spec, _ in requested}
    strides = [spec.stride for spec, _ in requested]
    stride = min(strides, key=lambda s: 1.5 if s is None else s, default=1)  # None is 1 or 2
    whole = len(forms) != 1
    widest = _widest([form.max_size for form in forms])
    own = layers.approximate(Approximation(max_size=widest) if whole else forms.pop())
    mean = Approximation(weight_sharing="reduce", max_size=widest)
    reduced = layers.approximate(mean) if whole else {}
    with_moments = [(spec, state) for spec, state in requested if spec.moments]
    if len(with_moments) > 1:
        raise ValueError(
            "opt_state holds several transformations that measure squared gradients in their own "
            "eigenbases, and a backward pass can measure one of them. Use "
            'moments="running_average" in the others.'
        )
    readers, blocks, moments, bases = {}, {}, {}, {}
    for path, layer in own.items():
        if layer.block != "kronecker" and (fisher == "none" or layer.by_gradient or alone):
            if fisher != "none":
                blocks[path] = layer
            continue
        own_forms: tuple[tuple[str, Layer], ...] = ((layer.approximation.weight_sharing, layer),)
        if whole and layer.shares and layer.calls == 1:
            own_forms += (("reduce", reduced[path]),)
        readers[path] = LayerReader(own_forms, stride=stride, parts=parts)
    for spec, state in with_moments if fisher != "none" else []:
        for path, layer in layers.approximate(spec.approximation).items():
            if layer.block == "kronecker" and path in state.bases:
                bases[path] = state.bases[path]
                if layer.by_gradient or alone:
                    moments[path] = layer
                    continue
                several = len(layer.terms) > 1  # has an axis of terms in front
                shape = state.moments[path].shape[several + len(layer.stack) :]
                readers[path] = readers[path]._replace(moments=layer, moments_shape=shape)
    diagonals = layers.diagonals if fisher != "none" else ()
    in_bases = bool(with_moments)
    together = [{*x.terms} for x in layers.values()] + [{*p.terms} for p in diagonals]
    passes = _apart(len(examples), together)
    every_step = opt_state is None or any(spec.every_step for spec, _ in requested)
    return Plan(
        readers, bases, blocks, moments, diagonals, in_bases, fisher, every_step, examples, passes,
        stride, parts,
    )  # fmt: skip


def unstrided(of: Plan) -> Plan:
    """The plan for a batch of which all examples are measured."""
    whole = lambda r: r._replace(stride=1) if isinstance(r, LayerReader) else r
    return of._replace(readers={path: whole(r) for path, r in of.readers.items()}, stride=1)


def _widest(sizes: Sequence[int | None]) -> int | None:
    """The largest of several limits of a factor's size; the usual one if there are none."""
    if None in sizes:
        return None
    return max((size for size in sizes if size is not None), default=Approximation().max_size)


def _apart(terms: int, together: Sequence[set[int]]) -> tuple[tuple[int, ...], ...]:
    """The terms in few passes, such that no two terms of one set share a pass."""
    passes: list[set[int]] = []
    for term in range(terms):
        others = set().union(*(own for own in together if term in own)) - {term}
        free = next((own for own in passes if not own & others), None)
        if free is None:
            passes.append({term})
        else:
            free.add(term)
    return tuple(tuple(sorted(own)) for own in passes)


def with_uses(of: Plan, tagged: Tagged) -> Plan:
    """The plan for one traced loss: with the numbers of examples that it has."""
    readers, blocks = dict(of.readers), dict(of.blocks)
    for path, reader in of.readers.items():
        layer = reader.layer
        if layer.rows:
            examples = _meeting_examples(layer, tagged, layer.parameters)
            if examples * layer.size * math.prod(layer.stack_sizes) > MAX_ROWS or not examples:
                del readers[path]
                blocks[path] = layer
            else:
                readers[path] = RowsReader(layer, examples)
            continue
        kernel = _kernel_of(layer, tagged)
        if layer.matrices and of.fisher == "none":  # inputs of the uses forward, pooled
            forms = tuple((k, replace(x, matrices=False)) for k, x in reader.forms)
            readers[path] = reader._replace(forms=forms)
        elif layer.matrices:
            examples = max(call.examples for call in kernel.calls)
            met = _meeting_examples(layer, tagged, layer.parameters[:1])
            examples = max(examples, met)
            readers[path] = MatricesReader(reader.forms, reader.moments, examples, met > 0)
        elif any(reader.keeps_rows(sharing) for sharing, _ in reader.forms):
            readers[path] = reader._replace(examples=_examples_of(path, kernel))
    return of._replace(readers=readers, blocks=blocks)


def _meeting_examples(layer: Layer, tagged: Tagged, parameters: Sequence[Parameter]) -> int:
    """The most examples that these parameters of the layer meet at once; 0 where one meets none."""
    number = {p.path: i for i, p in enumerate(tagged.parameters)}
    own = [number[p.path] for p in parameters]
    found = [[m.examples for m in tagged.uses.meetings.get(i, ())] for i in own]
    lost = any(not counts for counts in found) or any(i in tagged.uses.lost for i in own)
    return 0 if lost else max(n for counts in found for n in counts)


def _kernel_of(layer: Layer, tagged: Tagged) -> Kernel:
    kernel = tagged.kernels.get(layer.kernel.path)
    if kernel is None or (kernel.kind, kernel.stack) != (layer.kind, layer.stack):
        now = tagged.reasons.get(layer.kernel.path) if kernel is None else f"it is {kernel.kind}"
        raise ValueError(
            f"these Layers were found on another loss_fn: {join(layer.path)} was {layer.kind} "
            f"there, and here {now}. Call find_layers again with this loss_fn and such a batch."
        )
    return kernel


def _examples_of(path: Path, kernel: Kernel) -> int:
    examples = {call.examples for call in kernel.calls}
    if len(examples) != 1:
        raise ValueError(
            f'weight_sharing="reduce" adds up the calls of layer {join(path)} example by '
            f"example, but they have {sorted(examples)} examples. Call it with the same "
            'number each time, or use weight_sharing="expand".'
        )
    return examples.pop()


def instruments_of(
    of: Plan, tagged: Tagged, inputs: Sequence[jax.Array]
) -> tuple[Instruments, dict[Any, jax.Array]]:
    """Where the readers' taps and rows are in the traced loss, and the weights of the taps' rows by
    their names; ``inputs``: of the trace."""
    of_terms = term_weights(tagged, inputs) if of.readers else {}
    weights: dict[Any, Any] = {}
    number = {p.path: i for i, p in enumerate(tagged.parameters)}
    taps: list[Tap] = []
    meetings: list[Meeting] = []
    scaled = False
    for path, reader in of.readers.items():
        for parameter in _with_rows(reader):
            meetings += tagged.uses.meetings[number[parameter.path]]
        if isinstance(reader, RowsReader):
            continue
        for each in _kernel_of(reader.layer, tagged).calls:
            use = each.use
            call: Any = each.call
            if isinstance(reader, MatricesReader) and reader.constant and use.axis is None:
                continue  # rows go through it
            if of.fisher == "none" and call.swapped and reader.layer.uses == 1:
                continue  # it has no inputs of the layer
            if reader.layer.bias is None and getattr(call, "bias", None) is not None:
                call = call._replace(bias=None)
            scaled |= use.scaled
            own = tuple(use.out[a] for a in call.row_axes(len(use.out)))
            read = partial(tap, reader, regrouped(call, each.axis, each.sizes, own))
            name = ("weights of rows", str(len(taps)))
            at = use.geometry.at
            taps.append(Tap(use.key, path, use.operand, at, use.scans, read, name))
            weights[name] = row_weights(tagged, reader.layer, each, of_terms)
    chain = frozenset(tagged.uses.chain) if meetings or scaled else frozenset[Any]()
    weights = {name: weight for name, weight in weights.items() if weight is not None}
    return instruments(taps, list(dict.fromkeys(meetings)), chain), weights


def slots(of: Plan, values: dict[Path, Any]) -> dict[Path, Any]:
    """The slots of the taps around ``values``, their differentiable part."""
    tapped = {p: v for p, v in values.items() if not isinstance(of.readers[p], RowsReader)}
    moments = lambda path: of.readers[path].moments is not None
    own = lambda p, v: v[0] if isinstance(of.readers[p], MatricesReader) else v
    bases = lambda p: Factors(*of.bases[p][:2]) if moments(p) else None
    return {p: (own(p, v), bases(p)) for p, v in tapped.items()}


def _with_rows(reader: Any) -> tuple[Parameter, ...]:
    """The parameters of a reader's layer whose examples' own gradients are rows."""
    if isinstance(reader, RowsReader):
        return reader.layer.parameters
    constant = isinstance(reader, MatricesReader) and reader.constant
    return reader.layer.parameters[:1] if constant else ()


def rows(of: Plan, tagged: Tagged, values: dict[Path, Any]) -> dict[int, jax.Array]:
    """The rows among ``values`` by the number of their parameter, in its dtype."""
    number = {p.path: i for i, p in enumerate(tagged.parameters)}
    return {
        number[p.path]: x.astype(p.dtype)
        for path, own in values.items()
        for p, x in zip(_with_rows(of.readers[path]), _rows_of(of.readers[path], own), strict=True)
    }


def _rows_of(reader: Any, values: Any) -> tuple[jax.Array, ...]:
    if isinstance(reader, MatricesReader):
        return values[1:]  # beside the taps' own
    return values if isinstance(reader, RowsReader) else ()


def empty(of: Plan) -> dict[Path, Any]:
    """Zeros in every slot."""
    return {path: reader.zeros() for path, reader in of.readers.items()}
