"""From what transformations ask for to slots, and from a backward pass to the layers' sums."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax.curvature.eigenbases import second_moments
from natgrad_jax.curvature.factor_averages import Factors
from natgrad_jax.curvature.layer_sums import Sums
from natgrad_jax.layers.approximation import Approximation
from natgrad_jax.layers.collection import Layers
from natgrad_jax.layers.layer import Layer, Parameter
from natgrad_jax.statistics.layer_statistics import Readings, Wanted, empty_slot, from_slot, to_slot
from natgrad_jax.statistics.spec import requests
from natgrad_jax.tagging.slots import Census, Slot
from natgrad_jax.utils import tree_paths
from natgrad_jax.utils.precision import HIGHEST, at_least_float32
from natgrad_jax.utils.sharding import psum
from natgrad_jax.utils.tree_paths import Path, join


class Plan(NamedTuple):
    """What one backward pass measures, by layer path.

    ``wanted``: what each call of a layer reads. ``bases``: the eigenbases to read moments in.
    ``blocks``, ``moments``: layers whose examples' gradients are out of reach, so that full blocks
    and moments come from squared sums. ``diagonals``: parameters with a diagonal block.
    ``in_bases``: whether a transformation asks for moments at all. ``fisher``: where labels come
    from, ``"none"`` also where no transformation asks for more than inputs. ``examples``: for each
    term of the loss which axis of its outputs counts examples. ``passes``: the terms of each
    backward pass; those that depend on one parameter have passes of their own.
    """

    wanted: dict[Path, Wanted]
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


class Squares(NamedTuple):
    """Products of summed gradients, in the sums' forms: ``w wᵀ``, ``(Q_Aᵀ W Q_G)²``, ``w²``."""

    blocks: dict[Path, Sums]
    moments: dict[Path, jax.Array]
    diagonals: dict[Path, jax.Array]


class Measured(NamedTuple):
    """What one pass measured: ``taps`` of this device, ``squares`` over all of them.

    Of several terms (:func:`by_terms`), what depends on gradients has an axis of terms in front.
    """

    taps: dict[Path, Readings]
    squares: Squares


def plan(layers: Layers, opt_state: Any, fisher: str, parts: int = 1) -> Plan:
    """What to measure for the transformations in ``opt_state``, in one of equal parts of a batch.

    Only of layers that they keep: not of parameters that are masked out there. Without a state, or
    where several ask for different forms, whole factors are measured, and both ways of treating
    positions: every other form can be cut out of those. (But for layers called several times,
    where "reduce" has to be asked for.)
    """
    asked = [] if opt_state is None else requests(opt_state)
    if asked:
        kept = lambda field: {path for _, s in asked for path in getattr(s, field, ())}
        layers = layers.within(kept("factors"), kept("diagonal"))
    if asked and all(request.inputs_only for request, _ in asked):
        fisher = "none"
    examples = tuple(term.examples for term in layers.terms)
    if fisher == "exact" and None in examples:  # a pass for each example, of every term
        examples = (None,) * len(examples)
    alone = fisher == "exact" and None in examples
    forms = {request.approximation for request, _ in asked}
    strides = [request.stride for request, _ in asked]
    stride = min(strides, key=lambda s: 1.5 if s is None else s, default=1)  # None is 1 or 2
    own = layers.approximate(forms.pop() if len(forms) == 1 else Approximation())
    both = None
    if len({request.approximation for request, _ in asked}) != 1:
        both = layers.approximate(Approximation(weight_sharing="reduce"))
    with_moments = [(request, state) for request, state in asked if request.moments]
    if len(with_moments) > 1:
        raise ValueError(
            "opt_state holds several transformations that measure squares in their own eigenbases, "
            'and a backward pass has room for one. Use moments="running_average" in the others.'
        )
    wanted, blocks, moments, bases = {}, {}, {}, {}
    for path, layer in own.items():
        if layer.block != "kronecker" and (fisher == "none" or layer.by_gradient or alone):
            if fisher != "none":
                blocks[path] = layer
            continue
        reduce = layer.approximation.weight_sharing == "reduce"
        wanted[path] = Wanted(None, layer) if reduce else Wanted(layer)
        if both is not None and layer.shares and layer.calls == 1:
            wanted[path] = wanted[path]._replace(reduced=both[path])
        wanted[path] = wanted[path]._replace(stride=stride, parts=parts)
    for request, state in with_moments if fisher != "none" else []:
        for path, layer in layers.approximate(request.approximation).items():
            if layer.block == "kronecker" and path in state.bases:
                bases[path] = state.bases[path]
                if layer.by_gradient or alone:
                    moments[path] = layer
                    continue
                several = len(layer.terms) > 1  # has an axis of terms in front
                shape = state.moments[path].shape[several + len(layer.stack) :]
                wanted[path] = wanted[path]._replace(moments=layer, moments_shape=shape)
    diagonals = layers.diagonals if fisher != "none" else ()
    in_bases = bool(with_moments)
    together = [{*x.terms} for x in layers.values()] + [{*p.terms} for p in diagonals]
    passes = _apart(len(examples), together)
    return Plan(wanted, bases, blocks, moments, diagonals, in_bases, fisher, examples, passes)


