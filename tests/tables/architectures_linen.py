"""Whole Linen networks as people write them, and what both frameworks' networks are fed."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from zoo import BATCH, CLASSES, KEY, Problem, classify, filled, image

import natgrad_jax as ng

WIDTH, HEADS, VOCAB, LENGTH, SIZE = 4, 2, 7, 5, 8
# softmax does not see a key's bias, layer norm no shift: such a gradient is zero but for rounding
INVARIANT = 1e-4


def text(length: int = LENGTH) -> Array:
    """Tokens 1…, of sentences of different lengths; 0 is padding."""
    ids = np.random.default_rng(0).integers(1, VOCAB, (BATCH, length))
    return jnp.asarray(np.where(np.arange(length) < length - np.arange(BATCH)[:, None] % 3, ids, 0))


def picture(channels: int = 3) -> Array:
    return image(size=SIZE, channels=channels)


def patches() -> int:
    """Of a picture in squares of 4."""
    return (SIZE // 4) ** 2


def classes() -> Array:
    return jnp.arange(BATCH) % CLASSES


def language_loss(logits: Array, ids: Array) -> ng.Loss:
    """Each next token, where there is one."""
    return ng.Categorical(logits[:, :-1]).nll(ids[:, 1:], where=ids[:, 1:] > 0)


def trained(
    module: nn.Module, loss: Callable[..., ng.Loss], inputs: tuple[Any, ...], *targets: Any,
    **kwargs: Any,
) -> Problem:  # fmt: skip
    """``loss(module(*inputs), *targets)`` of a Linen module without other state."""
    params = filled(jax.eval_shape(module.init, KEY, *inputs)["params"])

    def loss_fn(params: Any, inputs: Any, *targets: Any) -> ng.Loss:
        return loss(module.apply({"params": params}, *inputs), *targets)

    return Problem(loss_fn, params, (inputs, *targets), **kwargs)


class BertLayer(nn.Module):
    """Post-norm."""

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        x = nn.LayerNorm()(x + nn.MultiHeadDotProductAttention(HEADS)(x, mask=mask))
        return nn.LayerNorm()(x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(6)(x))))


class MaskedLMHead(nn.Module):
    """The kernel is the embedding's table; the bias is its own."""

    @nn.compact
    def __call__(self, x: Array, attend: Callable[[Array], Array]) -> Array:
        x = nn.LayerNorm()(nn.gelu(nn.Dense(WIDTH)(x)))
        return attend(x) + self.param("bias", nn.initializers.zeros, (VOCAB,))


class Bert(nn.Module):
    def setup(self) -> None:
        self.words = nn.Embed(VOCAB, WIDTH)
        self.positions = nn.Embed(LENGTH, WIDTH)
        self.segments = nn.Embed(2, WIDTH)
        self.norm = nn.LayerNorm()
        self.layers = [BertLayer()]
        self.cls = MaskedLMHead()
        self.pooler = nn.Dense(WIDTH)
        self.head = nn.Dense(CLASSES)

    def __call__(self, ids: Array, segments: Array) -> tuple[Array, Array]:
        x = self.words(ids) + self.positions(jnp.arange(LENGTH)[None]) + self.segments(segments)
        x = self.norm(x)
        mask = nn.make_attention_mask(ids > 0, ids > 0)
        for layer in self.layers:
            x = layer(x, mask)
        return self.cls(x, self.words.attend), self.head(nn.tanh(self.pooler(x[:, 0])))


def bert() -> Problem:
    """Two terms; words that are not to be guessed have label -1."""
    ids = text()
    guess = (ids > 0) & (jnp.arange(LENGTH) % 2 == 1)
    segments = jnp.broadcast_to(jnp.arange(LENGTH) > 2, ids.shape).astype(jnp.int32)

    def loss(out: tuple[Array, Array], words: Array, y: Array) -> ng.Loss:
        logits, pooled = out
        masked = ng.Categorical(logits).nll(words, where=words >= 0)
        return masked + 0.5 * ng.Categorical(pooled).nll(y)

    inputs = jnp.where(guess, VOCAB - 1, ids), segments
    targets = jnp.where(guess, ids, -1), classes()
    return trained(Bert(), loss, inputs, *targets, tolerance=INVARIANT)


