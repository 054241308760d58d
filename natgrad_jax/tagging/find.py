"""Find the layers of a model: which of its parameters are which kind of layer."""

import warnings
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen
from jaxtyping import PyTree

from natgrad_jax.layers.collection import Layers, Leftover
from natgrad_jax.layers.layer import Layer, Parameter, free_layer
from natgrad_jax.layers.limits import MAX_FREE
from natgrad_jax.losses.loss import LossFn, as_loss
from natgrad_jax.tagging.frontend import frontend_of
from natgrad_jax.tagging.modules import KINDS
from natgrad_jax.tagging.nnx import NORMALIZERS
from natgrad_jax.tagging.sightings import (
    HELD,
    Sightings,
    parameter_path,
    stack_candidates,
    to_layer,
)
from natgrad_jax.tagging.slots import SLOT
from natgrad_jax.utils.hyperparams import is_concrete
from natgrad_jax.utils.tree_paths import Path, join, leaves, normalize

_WRAPPERS = (linen.WeightNorm, linen.SpectralNorm, *NORMALIZERS)


class UncoveredWarning(UserWarning):
    """Something has no curvature of its own.

    Parameters without a block, which fall to the diagonal of the Fisher; or a term of the loss that
    is scaled by zero. Silence it for parameters that are meant to, by
    ``blocks={"embedding": "diagonal"}`` in :func:`find_layers`, which chooses that block.

    >>> import natgrad_jax as ng
    >>> issubclass(ng.UncoveredWarning, UserWarning)
    True
    """


def find_layers(
    loss_fn: LossFn,
    params: PyTree,
    *args: Any,
    blocks: Mapping[Any, str] | None = None,
) -> Layers:
    """Find the layers of the model that ``loss_fn`` runs.

    Traces ``loss_fn(params, *args)`` abstractly (no arithmetic is done) and records every known
    Flax layer that the trace calls, of Linen or NNX, in whatever transforms it stands. A small
    parameter of no known layer has a full block; what is left gets the diagonal of the Fisher, and
    a warning that names each.

    Args:
      loss_fn: ``loss_fn(params, *args)`` returns an :class:`~natgrad_jax.Loss`, or
        ``(Loss, aux)``. For NNX the first argument is the model.
      params: the parameters (Linen: nested dicts, of one model or several) or the NNX model;
        arrays or ``jax.ShapeDtypeStruct``.
      *args: the other arguments, e.g. a batch; arrays or ``jax.ShapeDtypeStruct``.
      blocks: other blocks than the default ones, as by one :meth:`Layers.replace` after another; of
        two choices for a parameter the later holds: ``{"*": "diagonal", "head": "full"}``. Keys are
        paths, patterns or predicates ``(path, record) -> bool``:
        ``{lambda path, record: "head" in path: "full"}``.

    Returns:
      :class:`~natgrad_jax.Layers`: path → record. ``print`` it: it is the coverage table.

    Raises:
      TypeError: ``loss_fn`` does not return a Loss, or a parameter is not a floating-point array.
      ValueError: ``blocks`` names what is not there, or a block that cannot be had there.

    >>> import flax.linen as nn, jax, jax.numpy as jnp, natgrad_jax as ng
    >>> model, x, y = nn.Dense(3), jnp.ones((8, 4)), jnp.zeros(8, jnp.int32)
    >>> params = model.init(jax.random.key(0), x)["params"]
    >>> loss_fn = lambda p, x, y: ng.Categorical(model.apply({"params": p["head"]}, x)).nll(y)
    >>> print(ng.find_layers(loss_fn, {"head": params}, x, y))
    parameter    block  shape  factors          parameters   share
    ───────────  ─────  ─────  ───────────────  ──────────  ──────
    head/kernel  dense  4×3    A 5², G 3²               12  80.0 %
    head/bias    dense  3      with the kernel           3  20.0 %
    1 layer covers 15 of 15 parameters (100.0 %); 0 left over.
    """
    frontend = frontend_of(params)
    parameters = _parameters(frontend.split(params)[0])
    probes = {
        path: jax.ShapeDtypeStruct(parameter.shape, jnp.float32)
        for path, parameter in parameters.items()
    }
    seen = _trace(frontend, loss_fn, params, args, probes)
    parameters = {path: p._replace(terms=seen.reached[path]) for path, p in parameters.items()}
    found = _resolve(frontend, loss_fn, params, args, probes, seen, parameters)
    found = {path: layer for path, layer in found.items() if layer.size}
    covered = {p.path for layer in found.values() for p in layer.parameters}
    rest = [p for p in parameters.values() if p.path not in covered]
    free = {p.path: free_layer(p) for p in rest if _is_free(p, seen)}
    leftover = [
        Leftover(p, _reason(p, seen)) if p.size else Leftover(p, "it is empty", "gradient", True)
        for p in rest
        if p.path not in free
    ]
    layers = Layers(found | free, tuple(leftover), seen.terms)
    for where, block in (blocks or {}).items():
        layers = layers.replace(where, block)
    _warn(layers, len(parameters), seen.zero)
    return layers


