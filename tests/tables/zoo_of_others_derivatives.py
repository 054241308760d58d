"""Losses of derivatives; Linen modules of one's own; Equinox, Haiku and Flax's bridges.

Residuals are of the Poisson equation, one entry for each way to write its Laplacian in JAX. Entries
of a library that is not installed skip the test that makes them.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import zoo
from flax import nnx
from flax.nnx import bridge
from jax import lax
from jax.experimental import jet
from zoo import BATCH, CLASSES, FEATURES, KEY, Problem, build, classify, classify_nnx, filled, mlp
from zoo_of_others import (
    HEADS,
    HIDDEN,
    WORDS,
    Other,
    Params,
    attend,
    draw,
    named,
    supervised,
    tuples,
)

import natgrad_jax as ng

SPACE = 2


def scalar_mlp(n: int) -> Params:
    """Parameters (w, b) of a network of n inputs and one output."""
    sizes = [(n, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, 1)]
    return draw([((i, o), (o,)) for i, o in sizes])


# ---------------------------------------------------------------------------------- derivatives

Scalar = Callable[[jax.Array], jax.Array]


def by_hessian(u: Scalar, x: jax.Array) -> jax.Array:
    return jnp.trace(jax.hessian(u)(x))


def by_grad_of_grad(u: Scalar, x: jax.Array) -> jax.Array:
    """A function of scalars, as most PINNs have it."""
    of = lambda *x: u(jnp.stack(x))
    return sum(jax.grad(jax.grad(of, i), i)(*x) for i in range(SPACE))


def by_jvp_of_jvp(u: Scalar, x: jax.Array) -> jax.Array:
    def second(e: jax.Array) -> jax.Array:
        first = lambda x: jax.jvp(u, (x,), (e,))[1]
        return jax.jvp(first, (x,), (e,))[1]

    return sum(second(e) for e in jnp.eye(SPACE))


def by_linearize(u: Scalar, x: jax.Array) -> jax.Array:
    """Rows of the Hessian by one linear map, as wave functions' kinetic energy has it."""
    _, hessian = jax.linearize(jax.grad(u), x)
    return sum(hessian(e)[i] for i, e in enumerate(jnp.eye(SPACE)))


def by_linearize_in_loop(u: Scalar, x: jax.Array) -> jax.Array:
    """The same in a loop, which saves memory."""
    _, hessian = jax.linearize(jax.grad(u), x)
    eye = jnp.eye(SPACE)
    step = lambda total, i: (total + hessian(eye[i])[i], None)
    return lax.scan(step, jnp.zeros(()), jnp.arange(SPACE))[0]


def by_jacfwd(u: Scalar, x: jax.Array) -> jax.Array:
    return jnp.trace(jax.jacfwd(jax.jacfwd(u))(x))


def by_jet(u: Scalar, x: jax.Array) -> jax.Array:
    """Taylor mode: the second coefficient along each axis."""
    second = lambda e: jet.jet(u, (x,), ((e, jnp.zeros_like(x)),))[1][1]
    return jax.vmap(second)(jnp.eye(SPACE)).sum()


LAPLACIANS = {
    "hessian": by_hessian,
    "grad of grad": by_grad_of_grad,
    "jvp of jvp": by_jvp_of_jvp,
    "linearize": by_linearize,
    "linearize in a loop": by_linearize_in_loop,
    "jacfwd": by_jacfwd,
    "jet": by_jet,
}


def poisson(laplacian: Any, boundary: bool) -> Problem:
    """``Δu = f`` inside, and ``u = 0`` on the boundary where asked."""
    field = lambda p: lambda x: tuples(p, x)[0]

    def loss_fn(p: Params, inside: jax.Array, edge: jax.Array) -> ng.Loss:
        found = jax.vmap(partial(laplacian, field(p)))(inside)
        wanted = jnp.prod(jnp.sin(inside), axis=-1)
        loss = ng.Gaussian(found, event_ndims=0).nll(wanted)
        if boundary:
            u = jax.vmap(field(p))(edge)
            loss += 10.0 * ng.Gaussian(u, event_ndims=0).nll(jnp.zeros(len(edge)))
        return loss

    inside = zoo.noise(6, SPACE)
    return Problem(loss_fn, scalar_mlp(SPACE), (inside, jnp.sign(inside[:BATCH])), tolerance=1e-4)


