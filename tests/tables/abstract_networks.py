"""Published networks at their own widths, of shapes alone: nothing of them is ever computed.

``WHOLE`` is the table: a new row grows the tests. Each may be had shallow, with few of the equal
blocks of one stage, whose shapes are all the same.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from abstract_zoo import Network, Shape, linen

import natgrad_jax as ng

Array = jax.Array
IMAGENET = Shape((64, 224, 224, 3))
CLASSES = 1000
norm = partial(nn.BatchNorm, use_running_average=False)


def classes(logits: Array, y: Array) -> ng.Loss:
    return ng.Categorical(logits).nll(y)


class Residual(nn.Module):
    """Two 3×3 convolutions, or a bottleneck of three."""

    channels: int
    strides: int
    bottleneck: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        conv, n = partial(nn.Conv, use_bias=False), self.channels
        sizes = [(n, 1, 1), (n, 3, self.strides), (4 * n, 1, 1)]
        if not self.bottleneck:
            sizes = [(n, 3, self.strides), (n, 3, 1)]
        y = x
        for i, (channels, size, strides) in enumerate(sizes):
            y = norm()(conv(channels, (size, size), strides=strides)(y))
            y = y if i == len(sizes) - 1 else nn.relu(y)
        if x.shape != y.shape:
            x = norm()(conv(y.shape[-1], (1, 1), strides=self.strides)(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    blocks: tuple[int, ...]
    bottleneck: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.relu(norm()(nn.Conv(64, (7, 7), strides=2, use_bias=False)(x)))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        for stage, count in enumerate(self.blocks):
            for i in range(count):
                strides = 2 if stage and not i else 1
                x = Residual(64 * 2**stage, strides, self.bottleneck)(x)
        return nn.Dense(CLASSES)(x.mean((1, 2)))


class Block(nn.Module):
    """Of a transformer, normalized first."""

    heads: int
    causal: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        mask = nn.make_causal_mask(x[..., 0]) if self.causal else None
        x = x + nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(x), mask=mask)
        y = nn.gelu(nn.Dense(4 * x.shape[-1])(nn.LayerNorm()(x)))
        return x + nn.Dense(x.shape[-1])(y)


class ViT(nn.Module):
    """Base: patches of 16, 768 channels in 12 heads."""

    blocks: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.Conv(768, (16, 16), strides=16, padding="VALID")(x).reshape(len(x), -1, 768)
        token = self.param("token", nn.initializers.zeros, (1, 1, 768))
        x = jnp.concatenate([jnp.tile(token, (len(x), 1, 1)), x], axis=1)
        x = x + self.param("places", nn.initializers.normal(), (1, *x.shape[1:]))
        for _ in range(self.blocks):
            x = Block(12)(x)
        return nn.Dense(CLASSES)(nn.LayerNorm()(x)[:, 0])


class GPT2(nn.Module):
    """Small: 768 channels in 12 heads, 50,257 words."""

    blocks: int
    tied: bool

    @nn.compact
    def __call__(self, ids: Array) -> Array:
        words = nn.Embed(50_257, 768)
        x = words(ids) + nn.Embed(1024, 768)(jnp.arange(ids.shape[1]))
        for _ in range(self.blocks):
            x = Block(12, causal=True)(x)
        x = nn.LayerNorm()(x)
        return words.attend(x) if self.tied else nn.Dense(50_257, use_bias=False)(x)


def next_words(logits: Array, ids: Array) -> ng.Loss:
    return ng.Categorical(logits[:, :-1]).nll(ids[:, 1:], where=ids[:, 1:] > 0)


class LSTMLanguageModel(nn.Module):
    """Two layers of 650 units, 10,000 words."""

    @nn.compact
    def __call__(self, ids: Array) -> Array:
        x = nn.Embed(10_000, 650)(ids)
        for cell in (nn.LSTMCell, nn.OptimizedLSTMCell):
            x = nn.RNN(cell(650))(x)
        return nn.Dense(10_000)(x)


class Twice(nn.Module):
    """Two convolutions, each normalized."""

    channels: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for _ in range(2):
            x = nn.relu(nn.GroupNorm(32)(nn.Conv(self.channels, (3, 3))(x)))
        return x


class UNet(nn.Module):
    """64 channels, doubled at each of four poolings, and back."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        skips: list[Array] = []
        for channels in (64, 128, 256, 512):
            skips.append(x := Twice(channels)(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = Twice(1024)(x)
        for channels in (512, 256, 128, 64):
            x = nn.ConvTranspose(channels, (2, 2), strides=(2, 2))(x)
            x = Twice(channels)(jnp.concatenate([x, skips.pop()], axis=-1))
        return nn.Conv(21, (1, 1))(x)


class ConvNeXtBlock(nn.Module):
    @nn.compact
    def __call__(self, x: Array) -> Array:
        n = x.shape[-1]
        y = nn.LayerNorm()(nn.Conv(n, (7, 7), feature_group_count=n)(x))
        y = nn.Dense(n)(nn.gelu(nn.Dense(4 * n)(y)))
        return x + y * self.param("gain", nn.initializers.constant(1e-6), (n,))


class ConvNeXt(nn.Module):
    """Tiny: 96 channels, doubled at each of three stages."""

    blocks: tuple[int, ...]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.LayerNorm()(nn.Conv(96, (4, 4), strides=4)(x))
        for stage, count in enumerate(self.blocks):
            if stage:
                x = nn.Conv(96 * 2**stage, (2, 2), strides=2)(nn.LayerNorm()(x))
            for _ in range(count):
                x = ConvNeXtBlock()(x)
        return nn.Dense(CLASSES)(nn.LayerNorm()(x.mean((1, 2))))


class MobileNet(nn.Module):
    """The first: depthwise convolutions, each with a 1×1 one; ``equal`` blocks of 512 channels."""

    equal: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        conv = partial(nn.Conv, use_bias=False)
        x = nn.relu(norm()(conv(32, (3, 3), strides=2)(x)))
        for channels in (64, 128, 128, 256, 256, *[512] * self.equal, 1024, 1024):
            n = x.shape[-1]
            strides = 2 if channels == 2 * n and n > 32 else 1
            x = nn.relu(norm()(conv(n, (3, 3), strides=strides, feature_group_count=n)(x)))
            x = nn.relu(norm()(conv(channels, (1, 1))(x)))
        return nn.Dense(CLASSES)(x.mean((1, 2)))


def classifier(module: nn.Module) -> Network:
    return linen(module, IMAGENET, classes)


def language_model(module: nn.Module, length: int = 1024) -> Network:
    ids = Shape((8, length), ids=True)
    return linen(module, ids, next_words, ids)


def unet() -> Network:
    return linen(UNet(), Shape((4, 256, 256, 3)), classes, Shape((4, 256, 256), ids=True))


def deep_or_shallow(
    make: Callable[[Any], nn.Module], deep: Any, shallow: Any, of: Callable[[nn.Module], Network]
) -> Callable[[bool], Network]:
    return lambda whole: of(make(deep if whole else shallow))


WHOLE: dict[str, Callable[[bool], Network]] = {
    "ResNet-18": deep_or_shallow(
        lambda blocks: ResNet(blocks, bottleneck=False), (2, 2, 2, 2), (1, 1, 1, 1), classifier
    ),
    "ResNet-50": deep_or_shallow(
        lambda blocks: ResNet(blocks, bottleneck=True), (3, 4, 6, 3), (2, 1, 1, 1), classifier
    ),
    "ViT-B": deep_or_shallow(ViT, 12, 1, classifier),
    "GPT-2, tied": deep_or_shallow(lambda n: GPT2(n, tied=True), 12, 1, language_model),
    "GPT-2, untied": deep_or_shallow(lambda n: GPT2(n, tied=False), 12, 1, language_model),
    "LSTM language model": lambda whole: language_model(LSTMLanguageModel(), 35),
    "U-Net": lambda whole: unet(),
    "ConvNeXt-T": deep_or_shallow(ConvNeXt, (3, 3, 9, 3), (1, 1, 1, 1), classifier),
    "MobileNet": deep_or_shallow(MobileNet, 6, 1, classifier),
}
