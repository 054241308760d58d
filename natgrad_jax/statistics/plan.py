"""What one backward pass measures, given what the transformations need."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from natgrad_jax.curvature.factor_averages import Factors
from natgrad_jax.layers.approximation import Approximation
from natgrad_jax.layers.collection import Layers
from natgrad_jax.layers.layer import Layer, Parameter
from natgrad_jax.statistics.layer_statistics import (
    ExamplesCount,
    LayerReader,
    LayerStatistics,
    to_slot,
)
from natgrad_jax.statistics.spec import specs
from natgrad_jax.tagging.slots import Slot
from natgrad_jax.utils.tree_paths import Path, join


class Plan(NamedTuple):
    """What one backward pass measures, by layer path.

    ``readers``: which statistics are taken from each call of a layer. ``bases``: eigenbases for
    moments. ``blocks``, ``moments``: layers whose examples' gradients are not available, so that
    full blocks and moments come from squared sums. ``diagonals``: parameters with a diagonal block.
    ``in_bases``: whether a transformation needs moments at all. ``fisher``: where labels come from,
    ``"none"`` also if no transformation needs more than inputs. ``examples``: for each term of the
    loss, the axis of its outputs that counts examples. ``passes``: the terms of each backward pass;
    terms that depend on the same parameter are in different passes.
    """

    readers: dict[Path, LayerReader]
    bases: dict[Path, Any]
    blocks: dict[Path, Layer]
    moments: dict[Path, Layer]
    diagonals: tuple[Parameter, ...]
    in_bases: bool
    fisher: str
    examples: tuple[int | None, ...]
    passes: tuple[tuple[int, ...], ...]

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
    own = layers.approximate(Approximation() if whole else forms.pop())
    reduced = layers.approximate(Approximation(weight_sharing="reduce")) if whole else {}
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
    return Plan(readers, bases, blocks, moments, diagonals, in_bases, fisher, examples, passes)


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


def with_examples(of: Plan, run: Callable[[dict[Path, Slot]], Any]) -> Plan:
    """The plan with the number of examples, for layers that keep rows of single examples.

    ``run(slots)`` runs the model and returns its outputs, examples first; it is traced once more,
    abstractly, if there are such layers.
    """
    several = {
        path: ExamplesCount(reader.layer)
        for path, reader in of.readers.items()
        if any(reader.keeps_rows(sharing) for sharing, _ in reader.forms)
    }
    if not several:
        return of
    out = jax.eval_shape(
        lambda: run({path: Slot(None, None, count) for path, count in several.items()})
    )
    readers = dict(of.readers)
    for path, count in several.items():
        if count.examples == {1} and out.shape[0] > 1:
            raise ValueError(
                f'weight_sharing="reduce" adds up the calls of layer {join(path)} example by '
                "example, but the model is mapped over single examples. Call it on the batch, or "
                'use weight_sharing="expand".'
            )
        if len(count.examples) != 1:
            raise ValueError(
                f'weight_sharing="reduce" adds up the calls of layer {join(path)} example by '
                f"example, but they have {sorted(count.examples)} examples. Call it with the same "
                'number each time, or use weight_sharing="expand".'
            )
        readers[path] = readers[path]._replace(examples=next(iter(count.examples)))
    return of._replace(readers=readers)


def slots(of: Plan, values: dict[Path, LayerStatistics]) -> dict[Path, Slot]:
    """The slots around ``values``, their differentiable part."""
    found = {}
    for path, own_values in values.items():
        reader = of.readers[path]
        bases = None
        if reader.moments is not None:
            own = of.bases[path]
            bases = Factors(*(to_slot(x, reader.layer) for x in (own.A, own.G)))
        found[path] = Slot(own_values, bases, reader)
    return found


def empty(of: Plan) -> dict[Path, LayerStatistics]:
    """Zeros in every slot."""
    return {path: reader.zeros() for path, reader in of.readers.items()}
