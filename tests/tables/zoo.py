"""The model zoo: tiny models of every shape that people write in Flax, each with a loss.

``CASES`` is one table for Linen and NNX. Models are as small as their structure allows.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import natgrad_jax as ng

BATCH, FEATURES, CLASSES, TOKENS = 4, 4, 3, 3
KEY = jax.random.key(0)


class Problem(NamedTuple):
    """``loss_fn(params, *args)`` of one model; ``params`` is the model itself in NNX.

    ``tolerance`` is the relative one of two programs that compute the same gradient.
    """

    loss_fn: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]
    has_aux: bool = False
    tolerance: float = 1e-5


class Case(NamedTuple):
    """A name, and what makes a fresh problem (NNX models change in place)."""

    name: str
    make: Callable[[], Problem]


def noise(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape), jnp.float32)


def image(rank: int = 2, size: int = 4, channels: int = FEATURES) -> jax.Array:
    return noise(BATCH, *[size] * rank, channels)


def vector() -> jax.Array:
    return noise(BATCH, FEATURES)


def sequence() -> jax.Array:
    return noise(BATCH, TOKENS, FEATURES)


def tokens() -> jax.Array:
    return jnp.asarray(np.arange(BATCH * TOKENS).reshape(BATCH, TOKENS) % 5)


def labels(logits: Any) -> jax.Array:
    """Some label for each example of logits (or their shape)."""
    shape = logits.shape[:-1]
    return jnp.asarray(np.arange(np.prod(shape)).reshape(shape) % CLASSES)


def filled(tree: Any) -> Any:
    """Arrays for a tree of shapes; eager initializers would compile every random op of a model."""
    rng = np.random.default_rng(0)

    def fill(x: Any) -> Any:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            keys = [jax.random.key(i) for i in range(int(np.prod(x.shape)))]
            return jnp.stack(keys).reshape(x.shape)
        if jnp.issubdtype(x.dtype, jnp.integer):
            return jnp.zeros(x.shape, x.dtype)
        return jnp.asarray(rng.normal(size=x.shape) / 2, x.dtype)

    return jax.tree.map(fill, tree)


def init(module: nn.Module, x: jax.Array) -> Any:
    """The module's parameters."""
    return filled(jax.eval_shape(module.init, KEY, x)["params"])


def build(make: Callable[..., nnx.Module], *args: Any, **kwargs: Any) -> nnx.Module:
    """``make(rngs, …)``, with parameters filled in."""
    graph, params, stats, rest = nnx.split(
        nnx.eval_shape(lambda: make(nnx.Rngs(0, dropout=1), *args, **kwargs)),
        nnx.Param,
        nnx.BatchStat,
        ...,
    )
    stats = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), stats)
    return nnx.merge(graph, filled(params), stats, filled(rest))


def classify(module: nn.Module, x: jax.Array, apply: Any = None, **kwargs: Any) -> Problem:
    """Classification by a Linen module without other state."""
    params = init(module, x)
    apply = apply or module.apply

    def loss_fn(params: Any, x: Any, y: Any) -> ng.Loss:
        return ng.Categorical(apply({"params": params}, x)).nll(y)

    y = labels(jax.eval_shape(apply, {"params": params}, x))
    return Problem(loss_fn, params, (x, y), **kwargs)


def classify_nnx(model: nnx.Module, x: jax.Array, forward: Any = None, **kwargs: Any) -> Problem:
    """Classification by an NNX model."""
    forward = forward or (lambda model, x: model(x))

    def loss_fn(model: Any, x: Any, y: Any) -> ng.Loss:
        return ng.Categorical(forward(model, x)).nll(y)

    y = labels(nnx.eval_shape(forward, model, x))
    return Problem(loss_fn, model, (x, y), **kwargs)


# ---------------------------------------------------------------------------------------- Linen


def mlp(dtype: Any = None) -> nn.Module:
    dense = partial(nn.Dense, dtype=dtype)
    return nn.Sequential([dense(FEATURES), nn.tanh, dense(5), nn.tanh, dense(CLASSES)])