def _apart(terms: int, together: Sequence[set[int]]) -> tuple[tuple[int, ...], ...]:
    """The terms in as few passes as go, so that no two of one set are in one pass."""
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
    """The plan with the number of examples where rows of single examples are kept.

    ``run(slots)`` runs the model, to its outputs with the examples first; it is traced once more,
    abstractly, if there are such layers.
    """
    several = {
        path: Census(w.layer)
        for path, w in of.wanted.items()
        if w.reduced is not None and w.reduced.calls != 1
    }
    if not several:
        return of
    out = jax.eval_shape(
        lambda: run({path: Slot(Readings(), None, c) for path, c in several.items()})
    )
    wanted = dict(of.wanted)
    for path, census in several.items():
        if census.examples == {1} and out.shape[0] > 1:
            raise ValueError(
                f'weight_sharing="reduce" adds up the calls of layer {join(path)} example by '
                "example, and the model is mapped over single examples. Call it on the batch, or "
                'use weight_sharing="expand".'
            )
        if len(census.examples) != 1:
            raise ValueError(
                f'weight_sharing="reduce" adds up the calls of layer {join(path)} example by '
                f"example, and they have {sorted(census.examples)} examples. Call it with the same "
                'number each time, or use weight_sharing="expand".'
            )
        wanted[path] = wanted[path]._replace(examples=next(iter(census.examples)))
    return of._replace(wanted=wanted)


def slots(of: Plan, readings: dict[Path, Readings]) -> dict[Path, Slot]:
    """The slots around their differentiable part."""
    found = {}
    for path, r in readings.items():
        wanted = of.wanted[path]
        bases = None
        if wanted.moments is not None:
            own = of.bases[path]
            bases = Factors(*(to_slot(x, wanted.layer) for x in (own.A, own.G)))
        found[path] = Slot(r, bases, wanted)
    return found


def empty(of: Plan) -> dict[Path, Readings]:
    """Zeros in every slot."""
    return {path: empty_slot(wanted) for path, wanted in of.wanted.items()}


def measured(of: Plan, axes: Sequence[str], grads: Any, readings: dict[Path, Readings]) -> Measured:
    """What a pullback's cotangents of parameters and slots say."""
    taps = {path: from_slot(of.wanted[path], r) for path, r in readings.items()}
    return Measured(taps, _squares(of, axes, grads))


