"""Linen: slots travel in the params dict, beside the kernel, and an interceptor reads them."""

import itertools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from natgrad_jax.paths import Path, insert
from natgrad_jax.tagging.modules import KINDS, call_input, describe
from natgrad_jax.tagging.sightings import Sightings
from natgrad_jax.tagging.slots import SLOT, Slot, tap

_nonce = itertools.count()


@jax.tree_util.register_pytree_node_class
class Tag:
    """A stand-in for a slot while layers are searched: an array that scans slice, and a path.

    The nonce makes every search a new tree structure, so that no warm jit cache of the user's
    hides a layer from it.
    """

    def __init__(self, probe: Any, path: Path, nonce: int):
        self.probe, self.path, self.nonce = probe, path, nonce

    def tree_flatten(self) -> tuple[tuple[Any], tuple[Path, int]]:
        return (self.probe,), (self.path, self.nonce)

    @classmethod
    def tree_unflatten(cls, aux: tuple[Path, int], children: tuple[Any]) -> "Tag":
        return cls(children[0], *aux)


def watched(run: Any, params: Any, probes: Mapping[Path, Any]) -> tuple[Any, Any, Sightings]:
    """``(params with tags, run with a watching interceptor, what it will have seen)``.

    A tag lies in every mapping of ``params`` that holds arrays of its own; ``probes`` gives the
    array of each, by the mapping's path.
    """
    seen = Sightings()
    nonce = next(_nonce)

    def tag(path: Path, mapping: Mapping[str, Any]) -> Tag | None:
        return Tag(probes[path], path, nonce) if path in probes else None

    def watch(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if isinstance(module, nn.WeightNorm | nn.SpectralNorm):
            with seen.refusing(f"its kernel is normalized by {type(module).__name__}"):
                return next_fun(*args, **kwargs)
        found = _variable(module)
        if not isinstance(found, Tag):
            return next_fun(*args, **kwargs)
        seen.owners.setdefault(found.path, type(module))
        result = next_fun(*args, **kwargs)
        if _is_layer_call(context):
            kernel = _kernel_shape(module)
            own = (module, type(module), args, kwargs)
            seen.record(found.path, found.probe, kernel, module.use_bias, *own)
        return result

    def run_watched(params: Any, *args: Any) -> Any:
        with nn.intercept_methods(watch):
            return run(params, *args)

    return insert(params, SLOT, tag), run_watched, seen


def split(params: Any) -> tuple[Any, Any]:
    """The parameters, and the rest of the model: nothing, in Linen."""
    return params, None


def instrument(
    loss_fn: Any, params: Any, rest: Any, slots: Mapping[Path, Slot], args: Any
) -> tuple[Any, Any]:
    """``loss_fn(params, *args)`` with each layer's slot in place, and no state."""

    def attach(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        result = next_fun(*args, **kwargs)
        if not _is_layer_call(context):
            return result
        module = context.module
        slot = _variable(module)
        if not isinstance(slot, Slot):
            return result
        bias = slot.layer.bias is not None
        geometry = describe(module, type(module), _kernel_shape(module), bias, args, kwargs)
        return tap(slot, geometry.call, call_input(args, kwargs), result)

    with nn.intercept_methods(attach):
        return loss_fn(insert(params, SLOT, lambda path, _: slots.get(path)), *args), None


def propagate(params: Any, state: Any) -> None:
    """Linen models keep no state of their own."""


def _is_layer_call(context: Any) -> bool:
    return context.method_name == "__call__" and type(context.module) in KINDS


def _variable(module: nn.Module) -> Any:
    """The slot or tag beside the module's own parameters, or None."""
    if module.scope is None or not module.has_variable("params", SLOT):
        return None
    return module.get_variable("params", SLOT)


def _kernel_shape(module: nn.Module) -> tuple[int, ...]:
    """Shape of the kernel as the module sees it, scans already sliced."""
    return tuple(nn.meta.unbox(module.get_variable("params", "kernel")).shape)