def _warn(layers: Layers, total: int, zero: list[str]) -> None:
    if zero:
        warnings.warn(
            f"scaled by 0, and so without gradient and Fisher, of the terms of the loss: "
            f"{', '.join(zero)}. Leave them out; a scale that changes in training is an argument "
            "of loss_fn.",
            UncoveredWarning,
            stacklevel=3,
        )
    left = [x for x in layers.leftover if not x.chosen]
    if left:
        names = "; ".join(f"{join(x.path)} ({x.reason})" for x in left)
        warnings.warn(
            f"{len(left)} of {total} parameters have no block of their own and get the diagonal "
            f"of the Fisher: {names}",
            UncoveredWarning,
            stacklevel=3,
        )


def _parameters(tree: Any) -> dict[Path, Parameter]:
    found = {}
    for path, leaf in leaves(tree).items():
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            what = type(leaf).__name__ if dtype is None else f"dtype {dtype}"
            raise TypeError(
                f"parameter {join(path)} has {what}; expected a floating-point array. Keep "
                "integers, keys and other constants out of params: pass them as another argument."
            )
        found[path] = Parameter(path, tuple(leaf.shape), jnp.dtype(dtype))
    if not found:
        raise ValueError("params holds no parameters: an empty tree has no layers to find.")
    return found


def _trace(
    frontend: ModuleType,
    loss_fn: Any,
    params: Any,
    args: Any,
    probes: Mapping[Path, jax.ShapeDtypeStruct],
) -> Sightings:
    """Run ``loss_fn`` abstractly with tags in place of slots."""

    losses: list[Any] = []

    def run(params: Any, *args: Any) -> Any:
        losses[:] = as_loss(loss_fn(params, *args)).terms
        named = [f"{i} ({type(t.distribution).__name__})" for i, t in enumerate(losses)]
        known = [is_concrete(t.scale) and float(t.scale) == 0 for t in losses]
        seen.zero = [name for name, zero in zip(named, known, strict=True) if zero]
        return [term.distribution.natural for term in losses]

    tagged, run_watched, seen = frontend.watched(run, params, probes)
    flat, tree = jax.tree.flatten(args)
    traced = [hasattr(x, "shape") and hasattr(x, "dtype") for x in flat]

    def from_arrays(params: Any, arrays: list[Any]) -> Any:
        given = iter(arrays)
        values = [next(given) if t else x for x, t in zip(flat, traced, strict=True)]
        return run_watched(params, *jax.tree.unflatten(tree, values))

    try:
        arrays = [x for x, t in zip(flat, traced, strict=True) if t]
        jaxpr = jax.make_jaxpr(from_arrays)(tagged, arrays)
    except Exception as e:
        if SLOT not in str(e) and "pytree" not in str(e):
            raise
        e.add_note(
            f"natgrad_jax calls loss_fn with one more leaf, {SLOT!r}, beside each layer's "
            "parameters. Where loss_fn maps params together with another tree, map over the "
            "other tree's own paths, or add that penalty's gradient outside loss_fn."
        )
        raise
    seen.count(jaxpr)
    # what goes in: the parameters with their tags, the rest of the model, the other arguments
    inputs = [normalize(p) for p, _ in jax.tree_util.tree_flatten_with_path(tagged)[0]]
    given = [path[1:] if path[:1] == ("0",) and path[1:] in probes else None for path in inputs]
    seen.reached = dict.fromkeys(probes, ())
    seen.follow(jaxpr, given, losses)
    return seen