def _squares(of: Plan, axes: Sequence[str], grads: Any) -> Squares:
    """Squares of the Fisher pass' gradients, summed over examples and devices.

    Examples' gradients are independent with mean zero (sampled labels, or random signs), so
    that the square of their sum estimates the sum of their squares.
    """
    given = tree_paths.leaves(grads)
    layers = of.blocks | of.moments
    wide = {p.path: given[p.path].astype(_wide(p)) for p in of.diagonals}
    wide |= {
        p.path: given[p.path].astype(layer.factor_dtype)
        for layer in layers.values()
        for p in layer.parameters
    }
    wide = psum(wide, axes)
    packed = {
        path: layer.pack(layer.to_matrix(*(wide[p.path] for p in layer.parameters)))
        for path, layer in layers.items()
    }
    return Squares(
        {path: _outer(layer, packed[path]) for path, layer in of.blocks.items()},
        {
            path: second_moments(layer, of.bases[path], packed[path])
            for path, layer in of.moments.items()
        },
        {p.path: jnp.square(wide[p.path]) for p in of.diagonals},
    )


def _outer(layer: Layer, w: jax.Array) -> Sums:
    """``w wᵀ``, counted as one row."""
    A = jnp.matmul(w, w.mT, precision=HIGHEST)
    return Sums(A, None, jnp.ones(layer.stack_sizes, A.dtype))


def _wide(parameter: Parameter) -> Any:
    return at_least_float32(parameter.dtype)


def split(of: Plan, found: Measured) -> tuple[dict[Path, Readings], Measured]:
    """What is the same for every seed (input factors and counts), and the rest of a pass."""

    def outputs(keep: bool, layer: Layer | None, sums: Any) -> Any:
        if sums is None or layer is None:
            return sums
        if layer.mixed:  # all of it varies
            return sums if keep else Sums(None, None, None)  # type: ignore[arg-type]
        return Sums(None, sums.G, None) if keep else sums._replace(G=None)  # type: ignore[arg-type]

    def part(keep: bool) -> dict[Path, Readings]:
        return {
            path: Readings(
                outputs(keep, of.wanted[path].sums, r.sums),
                outputs(keep, of.wanted[path].reduced, r.reduced),
                r.moments if keep else None,
            )
            for path, r in found.taps.items()
        }

    return part(False), found._replace(taps=part(True))


def join_parts(inputs: dict[Path, Readings], rest: Measured) -> Measured:
    """The inverse of :func:`split`."""
    is_none = lambda x: x is None
    either = lambda a, b: b if a is None else a
    return rest._replace(taps=jax.tree.map(either, inputs, rest.taps, is_leaf=is_none))


def by_terms(of: Plan, passes: Sequence[Measured]) -> Measured:
    """What the passes found (:func:`split`), by the terms that each parameter depends on."""

    def pick(terms: tuple[int, ...], found: Callable[[Measured], Any]) -> Any:
        own = [found(passes[i]) for t in terms for i, group in enumerate(of.passes) if t in group]
        return own[0] if len(own) == 1 else jax.tree.map(lambda *x: jnp.stack(x), *own)

    def each(terms: Mapping[Path, tuple[int, ...]], found: Any) -> dict[Path, Any]:
        at = lambda path: lambda m: found(m)[path]
        return {path: pick(terms[path], at(path)) for path in found(passes[0])}

    layers = {path: wanted.layer for path, wanted in of.wanted.items()} | of.blocks | of.moments
    of_layer = {path: layer.terms for path, layer in layers.items()}
    of_parameter = {p.path: p.terms for p in of.diagonals}
    return Measured(
        each(of_layer, lambda m: m.taps),
        Squares(
            each(of_layer, lambda m: m.squares.blocks),
            each(of_layer, lambda m: m.squares.moments),
            each(of_parameter, lambda m: m.squares.diagonals),
        ),
    )


def scale_gradients(of: Plan, taps: dict[Path, Readings], factor: jax.Array) -> Any:
    """The readings with everything of second order in the gradients multiplied."""
    times = partial(jax.tree.map, lambda x: (x * factor).astype(x.dtype))

    def sums(layer: Layer | None, s: Any) -> Any:
        if s is None or layer is None:
            return s
        return s._replace(A=times(s.A)) if layer.block != "kronecker" else s._replace(G=times(s.G))

    return {
        path: Readings(
            sums(of.wanted[path].sums, r.sums),
            sums(of.wanted[path].reduced, r.reduced),
            times(r.moments),
        )
        for path, r in taps.items()
    }
