"""Linen: slots travel in the params dict, beside the kernel, and an interceptor reads them."""

import functools
import itertools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from natgrad_jax.tagging import lstm
from natgrad_jax.tagging.modules import (
    DENSE,
    Kind,
    call_input,
    describe,
    geometry_or_reason,
    kind_of,
)
from natgrad_jax.tagging.sightings import Sightings
from natgrad_jax.tagging.slots import SLOT, Slot, tap
from natgrad_jax.utils.tree_paths import Path, insert

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
    """``((params with tags, None), run with a watching interceptor, what it will have seen)``.

    A tag lies in every mapping of ``params`` that holds arrays of its own, with the probe of the
    first of them in the order of ``probes``.
    """
    seen = Sightings()
    nonce = next(_nonce)
    own: dict[Path, Any] = {}
    for path, probe in probes.items():
        if path[-1] in ("kernel", "embedding") or path[:-1] not in own:
            own[path[:-1]] = probe

    def tag(path: Path, mapping: Mapping[str, Any]) -> Tag | None:
        return Tag(own[path], path, nonce) if path in own else None

    def watch(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if isinstance(module, nn.WeightNorm | nn.SpectralNorm):
            with seen.refusing(f"its kernel is normalized by {type(module).__name__}"):
                return next_fun(*args, **kwargs)
        if _is_lstm(context):
            return lstm.forward(
                module, module.variables["params"], functools.partial(note, module), *args, **kwargs
            )
        found = _variable(module)
        if not isinstance(found, Tag):
            return next_fun(*args, **kwargs)
        seen.owners.setdefault(found.path, type(module))
        result = next_fun(*args, **kwargs)
        kind, shapes = kind_of(type(module), context.method_name), _shapes(module)
        if kind is None or not any(name in shapes for name in kind.names):
            return result
        x = call_input(args, kwargs)
        geometry = geometry_or_reason(kind, module, shapes, x, args, kwargs)
        return seen.record(found.path, geometry, found.probe, x, result)

    def note(cell: nn.Module, name: str, x: jax.Array, s: jax.Array) -> jax.Array:
        params = cell.variables["params"][name]
        found = params.get(SLOT)
        if not isinstance(found, Tag):
            return s
        seen.owners.setdefault(found.path, nn.Dense)
        geometry = geometry_or_reason(DENSE, cell, _shapes_in(params), x, (), {})
        return seen.record(found.path, geometry, found.probe, x, s)

    def run_watched(tagged: Any, *args: Any) -> Any:
        with nn.intercept_methods(watch):
            return run(tagged[0], *args)

    return (insert(params, SLOT, tag), None), run_watched, seen


def split(params: Any) -> tuple[Any, Any]:
    """The parameters, and the rest of the model: nothing, in Linen."""
    return params, None


def merge(params: Any, rest: Any) -> Any:
    """The inverse of :func:`split`."""
    return params


def instrument(
    loss_fn: Any, params: Any, rest: Any, slots: Mapping[Path, Slot], args: Any
) -> tuple[Any, Any]:
    """``loss_fn(params, *args)`` with each layer's slot in place, and no state."""

    def attach(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if _is_lstm(context):
            return lstm.forward(
                module, module.variables["params"], functools.partial(part, module), *args, **kwargs
            )
        result = next_fun(*args, **kwargs)
        kind, slot = kind_of(type(module), context.method_name), _variable(module)
        if kind is None or not isinstance(slot, Slot):
            return result
        x = call_input(args, kwargs)
        given = _normalized(module, args, kwargs) if kind.normalized else x
        return _tap(slot, kind, module, _shapes(module), x, given, result, args, kwargs)

    def part(cell: nn.Module, name: str, x: jax.Array, s: jax.Array) -> jax.Array:
        params = cell.variables["params"][name]
        slot = params.get(SLOT)
        if not isinstance(slot, Slot):
            return s
        return _tap(slot, DENSE, cell, _shapes_in(params), x, x, s, (), {})

    with nn.intercept_methods(attach):
        return loss_fn(insert(params, SLOT, lambda path, _: slots.get(path)), *args), None


def propagate(params: Any, state: Any) -> None:
    """Linen models keep no state of their own."""


def _tap(
    slot: Slot, kind: Kind, module: Any, shapes: Any, x: Any, given: Any, s: Any, args: Any, kw: Any
) -> jax.Array:
    own = {p.path[-1] for p in slot.layer.parameters}
    shapes = {name: shape for name, shape in shapes.items() if name in own}
    return tap(slot, describe(kind, module, shapes, x, args, kw).call, given, s)


def _is_lstm(context: Any) -> bool:
    """Whether this is a call of a fused cell whose parameters are there already."""
    if type(context.module) is not nn.OptimizedLSTMCell or context.method_name != "__call__":
        return False
    return "params" in context.module.variables and not context.module.is_initializing()


def _normalized(module: nn.Module, args: Any, kwargs: Any) -> jax.Array:
    """What the normalization gives at scale 1 and bias 0."""
    values = {"scale": jnp.ones, "bias": jnp.zeros}
    plain = {
        name: values[name](x.shape, x.dtype)
        for name, x in nn.meta.unbox(module.variables["params"]).items()
        if name in values
    }
    state = {name: x for name, x in module.variables.items() if name != "params"}
    twin = module.clone(parent=None, name=None)
    return twin.apply({**state, "params": plain}, *args, **kwargs, mutable=list(state))[0]


def _variable(module: nn.Module) -> Any:
    """The slot or tag beside the module's own parameters, or None."""
    if module.scope is None or not module.has_variable("params", SLOT):
        return None
    return module.get_variable("params", SLOT)


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of the module's own parameters as it sees them, scans already sliced."""
    return _shapes_in(module.variables["params"])


def _shapes_in(params: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    arrays = {name: nn.meta.unbox(x) for name, x in params.items() if name != SLOT}
    return {name: tuple(x.shape) for name, x in arrays.items() if hasattr(x, "shape")}
