"""A traced loss with its layers: what find_layers records, and what value_and_grad measures."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from natgrad_jax.layers.layer import Layer, LossTerm, Parameter, free_layer
from natgrad_jax.layers.limits import MAX_FREE
from natgrad_jax.tagging.assemble import (
    Kernel,
    assemble,
    is_differentiated,
    kernel_layer,
    paths_of,
    rows_layer,
)
from natgrad_jax.tagging.follow import follow
from natgrad_jax.tagging.uses import Uses
from natgrad_jax.tracing.examples import Examples, find_examples, reached_terms
from natgrad_jax.tracing.trace import Traced
from natgrad_jax.utils.tree_paths import Path


class Tagged(NamedTuple):
    """``layers``: by path, in the order in which the loss uses them. ``kernels``: by the path of
    the kernel. ``reasons``: why a parameter is in no layer, by its path."""

    traced: Traced
    examples: Examples
    uses: Uses
    parameters: tuple[Parameter, ...]
    layers: dict[Path, Layer]
    kernels: Mapping[Path, Kernel]
    reasons: Mapping[Path, str]

    @property
    def terms(self) -> tuple[LossTerm, ...]:
        pairs = zip(self.traced.loss.terms, self.examples.terms, strict=True)
        return tuple(LossTerm(type(t.distribution).__name__, own.axis) for t, own in pairs)


def tag(traced: Traced, parameters: Sequence[Parameter]) -> Tagged:
    """Follow the parameters of a traced loss to their layers."""
    examples = find_examples(traced)
    terms = reached_terms(examples, parameters)
    parameters = [p._replace(terms=t) for p, t in zip(parameters, terms, strict=True)]
    uses = follow(traced.jaxpr.jaxpr, [p.shape for p in parameters], examples)
    found = assemble(uses, parameters)
    rows = [rows_layer(group, uses, parameters) for group in found.rows]
    named = [x for x in rows if x.kind != "free"]
    mains = [parameters[p] for p in found.kernels] + [x.parameters[0] for x in named]
    differentiated = any(map(is_differentiated, found.kernels.values()))
    paths = paths_of(mains, len(found.kernels), parameters)
    made = [
        kernel_layer(kernel, parameters, path, differentiated)
        for kernel, path in zip(found.kernels.values(), paths, strict=False)
    ]
    made += [replace(x, path=path) for x, path in zip(named, paths[len(made) :], strict=True)]
    made += [x for x in rows if x.kind == "free" and x.size <= MAX_FREE]
    covered = {p.path for layer in made for p in layer.parameters}
    free = [p for p in parameters if p.path not in covered and 0 < p.size <= MAX_FREE]
    made += [free_layer(p) for p in free if parameters.index(p) in uses.ends]
    order = {p: i for i, p in enumerate(_order(uses))}
    number = {p.path: i for i, p in enumerate(parameters)}
    made.sort(key=lambda x: order.get(number[x.parameters[0].path], len(order)))
    reasons = {
        p.path: found.reasons.get(i) or "loss_fn does not use it" for i, p in enumerate(parameters)
    }
    return Tagged(
        traced,
        examples,
        uses,
        tuple(parameters),
        {x.path: x for x in made if x.size},
        {parameters[p].path: k for p, k in found.kernels.items()},
        reasons,
    )


def _order(uses: Uses) -> list[int]:
    """The parameters in the order in which the loss uses them."""
    at = [(use.key, use.parameter) for use in uses.uses]
    at += [(m.key, p) for p, found in uses.meetings.items() for m in found]
    return list(dict.fromkeys(p for _, p in sorted(at)))
