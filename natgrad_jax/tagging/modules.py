"""Which Flax modules have a block, and the geometry of one call of each.

One table for Linen and NNX: both spell the same layers with nearly the same attributes. Exact
types only: a subclass may compute something else.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
from flax import nnx

from natgrad_jax.layers.geometry import Geometry
from natgrad_jax.layers.kinds import conv, dense, embed, norm

Shapes = Mapping[str, tuple[int, ...]]


class UnsupportedError(Exception):
    """A known layer used in a way that has no block; the message says which."""


class Kind(NamedTuple):
    """A row of the table: ``geometry(module, shapes, x, args, kwargs)`` → call, layouts.

    ``names``: the parameters, in the order of their rows in ``K̄``. ``normalized``: whether the
    rows are not those of the input but of what comes out at scale 1 and bias 0.
    """

    kind: str
    names: tuple[str, ...]
    geometry: Callable[..., Any]
    normalized: bool = False


def describe(
    kind: Kind, module: Any, shapes: Shapes, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Geometry:
    """The geometry of calling ``module`` with input ``x``; ``shapes`` of the block's parameters."""
    call, *layouts = kind.geometry(module, shapes, x, args, kwargs)
    names = tuple(n for n in kind.names if n in shapes)
    own = tuple(layout for layout in layouts if layout is not None)
    return Geometry(kind.kind, names, tuple(shapes[names[0]]), call, own)


def geometry_or_reason(*given: Any) -> Geometry | str:
    """:func:`describe`, or why a layer that is used so has no block."""
    try:
        return describe(*given)
    except UnsupportedError as e:
        return str(e)


def call_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The layer's input: every known layer takes it first, under one of these names."""
    return args[0] if args else next(kwargs[n] for n in ("inputs", "x", "query") if n in kwargs)


def _dense(module: Any, shapes: Shapes, x: Any, args: Any, kwargs: Any) -> Any:
    return dense.general(x.ndim, shapes["kernel"], (-1,), (), "bias" in shapes)


def _dense_general(module: Any, shapes: Shapes, x: Any, args: Any, kwargs: Any) -> Any:
    axis = (module.axis,) if isinstance(module.axis, int) else tuple(module.axis)
    batch = module.batch_axis if hasattr(module, "batch_axis") else module.batch_dims
    return dense.general(x.ndim, shapes["kernel"], axis, tuple(batch), "bias" in shapes)


def _einsum(module: Any, shapes: Shapes, x: Any, args: Any, kwargs: Any) -> Any:
    given = args[1] if len(args) > 1 else kwargs.get("einsum_str")
    equation = module.einsum_str if given is None else given
    try:
        return dense.einsum(equation, x.shape, shapes["kernel"], "bias" in shapes)
    except ValueError as e:
        raise UnsupportedError(str(e)) from None


def _conv(module: Any, shapes: Shapes, x: Any, args: Any, kwargs: Any) -> Any:
    _refuse_masks(module)
    return conv.conv(
        shapes["kernel"],
        module.strides,
        module.padding,
        module.input_dilation,
        module.kernel_dilation,
        module.feature_group_count,
        "bias" in shapes,
    )


def _conv_transpose(module: Any, shapes: Shapes, x: Any, args: Any, kwargs: Any) -> Any:
    _refuse_masks(module)
    return conv.transpose(
        shapes["kernel"],
        module.strides,
        module.padding,
        module.kernel_dilation,
        module.transpose_kernel,
        "bias" in shapes,
    )


def _conv_local(module: Any, shapes: Shapes, x: Any, args: Any, kwargs: Any) -> Any:
    _refuse_masks(module)
    size = module.kernel_size
    return conv.local(
        shapes["kernel"],
        (size,) if isinstance(size, int) else size,
        module.strides,
        module.padding,
        module.input_dilation,
        module.kernel_dilation,
        "bias" in shapes,
    )


def _refuse_masks(module: Any) -> None:
    if module.mask is not None:
        raise UnsupportedError("its kernel is masked")


def _norm(module: Any, shapes: Shapes, x: Any, args: Any, kwargs: Any) -> Any:
    features = -1
    for name in ("feature_axes", "axis"):
        features = getattr(module, name, features)
    shape = next(iter(shapes.values()))
    return norm.norm(x.ndim, shape, features, "scale" in shapes, "bias" in shapes)


def _embed(module: Any, shapes: Shapes, x: Any, args: Any, kwargs: Any) -> Any:
    return embed.embed(shapes["embedding"])


def _attend(module: Any, shapes: Shapes, x: Any, args: Any, kwargs: Any) -> Any:
    return embed.attend(shapes["embedding"])


_KERNEL = ("kernel", "bias")
DENSE = Kind("dense", _KERNEL, _dense)
_NORM = Kind("norm", ("scale", "bias"), _norm, normalized=True)

KINDS: dict[type, Kind] = {
    nn.Dense: DENSE,
    nn.DenseGeneral: Kind("dense", _KERNEL, _dense_general),
    nn.Einsum: Kind("einsum", _KERNEL, _einsum),
    nn.Conv: Kind("conv", _KERNEL, _conv),
    nn.ConvTranspose: Kind("conv transpose", _KERNEL, _conv_transpose),
    nn.ConvLocal: Kind("conv local", _KERNEL, _conv_local),
    nn.Embed: Kind("embed", ("embedding",), _embed),
    nnx.Linear: DENSE,
    nnx.LoRALinear: DENSE,  # the pair's output is added: the kernel's sees the same gradient
    nnx.LinearGeneral: Kind("dense", _KERNEL, _dense_general),
    nnx.Einsum: Kind("einsum", _KERNEL, _einsum),
    nnx.Conv: Kind("conv", _KERNEL, _conv),
    nnx.ConvTranspose: Kind("conv transpose", _KERNEL, _conv_transpose),
    nnx.Embed: Kind("embed", ("embedding",), _embed),
    **dict.fromkeys((nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.InstanceNorm, nn.BatchNorm), _NORM),
    **dict.fromkeys(
        (nnx.LayerNorm, nnx.RMSNorm, nnx.GroupNorm, nnx.InstanceNorm, nnx.BatchNorm), _NORM
    ),
}

# A second way of using the same parameters.
ATTEND = Kind("embed", ("embedding",), _attend)


def kind_of(module_type: type, method: str) -> Kind | None:
    """The row of the table for a call of that method, if it has one."""
    if method == "attend" and module_type in (nn.Embed, nnx.Embed):
        return ATTEND
    return KINDS.get(module_type) if method == "__call__" else None
