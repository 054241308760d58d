"""States divided among devices, where the parameters are: each array along one of its axes."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from natgrad_jax.utils.hyperparams import is_concrete

SMALL = 2048  # arrays of fewer numbers are on every device
MULTIPLE = 16  # of padded sizes: so they are the same for every number of devices that divides it


@partial(
    jax.tree_util.register_dataclass, data_fields=["padded"], meta_fields=["shape", "sharding"]
)
@dataclass(frozen=True)
class Divided:
    """An array of ``shape``, stored with as many zeros behind it as its ``sharding`` needs."""

    padded: jax.Array
    shape: tuple[int, ...] = field(metadata={"static": True})
    sharding: NamedSharding = field(metadata={"static": True})

    def __repr__(self) -> str:
        shape = ",".join(map(str, self.shape))
        return f"Divided({getattr(self.padded, 'dtype', '?')}[{shape}], {self.sharding.spec})"


def divided(
    init: Callable[[Any], Any], update: Callable[..., Any]
) -> optax.GradientTransformationExtraArgs:
    """The transformation with its state divided over the mesh axes of the parameters.

    If ``init`` is given parameters that are sharded over Auto axes, outside ``jit``. Beside whole
    parameters on such a mesh the state is whole on all its devices, as after a step: else the
    second step would be compiled anew. ``update`` sees whole arrays, and the compiler decides what
    is computed where.
    """

    def divided_init(params: optax.Params) -> Any:
        known, everywhere = _shardings(params), _everywhere(params)
        if not known:
            state = init(params)
            return state if everywhere is None else jax.device_put(state, everywhere)

        def made() -> Any:
            return jax.tree.map(lambda x: _put(x, _sharding_for(x.shape, known)), init(params))

        places = jax.tree.map(
            lambda x: x.sharding if _is_divided(x) else everywhere,
            jax.eval_shape(made),
            is_leaf=_is_divided,
        )
        # made in its places: no device ever has all of it
        return jax.jit(made, out_shardings=places)()

    def divided_update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, Any]:
        updates, new = update(updates, whole(state), params, **extra)
        put = lambda old, x: _put(x, old.sharding) if _is_divided(old) else x
        return updates, jax.tree.map(put, state, new, is_leaf=_is_divided)

    return optax.GradientTransformationExtraArgs(divided_init, divided_update)


def whole(tree: Any) -> Any:
    """The tree with arrays in place of divided ones."""
    cut = lambda x: refitted(x.padded, x.shape) if _is_divided(x) else x
    return jax.tree.map(cut, tree, is_leaf=_is_divided)


def refitted(x: Any, shape: tuple[int, ...]) -> Any:
    """The array cut down to a shape, or filled up to it with zeros."""
    if tuple(x.shape) == shape:
        return x
    cut = x[tuple(slice(n) for n in shape)]
    return jnp.pad(cut, [(0, n - m) for n, m in zip(shape, cut.shape, strict=True)])


def _is_divided(x: Any) -> bool:
    return isinstance(x, Divided)


def _put(x: jax.Array, sharding: NamedSharding | None) -> Any:
    if sharding is None:
        return x
    spec = (*sharding.spec, *[None] * (x.ndim - len(sharding.spec)))
    shape = tuple(_up(n, _count(sharding.mesh, on)) for n, on in zip(x.shape, spec, strict=True))
    padded = jax.lax.with_sharding_constraint(refitted(x, shape), sharding)
    return Divided(padded, x.shape, sharding)


def _up(size: int, devices: int) -> int:
    multiple = math.lcm(MULTIPLE, devices)
    return size if size % devices == 0 else -(-size // multiple) * multiple


def _count(mesh: Mesh | AbstractMesh, axes: Any) -> int:
    return math.prod(mesh.shape[name] for name in _names(axes))


def _names(axes: Any) -> tuple[str, ...]:
    """The mesh axes of one entry of a PartitionSpec."""
    return () if axes is None else axes if isinstance(axes, tuple) else (axes,)


def _auto(params: Any) -> list[tuple[tuple[int, ...], NamedSharding]]:
    """Shapes and shardings of the parameters that are on a mesh of Auto axes."""
    found = []
    for x in jax.tree.leaves(params):
        sharding = getattr(x, "sharding", None) if is_concrete(x) else None
        if not isinstance(sharding, NamedSharding):
            continue
        if all(kind == AxisType.Auto for kind in sharding.mesh.axis_types):
            found.append((tuple(x.shape), sharding))
    return found


def _everywhere(params: Any) -> NamedSharding | None:
    """The sharding of whole arrays on the parameters' mesh."""
    return next((NamedSharding(own.mesh, PartitionSpec()) for _, own in _auto(params)), None)


def _shardings(params: Any) -> dict[tuple[int, ...], NamedSharding]:
    """Of the parameters that are divided over Auto axes of a mesh, by shape."""
    found: dict[tuple[int, ...], NamedSharding] = {}
    for shape, sharding in _auto(params):
        if not sharding.is_fully_replicated:
            found.setdefault(shape, sharding)
    return found


def _sharding_for(
    shape: tuple[int, ...], known: dict[tuple[int, ...], NamedSharding]
) -> NamedSharding | None:
    """That of a parameter of the same shape, or over all axes that parameters are sharded over.

    Then along the largest axis of a matrix that the devices divide, else along its largest one,
    padded, else along an axis in front.
    """
    if shape in known:
        return known[shape]
    if math.prod(shape) < SMALL:
        return None
    mesh = next(iter(known.values())).mesh
    used = {name for own in known.values() for on in own.spec for name in _names(on)}
    axes = tuple(name for name in mesh.axis_names if name in used)
    devices = _count(mesh, axes)
    by_size = sorted(range(len(shape)), key=lambda i: shape[i], reverse=True)
    inside = [i for i in by_size if i >= len(shape) - 2]
    choices = [i for i in inside if shape[i] % devices == 0]
    choices += [i for i in inside if shape[i] >= devices]
    choices += [i for i in by_size if shape[i] % devices == 0]
    if not choices:
        return None
    return NamedSharding(mesh, PartitionSpec(*[None] * choices[0], axes))