class ConvNet(nn.Module):
    """Batch norm in training mode and dropout: mutable state, and rngs."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3))(x)
        x = nn.relu(nn.BatchNorm(use_running_average=False)(x))
        x = nn.Dropout(0.5, deterministic=False)(x.mean((1, 2)))
        return nn.Dense(CLASSES)(x)


class ResNetBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        conv = partial(nn.Conv, use_bias=False)
        norm = partial(nn.BatchNorm, use_running_average=False)
        y = nn.relu(norm()(conv(6, (3, 3), strides=2)(x)))
        y = norm(scale_init=nn.initializers.zeros)(conv(6, (3, 3))(y))
        x = nn.relu(y + norm(name="BatchNorm_shortcut")(conv(6, (1, 1), strides=2)(x)))
        return nn.Dense(CLASSES)(x.mean((1, 2)))


def with_batch_stats(module: nn.Module) -> Problem:
    """A model whose loss returns ``(Loss, new batch statistics)`` and takes a dropout key."""
    x = image()
    variables = jax.eval_shape(module.init, {"params": KEY, "dropout": KEY}, x)
    batch_stats = jax.tree.map(lambda x: jnp.ones(x.shape), variables["batch_stats"])

    def loss_fn(params: Any, batch_stats: Any, x: Any, y: Any, key: Any) -> Any:
        logits, changed = module.apply(
            {"params": params, "batch_stats": batch_stats},
            x,
            mutable=["batch_stats"],
            rngs={"dropout": key},
        )
        return ng.Categorical(logits).nll(y), changed["batch_stats"]

    args = (batch_stats, x, jnp.arange(BATCH) % CLASSES, jax.random.key(1))
    return Problem(loss_fn, filled(variables["params"]), args, has_aux=True)


class Block(nn.Module):
    """A pre-norm transformer block; the carry form that ``nn.scan`` takes."""

    @nn.compact
    def __call__(self, x, _=None):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(y, y)
        y = nn.Dense(6)(nn.LayerNorm()(x))
        return x + nn.Dense(x.shape[-1])(nn.gelu(y)), None


class Transformer(nn.Module):
    block: Any = Block

    @nn.compact
    def __call__(self, x):
        position = self.param("position", nn.initializers.normal(), (TOKENS, FEATURES))
        x = nn.Embed(5, FEATURES)(x) + position
        x, _ = self.block(name="block")(x, None)
        return nn.Dense(CLASSES)(nn.LayerNorm()(x))


def transformer(block: Any) -> Problem:
    return classify(Transformer(block), tokens())


def scanned(body: Any, length: int = 2, axis: int = 0) -> Any:
    return nn.scan(body, variable_axes={"params": axis}, split_rngs={"params": True}, length=length)


class DenseBody(nn.Module):
    """One layer of a stack, as wide as the stack is deep: its stack axis shows in no shape."""

    @nn.compact
    def __call__(self, x, _=None):
        return nn.tanh(nn.Dense(FEATURES)(x)), None


class Stack(nn.Module):
    length: int = 2
    axis: int = 0
    body: Any = DenseBody

    @nn.compact
    def __call__(self, x):
        x, _ = scanned(self.body, self.length, self.axis)(name="stack")(x, None)
        return nn.Dense(CLASSES)(x)


def ensemble(members: int) -> Problem:
    member = nn.vmap(
        nn.Dense,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=None,
        axis_size=members,
    )
    return classify(member(CLASSES), vector())


class InSetup(nn.Module):
    def setup(self):
        self.hidden = [nn.Dense(FEATURES), nn.Dense(5)]
        self.heads = {"logits": nn.Dense(CLASSES)}

    def __call__(self, x):
        for layer in self.hidden:
            x = nn.tanh(layer(x))
        return self.heads["logits"](x)


class Nested(nn.Module):
    depth: int

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(FEATURES)(x)
        return Nested(self.depth - 1)(x) if self.depth else nn.Dense(CLASSES)(x)


class CalledThrice(nn.Module):
    @nn.compact
    def __call__(self, x):
        shared = nn.Dense(FEATURES)
        for _ in range(3):
            x = nn.tanh(shared(x))
        return nn.Dense(CLASSES)(x)


class SharedScope(nn.Module):
    """The inner layer's parameters lie in the outer module's own scope."""

    def setup(self):
        self.inner = nn.Dense(CLASSES)
        nn.share_scope(self, self.inner)

    def __call__(self, x):
        return self.inner(x)


class Contractions(nn.Module):
    """Einsum and DenseGeneral over several axes."""

    @nn.compact
    def __call__(self, x):
        x = nn.Einsum((FEATURES, 2, 3), "...d,dhk->...hk")(x)
        x = nn.DenseGeneral((2, 2), axis=(-2, -1))(nn.tanh(x))
        return nn.DenseGeneral(CLASSES, axis=(-2, -1))(x)


class Convolutions(nn.Module):
    """A convolution with the given arguments, and a head."""

    rank: int
    options: Any

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (2,) * self.rank, **self.options)(x)
        return nn.Dense(CLASSES)(x.reshape(x.shape[0], -1, x.shape[-1]).mean(1))


def convolution(rank: int, **options: Any) -> Problem:
    return classify(Convolutions(rank, options), image(rank, size=3))


class Recurrent(nn.Module):
    """A scan that shares one layer's parameters over time."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(CLASSES)(nn.RNN(nn.GRUCell(FEATURES))(x))


