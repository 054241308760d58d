"""Extra arguments of ``update``: how they are used, and errors that show the call to write."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import nnx

# How each of them is written in a call.
HOW = {
    "params": "params",
    "args": "args=(batch,)",
    "grad": "grad=grads",
    "value": "value=loss",
}

WITH_MODEL = "optimizer.update(model, grads, …, split=nnx.split(model))"


def needed(name: str, **given: Any) -> None:
    """Raise if one of ``given`` is None, showing the call to write, or if parameters are masked
    out, so that no loss can be computed."""
    missing = [key for key, value in given.items() if value is None]
    if missing:
        call = ", ".join(HOW[key] for key in given if key != "params")
        raise ValueError(
            f"{name} needs {', '.join(missing)}: write {_call(given['params'], call)}."
        )
    is_masked = lambda x: isinstance(x, optax.MaskedNode)
    if any(map(is_masked, jax.tree.leaves(given["params"], is_leaf=is_masked))):
        raise ValueError(
            f"{name} needs all parameters, to run loss_fn on them; some are masked out. Keep it "
            "out of optax.masked and optax.partition, and mask what comes before or inside it: "
            "optax.chain(optax.masked(ng.scale_by_kfac(layers), mask), …), or "
            "make=lambda damping: optax.masked(ng.kfac(0.1, layers, damping=damping), mask)."
        )


def on_parameters(fn: Callable[..., Any], args: Any, split: Any) -> Callable[[Any], Any]:
    """A function from parameters to ``fn(params, *args)``; with ``split``, ``nnx.split(model)``, to
    ``fn(model, *args)`` on a copy of the model that has these parameters.

    Changes that ``fn`` makes to the copy (batch statistics, rng counts) are dropped.
    """
    if split is None:
        return lambda params: _on_state(fn, params, args)
    if not (isinstance(split, tuple) and split and isinstance(split[0], nnx.GraphDef)):
        raise TypeError(
            "the extra argument split must be nnx.split(model), a graph and its state; got "
            f"{type(split).__name__}. Write {WITH_MODEL}."
        )
    graph, *states = split
    whole = lambda params: nnx.merge(graph, nnx.merge_state(*states, params), copy=True)
    return lambda params: fn(whole(params), *args)


def _on_state(fn: Callable[..., Any], params: Any, args: Any) -> Any:
    """``fn(params, *args)``; an error on an ``nnx.State`` says how to pass the model instead."""
    try:
        return fn(params, *args)
    except (TypeError, AttributeError) as e:
        if not isinstance(params, nnx.State):
            raise
        raise TypeError(
            f"the loss was given an nnx.State of parameters and raised {type(e).__name__}: {e}. "
            f"If it takes the model, write {WITH_MODEL}."
        ) from e


def _call(params: Any, extra: str) -> str:
    """The call to write, for an NNX optimizer or for the transformation itself."""
    if isinstance(params, nnx.State):
        return WITH_MODEL.replace("…", f"statistics=statistics, {extra}")
    return f"tx.update(grads, opt_state, params, statistics=statistics, {extra})"
