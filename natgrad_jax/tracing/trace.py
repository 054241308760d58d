"""The loss as a jaxpr whose first inputs are the parameters."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
from jax.extend import core

from natgrad_jax.losses.terms import Loss, LossFn, as_loss
from natgrad_jax.tracing import model
from natgrad_jax.utils import tree_paths
from natgrad_jax.utils.tree_paths import Path


class Traced(NamedTuple):
    """A loss, traced.

    ``jaxpr``: its inputs are the parameters, then the state of an NNX model, then the arrays among
    the other arguments, which begin at ``arguments``. ``paths``: of the parameters. ``inputs``: the
    values of all inputs.
    ``result``: from the values of its outputs to ``(loss, aux, state)``. ``outputs``, ``weights``:
    for each term of the loss the places of the network's outputs, by name, and of the examples'
    weights among its outputs, None where there are no weights; ``raw``: of the outputs before
    they were centred. ``scalar``: the place of what was added to the loss.
    """

    jaxpr: Any
    paths: tuple[Path, ...]
    inputs: tuple[Any, ...]
    arguments: int
    result: Callable[[Sequence[Any]], tuple[Loss, Any, Any]]
    loss: Loss
    outputs: tuple[dict[str, int], ...]
    raw: tuple[dict[str, int], ...]
    weights: tuple[int | None, ...]
    scalar: int | None


@contextlib.contextmanager
def leaks_explained() -> Iterator[None]:
    """What is differentiated after it was traced cannot use what the trace closed over."""
    try:
        yield
    except jax.errors.UnexpectedTracerError as error:
        error.add_note(
            "loss_fn is traced and then differentiated, as under jax.checkpoint. A function with a "
            "custom_vjp that closes over arrays of loss_fn cannot be: pass them to it as arguments "
            "(jax.closure_convert finds them)."
        )
        raise


def trace(
    loss_fn: LossFn, tree: Any, rest: Any, args: tuple[Any, ...], has_aux: bool | None = None
) -> Traced:
    """Trace ``loss_fn`` abstractly, with the parameters and the rest from :func:`model.split`.

    Works on arrays, on ``jax.ShapeDtypeStruct`` and on tracers. Arguments that are no arrays stay
    as they are.
    """
    leaves, structure = jax.tree.flatten((tree, rest, args))
    is_array = [_is_array(x) for x in leaves]
    arrays = [_canonical(x) for x, a in zip(leaves, is_array, strict=True) if a]
    found: dict[str, Any] = {}

    def flat(*arrays: Any) -> list[Any]:
        given = iter(arrays)
        whole = [next(given) if a else x for x, a in zip(leaves, is_array, strict=True)]
        out, state = model.run(loss_fn, *jax.tree.unflatten(structure, whole))
        loss = as_loss(out, has_aux)
        # a scale that is a Python number stays one
        values, tree = jax.tree.flatten((loss, out[1] if isinstance(out, tuple) else None, state))
        found.update(values=values, tree=tree, loss=loss)
        found["is_array"] = [_is_array(x) for x in values]
        return [x for x in values if _is_array(x)]

    jaxpr = jax.make_jaxpr(flat)(*arrays)

    def whole(outputs: Sequence[Any]) -> tuple[Loss, Any, Any]:
        given = iter(outputs)
        pairs = zip(found["values"], found["is_array"], strict=True)
        return jax.tree.unflatten(found["tree"], [next(given) if a else x for x, a in pairs])

    loss = whole(range(len(jaxpr.jaxpr.outvars)))[0]
    terms = loss.terms
    places = lambda of, own: {name: int(x) for name, x in of.items() if name not in own}
    paths = tuple(tree_paths.leaves(tree))
    fixed = _fixed(jaxpr.jaxpr, len(paths), terms)

    def result(outputs: Sequence[Any]) -> tuple[Loss, Any, Any]:
        loss, aux, state = whole(outputs)
        return _with_fixed(loss, fixed), aux, state

    return Traced(
        jaxpr,
        paths,
        tuple(arrays),
        len(jax.tree.leaves((tree, rest))),
        result,
        _with_fixed(found["loss"], fixed),
        tuple(places(t.distribution.outputs, own) for t, own in zip(terms, fixed, strict=True)),
        tuple(places(t.raw, own) for t, own in zip(terms, fixed, strict=True)),
        tuple(t.weight if isinstance(t.weight, int) else None for t in terms),
        loss.scalar if isinstance(loss.scalar, int) else None,
    )


def _fixed(jaxpr: Any, parameters: int, terms: Sequence[Any]) -> list[tuple[str, ...]]:
    """For each term the names of the outputs that depend on no parameter."""
    reached = set(jaxpr.invars[:parameters])
    for equation in jaxpr.eqns:
        operands = {v for v in equation.invars if isinstance(v, core.Var)}
        if operands & reached and equation.primitive.name != "stop_gradient":
            reached.update(equation.outvars)
    depends = lambda place: isinstance(place, int) and jaxpr.outvars[place] in reached
    every = [t.distribution.parametrized.items() for t in terms]
    found = [tuple(name for name, place in own if not depends(place)) for own in every]
    # a term without parameters keeps its outputs, with a Fisher of zero
    return [
        names if len(names) < len(own) else t.distribution.fixed
        for names, own, t in zip(found, every, terms, strict=True)
    ]


def _with_fixed(loss: Loss, fixed: Sequence[tuple[str, ...]]) -> Loss:
    terms = [
        replace(term, distribution=replace(term.distribution, fixed=names))
        for term, names in zip(loss.terms, fixed, strict=True)
    ]
    return replace(loss, terms=tuple(terms))


def _canonical(x: Any) -> Any:
    """Of a shape alone, that of the array that it becomes: int32 for int64 without 64 bits."""
    if not isinstance(x, jax.ShapeDtypeStruct):
        return x
    return x.update(dtype=jax.dtypes.canonicalize_dtype(x.dtype, allow_extended_dtype=True))


def _is_array(x: Any) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype")
