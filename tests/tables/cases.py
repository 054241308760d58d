"""The table of layers: one row a layer kind and geometry, for Linen and NNX.

A row grows the exactness tests; it is never copied. ``arrange`` says by hand what the library
must find out: how one example's output divides into (positions, blocks, outputs).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

Arrange = Callable[[np.ndarray], np.ndarray]


class Case(NamedTuple):
    """``linen()`` and ``nnx(rngs)`` make the same layer; ``shape`` is one example's input.

    ``block``: which parameters lie in one block of the Fisher that has no Kronecker form, by
    the place of each along its last axis: all of them ("full") or those of one unit ("unit").
    """

    name: str
    shape: tuple[int, ...]
    linen: Callable[[], nn.Module]
    nnx: Callable[[nnx.Rngs], nnx.Module]
    arrange: Arrange
    tokens: bool = False  # whether the loss is over every position, not only over examples
    ids: int = 0  # inputs are ids below this number
    block: str = "kronecker"


def flat(s: np.ndarray) -> np.ndarray:
    """All of one example's output belongs to one position and one block."""
    return s.reshape(1, 1, -1)


def positions(s: np.ndarray) -> np.ndarray:
    """Every axis but the last is a position."""
    return s.reshape(-1, 1, s.shape[-1])


def grouped(groups: int) -> Arrange:
    return lambda s: s.reshape(-1, groups, s.shape[-1] // groups)


def _dense(
    name: str, shape: tuple[int, ...], arrange: Arrange, tokens: bool = False, **kw: Any
) -> Case:
    return Case(
        name,
        shape,
        lambda: nn.Dense(3, **kw),
        lambda rngs: nnx.Linear(shape[-1], 3, rngs=rngs, **kw),
        arrange,
        tokens,
    )


def _conv(
    name: str,
    shape: tuple[int, ...],
    kernel: tuple[int, ...],
    features: int = 3,
    groups: int = 1,
    **kw: Any,
) -> Case:
    kw["feature_group_count"] = groups
    return Case(
        name,
        shape,
        lambda: nn.Conv(features, kernel, **kw),
        lambda rngs: nnx.Conv(shape[-1], features, kernel, rngs=rngs, **kw),
        grouped(groups),
    )


def _einsum(
    name: str,
    shape: tuple[int, ...],
    equation: str,
    kernel: tuple[int, ...],
    bias: tuple[int, ...] | None,
    arrange: Arrange,
) -> Case:
    return Case(
        name,
        shape,
        lambda: nn.Einsum(kernel, equation, use_bias=bias is not None),
        lambda rngs: nnx.Einsum(equation, kernel, bias, rngs=rngs),
        arrange,
    )


def _norm(name: str, shape: tuple[int, ...], linen: Any, model: Any, block: str = "full") -> Case:
    return Case(name, shape, linen, model, positions, block=block)


def _transpose(name: str, shape: tuple[int, ...], kernel: tuple[int, ...], **kw: Any) -> Case:
    return Case(
        name,
        shape,
        lambda: nn.ConvTranspose(3, kernel, **kw),
        lambda rngs: nnx.ConvTranspose(
            3 if kw.get("transpose_kernel") else shape[-1],
            shape[-1] if kw.get("transpose_kernel") else 3,
            kernel,
            rngs=rngs,
            **kw,
        ),
        positions,
    )


def _embed(rngs: nnx.Rngs) -> nnx.Module:
    return nnx.Embed(4, 3, dtype=jnp.float64, rngs=rngs)  # which it would keep from its init


CASES = [
    _dense("dense", (4,), flat),
    _dense("dense no bias", (4,), flat, use_bias=False),
    _dense("dense on positions", (3, 4), positions),
    _dense("dense on a grid", (2, 2, 4), positions),
    _dense("dense, loss on tokens", (3, 4), positions, tokens=True),
    Case(
        "dense general, many outputs",
        (4,),
        lambda: nn.DenseGeneral((2, 3)),
        lambda rngs: nnx.LinearGeneral(4, (2, 3), rngs=rngs),
        flat,
    ),
    Case(
        "dense general, two input axes",
        (2, 3, 2),
        lambda: nn.DenseGeneral(3, axis=(-2, -1)),
        lambda rngs: nnx.LinearGeneral((3, 2), 3, axis=(-2, -1), rngs=rngs),
        positions,
    ),
    Case(
        "dense general, an inner axis",
        (3, 2),
        lambda: nn.DenseGeneral((2, 2), axis=1),
        lambda rngs: nnx.LinearGeneral(3, (2, 2), axis=1, rngs=rngs),
        lambda s: s.reshape(2, 1, 4),
    ),
    _einsum("einsum as dense", (3, 4), "bti,io->bto", (4, 3), (3,), positions),
    _einsum("einsum heads in", (3, 2, 2), "bthd,hde->bte", (2, 2, 3), (3,), positions),
    _einsum("einsum heads out", (3, 4), "...i,ihd->...hd", (4, 2, 2), (2, 2),
            lambda s: s.reshape(3, 1, 4)),
    _einsum("einsum output first", (3, 4), "bti,io->bot", (4, 2), (2,),
            lambda s: s.T.reshape(3, 1, 2)),
    _einsum("einsum per head", (3, 2, 2), "bthd,hde->bthe", (2, 2, 3), (2, 3),
            lambda s: s.reshape(3, 2, 3)),
    _einsum("einsum of one head", (3, 1, 2), "bthd,hde->bthe", (1, 2, 3), (1, 3),
            lambda s: s.reshape(3, 1, 3)),
    _einsum("einsum summed input", (3, 4), "bti,io->bo", (4, 3), (3,), flat),
    _einsum("einsum transposed kernel, no bias", (4,), "bi,oi->bo", (3, 4), None, flat),
    _conv("conv 1-d", (5, 2), (3,)),
    _conv("conv 1-d causal dilated", (6, 2), (2,), padding="CAUSAL", kernel_dilation=2),
    _conv("conv 2-d", (4, 3, 2), (3, 3)),
    _conv("conv 2-d no bias", (4, 4, 2), (2, 3), use_bias=False),
    _conv("conv 2-d valid strides", (5, 4, 2), (3, 2), strides=(2, 1), padding="VALID"),
    _conv("conv 2-d same strides", (5, 4, 2), (3, 3), strides=2),
    _conv("conv 2-d kernel dilation", (5, 5, 1), (2, 2), kernel_dilation=(2, 3)),
    _conv("conv 2-d input dilation", (3, 3, 2), (3, 3), input_dilation=2, padding=1),
    _conv("conv 2-d strides, both dilations", (3, 4, 2), (2, 3), input_dilation=(2, 1),
          kernel_dilation=(2, 1), padding=((1, 0), (2, 1)), strides=(1, 2)),
    _conv("conv 2-d circular", (4, 4, 2), (3, 2), padding="CIRCULAR"),
    _conv("conv 2-d reflect dilated", (5, 5, 1), (2, 2), padding="REFLECT", kernel_dilation=2),
    _conv("conv 2-d explicit padding", (4, 4, 2), (3, 3), padding=((2, 0), (0, 1))),
    _conv("conv 2-d negative padding", (5, 5, 1), (2, 2), padding=((-1, 0), (1, -1))),
    _conv("conv 2-d grouped", (4, 3, 4), (2, 2), features=6, groups=2),
    _conv("conv 2-d depthwise", (4, 4, 3), (3, 3), features=6, groups=3),
    _conv("conv 3-d", (3, 2, 3, 1), (2, 2, 2), features=2),
    _transpose("conv transpose", (3, 2, 2), (3, 3), strides=(2, 2)),
    _transpose("conv transpose, valid, dilated, no bias", (3, 2), (2,), strides=(3,),
               padding="VALID", kernel_dilation=(2,), use_bias=False),
    _transpose("conv transpose, explicit padding", (3, 3, 2), (3, 2), padding=((1, 2), (0, 1))),
    Case("embed", (3,), lambda: nn.Embed(4, 3), _embed,
         positions, ids=4),
    Case("embed, one id", (), lambda: nn.Embed(4, 3), _embed,
         flat, ids=4),
    _norm("layer norm", (3, 4), lambda: nn.LayerNorm(), lambda rngs: nnx.LayerNorm(4, rngs=rngs)),
    _norm("layer norm, no scale", (4,), lambda: nn.LayerNorm(use_scale=False),
          lambda rngs: nnx.LayerNorm(4, use_scale=False, rngs=rngs)),
    _norm("rms norm", (3, 4), lambda: nn.RMSNorm(), lambda rngs: nnx.RMSNorm(4, rngs=rngs)),
    _norm("group norm", (2, 2, 4), lambda: nn.GroupNorm(2),
          lambda rngs: nnx.GroupNorm(4, 2, rngs=rngs)),
    _norm("instance norm", (3, 2), lambda: nn.InstanceNorm(),
          lambda rngs: nnx.InstanceNorm(2, rngs=rngs)),
    _norm("batch norm, running average", (3, 2), lambda: nn.BatchNorm(use_running_average=True),
          lambda rngs: nnx.BatchNorm(2, use_running_average=True, rngs=rngs)),
    _norm("layer norm over 300 units", (300,), lambda: nn.LayerNorm(),
          lambda rngs: nnx.LayerNorm(300, rngs=rngs), "unit"),
]  # fmt: skip

# what only Linen spells
LINEN_ONLY = [
    Case(
        "conv 2-d two batch axes",
        (2, 4, 3, 2),
        lambda: nn.Conv(3, (3, 3)),
        lambda rngs: nnx.Linear(1, 1, rngs=rngs),
        positions,
    ),
    Case(
        "conv local",
        (4, 3, 2),
        lambda: nn.ConvLocal(3, (2, 2), strides=(2, 1), padding="VALID"),
        lambda rngs: nnx.Linear(1, 1, rngs=rngs),
        lambda s: s.reshape(1, -1, s.shape[-1]),
    ),
    Case(
        "conv local, one position",
        (2, 2, 2),
        lambda: nn.ConvLocal(3, (2, 2), padding="VALID"),
        lambda rngs: nnx.Linear(1, 1, rngs=rngs),
        lambda s: s.reshape(1, 1, s.shape[-1]),
    ),
    _transpose("conv transpose, transposed kernel", (3, 2), (3,), strides=(2,),
               transpose_kernel=True),
]  # fmt: skip


class Own(nn.Module):
    """A layer that its user wrote: ``function(parameters, x)`` of parameters of these shapes."""

    function: Callable[[dict[str, Any], Any], Any]
    shapes: Any  # a tuple of (name, shape)

    @nn.compact
    def __call__(self, x: Any) -> Any:
        init = nn.initializers.normal()
        return self.function({name: self.param(name, init, s) for name, s in self.shapes}, x)


def _own(
    name: str,
    shape: tuple[int, ...],
    function: Any,
    arrange: Arrange = positions,
    ids: int = 0,
    block: str = "kronecker",
    **shapes: tuple[int, ...],
) -> Case:
    module = lambda: Own(function, tuple(shapes.items()))
    return Case(name, shape, module, lambda rngs: nnx.Linear(1, 1, rngs=rngs), arrange, False, ids,
                block)  # fmt: skip


def _channels_first(p: dict[str, Any], x: Any) -> Any:
    s = jax.lax.conv_general_dilated(x.transpose(0, 3, 1, 2), p["w"], (1, 1), [(1, 1), (0, 1)])
    return (s + p["b"]).transpose(0, 2, 3, 1)


# what people write themselves, in plain JAX
OWN = [
    _own("own: kernel (out, in)", (3, 4), lambda p, x: x @ p["w"].T + p["b"], w=(3, 4), b=(3,)),
    _own("own: kernel in front", (4,),
         lambda p, x: jnp.einsum("oi,ni->no", p["w"], x) + p["b"][:, None].T, flat,
         w=(3, 4), b=(3,)),
    _own("own: a product for each expert", (2, 4),
         lambda p, x: jnp.einsum("nei,eio->neo", x, p["w"]) + p["b"], lambda s: s.reshape(1, 2, 3),
         w=(2, 4, 3), b=(2, 3)),
    _own("own: heads fused in one axis", (4,),
         lambda p, x: (x @ p["w"]).reshape(-1, 2, 3) + p["b"].reshape(2, 3), flat,
         w=(4, 6), b=(6,)),
    _own("own: kernel over √n", (3, 4), lambda p, x: x @ (p["w"] / 2.0) + p["b"],
         w=(4, 3), b=(3,)),
    _own("own: minus a scaled kernel", (4,), lambda p, x: x @ -(3.0 * p["w"]), flat, w=(4, 3)),
    _own("own: table[ids]", (3,), lambda p, x: p["w"][x], ids=4, w=(4, 3)),
    _own("own: one-hot rows", (3,), lambda p, x: jax.nn.one_hot(x, 4, dtype=p["w"].dtype) @ p["w"],
         ids=4, w=(4, 3)),
    _own("own: channels first", (4, 3, 2), _channels_first, w=(3, 2, 3, 2), b=(3, 1, 1)),
    _own("own: scale and shift", (3, 4), lambda p, x: x * p["scale"] + p["shift"], block="full",
         scale=(4,), shift=(4,)),
    _own("own: one plus a scale", (3, 4), lambda p, x: x * (1 + p["scale"]), block="full",
         scale=(4,)),
    _own("own: any function of a parameter", (3, 4), lambda p, x: jnp.sin(x * jnp.exp(p["a"])),
         block="full", a=(4,)),
]  # fmt: skip

# One of each way of dividing a layer: what does not depend on geometry is tested on these.
REPRESENTATIVE = [c for c in CASES if c.name in (
    "dense", "dense, loss on tokens", "einsum per head", "conv 2-d", "conv 2-d grouped", "embed",
    "conv transpose", "layer norm")]  # fmt: skip

# Layers on which the approximations differ, each under every one of them.
APPROXIMATED = [c for c in CASES + LINEN_ONLY if c.name in (
    "dense on positions", "einsum per head", "conv 2-d valid strides", "conv 2-d circular",
    "conv 2-d grouped", "conv transpose", "conv local", "embed")]  # fmt: skip