def two_models() -> Problem:
    encoder, decoder = nn.Dense(5), nn.Dense(FEATURES)
    x = vector()
    params = {
        "enc": init(encoder, x),
        "dec": init(decoder, jnp.zeros((BATCH, 5))),
    }

    def loss_fn(params: Any, x: Any) -> ng.Loss:
        code = nn.tanh(encoder.apply({"params": params["enc"]}, x))
        return ng.Gaussian(decoder.apply({"params": params["dec"]}, code)).nll(x)

    return Problem(loss_fn, params, (x,))


def warm_jit() -> Problem:
    """The user's jitted apply has run on these very shapes before."""
    module, x = mlp(), vector()
    apply = jax.jit(module.apply)
    apply({"params": init(module, x)}, x)
    return classify(module, x, apply=apply)


def boxed() -> Problem:
    """Parameters in boxes that carry their sharding."""
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    return classify(
        nn.Sequential([nn.Dense(FEATURES, kernel_init=init), nn.tanh, nn.Dense(CLASSES)]), vector()
    )


LINEN = {
    "mlp": lambda: classify(mlp(), vector()),
    "mlp on tokens": lambda: classify(mlp(), sequence()),
    "bf16 compute": lambda: classify(mlp(jnp.bfloat16), vector(), tolerance=0.03),
    "convnet with batch norm and dropout": lambda: with_batch_stats(ConvNet()),
    "ResNet block": lambda: with_batch_stats(ResNetBlock()),
    "transformer": lambda: transformer(Block),
    "scanned transformer": lambda: transformer(scanned(Block)),
    "remat": lambda: classify(nn.remat(Nested)(1), vector()),
    "remat in scan": lambda: classify(Stack(body=nn.remat(DenseBody)), vector()),
    "scan, depth equal to width": lambda: classify(Stack(FEATURES), vector()),
    "scan over parameter axis 1": lambda: classify(Stack(2, axis=1), vector()),
    "ensemble": lambda: ensemble(2),
    "ensemble as large as the layer": lambda: ensemble(FEATURES),
    "layers in setup": lambda: classify(InSetup(), vector()),
    "nested": lambda: classify(Nested(2), vector()),
    "two models": two_models,
    "nn.jit": lambda: classify(nn.jit(Nested)(1), vector()),
    "warm jit of the user": warm_jit,
    "called three times": lambda: classify(CalledThrice(), vector()),
    "shared scope": lambda: classify(SharedScope(), vector()),
    "partitioned parameters": boxed,
    "Einsum and DenseGeneral": lambda: classify(Contractions(), sequence()),
    "conv 1-d, causal": lambda: convolution(1, padding="CAUSAL"),
    "conv 3-d, strided": lambda: convolution(3, strides=2, padding="VALID"),
    "conv, grouped": lambda: convolution(2, feature_group_count=2),
    "conv, depthwise and dilated": lambda: convolution(
        2, feature_group_count=4, kernel_dilation=2, padding="CIRCULAR"
    ),
    "recurrent": lambda: classify(Recurrent(), sequence(), tolerance=1e-4),
}


# ------------------------------------------------------------------------------------------ NNX


class MLP(nnx.Module):
    """Layers in an ``nnx.List``."""

    def __init__(self, rngs, dtype=None):
        sizes = [(FEATURES, 5), (5, 5), (5, CLASSES)]
        self.layers = nnx.List([nnx.Linear(i, o, rngs=rngs, dtype=dtype) for i, o in sizes])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(nnx.tanh(x))
        return x


