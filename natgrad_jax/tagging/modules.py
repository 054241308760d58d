"""Which Flax modules have a block, and the geometry of one call of each.

One table for Linen and NNX: both spell the same layers with nearly the same attributes. Exact
types only: a subclass may compute something else.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
from flax import nnx

from natgrad_jax.kinds import conv, dense
from natgrad_jax.layers import Layout


class UnsupportedError(Exception):
    """A known layer used in a way that has no Kronecker block; the message says which."""


class Geometry(NamedTuple):
    """One call of a layer: its kind, how its arrays are arranged, how its parameters read."""

    kind: str
    call: Any
    kernel: Layout
    bias: Layout | None


def describe(
    module: Any,
    module_type: type,
    kernel_shape: tuple[int, ...],
    bias: bool,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Geometry:
    """The geometry of calling ``module`` (of exact type ``module_type``) with these arguments."""
    kind, geometry = KINDS[module_type]
    return Geometry(kind, *geometry(module, kernel_shape, bias, args, kwargs))


def call_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The layer's input: every known layer names it ``inputs`` and takes it first."""
    return args[0] if args else kwargs["inputs"]


def _dense(module: Any, kernel_shape: Any, bias: bool, args: Any, kwargs: Any) -> Any:
    return dense.general(call_input(args, kwargs).ndim, kernel_shape, (-1,), (), bias)


def _dense_general(module: Any, kernel_shape: Any, bias: bool, args: Any, kwargs: Any) -> Any:
    axis = (module.axis,) if isinstance(module.axis, int) else tuple(module.axis)
    batch = module.batch_axis if hasattr(module, "batch_axis") else module.batch_dims
    return dense.general(call_input(args, kwargs).ndim, kernel_shape, axis, tuple(batch), bias)


def _einsum(module: Any, kernel_shape: Any, bias: bool, args: Any, kwargs: Any) -> Any:
    given = args[1] if len(args) > 1 else kwargs.get("einsum_str")
    equation = module.einsum_str if given is None else given
    try:
        return dense.einsum(equation, call_input(args, kwargs).shape, kernel_shape, bias)
    except ValueError as e:
        raise UnsupportedError(str(e)) from None


def _conv(module: Any, kernel_shape: Any, bias: bool, args: Any, kwargs: Any) -> Any:
    if module.mask is not None:
        raise UnsupportedError("its kernel is masked")
    return conv.conv(
        kernel_shape,
        module.strides,
        module.padding,
        module.input_dilation,
        module.kernel_dilation,
        module.feature_group_count,
        bias,
    )


KINDS: dict[type, tuple[str, Callable[..., Any]]] = {
    nn.Dense: ("dense", _dense),
    nn.DenseGeneral: ("dense", _dense_general),
    nn.Einsum: ("einsum", _einsum),
    nn.Conv: ("conv", _conv),
    nnx.Linear: ("dense", _dense),
    nnx.LinearGeneral: ("dense", _dense_general),
    nnx.Einsum: ("einsum", _einsum),
    nnx.Conv: ("conv", _conv),
}