class GPTBlock(nn.Module):
    @nn.compact
    def __call__(self, x: Array, mask: Array) -> tuple[Array, None]:
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(HEADS)(y, mask=mask)
        y = nn.gelu(nn.Dense(6)(nn.LayerNorm()(x)))
        return x + nn.Dense(WIDTH)(y), None


class GPT(nn.Module):
    """Scanned and rematerialized blocks, tied embeddings."""

    @nn.compact
    def __call__(self, ids: Array) -> Array:
        embed = nn.Embed(VOCAB, WIDTH, name="wte")
        x = embed(ids) + nn.Embed(LENGTH, WIDTH, name="wpe")(jnp.arange(LENGTH))
        blocks = nn.scan(
            nn.remat(GPTBlock, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=2,
        )
        x, _ = blocks(name="blocks")(x, nn.make_causal_mask(ids))
        return embed.attend(nn.LayerNorm()(x))


class BasicBlock(nn.Module):
    channels: int
    strides: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        conv = partial(nn.Conv, self.channels, use_bias=False)
        norm = partial(nn.BatchNorm, use_running_average=False)
        y = nn.relu(norm()(conv((3, 3), strides=self.strides)(x)))
        y = norm(scale_init=nn.initializers.zeros)(conv((3, 3))(y))
        if x.shape != y.shape:
            x = norm(name="norm_proj")(conv((1, 1), strides=self.strides, name="conv_proj")(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.Conv(4, (3, 3), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=False)(x))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        for channels, strides in ((4, 1), (8, 2)):
            x = BasicBlock(channels, strides)(x)
        return nn.Dense(CLASSES)(x.mean((1, 2)))


def resnet() -> Problem:
    """Its loss returns the new batch statistics."""
    module, x = ResNet(), picture()
    variables = jax.eval_shape(module.init, KEY, x)
    batch_stats = jax.tree.map(lambda s: jnp.ones(s.shape), variables["batch_stats"])

    def loss_fn(params: Any, batch_stats: Any, x: Any, y: Any) -> Any:
        logits, updates = module.apply(
            {"params": params, "batch_stats": batch_stats}, x, mutable=["batch_stats"]
        )
        return ng.Categorical(logits).nll(y), updates

    args = (batch_stats, x, classes())
    return Problem(loss_fn, filled(variables["params"]), args, has_aux=True)


class ConvNorm(nn.Module):
    channels: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return nn.relu(nn.GroupNorm(2)(nn.Conv(self.channels, (3, 3))(x)))


class UNet(nn.Module):
    """Two levels; skips are concatenated."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        skips = []
        for channels in (4, 6):
            skips.append(x := ConvNorm(channels)(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = ConvNorm(8)(x)
        for channels in (6, 4):
            x = nn.ConvTranspose(channels, (2, 2), strides=(2, 2))(x)
            x = ConvNorm(channels)(jnp.concatenate([x, skips.pop()], axis=-1))
        return nn.Conv(CLASSES, (1, 1))(x)


def unet() -> Problem:
    """A class for each pixel, but for those of class 255."""
    y = np.arange(BATCH * SIZE * SIZE).reshape(BATCH, SIZE, SIZE) % CLASSES
    y[:, :2] = 255
    loss = lambda logits, y: ng.Categorical(logits).nll(y, where=y < 255)
    return trained(UNet(), loss, (picture(),), jnp.asarray(y))


class LSTMLanguageModel(nn.Module):
    cell: Any
    layers: int = 1

    @nn.compact
    def __call__(self, ids: Array) -> Array:
        x = nn.Embed(VOCAB, WIDTH)(ids)
        for _ in range(self.layers):
            x = nn.RNN(self.cell(5))(x)
        return nn.Dense(VOCAB)(x)


def language_model(cell: Any, layers: int) -> Problem:
    ids = text()
    return trained(LSTMLanguageModel(cell, layers), language_loss, (ids,), ids, tolerance=1e-4)


class Bidirectional(nn.Module):
    """The last states of both directions tell the class; padding is not read."""

    @nn.compact
    def __call__(self, ids: Array) -> Array:
        rnn = lambda: nn.RNN(nn.GRUCell(WIDTH), return_carry=True)
        both = nn.Bidirectional(rnn(), rnn(), return_carry=True)
        carries, _ = both(nn.Embed(VOCAB, WIDTH)(ids), seq_lengths=(ids > 0).sum(-1))
        return nn.Dense(CLASSES)(jnp.concatenate(carries, axis=-1))


class ViTBlock(nn.Module):
    """Queries and keys are normalized, in heads of 4."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(HEADS, qkv_features=8, normalize_qk=True)(y)
        y = nn.gelu(nn.Dense(6)(nn.LayerNorm()(x)))
        return x + nn.Dense(WIDTH)(y)


class ViT(nn.Module):
    """A class token and positions that belong to no layer."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.Conv(WIDTH, (4, 4), strides=(4, 4), padding="VALID", name="embedding")(x)
        x = x.reshape(BATCH, -1, WIDTH)
        cls = self.param("cls", nn.initializers.zeros, (1, 1, WIDTH))
        x = jnp.concatenate([jnp.tile(cls, (BATCH, 1, 1)), x], axis=1)
        x = x + self.param("pos_embedding", nn.initializers.normal(), (1, patches() + 1, WIDTH))
        x = nn.LayerNorm()(ViTBlock()(x))
        return nn.Dense(CLASSES, name="head")(x[:, 0])


class ConvNeXtBlock(nn.Module):
    @nn.compact
    def __call__(self, x: Array) -> Array:
        channels = x.shape[-1]
        y = nn.Conv(channels, (7, 7), feature_group_count=channels)(x)
        y = nn.Dense(2 * channels)(nn.LayerNorm()(y))
        y = nn.Dense(channels)(nn.gelu(y))
        return x + y * self.param("gamma", nn.initializers.constant(0.1), (channels,))


class ConvNeXt(nn.Module):
    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.LayerNorm()(nn.Conv(4, (2, 2), strides=(2, 2))(x))
        x = ConvNeXtBlock()(x)
        x = nn.Conv(6, (2, 2), strides=(2, 2))(nn.LayerNorm()(x))
        return nn.Dense(CLASSES)(nn.LayerNorm()(x.mean((1, 2))))


class VAE(nn.Module):
    def setup(self) -> None:
        conv = partial(nn.Conv, kernel_size=(3, 3), strides=(2, 2))
        deconv = partial(nn.ConvTranspose, kernel_size=(3, 3), strides=(2, 2))
        self.down = [conv(4), conv(6)]
        self.mean, self.log_variance = nn.Dense(3), nn.Dense(3)
        self.unflatten = nn.Dense(2 * 2 * 6)
        self.up = [deconv(4), deconv(1)]

    def encode(self, x: Array) -> tuple[Array, Array]:
        for layer in self.down:
            x = nn.relu(layer(x))
        x = x.reshape(len(x), -1)
        return self.mean(x), self.log_variance(x)

    def decode(self, z: Array) -> Array:
        x = self.unflatten(z).reshape(len(z), 2, 2, 6)
        for layer in self.up:
            x = layer(nn.relu(x))
        return x.reshape(len(z), -1)

    def __call__(self, x: Array, key: Array) -> tuple[Array, Array, Array]:
        mean, log_variance = self.encode(x)
        z = mean + jnp.exp(log_variance / 2) * jax.random.normal(key, mean.shape)
        return self.decode(z), mean, log_variance


def vae() -> Problem:
    """The divergence from the prior is a Gaussian's loss and a scalar of the variance."""
    x = (picture(1) > 0).astype(jnp.float32)

    def loss(out: tuple[Array, Array, Array], x: Array) -> ng.Loss:
        logits, mean, log_variance = out
        spread = (jnp.exp(log_variance) - log_variance - 1).sum(-1).mean() / 2
        prior = ng.Gaussian(mean).nll(jnp.zeros_like(mean)) + spread
        return ng.Bernoulli(logits).nll(x.reshape(len(x), -1)) + 0.5 * prior

    return trained(VAE(), loss, (x, jax.random.key(1)), x)


class LocallyConnected(nn.Module):
    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.relu(nn.Conv(3, (3, 3), strides=(2, 2))(x))
        x = nn.relu(nn.ConvLocal(4, (2, 2), strides=(2, 2), padding="VALID")(x))
        return nn.Dense(CLASSES)(x.reshape(len(x), -1))


class StyleNet(nn.Module):
    """Instance norms: down, a residual block, up, and an image comes out."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        conv = partial(nn.Conv, kernel_size=(3, 3), use_bias=False)
        x = nn.relu(nn.InstanceNorm()(conv(4, strides=(2, 2))(x)))
        y = nn.relu(nn.InstanceNorm()(conv(4)(x)))
        x = x + nn.InstanceNorm()(conv(4)(y))
        x = nn.ConvTranspose(4, (3, 3), strides=(2, 2), use_bias=False)(x)
        return nn.Conv(3, (3, 3))(nn.relu(nn.InstanceNorm()(x)))


class WaveNet(nn.Module):
    """Gated causal convolutions whose dilation doubles; a categorical of the next sample."""

    @nn.compact
    def __call__(self, ids: Array) -> Array:
        causal = partial(nn.Conv, padding="CAUSAL")
        x = causal(WIDTH, (2,))(jax.nn.one_hot(ids, VOCAB))
        skips: list[Array] = []
        for dilation in (1, 2, 4):
            gate, y = jnp.split(causal(6, (2,), kernel_dilation=dilation)(x), 2, axis=-1)
            y = nn.tanh(y) * nn.sigmoid(gate)
            skips.append(nn.Conv(WIDTH, (1,))(y))
            if dilation < 4:
                x = x + nn.Conv(WIDTH, (1,))(y)
        y = nn.relu(nn.Conv(5, (1,))(nn.relu(sum(skips))))
        return nn.Conv(VOCAB, (1,))(y)


def wavenet() -> Problem:
    ids = text(12)
    return trained(WaveNet(), language_loss, (ids,), ids)


def gpt() -> Problem:
    ids = text()
    return trained(GPT(), language_loss, (ids,), ids, tolerance=INVARIANT)


def denoiser(out: Array, x: Array) -> ng.Loss:
    """Each pixel is an example."""
    return ng.Gaussian(out, 0.5).nll(x)


LINEN = {
    "BERT": bert,
    "GPT": gpt,
    "ResNet-18": resnet,
    "U-Net": unet,
    "LSTM language model": lambda: language_model(nn.OptimizedLSTMCell, 1),
    "two-layer LSTM language model": lambda: language_model(nn.LSTMCell, 2),
    "bidirectional GRU": lambda: classify(Bidirectional(), text(), tolerance=1e-4),
    "vision transformer": lambda: classify(ViT(), picture()),
    "ConvNeXt": lambda: classify(ConvNeXt(), picture()),
    "variational autoencoder": vae,
    "locally connected": lambda: classify(LocallyConnected(), picture()),
    "instance norm": lambda: trained(StyleNet(), denoiser, (picture(),), picture()),
    "WaveNet": wavenet,
}
