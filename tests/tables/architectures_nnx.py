"""Whole NNX networks as people write them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
from architectures_linen import (
    HEADS,
    INVARIANT,
    LENGTH,
    SIZE,
    VOCAB,
    WIDTH,
    denoiser,
    language_loss,
    patches,
    picture,
    text,
)
from flax import nnx
from jax import Array
from zoo import BATCH, CLASSES, Problem, build, classify_nnx, noise

import natgrad_jax as ng


def trained_nnx(
    model: nnx.Module, loss: Callable[..., ng.Loss], x: Any, *targets: Any, **kwargs: Any
) -> Problem:
    """``loss(model(x), *targets)``."""

    def loss_fn(model: Any, x: Any, *targets: Any) -> ng.Loss:
        return loss(model(x), *targets)

    return Problem(loss_fn, model, (x, *targets), **kwargs)


class GPTBlockNNX(nnx.Module):
    """Root-mean-square norms, no biases."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm1 = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            HEADS, WIDTH, use_bias=False, decode=False, rngs=rngs
        )
        self.norm2 = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.gate = nnx.Linear(WIDTH, 6, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 6, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(6, WIDTH, use_bias=False, rngs=rngs)

    def __call__(self, x: Array, mask: Array) -> Array:
        x = x + self.attention(self.norm1(x), mask=mask)
        y = self.norm2(x)
        return x + self.down(nnx.silu(self.gate(y)) * self.up(y))


class GPTNNX(nnx.Module):
    """Tied embeddings."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.positions = nnx.Embed(LENGTH, WIDTH, rngs=rngs)
        self.blocks = nnx.List([GPTBlockNNX(rngs) for _ in range(2)])
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)

    def __call__(self, ids: Array) -> Array:
        x, mask = self.embed(ids) + self.positions(jnp.arange(LENGTH)), nnx.make_causal_mask(ids)
        for block in self.blocks:
            x = block(x, mask)
        return self.embed.attend(self.norm(x))


class BasicBlockNNX(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, ins: int, outs: int, strides: int = 1) -> None:
        conv = partial(nnx.Conv, use_bias=False, rngs=rngs)
        self.conv1, self.norm1 = conv(ins, outs, (3, 3), strides), nnx.BatchNorm(outs, rngs=rngs)
        self.conv2, self.norm2 = conv(outs, outs, (3, 3)), nnx.BatchNorm(outs, rngs=rngs)
        self.project = (
            nnx.Sequential(conv(ins, outs, (1, 1), strides), nnx.BatchNorm(outs, rngs=rngs))
            if ins != outs
            else None
        )

    def __call__(self, x: Array) -> Array:
        y = self.norm2(self.conv2(nnx.relu(self.norm1(self.conv1(x)))))
        return nnx.relu(y + (x if self.project is None else self.project(x)))


class ResNetNNX(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.stem = nnx.Conv(3, 4, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        shapes = ((4, 4), (4, 8, 2))
        self.blocks = nnx.Sequential(*[BasicBlockNNX(rngs, *shape) for shape in shapes])
        self.head = nnx.Linear(8, CLASSES, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = nnx.relu(self.norm(self.stem(x)))
        x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        return self.head(self.blocks(x).mean((1, 2)))


class SqueezeExcite(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, channels: int) -> None:
        self.squeeze = nnx.Conv(channels, 2, (1, 1), rngs=rngs)
        self.excite = nnx.Conv(2, channels, (1, 1), rngs=rngs)

    def __call__(self, x: Array) -> Array:
        y = nnx.silu(self.squeeze(x.mean((1, 2), keepdims=True)))
        return x * nnx.sigmoid(self.excite(y))


class InvertedResidual(nnx.Module):
    """Widen, convolve each channel by itself, squeeze and excite, narrow.

    The first block of a network (``widen`` 1) only does the second and the last.
    """

    def __init__(self, rngs: nnx.Rngs, ins: int, outs: int, strides: int, widen: int) -> None:
        wide, norm = widen * ins, partial(nnx.BatchNorm, rngs=rngs)
        conv = partial(nnx.Conv, use_bias=False, rngs=rngs)
        layers: list[Any] = [conv(ins, wide, (1, 1)), norm(wide), nnx.silu] if widen > 1 else []
        layers += [conv(wide, wide, (3, 3), strides, feature_group_count=wide), norm(wide)]
        layers += [nnx.silu, SqueezeExcite(rngs, wide)] if widen > 1 else [nnx.silu]
        self.layers = nnx.Sequential(*layers, conv(wide, outs, (1, 1)), norm(outs))

    def __call__(self, x: Array) -> Array:
        y = self.layers(x)
        return x + y if x.shape == y.shape else y


class MobileNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.stem = nnx.Conv(3, 4, (3, 3), 2, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.blocks = nnx.Sequential(
            InvertedResidual(rngs, 4, 6, 2, widen=1), InvertedResidual(rngs, 6, 6, 1, widen=2)
        )
        self.head = nnx.Linear(6, CLASSES, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = self.blocks(nnx.silu(self.norm(self.stem(x))))
        return self.head(x.mean((1, 2)))


class UNetNNX(nnx.Module):
    """A denoiser: it predicts what to add to the image."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        def block(ins: int, outs: int) -> nnx.Sequential:
            conv, norm = nnx.Conv(ins, outs, (3, 3), rngs=rngs), nnx.GroupNorm(outs, 2, rngs=rngs)
            return nnx.Sequential(conv, norm, nnx.silu)

        self.down, self.middle, self.join = block(3, 4), block(4, 6), block(8, 4)
        self.up = nnx.ConvTranspose(6, 4, (2, 2), strides=(2, 2), rngs=rngs)
        self.head = nnx.Conv(4, 3, (1, 1), rngs=rngs)

    def __call__(self, x: Array) -> Array:
        skip = self.down(x)
        y = self.up(self.middle(nnx.avg_pool(skip, (2, 2), strides=(2, 2))))
        return x + self.head(self.join(jnp.concatenate([y, skip], axis=-1)))


class LSTMLanguageModelNNX(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.rnn = nnx.RNN(nnx.OptimizedLSTMCell(WIDTH, 5, rngs=rngs), rngs=rngs)
        self.head = nnx.Linear(5, VOCAB, rngs=rngs)

    def __call__(self, ids: Array) -> Array:
        return self.head(self.rnn(self.embed(ids)))


class ViTBlockNNX(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm1 = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.norm2 = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.mlp = nnx.Sequential(
            nnx.Linear(WIDTH, 6, rngs=rngs), nnx.gelu, nnx.Linear(6, WIDTH, rngs=rngs)
        )

    def __call__(self, x: Array) -> Array:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViTNNX(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.patches = nnx.Conv(3, WIDTH, (4, 4), (4, 4), padding="VALID", rngs=rngs)
        self.cls = nnx.Param(jnp.zeros((1, 1, WIDTH)))
        self.pos = nnx.Param(0.02 * rngs.params.normal((1, patches() + 1, WIDTH)))
        self.blocks = nnx.List([ViTBlockNNX(rngs)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = self.patches(x).reshape(BATCH, -1, WIDTH)
        cls = jnp.broadcast_to(self.cls[...], (BATCH, 1, WIDTH))
        x = jnp.concatenate([cls, x], axis=1) + self.pos[...]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class MixerBlock(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        def mlp(width: int, hidden: int) -> nnx.Sequential:
            first, second = (
                nnx.Linear(width, hidden, rngs=rngs),
                nnx.Linear(hidden, width, rngs=rngs),
            )
            return nnx.Sequential(first, nnx.gelu, second)

        self.norm1, self.norm2 = nnx.LayerNorm(5, rngs=rngs), nnx.LayerNorm(5, rngs=rngs)
        self.tokens, self.channels = mlp(patches(), 3), mlp(5, 6)

    def __call__(self, x: Array) -> Array:
        y = self.tokens(self.norm1(x).swapaxes(1, 2))
        x = x + y.swapaxes(1, 2)
        return x + self.channels(self.norm2(x))


class Mixer(nnx.Module):
    """One multilayer perceptron over patches, one over channels."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.stem = nnx.Conv(3, 5, (4, 4), (4, 4), rngs=rngs)
        self.blocks = nnx.Sequential(*[MixerBlock(rngs) for _ in range(2)])
        self.norm = nnx.LayerNorm(5, rngs=rngs)
        self.head = nnx.Linear(5, CLASSES, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = self.blocks(self.stem(x).reshape(BATCH, -1, 5))
        return self.head(self.norm(x).mean(1))


class Frozen(nnx.Variable):
    """What is not trained."""


class Adapted(nnx.Module):
    """Low-rank updates: around a frozen layer, beside a trained one, and by themselves."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        base = nnx.Linear(WIDTH, 5, rngs=rngs)
        base.kernel, base.bias = Frozen(base.kernel[...]), Frozen(base.bias[...])
        self.frozen = nnx.LoRA(WIDTH, 2, 5, base_module=base, rngs=rngs)
        self.trained = nnx.LoRALinear(5, 6, lora_rank=2, rngs=rngs)
        self.pair = nnx.LoRA(6, 1, 6, rngs=rngs)
        self.head = nnx.Linear(6, CLASSES, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = nnx.tanh(self.trained(nnx.tanh(self.frozen(x))))
        return self.head(x + self.pair(x))


def language_model_nnx(make: Any, **kwargs: Any) -> Problem:
    ids = text()
    return trained_nnx(build(make), language_loss, ids, ids, **kwargs)


NNX = {
    "GPT": lambda: language_model_nnx(GPTNNX),
    "ResNet-18": lambda: classify_nnx(build(ResNetNNX), picture()),
    "MobileNet": lambda: classify_nnx(build(MobileNet), picture()),
    "U-Net": lambda: trained_nnx(build(UNetNNX), denoiser, picture(), noise(BATCH, SIZE, SIZE, 3)),
    "LSTM language model": lambda: language_model_nnx(LSTMLanguageModelNNX, tolerance=1e-4),
    "vision transformer": lambda: classify_nnx(build(ViTNNX), picture(), tolerance=INVARIANT),
    "MLP-Mixer": lambda: classify_nnx(build(Mixer), picture(), tolerance=INVARIANT),
    "LoRA": lambda: classify_nnx(build(Adapted), noise(BATCH, WIDTH)),
}
