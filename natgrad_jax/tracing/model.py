"""A model's parameters apart from the rest of it; the only place that knows of NNX."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from natgrad_jax.layers.layer import Parameter
from natgrad_jax.utils.tree_paths import join, leaves


def split(params: Any) -> tuple[Any, Any]:
    """The tree of parameters, and the rest of an NNX model, None for every other pytree."""
    if isinstance(params, nnx.State):
        raise TypeError(
            "the first argument of loss_fn must be the NNX model itself, got its nnx.State. Write "
            "loss_fn(model, batch) and pass the model (merge it first where you have a state)."
        )
    if isinstance(params, nnx.Module):
        graph, tree, rest = nnx.split(params, nnx.Param, ...)  # type: ignore[misc]
        return tree, (graph, rest)
    is_model = lambda x: isinstance(x, nnx.Module)
    if any(map(is_model, jax.tree.leaves(params, is_leaf=is_model))):
        raise TypeError(
            f"the first argument of loss_fn must be one NNX model; got a {type(params).__name__} "
            "with models in it. Hold them in one nnx.Module, for example nnx.Dict(a=…, b=…)."
        )
    return params, None


def merge(tree: Any, rest: Any) -> Any:
    """The inverse of :func:`split`: for NNX a model of its own."""
    return tree if rest is None else nnx.merge(rest[0], tree, rest[1], copy=True)


def run(loss_fn: Any, tree: Any, rest: Any, args: tuple[Any, ...]) -> tuple[Any, Any]:
    """What ``loss_fn`` returns, and the new state of an NNX model (batch statistics, counts)."""
    model = merge(tree, rest)
    out = loss_fn(model, *args)
    return out, None if rest is None else nnx.state(model, nnx.Not(nnx.Param))


def propagate(params: Any, state: Any) -> None:
    """Write the new state of an NNX model back to it."""
    if state is not None:
        nnx.update(params, state)


def parameters_of(tree: Any) -> tuple[Parameter, ...]:
    """The records of the parameters in a tree; raises for what is none."""
    found = {}
    for path, leaf in leaves(tree).items():
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            what = type(leaf).__name__ if dtype is None else f"dtype {dtype}"
            if dtype is not None and jnp.issubdtype(dtype, jnp.complexfloating):
                raise TypeError(
                    f"parameter {join(path)} has {what}: layers of complex parameters have no "
                    "Kronecker-factored block. Use ng.exact_ngd, which takes any function without "
                    "layers, or keep real and imaginary parts as two real parameters."
                )
            raise TypeError(
                f"parameter {join(path)} has {what}; expected a floating-point array. Keep "
                "integers, keys, functions and other constants out of params: pass them as another "
                "argument, or divide the tree (equinox.partition(model, equinox.is_inexact_array))."
            )
        found[path] = Parameter(path, tuple(leaf.shape), jnp.dtype(dtype))
    return tuple(found.values())