def critic(boundary: bool) -> Problem:
    """WGAN-GP: slopes of the critic are one between real and fake; its means are a plain scalar.

    ``boundary``: its values on real examples are also held near zero, as progressive GANs do.
    """
    value = lambda p, x: tuples(p, x)[0]

    def loss_fn(p: Params, real: jax.Array, fake: jax.Array, mix: jax.Array) -> ng.Loss:
        between = mix * real + (1 - mix) * fake
        slopes = jax.vmap(jax.grad(value, argnums=1), (None, 0))(p, between)
        norms = jnp.sqrt(jnp.sum(slopes**2, axis=-1) + 1e-12)
        on_real, on_fake = (jax.vmap(value, (None, 0))(p, x) for x in (real, fake))
        loss = 10.0 * ng.Gaussian(norms, event_ndims=0).nll(jnp.ones(len(norms)))
        loss += on_fake.mean() - on_real.mean()
        if boundary:
            loss += 1e-3 * ng.Gaussian(on_real, event_ndims=0).nll(jnp.zeros(len(on_real)))
        return loss

    real, fake = zoo.vector(), jnp.cos(zoo.vector())
    mix = jnp.linspace(0.1, 0.9, BATCH)[:, None]
    return Problem(loss_fn, scalar_mlp(FEATURES), (real, fake, mix), tolerance=1e-4)


DERIVATIVES = []
for suffix, edge in (("", False), (", boundary", True)):
    # the last bias has no part in a derivative of the network
    left = () if edge else ("2/1",)
    DERIVATIVES += [
        Other(f"{name}{suffix}", partial(poisson, f, edge), left, layers=3)
        for name, f in LAPLACIANS.items()
    ]
    DERIVATIVES.append(Other(f"gradient penalty{suffix}", partial(critic, edge), left, layers=3))


# ------------------------------------------------------------------ Linen modules of one's own

normal = nn.initializers.normal()


class DenseGeneral(nn.Module):
    """T5X and MaxText: a matrix as parameter, given axes before ``lax.dot_general``."""

    features: tuple[int, ...]
    axes: tuple[int, ...] = (-1,)

    @nn.compact
    def __call__(self, x):
        axes = tuple(a % x.ndim for a in self.axes)
        shape = tuple(x.shape[a] for a in axes) + self.features
        rows = math.prod(shape[: len(axes)])
        kernel = self.param("kernel", normal, (rows, math.prod(self.features)))
        contract = (axes, tuple(range(len(axes))))
        return lax.dot_general(x, kernel.reshape(shape), (contract, ((), ())))


class RMSNorm(nn.Module):
    """T5's multiplies by its scale, Gemma's by ``1 + scale``."""

    gemma: bool = False

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", normal, (x.shape[-1],))
        normed = x * lax.rsqrt(jnp.mean(lax.square(x), axis=-1, keepdims=True) + 1e-6)
        return normed * (1 + scale) if self.gemma else normed * scale


class T5Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = RMSNorm(name="pre_attention")(x)
        q, k, v = (DenseGeneral((HEADS, 2), name=n)(y) for n in ("query", "key", "value"))
        mixed = attend(q, k, v).reshape(q.shape)
        x = x + DenseGeneral((FEATURES,), axes=(-2, -1), name="out")(mixed)
        y = RMSNorm(name="pre_mlp")(x)
        gate, up = (DenseGeneral((6,), name=n)(y) for n in ("wi_0", "wi_1"))
        x = x + DenseGeneral((FEATURES,), name="wo")(nn.gelu(gate) * up)
        return DenseGeneral((CLASSES,), name="logits")(x)


