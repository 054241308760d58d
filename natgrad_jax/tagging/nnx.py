"""NNX: slots are variables of the layers, on a private copy of the model.

NNX has no interceptors. On a merged copy each known layer's class is exchanged for a subclass
that taps its output; scan, vmap and remat of NNX carry the class and the variables along.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from natgrad_jax.tagging.modules import (
    DENSE,
    KINDS,
    Kind,
    call_input,
    describe,
    geometry_or_reason,
    kind_of,
)
from natgrad_jax.tagging.sightings import HELD, Sightings
from natgrad_jax.tagging.slots import SLOT, Slot, tap
from natgrad_jax.utils.tree_paths import Path

NORMALIZERS = (nnx.WeightNorm, nnx.SpectralNorm)

# The two dense layers of a LoRA pair, each a parameter of its own.
PAIR = ("lora_a", "lora_b")


def watched(run: Any, model: nnx.Module, probes: Mapping[Path, Any]) -> tuple[Any, Any, Sightings]:
    """``(params of the model, run on a watched copy, what it will have seen)``."""
    params, (graph, rest) = split(model)
    seen = Sightings()
    normalized = [path for path, m in modules(model) if isinstance(m, NORMALIZERS)]

    def run_watched(state: Any, *args: Any) -> Any:
        copy = nnx.merge(graph, *state, copy=True)
        variables: dict[int, Path] = {}
        for path, module in modules(copy):
            seen.owners[path] = type(module)
            for layer, names in _layers_of(module, path):
                main = getattr(module, names[0])
                first = variables.setdefault(id(main), layer)
                if first != layer:
                    seen.refused |= dict.fromkeys((first, layer), "its kernel is shared by layers")
                if (*path, names[0]) in probes:
                    # the parameters' own variable type: whatever slices them slices the slot
                    probe = jnp.zeros(probes[(*path, names[0])].shape)
                    setattr(module, _slot_name(names[0]), type(main)(probe))
            _exchange(module, functools.partial(_watch, seen, path))
        out = run(copy, *args)
        inside = [p for p in seen.layers if any(p[: len(n)] == n for n in normalized)]
        seen.refused |= dict.fromkeys(inside, "its kernel is normalized by a wrapper")
        return out

    return (params, rest), run_watched, seen


def _watch(
    seen: Sightings, path: Path, module: Any, kind: Kind, name: str, x: Any, s: Any, call: Any
) -> jax.Array:
    """Note one call of the layer whose first parameter is called ``name``."""
    layer = (*path, name) if name in PAIR else path
    probe = getattr(module, _slot_name(name), None)
    if probe is None:
        seen.refused.setdefault(layer, HELD.format(name))
        return s
    shapes = _shapes(module, kind, name)
    geometry = geometry_or_reason(kind, module, shapes, x, *call)
    return seen.record(layer, geometry, probe[...], x, s)


def split(model: nnx.Module) -> tuple[Any, Any]:
    """The model's parameters, and the rest of it."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)  # type: ignore[misc]
    return params, (graph, rest)


def merge(params: Any, rest: Any) -> nnx.Module:
    """The inverse of :func:`split`: a model of its own."""
    return nnx.merge(rest[0], params, rest[1], copy=True)


def instrument(
    loss_fn: Any, params: Any, rest: Any, slots: Mapping[Path, Slot], args: Any
) -> tuple[Any, Any]:
    """``loss_fn(model, *args)`` with each layer's slot in place, and the model's new state."""
    model = merge(params, rest)
    for path, module in modules(model):
        own = {}
        for layer, names in _layers_of(module, path):
            slot = slots.get(layer)
            if slot is not None:
                leaves, tree = jax.tree.flatten(slot)
                own[names[0]] = tree
                variable_type = type(getattr(module, names[0]))
                for i, leaf in enumerate(leaves):
                    setattr(module, f"{_slot_name(names[0])}_{i}", variable_type(leaf))
        if own:
            _exchange(module, _attacher(tuple(own.items())))
    out = loss_fn(model, *args)
    return out, nnx.state(model, nnx.Not(nnx.Param))