class ConvNetNNX(nnx.Module):
    """Its loss changes the model in place: batch statistics and the count of dropout's rng."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(FEATURES, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(4, CLASSES, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x)))
        return self.head(self.dropout(x.mean((1, 2))))


class ResNetBlockNNX(nnx.Module):
    def __init__(self, rngs):
        conv = partial(nnx.Conv, use_bias=False, rngs=rngs)
        self.conv1, self.norm1 = conv(4, 6, (3, 3), strides=2), nnx.BatchNorm(6, rngs=rngs)
        self.conv2, self.norm2 = conv(6, 6, (3, 3)), nnx.BatchNorm(6, rngs=rngs)
        norm = nnx.GroupNorm(6, 2, rngs=rngs)
        self.shortcut = nnx.Sequential(conv(4, 6, (1, 1), strides=2), norm)
        self.head = nnx.Linear(6, CLASSES, rngs=rngs)

    def __call__(self, x):
        y = self.norm2(self.conv2(nnx.relu(self.norm1(self.conv1(x)))))
        return self.head(nnx.relu(y + self.shortcut(x)).mean((1, 2)))


class BlockNNX(nnx.Module):
    def __init__(self, rngs):
        self.norm1 = nnx.LayerNorm(FEATURES, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, FEATURES, decode=False, rngs=rngs)
        self.norm2 = nnx.LayerNorm(FEATURES, rngs=rngs)
        self.up, self.down = nnx.Linear(FEATURES, 6, rngs=rngs), nnx.Linear(6, FEATURES, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class DenseNNX(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(FEATURES, FEATURES, rngs=rngs)

    def __call__(self, x):
        return nnx.tanh(self.dense(x))


class StackNNX(nnx.Module):
    """Stacked blocks, made by ``nnx.vmap`` and run by ``nnx.scan``."""

    def __init__(self, rngs, block=DenseNNX, length=2, axis=0, remat=False):
        self.remat, self.axes = remat, nnx.StateAxes({nnx.Param: axis, ...: 0})
        make = nnx.split_rngs(splits=length)(nnx.vmap(block, in_axes=0, out_axes=self.axes))
        self.blocks = make(rngs)
        self.head = nnx.Linear(FEATURES, CLASSES, rngs=rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, self.axes), out_axes=nnx.Carry)
        def run(x, block):
            return nnx.remat(type(block).__call__)(block, x) if self.remat else block(x)

        return self.head(run(x, self.blocks))


class TransformerNNX(nnx.Module):
    def __init__(self, rngs, body):
        self.embed = nnx.Embed(5, FEATURES, rngs=rngs)
        self.position = nnx.Param(0.1 * rngs.params.normal((TOKENS, FEATURES)))
        self.body = body(rngs)

    def __call__(self, x):
        return self.body(self.embed(x) + self.position)


class Headed(nnx.Module):
    """One block and a head; ``remat`` recomputes the block in the backward pass."""

    def __init__(self, rngs, block=BlockNNX, remat=False):
        self.block, self.remat = block(rngs), remat
        self.head = nnx.Linear(FEATURES, CLASSES, rngs=rngs)

    def __call__(self, x):
        call = type(self.block).__call__
        return self.head((nnx.remat(call) if self.remat else call)(self.block, x))


def transformer_nnx(body: Any) -> Problem:
    return classify_nnx(build(TransformerNNX, body), tokens())


def ensemble_nnx(members: int) -> Problem:
    @nnx.split_rngs(splits=members)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(rngs):
        return nnx.Linear(FEATURES, CLASSES, rngs=rngs)

    forward = nnx.vmap(lambda model, x: model(x), in_axes=(0, None))
    return classify_nnx(build(make), vector(), forward=forward)


class SharedNNX(nnx.Module):
    """One module under two names, called under both and twice under one."""

    def __init__(self, rngs):
        self.first = nnx.Linear(FEATURES, FEATURES, rngs=rngs)
        self.second = self.first
        self.head = nnx.Linear(FEATURES, CLASSES, rngs=rngs)

    def __call__(self, x):
        x = nnx.tanh(self.first(nnx.tanh(self.first(x))))
        return self.head(nnx.tanh(self.second(x)))


class ContractionsNNX(nnx.Module):
    def __init__(self, rngs):
        self.split = nnx.Einsum("...d,dhk->...hk", (FEATURES, 2, 3), (2, 3), rngs=rngs)
        self.mix = nnx.LinearGeneral((2, 3), (2, 2), axis=(-2, -1), rngs=rngs)
        self.head = nnx.LinearGeneral((2, 2), CLASSES, axis=(-2, -1), rngs=rngs)

    def __call__(self, x):
        return self.head(self.mix(nnx.tanh(self.split(x))))


class ConvolutionsNNX(nnx.Module):
    def __init__(self, rngs, rank, options):
        self.conv = nnx.Conv(FEATURES, 4, (2,) * rank, rngs=rngs, **options)
        self.head = nnx.Linear(4, CLASSES, rngs=rngs)

    def __call__(self, x):
        x = self.conv(x)
        return self.head(x.reshape(x.shape[0], -1, x.shape[-1]).mean(1))


def convolution_nnx(rank: int, **options: Any) -> Problem:
    return classify_nnx(build(ConvolutionsNNX, rank, options), image(rank, size=3))


class RecurrentNNX(nnx.Module):
    def __init__(self, rngs):
        self.rnn = nnx.RNN(nnx.GRUCell(FEATURES, FEATURES, rngs=rngs), rngs=rngs)
        self.head = nnx.Linear(FEATURES, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.head(self.rnn(x))


class DropoutStack(nnx.Module):
    """Dropout inside a scan: each layer's own rng, changed in place."""

    def __init__(self, rngs, length=2):
        @nnx.split_rngs(splits=length)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs):
            return nnx.Sequential(
                nnx.Linear(FEATURES, FEATURES, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
            )

        self.blocks = make(rngs)
        self.head = nnx.Linear(FEATURES, CLASSES, rngs=rngs)

    def __call__(self, x):
        run = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return self.head(run(x, self.blocks))


def two_models_nnx() -> Problem:
    def make(rngs):
        encoder, decoder = nnx.Linear(FEATURES, 5, rngs=rngs), nnx.Linear(5, FEATURES, rngs=rngs)
        return nnx.Dict(enc=encoder, dec=decoder)

    model = build(make)

    def loss_fn(model: Any, x: Any) -> ng.Loss:
        return ng.Gaussian(model.dec(nnx.tanh(model.enc(x)))).nll(x)

    return Problem(loss_fn, model, (vector(),))


def aux_nnx() -> Problem:
    """The loss returns the logits too."""
    problem = classify_nnx(build(ConvNetNNX), image())

    def loss_fn(model: Any, x: Any, y: Any) -> Any:
        logits = model(x)
        return ng.Categorical(logits).nll(y), {"logits": logits}

    return problem._replace(loss_fn=loss_fn, has_aux=True)


def warm_jit_nnx() -> Problem:
    """The user's jitted forward pass has run on this very model before."""
    model, x = build(MLP), vector()
    forward = nnx.jit(lambda model, x: model(x))
    forward(model, x)
    return classify_nnx(model, x, forward=forward)


NNX = {
    "mlp in nnx.List": lambda: classify_nnx(build(MLP), vector()),
    "bf16 compute": lambda: classify_nnx(build(MLP, jnp.bfloat16), vector(), tolerance=0.03),
    "convnet with batch norm and dropout": aux_nnx,
    "ResNet block": lambda: classify_nnx(build(ResNetBlockNNX), image()),
    "transformer": lambda: transformer_nnx(Headed),
    "remat": lambda: classify_nnx(build(Headed, block=DenseNNX, remat=True), vector()),
    "scanned transformer": lambda: transformer_nnx(partial(StackNNX, block=BlockNNX)),
    "remat in scan": lambda: classify_nnx(build(StackNNX, remat=True), vector()),
    "scan, depth equal to width": lambda: classify_nnx(build(StackNNX, length=4), vector()),
    "scan over parameter axis 1": lambda: classify_nnx(build(StackNNX, axis=1), vector()),
    "dropout in scan": lambda: classify_nnx(build(DropoutStack), vector()),
    "ensemble": lambda: ensemble_nnx(2),
    "ensemble as large as the layer": lambda: ensemble_nnx(FEATURES),
    "nnx.jit": warm_jit_nnx,
    "shared module": lambda: classify_nnx(build(SharedNNX), vector()),
    "two models": two_models_nnx,
    "Einsum and LinearGeneral": lambda: classify_nnx(build(ContractionsNNX), sequence()),
    "conv 1-d, causal": lambda: convolution_nnx(1, padding="CAUSAL"),
    "conv 3-d, strided": lambda: convolution_nnx(3, strides=2, padding="VALID"),
    "conv, grouped": lambda: convolution_nnx(2, feature_group_count=2),
    "conv, depthwise and dilated": lambda: convolution_nnx(
        2, feature_group_count=4, kernel_dilation=2, padding="CIRCULAR"
    ),
    "recurrent": lambda: classify_nnx(build(RecurrentNNX), sequence(), tolerance=1e-4),
}


# Linen's problems never change: make each once
CASES = [Case(f"linen: {name}", cache(make)) for name, make in LINEN.items()]
CASES += [Case(f"nnx: {name}", make) for name, make in NNX.items()]
