"""Flax layers with whitened parameters."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from natgrad_jax.utils.precision import HIGHEST


class WhitenedDense(nn.Module):
    """A dense layer of whitened inputs, ``s = (U (h − c)) V + d``.

    ``kernel`` V and ``bias`` d are parameters; U ``(n, n)`` and c ``(n,)`` are statistics, in the
    collection ``"whitening"``, initially the identity and zero.

    Source: Desjardins et al. 2015, section 3.

    >>> x = jnp.ones((2, 3))
    >>> jax.tree.map(jnp.shape, WhitenedDense(4).init(jax.random.key(0), x)["whitening"])
    {'U': (3, 3), 'c': (3,)}
    """

    features: int
    use_bias: bool = True
    kernel_init: Any = nn.initializers.lecun_normal()
    bias_init: Any = nn.initializers.zeros_init()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        z = _whitened(self, x, 1)
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        s = jnp.matmul(z, kernel, precision=HIGHEST)
        return s + self.param("bias", self.bias_init, (self.features,)) if self.use_bias else s


class WhitenedConv(nn.Module):
    """A convolution of whitened feature maps: a 1 × 1 convolution by U, then the kernel.

    The padding is whitened too: a pixel outside the image is a zero of the canonical network. With
    groups there is one U for the channels of each, ``(groups, n, n)``. Otherwise as
    :class:`WhitenedDense`; arguments as those of ``flax.linen.Conv``, for one batch axis.

    Source: Desjardins et al. 2015, section 3.2.

    >>> x = jnp.ones((2, 5, 5, 3))
    >>> WhitenedConv(4, (3, 3)).init_with_output(jax.random.key(0), x)[0].shape
    (2, 5, 5, 4)
    """

    features: int
    kernel_size: Sequence[int]
    strides: int | Sequence[int] = 1
    padding: Any = "SAME"
    input_dilation: int | Sequence[int] = 1
    kernel_dilation: int | Sequence[int] = 1
    feature_group_count: int = 1
    use_bias: bool = True
    kernel_init: Any = nn.initializers.lecun_normal()
    bias_init: Any = nn.initializers.zeros_init()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        groups = self.feature_group_count
        shape = (*self.kernel_size, x.shape[-1] // groups, self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        rank = len(self.kernel_size)
        strides, *dilations = (
            (value,) * rank if isinstance(value, int) else tuple(value)
            for value in (self.strides, self.input_dilation, self.kernel_dilation)
        )
        x = _padded(x, tuple(self.kernel_size), strides, self.padding, *dilations)
        s = jax.lax.conv_general_dilated(
            _whitened(self, x, groups),
            kernel,
            strides,
            "VALID",
            rhs_dilation=dilations[1],
            dimension_numbers=_channels_last(x.ndim),
            feature_group_count=groups,
            precision=HIGHEST,
        )
        return s + self.param("bias", self.bias_init, (self.features,)) if self.use_bias else s


def _padded(
    x: jax.Array,
    size: Sequence[int],
    strides: Sequence[int],
    padding: Any,
    input_dilation: Sequence[int],
    kernel_dilation: Sequence[int],
) -> jax.Array:
    """``x`` padded as by ``flax.linen.Conv``, and dilated: a VALID convolution remains."""
    extent = [(k - 1) * d + 1 for k, d in zip(size, kernel_dilation, strict=True)]
    if padding in ("CIRCULAR", "REFLECT"):
        sides = [((k - 1) // 2, k // 2) for k in extent]
        x = jnp.pad(
            x, [(0, 0), *sides, (0, 0)], mode="wrap" if padding == "CIRCULAR" else "reflect"
        )
        padding = "VALID"
    elif padding == "CAUSAL":
        x = jnp.pad(x, [(0, 0), (extent[0] - 1, 0), (0, 0)])
        padding = "VALID"
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(x.shape[1:-1], extent, strides, padding)
    elif isinstance(padding, int):
        padding = [padding] * len(size)
    pairs = [(p, p) if isinstance(p, int) else tuple(p) for p in padding]
    config = [(low, high, d - 1) for (low, high), d in zip(pairs, input_dilation, strict=True)]
    return jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *config, (0, 0, 0)])


def _channels_last(rank: int) -> jax.lax.ConvDimensionNumbers:
    spatial = tuple(range(1, rank - 1))
    image = (0, rank - 1, *spatial)
    kernel = (rank - 1, rank - 2, *range(rank - 2))
    return jax.lax.ConvDimensionNumbers(image, kernel, image)


def _whitened(module: nn.Module, x: jax.Array, groups: int) -> jax.Array:
    """``U (x − c)`` over the last axis, group by group."""
    n = x.shape[-1] // groups
    lead = (groups,) if groups > 1 else ()
    eye = lambda: jnp.broadcast_to(jnp.eye(n, dtype=x.dtype), (*lead, n, n))
    U = module.variable("whitening", "U", eye).value
    c = module.variable("whitening", "c", lambda: jnp.zeros((*lead, n), x.dtype)).value
    x = x.reshape(*x.shape[:-1], *lead, n) - c
    z = jnp.einsum("...ij,...j->...i", U, x, precision=HIGHEST)
    return z.reshape(*x.shape[: x.ndim - 1 - len(lead)], -1)