def propagate(model: nnx.Module, state: Any) -> None:
    """Write what the forward pass changed (batch statistics, rng counts) back to the model."""
    nnx.update(model, state)


@functools.cache
def _attacher(slots: tuple[tuple[str, Any], ...]) -> Any:
    # one object for the same slots: static attributes are compared when NNX looks for a warm jit
    return functools.partial(_attach, dict(slots))


def _attach(
    slots: Mapping[str, Any], module: Any, kind: Kind, name: str, x: Any, s: Any, call: Any
) -> jax.Array:
    if name not in slots:
        return s
    tree = slots[name]
    leaves = [getattr(module, f"{_slot_name(name)}_{i}")[...] for i in range(tree.num_leaves)]
    slot = jax.tree.unflatten(tree, leaves)
    own = {p.path[-1] for p in slot.layer.parameters}
    shapes = {n: v for n, v in _shapes(module, kind, name).items() if n in own or n == "kernel"}
    given = _normalized(module, *call) if kind.normalized else x
    return tap(slot, describe(kind, module, shapes, x, *call).call, given, s)


def _shapes(module: Any, kind: Kind, name: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the block's parameters; a LoRA matrix is a kernel by another name."""
    if name in PAIR:
        return {"kernel": getattr(module, name)[...].shape}
    found = {n: getattr(module, n, None) for n in kind.names}
    return {n: tuple(v[...].shape) for n, v in found.items() if v is not None}


def _layers_of(module: Any, path: Path) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """The layers in one module: path, and the names of the parameters there are."""
    if type(module) is nnx.LoRA:
        for name in PAIR:
            yield (*path, name), (name,)
    elif type(module) in KINDS:
        names = tuple(n for n in KINDS[type(module)].names if getattr(module, n, None) is not None)
        if names:
            yield path, names


def _slot_name(name: str) -> str:
    return f"{SLOT}_{name}"


def _exchange(module: Any, on_call: Any) -> None:
    """Have each call of ``module`` handed to ``on_call``, if it is a known layer."""
    module_type: Any = type(module)
    if module_type in KINDS or module_type is nnx.LoRA:
        module.natgrad_on_call = on_call
        module.__class__ = _tapped(module_type)


@functools.cache
def _tapped(module_type: Any) -> type:
    """A subclass of a known layer that hands each call to ``natgrad_on_call``."""

    def method(name: str) -> Any:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            s = getattr(module_type, name)(self, *args, **kwargs)
            kind = kind_of(module_type, name)
            assert kind is not None
            first = next((n for n in kind.names if getattr(self, n, None) is not None), None)
            if first is None:
                return s
            x = call_input(args, kwargs)
            return self.natgrad_on_call(self, kind, first, x, s, (args, kwargs))

        return call

    if module_type is nnx.LoRA:
        methods = {"__call__": _lora}
    else:
        names = ["__call__"] + ["attend"] * (module_type is nnx.Embed)
        methods = {name: method(name) for name in names}
    return type(module_type.__name__, (module_type,), methods)


def _lora(self: Any, x: jax.Array, **kwargs: Any) -> jax.Array:
    """What LoRA computes, its two products apart."""
    given, *pair = self.promote_dtype(
        (x, *(getattr(self, name)[...] for name in PAIR)), dtype=self.dtype
    )
    out = given
    for name, kernel in zip(PAIR, pair, strict=True):
        out = self.natgrad_on_call(self, DENSE, name, out, out @ kernel, ((), {}))
    return out if self.base_module is None else out + self.base_module(x, **kwargs)


def _normalized(module: Any, args: Any, kwargs: Any) -> jax.Array:
    """What the normalization gives at scale 1 and bias 0."""
    twin = nnx.merge(*nnx.split(module), copy=True)
    for name, value in (("scale", jnp.ones), ("bias", jnp.zeros)):
        variable = getattr(twin, name, None)
        if variable is not None:
            variable[...] = value(variable.shape, variable.dtype)
    parent: Any = type(module).__mro__[1]
    return parent.__call__(twin, *args, **kwargs)


def modules(model: nnx.Module) -> Iterator[tuple[Path, Any]]:
    """Every module of the model once, with its path."""
    for path, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Module):
            yield tuple(map(str, path)), node
