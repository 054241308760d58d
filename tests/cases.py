"""The table of layers: one row a layer kind and geometry, for Linen and NNX.

A row grows the exactness tests; it is never copied. ``arrange`` says by hand what the library
must find out: how one example's output divides into (positions, blocks, outputs).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np
from flax import nnx

Arrange = Callable[[np.ndarray], np.ndarray]


class Case(NamedTuple):
    """``linen()`` and ``nnx(rngs)`` make the same layer; ``shape`` is one example's input."""

    name: str
    shape: tuple[int, ...]
    linen: Callable[[], nn.Module]
    nnx: Callable[[nnx.Rngs], nnx.Module]
    arrange: Arrange
    tokens: bool = False  # whether the loss is over every position, not only over examples


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
]