class Einsum(nn.Module):
    """Gemma: the equation comes with the call."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self, eqn, x):
        return jnp.einsum(eqn, x, self.param("w", normal, self.shape))


class Embedder(nn.Module):
    """Gemma: one table, encoding scaled by the root of its width."""

    def setup(self):
        self.table = self.param("input_embedding", normal, (WORDS, FEATURES))

    def encode(self, ids):
        return self.table[(ids,)] * jnp.sqrt(FEATURES).astype(jnp.float32)

    def decode(self, x):
        return jnp.dot(x, self.table.T)


class Gemma(nn.Module):
    @nn.compact
    def __call__(self, ids):
        embedder = Embedder(name="embedder")
        x = embedder.encode(ids)
        y = RMSNorm(True, name="pre_attention_norm")(x)
        q = Einsum((HEADS, FEATURES, 2), name="q_einsum")("BTD,NDH->BTNH", y)
        k, v = Einsum((2, 1, FEATURES, 2), name="kv_einsum")("BSD,CKDH->CBSKH", y)
        mixed = attend(q, *(jnp.repeat(z, HEADS, axis=2) for z in (k, v))).reshape(q.shape)
        x = x + Einsum((HEADS, 2, FEATURES), name="attn_vec_einsum")("BTNH,NHD->BTD", mixed)
        y = RMSNorm(True, name="pre_ffw_norm")(x)
        gating = self.param("gating_einsum", normal, (2, FEATURES, 6))
        h = nn.gelu(jnp.dot(y, gating[0])) * jnp.dot(y, gating[1])
        x = x + jnp.dot(h, self.param("linear", normal, (6, FEATURES)))
        return embedder.decode(RMSNorm(True, name="final_norm")(x))


class OwnDense(nn.Module):
    """jaxpi: a dense layer; ``factorized`` has its kernel as a product of two parameters."""

    features: int
    factorized: bool = False

    @nn.compact
    def __call__(self, x):
        shape = (x.shape[-1], self.features)
        if self.factorized:
            init = lambda key, shape: (jnp.ones(shape[-1:]), normal(key, shape))
            g, v = self.param("kernel", init, shape)
            kernel = g * v
        else:
            kernel = self.param("kernel", normal, shape)
        return jnp.dot(x, kernel) + self.param("bias", normal, (self.features,))


def own_mlp(**kwargs):
    return nn.Sequential([OwnDense(5, **kwargs), nn.tanh, OwnDense(CLASSES, **kwargs)])


OWN_LINEN = [
    Other("T5X block", lambda: classify(T5Block(), zoo.sequence()), layers=10),
    Other("Gemma", lambda: classify(Gemma(), zoo.tokens())),  # the gating is one layer or two
    Other("jaxpi's dense", lambda: classify(own_mlp(), zoo.vector()), layers=2),
    Other(  # a product of two parameters: neither has a use of its own
        "factorized dense",
        lambda: classify(own_mlp(factorized=True), zoo.vector()),
        tuple(f"layers_{i}/kernel/{part}" for i in (0, 2) for part in (0, 1)),
    ),
]


# -------------------------------------------------------------------------------------- Equinox


def equinox(make: Callable[[Any], Callable[[jax.Array], Any]], x: jax.Array) -> Problem:
    """``make(eqx)`` gives a module's class of a key; it is called for one example under vmap."""
    import equinox as eqx

    shapes = eqx.filter_eval_shape(make(eqx), KEY)
    arrays, static = eqx.partition(shapes, lambda x: isinstance(x, jax.ShapeDtypeStruct))
    forward = lambda params, x: jax.vmap(eqx.combine(params, static))(x)
    return supervised(forward, filled(arrays), x)


def eqx_mlp(eqx):
    return lambda key: eqx.nn.MLP(FEATURES, CLASSES, 5, 2, activation=jax.nn.tanh, key=key)


def eqx_block(eqx):
    """A transformer block of one sequence; norms and dense layers are mapped over its tokens."""

    class Block(eqx.Module):
        norm1: eqx.nn.LayerNorm
        attention: eqx.nn.MultiheadAttention
        norm2: eqx.nn.LayerNorm
        mlp: eqx.nn.MLP
        head: eqx.nn.Linear

        def __init__(self, key):
            keys = jax.random.split(key, 3)
            self.norm1, self.norm2 = eqx.nn.LayerNorm(FEATURES), eqx.nn.LayerNorm(FEATURES)
            self.attention = eqx.nn.MultiheadAttention(2, FEATURES, key=keys[0])
            self.mlp = eqx.nn.MLP(FEATURES, FEATURES, 6, 1, activation=jax.nn.gelu, key=keys[1])
            self.head = eqx.nn.Linear(FEATURES, CLASSES, key=keys[2])

        def __call__(self, x):
            y = jax.vmap(self.norm1)(x)
            x = x + self.attention(y, y, y)
            x = x + jax.vmap(self.mlp)(jax.vmap(self.norm2)(x))
            return jax.vmap(self.head)(x)

    return Block


def eqx_convnet(eqx):
    """Channels first: one image is (channels, height, width)."""

    def make(key):
        first, second = jax.random.split(key)
        return eqx.nn.Sequential(
            [
                eqx.nn.Conv2d(FEATURES, 6, 3, stride=2, padding=1, key=first),
                eqx.nn.LayerNorm((6, 2, 2)),
                eqx.nn.Lambda(jax.nn.relu),
                eqx.nn.AvgPool2d(2),
                eqx.nn.Lambda(jnp.ravel),
                eqx.nn.Linear(6, CLASSES, key=second),
            ]
        )

    return make


def eqx_recurrent(eqx):
    """Words through a GRU cell by ``lax.scan``."""

    class Recurrent(eqx.Module):
        embed: eqx.nn.Embedding
        cell: eqx.nn.GRUCell
        head: eqx.nn.Linear

        def __init__(self, key):
            keys = jax.random.split(key, 3)
            self.embed = eqx.nn.Embedding(WORDS, FEATURES, key=keys[0])
            self.cell = eqx.nn.GRUCell(FEATURES, FEATURES, key=keys[1])
            self.head = eqx.nn.Linear(FEATURES, CLASSES, key=keys[2])

        def __call__(self, ids):
            step = lambda h, x: (self.cell(x, h), None)
            h, _ = lax.scan(step, jnp.zeros(FEATURES), jax.vmap(self.embed)(ids))
            return self.head(h)

    return Recurrent


