"""Which front end tags a model: Linen's or NNX's."""

from types import ModuleType
from typing import Any

import jax
from flax import nnx

from natgrad_jax.tagging import linen as linen_models, nnx as nnx_models


def frontend_of(params: Any) -> ModuleType:
    """The module that tags such parameters: Linen's or NNX's."""
    if isinstance(params, nnx.State):
        raise TypeError(
            "the first argument of loss_fn must be the NNX model itself, got its nnx.State. Write "
            "loss_fn(model, batch) and pass the model (merge it first where you have a state)."
        )
    if isinstance(params, nnx.Module):
        return nnx_models
    is_model = lambda x: isinstance(x, nnx.Module)
    if any(map(is_model, jax.tree.leaves(params, is_leaf=is_model))):
        raise TypeError(
            f"the first argument of loss_fn must be one NNX model; got a {type(params).__name__} "
            "with models in it. Hold them in one nnx.Module, for example nnx.Dict(a=…, b=…)."
        )
    return linen_models