def _resolve(
    frontend: ModuleType,
    loss_fn: Any,
    params: Any,
    args: Any,
    probes: dict[Path, jax.ShapeDtypeStruct],
    seen: Sightings,
    parameters: Mapping[Path, Parameter],
) -> dict[Path, Layer]:
    """Records of the sighted layers, with the axes over which scan or vmap stack them.

    Shapes tell those axes except where sizes agree by accident. Then a guess (leading axes
    first) is put to the test: a probe that only slices along the guessed axes must trace.
    """
    candidates, mains = {}, {}
    for path, sighting in seen.layers.items():
        if path in seen.refused:
            continue
        name = sighting.names[0]
        mains[path] = parameter_path(path, name)
        main = parameters.get(mains[path])
        if main is None:
            seen.refused[path] = HELD.format(name)
            continue
        candidates[path] = stack_candidates(main.shape, sighting.shape)
        if not candidates[path] or sighting.probe_shape != sighting.shape:
            seen.refused[path] = f"its {name} reaches it in another shape than its parameter's"
            del candidates[path]
    choice = {path: axes[0] for path, axes in candidates.items()}
    ambiguous = {path: axes for path, axes in candidates.items() if len(axes) > 1}
    for attempt in range(max(map(len, ambiguous.values()), default=0)):
        guess = {p: axes[min(attempt, len(axes) - 1)] for p, axes in ambiguous.items()}
        probing = {mains[p]: _probe(parameters[mains[p]].shape, axes) for p, axes in guess.items()}
        try:
            _trace(frontend, loss_fn, params, args, {**probes, **probing})
        except (ValueError, TypeError):
            continue
        choice |= guess
        break
    else:
        for path in ambiguous:
            seen.refused[path] = "the axis over which it is stacked cannot be told"
            del choice[path]
    return {path: to_layer(path, seen, parameters, axes) for path, axes in choice.items()}


def _probe(shape: tuple[int, ...], axes: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """A shape that a scan can slice along ``axes`` and along no other axis."""
    other = max(shape) + 1
    return jax.ShapeDtypeStruct(
        tuple(n if i in axes else other for i, n in enumerate(shape)), jnp.float32
    )


def _is_free(parameter: Parameter, seen: Sightings) -> bool:
    """Whether a small parameter belongs to no layer: of a module of the user's, or of none."""
    path = parameter.path
    owner = seen.owners.get(path[:-1], object)
    known = issubclass(owner, (*KINDS, *_WRAPPERS)) or path in seen.refused
    return not known and path[:-1] not in seen.refused and 0 < parameter.size <= MAX_FREE


def _reason(parameter: Parameter, seen: Sightings) -> str:
    """Why a parameter has no block."""
    path = parameter.path
    owner = seen.owners.get(path[:-1])
    for at in (path[:-1], path):
        if at in seen.refused:
            return seen.refused[at]
    if owner in KINDS and path[:-1] in seen.layers:
        return f"it is none of the parameters of its {owner.__name__}"
    if owner in KINDS:
        return f"its {owner.__name__} is never called"
    parent = next((k for k in KINDS if owner is not None and issubclass(owner, k)), None)
    if owner is not None and parent is not None:
        return f"{_name(owner)} is a subclass of {parent.__name__}: only exact types are known"
    if owner is not None and issubclass(owner, _WRAPPERS):
        return f"no block for {owner.__name__}"
    above = (seen.owners.get(path[:n]) for n in reversed(range(len(path))))
    nearest = next((x for x in above if x is not None), None)
    if owner is not None:
        whose = f"of {_name(owner)}"
    elif nearest is not None:  # in a pytree that one parameter is, or in a module never called
        whose = f"in {_name(nearest)}, of no known layer that it calls"
    else:
        whose = "of no known layer that loss_fn calls"
    size = f"{parameter.size:,} numbers"
    return f"{whose}; {size}, a full block unasked is of at most {MAX_FREE}"


def _name(owner: type) -> str:
    """The type's name, with its module's where it is called as a known layer but is none."""
    own = owner not in KINDS and owner.__name__ in {kind.__name__ for kind in KINDS}
    return f"{owner.__module__}.{owner.__qualname__}" if own else owner.__name__