EQUINOX = [
    Other("mlp", lambda: equinox(eqx_mlp, zoo.vector()), layers=3),
    Other("transformer block", lambda: equinox(eqx_block, zoo.sequence()), layers=9),
    Other("convnet", lambda: equinox(eqx_convnet, jnp.moveaxis(zoo.image(), -1, 1)), layers=3),
    # bias_n is added to a part of a product
    Other("words, GRU cell", lambda: equinox(eqx_recurrent, zoo.tokens()), ("cell/bias_n",)),
]


# ---------------------------------------------------------------------------------------- Haiku


def haiku(make: Callable[[Any], Callable[[jax.Array], jax.Array]], x: jax.Array) -> Problem:
    """``make(hk)`` is the function that Haiku transforms; a state is the loss's second result."""
    import haiku as hk

    net = hk.without_apply_rng(hk.transform_with_state(make(hk)))
    params, state = filled(jax.eval_shape(net.init, KEY, x))
    if not state:
        return supervised(lambda p, x: net.apply(p, state, x)[0], params, x)

    def loss_fn(params: Params, state: Any, x: jax.Array, y: jax.Array) -> Any:
        logits, new = net.apply(params, state, x)
        return ng.Categorical(logits).nll(y), new

    return Problem(loss_fn, params, (state, x, jnp.arange(BATCH) % CLASSES), has_aux=True)


def hk_mlp(hk):
    return lambda x: hk.nets.MLP([5, 5, CLASSES], activation=jnp.tanh)(x)


def hk_words(hk):
    return lambda ids: hk.Linear(CLASSES)(hk.Embed(WORDS, FEATURES)(ids))


def hk_resnet(hk):
    """A convolution and one block of Haiku's own ResNet, with batch statistics."""

    def forward(x):
        x = hk.Conv2D(6, 3, with_bias=False)(x)
        norms = {"create_scale": True, "create_offset": True, "decay_rate": 0.9}
        block = hk.nets.ResNet.BlockV1(6, 2, True, norms, bottleneck=False)
        return hk.Linear(CLASSES)(block(x, True, False).mean((1, 2)))

    return forward


def hk_lstm(hk):
    def forward(x):
        core = hk.LSTM(FEATURES)
        x, _ = hk.dynamic_unroll(core, x, core.initial_state(len(x)), time_major=False)
        return hk.Linear(CLASSES)(x)

    return forward


HAIKU = [
    Other("mlp", lambda: haiku(hk_mlp, zoo.vector()), layers=3),
    Other("small ResNet", lambda: haiku(hk_resnet, zoo.image()), layers=8),
    Other("LSTM", lambda: haiku(hk_lstm, zoo.sequence()), layers=2),
    Other("words", lambda: haiku(hk_words, zoo.tokens()), layers=2),
]


# --------------------------------------------------------------------- between Linen and NNX


def nnx_in_linen() -> Problem:
    """An NNX layer as one layer of a Linen model."""
    inner = bridge.to_linen(nnx.Linear, FEATURES, HIDDEN)
    return classify(nn.Sequential([inner, nn.tanh, nn.Dense(CLASSES)]), zoo.vector())


def linen_in_nnx() -> Problem:
    """A Linen model as an NNX model."""
    make = lambda rngs: bridge.ToNNX(mlp(), rngs=rngs).lazy_init(zoo.vector())
    return classify_nnx(build(make), zoo.vector())


class ScaledEmbed(nnx.Embed):
    """A class of one's own on top of a layer: its output is scaled."""

    def __call__(self, ids):
        return super().__call__(ids) * jnp.sqrt(self.features)


class Words(nnx.Module):
    def __init__(self, rngs):
        self.embed = ScaledEmbed(WORDS, FEATURES, rngs=rngs)
        self.head = nnx.Linear(FEATURES, CLASSES, rngs=rngs)

    def __call__(self, ids):
        return self.head(self.embed(ids))


BRIDGES = [Other("nnx in linen", nnx_in_linen, layers=2)]
# NNX models change in place: a fresh one each time
NNX = [
    Other("linen in nnx", linen_in_nnx, layers=3),
    Other("scaled embedding", lambda: classify_nnx(build(Words), zoo.tokens()), layers=2),
]

CASES = named("derivatives", DERIVATIVES) + named("own linen", OWN_LINEN)
CASES += named("equinox", EQUINOX) + named("haiku", HAIKU) + named("bridge", BRIDGES)
CASES += [x._replace(name=f"nnx: {x.name}") for x in NNX]
