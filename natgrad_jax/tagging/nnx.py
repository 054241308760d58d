"""NNX: slots are variables of the layers, on a private copy of the model.

NNX has no interceptors. On a merged copy each known layer's class is exchanged for a subclass
that taps its output; scan, vmap and remat of NNX carry the class and the variables along.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from natgrad_jax.layers import Layer
from natgrad_jax.paths import Path
from natgrad_jax.sums import Sums
from natgrad_jax.tagging.modules import KINDS, call_input, describe
from natgrad_jax.tagging.sightings import Sightings
from natgrad_jax.tagging.slots import SLOT, Slot, tap

NORMALIZERS = (nnx.WeightNorm, nnx.SpectralNorm)


def watched(run: Any, model: nnx.Module, probes: Mapping[Path, Any]) -> tuple[Any, Any, Sightings]:
    """``(params of the model, run on a watched copy, what it will have seen)``."""
    params, (graph, rest) = split(model)
    seen = Sightings()
    normalized = [path for path, m in modules(model) if isinstance(m, NORMALIZERS)]

    def run_watched(state: Any, *args: Any) -> Any:
        copy = nnx.merge(graph, *state, copy=True)
        kernels: dict[int, Path] = {}
        for path, module in modules(copy):
            if type(module) in KINDS:
                first = kernels.setdefault(id(module.kernel), path)
                if first != path:
                    seen.refused |= dict.fromkeys((first, path), "its kernel is shared by layers")
            if path not in probes:
                continue
            seen.owners[path] = type(module)
            if type(module) in KINDS:
                # the parameters' own variable type: whatever slices them slices the slot
                variable_type = type(module.kernel)
                setattr(module, SLOT, variable_type(jnp.zeros(probes[path].shape)))
                module_type: Any = type(module)
                module.natgrad_watch = functools.partial(_watch, seen, path, module_type)
                module.__class__ = _tapped(module_type)
        out = run(copy, *args)
        inside = [p for p in seen.layers if any(p[: len(n)] == n for n in normalized)]
        seen.refused |= dict.fromkeys(inside, "its kernel is normalized by a wrapper")
        return out

    return (params, rest), run_watched, seen


def _watch(
    seen: Sightings, path: Path, module_type: type, module: Any, args: Any, kwargs: Any, s: Any
) -> Any:
    seen.record(
        path,
        getattr(module, SLOT)[...],
        module.kernel[...].shape,
        getattr(module, "bias", None) is not None,
        module,
        module_type,
        args,
        kwargs,
    )
    return s


def split(model: nnx.Module) -> tuple[Any, Any]:
    """The model's parameters, and the rest of it."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)  # type: ignore[misc]
    return params, (graph, rest)


def instrument(
    loss_fn: Any, params: Any, rest: Any, slots: Mapping[Path, Slot], args: Any
) -> tuple[Any, Any]:
    """``loss_fn(model, *args)`` with each layer's slot in place, and the model's new state."""
    graph, state = rest
    model = nnx.merge(graph, params, state, copy=True)
    _attach_slots(model, slots)
    out = loss_fn(model, *args)
    return out, nnx.state(model, nnx.Not(nnx.Param))


def propagate(model: nnx.Module, state: Any) -> None:
    """Write what the forward pass changed (batch statistics, rng counts) back to the model."""
    nnx.update(model, state)


def _attach_slots(model: nnx.Module, slots: Mapping[Path, Slot]) -> None:
    for path, module in modules(model):
        if path not in slots:
            continue
        slot = slots[path]
        variable_type = type(module.kernel)
        for name, value in zip(Sums._fields, slot.sums, strict=True):
            setattr(module, f"{SLOT}_{name}", variable_type(value))
        module_type: Any = type(module)
        module.natgrad_watch = _attacher(slot.layer, module_type)
        module.__class__ = _tapped(module_type)


@functools.cache
def _attacher(layer: Layer, module_type: Any) -> Any:
    # one object for one layer: static attributes are compared when NNX looks for a warm jit
    return functools.partial(_attach, layer, module_type)


def _attach(layer: Layer, module_type: type, module: Any, args: Any, kwargs: Any, s: Any) -> Any:
    slot = Slot(Sums(*(getattr(module, f"{SLOT}_{name}")[...] for name in Sums._fields)), layer)
    bias = layer.bias is not None
    geometry = describe(module, module_type, module.kernel[...].shape, bias, args, kwargs)
    return tap(slot, geometry.call, call_input(args, kwargs), s)


@functools.cache
def _tapped(module_type: Any) -> type:
    """A subclass of a known layer that hands each call to ``natgrad_watch``."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        s = module_type.__call__(self, *args, **kwargs)
        return self.natgrad_watch(self, args, kwargs, s)

    return type(module_type.__name__, (module_type,), {"__call__": call})


def modules(model: nnx.Module) -> Iterator[tuple[Path, Any]]:
    """Every module of the model once, with its path."""
    for path, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Module):
            yield tuple(map(str, path)), node
