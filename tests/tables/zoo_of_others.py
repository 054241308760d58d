"""Models as others write them: plain functions of plain trees of arrays.

``CASES`` is one table of tiny models in the style of real code; only their structure is taken from
there. Models of Flax's own layers are in ``zoo.py``; losses of derivatives, modules of one's own
and those of other libraries in ``zoo_of_others_derivatives.py``.
"""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec as P
from zoo import (
    BATCH,
    CLASSES,
    FEATURES,
    TOKENS,
    Problem,
    filled,
    image,
    labels,
    sequence,
    tokens,
    vector,
)

import natgrad_jax as ng

HIDDEN, WORDS, EXPERTS, HEADS = 5, 5, 2, 2
Params = Any
Forward = Callable[[Params, jax.Array], jax.Array]


class Other(NamedTuple):
    """A case, and what is expected of it.

    ``uncovered``: the parameters that may remain without a block of their layer, paths joined by
    "/". ``layers``: how many layers there are, a kernel with its bias and a scale with its offset
    being one; None where that is a matter of taste.
    """

    name: str
    make: Callable[[], Problem]
    uncovered: tuple[str, ...] = ()
    layers: int | None = None


def draw(shapes: Any) -> Params:
    """Parameters for a tree whose leaves are shapes."""
    is_shape = lambda x: isinstance(x, tuple) and all(isinstance(n, int) for n in x)
    struct = lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    return filled(jax.tree.map(struct, shapes, is_leaf=is_shape))


def supervised(forward: Forward, params: Params, x: jax.Array, **kwargs: Any) -> Problem:
    """Classification by any function of any tree."""

    def loss_fn(params: Params, x: Any, y: Any) -> ng.Loss:
        return ng.Categorical(forward(params, x)).nll(y)

    return Problem(loss_fn, params, (x, labels(jax.eval_shape(forward, params, x))), **kwargs)


def plain(forward: Forward, shapes: Any, x: jax.Array, **kwargs: Any) -> Problem:
    """Classification by a function of a tree of arrays."""
    return supervised(forward, draw(shapes), x, **kwargs)


def affine(n: int, m: int) -> dict[str, tuple[int, ...]]:
    """The shapes of one dense layer."""
    return {"w": (n, m), "b": (m,)}


def linear(p: Params, x: jax.Array) -> jax.Array:
    return x @ p["w"] + p["b"]


# ------------------------------------------------------------------------------------ plain JAX


def tuples(p, x):
    """The tutorial's network: a list of (w, b)."""
    *hidden, (w, b) = p
    for v, c in hidden:
        x = jnp.tanh(jnp.dot(x, v) + c)
    return jnp.dot(x, w) + b


def ensemble(p, x):
    """Every member sees every example; members are an axis of each kernel."""
    h = jnp.einsum("bi,eih->ebh", x, p["w1"]) + p["b1"][:, None]
    return jnp.einsum("ebh,eho->ebo", jnp.tanh(h), p["w2"]) + p["b2"][:, None]


def transposed(p, x):
    """Kernels stored (out, in), as PyTorch stores them."""
    x = jax.nn.relu(x @ p["fc1"]["weight"].T + p["fc1"]["bias"])
    return x @ p["fc2"]["weight"].T + p["fc2"]["bias"]


def attend(q, k, v, mask=None):
    """Attention of (batch, time, heads, features), heads joined at the end."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    scores = scores if mask is None else jnp.where(mask, scores, -1e9)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
    return mixed.reshape(*mixed.shape[:2], -1)


def split_heads(x, heads=HEADS):
    return x.reshape(*x.shape[:-1], heads, -1)


def fused_qkv(p, x):
    """One kernel, used whole; its output is split."""
    q, k, v = jnp.split(linear(p["qkv"], x), 3, axis=-1)
    return linear(p["out"], attend(*map(split_heads, (q, k, v))))


def split_qkv(p, x):
    """One kernel, split before its parts are used."""
    q, k, v = (split_heads(x @ w) for w in jnp.split(p["qkv"], 3, axis=1))
    return linear(p["out"], attend(q, k, v))


def grouped_query(p, x):
    """Four query heads share two heads of keys and values: parts of unequal widths."""
    q, k, v = jnp.split(linear(p["qkv"], x), [8, 12], axis=-1)
    k, v = (jnp.repeat(split_heads(y), 2, axis=-2) for y in (k, v))
    return linear(p["out"], attend(split_heads(q, 4), k, v))


def run_lstm(gates, p, x):
    """A scan over time; ``gates(x, h)`` are the four gates beside each other."""
    n = FEATURES

    def step(carry, x):
        h, c = carry
        z = gates(x, h)
        i, f, g, o = z[:, :n], z[:, n : 2 * n], z[:, 2 * n : 3 * n], z[:, 3 * n :]
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    start = jnp.zeros((2, len(x), n))
    (h, _), _ = lax.scan(step, tuple(start), jnp.swapaxes(x, 0, 1))
    return linear(p["head"], h)


def lstm_of_gates(p, x):
    """Four kernels, joined before the scan; the input and the state are joined inside."""
    w, b = (jnp.concatenate([p[g][k] for g in "ifgo"], axis=-1) for k in "wb")
    return run_lstm(lambda x, h: jnp.concatenate([x, h], axis=-1) @ w + b, p, x)


def lstm_of_inputs(p, x):
    """An input and a recurrent kernel, joined inside of the scan."""

    def gates(x, h):
        w = jnp.concatenate([p["w_ih"], p["w_hh"]], axis=0)
        return jnp.concatenate([x, h], axis=1) @ w + p["b"]

    return run_lstm(gates, p, x)


def tied_embedding(p, ids):
    """The table reads words in and writes them out."""
    h = jnp.tanh(linear(p["dense"], p["table"][ids]))
    return h @ p["table"].T


def with_positions(p, ids):
    """A table of words, and one of more positions than there are tokens."""
    return linear(p["head"], p["table"][ids] + p["position"][: ids.shape[1]])


def one_hot(p, ids):
    return linear(p["head"], jax.nn.one_hot(ids, WORDS) @ p["table"])


def dense_mixture(p, x):
    """Every expert computes every example; a softmax weighs them."""
    gate = jax.nn.softmax(x @ p["gate"])
    h = jax.nn.relu(jnp.einsum("bd,edh->beh", x, p["up"]))
    return jnp.einsum("beh,eho,be->bo", h, p["down"], gate)


def dispatched_mixture(p, x):
    """Each example goes to one expert, to its next free place: dispatch and combine by einsum."""
    gate = jax.nn.softmax(x @ p["gate"])
    chosen = jax.nn.one_hot(gate.argmax(-1), EXPERTS)
    place = (jnp.cumsum(chosen, axis=0) - 1) * chosen
    dispatch = chosen[..., None] * jax.nn.one_hot(place.astype(int), BATCH)
    inputs = jnp.einsum("td,tec->ecd", x, dispatch)
    h = jax.nn.relu(jnp.einsum("ecd,edh->ech", inputs, p["up"]))
    outputs = jnp.einsum("ech,eho->eco", h, p["down"])
    return jnp.einsum("eco,tec,te->to", outputs, dispatch, gate)


def ragged_mixture(p, x):
    """Examples sorted by expert, and each run of rows multiplied by its expert's kernel."""
    gate = jax.nn.softmax(x @ p["gate"])
    expert = gate.argmax(-1)
    order = jnp.argsort(expert)
    sizes = jnp.bincount(expert, length=EXPERTS)
    h = jax.nn.relu(lax.ragged_dot(x[order], p["up"], sizes))
    y = lax.ragged_dot(h, p["down"], sizes)[jnp.argsort(order)]
    return y * jnp.take_along_axis(gate, expert[:, None], axis=1)


def layer_norm(p, x):
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return p["g"] * (x - mean) / jnp.sqrt(var + 1e-5) + p["b"]


def gpt2(p, ids):
    """GPT-2 of one block: kernels stored (in, out), the table tied."""
    x = p["wte"][ids] + p["wpe"][jnp.arange(ids.shape[1])]
    block, causal = p["h"][0], jnp.tril(jnp.ones((ids.shape[1],) * 2, bool))
    qkv = linear(block["attn"]["c_attn"], layer_norm(block["ln_1"], x))
    mixed = attend(*map(split_heads, jnp.split(qkv, 3, axis=-1)), mask=causal)
    x = x + linear(block["attn"]["c_proj"], mixed)
    h = jax.nn.gelu(linear(block["mlp"]["c_fc"], layer_norm(block["ln_2"], x)))
    x = x + linear(block["mlp"]["c_proj"], h)
    return layer_norm(p["ln_f"], x) @ p["wte"].T


def adaptive_norm(p, x):
    """A diffusion transformer's block: one vector of an example shifts, scales and gates all its
    positions."""
    shift, scale, gate = jnp.split(linear(p["modulation"], x.mean(1))[:, None], 3, axis=-1)
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    h = (x - mean) / jnp.sqrt(var + 1e-5) * (1 + scale) + shift
    return linear(p["head"], x + gate * linear(p["dense"], h))


NORM = {"g": (FEATURES,), "b": (FEATURES,)}
GPT2 = {
    "wte": (WORDS, FEATURES),
    "wpe": (TOKENS, FEATURES),
    "h": [
        {
            "ln_1": NORM,
            "attn": {"c_attn": affine(FEATURES, 12), "c_proj": affine(FEATURES, FEATURES)},
            "ln_2": NORM,
            "mlp": {"c_fc": affine(FEATURES, 6), "c_proj": affine(6, FEATURES)},
        }
    ],
    "ln_f": NORM,
}


def resnet_block(layout):
    """Two convolutions and a shortcut, batch norm written out; images in this layout."""
    last = layout == "NHWC"
    pixels, kernels = ((0, 1, 2), "HWIO") if last else ((0, 2, 3), "OIHW")

    def conv(w, x, stride=1):
        stride = (stride, stride)
        return lax.conv_general_dilated(
            x, w, stride, "SAME", dimension_numbers=(layout, kernels, layout)
        )

    def norm(p, x):
        scale, offset = (jnp.expand_dims(p[k], pixels) for k in ("scale", "offset"))
        mean = x.mean(pixels, keepdims=True)
        var = ((x - mean) ** 2).mean(pixels, keepdims=True)
        return (x - mean) * lax.rsqrt(var + 1e-5) * scale + offset

    def forward(p, x):
        x = x if last else jnp.moveaxis(x, -1, 1)
        y = jax.nn.relu(norm(p["norm1"], conv(p["conv1"], x, 2)))
        y = norm(p["norm2"], conv(p["conv2"], y))
        y = jax.nn.relu(y + conv(p["shortcut"], x, 2))
        return linear(p["head"], y.mean(pixels[1:]))

    kernel = lambda size, i, o: (size, size, i, o) if last else (o, i, size, size)
    norms = {name: {"scale": (6,), "offset": (6,)} for name in ("norm1", "norm2")}
    shapes = {"conv1": kernel(3, 4, 6), "conv2": kernel(3, 6, 6), "shortcut": kernel(1, 4, 6)}
    return plain(forward, shapes | norms | {"head": affine(6, CLASSES)}, image())


NHWC = ("NHWC", "HWIO", "NHWC")


def upsample(p, x):
    """A transposed convolution with a bias."""
    y = lax.conv_transpose(x, p["up"]["w"], (2, 2), "SAME", dimension_numbers=NHWC)
    return linear(p["head"], jnp.tanh(y + p["up"]["b"]).mean((1, 2)))


def separable(p, x):
    """A depthwise convolution, then one over the channels of each pixel."""
    conv = partial(lax.conv_general_dilated, padding="SAME", dimension_numbers=NHWC)
    x = conv(x, p["depth"], (1, 1), feature_group_count=FEATURES)
    x = jax.nn.relu(conv(x, p["point"], (1, 1)) + p["bias"])
    return linear(p["head"], x.mean((1, 2)))


def equalized(p, x):
    """Equalized learning rate: kernels are scaled where they are used."""
    scaled = lambda p: {"w": p["w"] / math.sqrt(len(p["w"])), "b": p["b"]}
    return linear(scaled(p[1]), jnp.tanh(linear(scaled(p[0]), x)))


def masked(p, x):
    """The first kernel without the weights that a constant mask takes away."""
    mask = np.tri(FEATURES, HIDDEN, dtype=np.float32)
    return linear(p[1], jnp.tanh(x @ (p[0]["w"] * mask) + p[0]["b"]))


def scanned(p, x):
    """Stacked layers, each computed again in the backward pass."""
    step = jax.checkpoint(lambda x, layer: (x + jnp.tanh(linear(layer, x)), None))
    x, _ = lax.scan(step, x, p["stack"])
    return linear(p["head"], x)


def conditional(p, x):
    """One of two layers, as the batch decides."""
    steep, flat = (partial(linear, p[name]) for name in ("steep", "flat"))
    return linear(p["head"], jnp.tanh(lax.cond(x.sum() > 0, steep, flat, x)))


def pairs(w):
    """Complex numbers from real and imaginary parts, the last axis of a kernel."""
    return w[..., 0] + 1j * w[..., 1]


def state_space(p, x):
    """A diagonal linear recurrence of complex states, as in S5 and LRU, by a parallel scan."""
    rate = jnp.exp(p["log_step"]) * (-jnp.exp(p["log_decay"]) + 1j * p["frequency"])
    u = p["gain"] * jnp.einsum("btf,sf->bts", x, pairs(p["B"]))
    then = lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1])
    _, states = lax.associative_scan(then, (jnp.broadcast_to(jnp.exp(rate), u.shape), u), axis=1)
    y = jnp.einsum("bts,fs->btf", states, pairs(p["C"])).real + p["D"] * x
    return linear(p["head"], jax.nn.gelu(y).mean(1))


def spectral(p, x):
    """A Fourier layer: a product of the lowest frequencies beside a product in place."""
    low = len(p["w"])
    h = jnp.einsum("bki,kio->bko", jnp.fft.rfft(x, axis=1)[:, :low], pairs(p["w"]))
    h = jnp.fft.irfft(jnp.pad(h, ((0, 0), (0, x.shape[1] // 2 + 1 - low), (0, 0))), x.shape[1], 1)
    return linear(p["head"], jax.nn.gelu(h + linear(p["skip"], x)).mean(1))


def shared_offset(p, x):
    """One number is added to every output of a layer: no bias, which has one for each."""
    return linear(p["head"], jnp.tanh(x @ p["w"] + p["b"]))


def on_one_device():
    """The user's own shard_map: parameters everywhere, examples divided."""
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    forward = jax.shard_map(tuples, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))
    return plain(forward, LIST, vector())


def tied_autoencoder():
    """One kernel encodes and decodes."""
    params = draw({"w": (FEATURES, 3), "encoded": (3,), "decoded": (FEATURES,)})

    def loss_fn(p: Params, x: jax.Array) -> ng.Loss:
        h = jnp.tanh(x @ p["w"] + p["encoded"])
        return ng.Bernoulli(h @ p["w"].T + p["decoded"]).nll(jax.nn.sigmoid(x))

    return Problem(loss_fn, params, (vector(),))


LIST = [((FEATURES, 5), (5,)), ((5, 5), (5,)), ((5, CLASSES), (CLASSES,))]
TORCH = {
    "fc1": {"weight": (HIDDEN, FEATURES), "bias": (HIDDEN,)},
    "fc2": {"weight": (CLASSES, HIDDEN), "bias": (CLASSES,)},
}
MEMBERS = {"w1": (2, 4, 5), "b1": (2, 5), "w2": (2, 5, CLASSES), "b2": (2, CLASSES)}
STATES = {
    **dict.fromkeys(("log_step", "log_decay", "frequency", "gain"), (3,)),
    "B": (3, FEATURES, 2),
    "C": (FEATURES, 3, 2),
    "D": (FEATURES,),
}
HEAD = {"head": affine(FEATURES, CLASSES)}
TABLE = {"table": (WORDS, FEATURES)}
MIXTURE = {"gate": (FEATURES, EXPERTS), "up": (EXPERTS, FEATURES, 6), "down": (EXPERTS, 6, CLASSES)}
JOINED = {"w_ih": (FEATURES, 16), "w_hh": (FEATURES, 16), "b": (16,)}
SEPARABLE = {"depth": (3, 3, 1, FEATURES), "point": (1, 1, FEATURES, 6), "bias": (6,)}
PLAIN = [
    Other("mlp of tuples", lambda: plain(tuples, LIST, vector()), layers=3),
    Other("ensemble by einsum", lambda: plain(ensemble, MEMBERS, vector()), layers=2),
    Other(
        "one number for all outputs",
        lambda: plain(shared_offset, {"w": (FEATURES, FEATURES), "b": ()} | HEAD, vector()),
        layers=3,
    ),
    Other("kernels (out, in)", lambda: plain(transposed, TORCH, vector()), layers=2),
    Other(
        "fused qkv",
        lambda: plain(
            fused_qkv, {"qkv": affine(FEATURES, 12), "out": affine(FEATURES, CLASSES)}, sequence()
        ),
        layers=2,
    ),
    Other(  # one layer or three
        "qkv split before use",
        lambda: plain(
            split_qkv, {"qkv": (FEATURES, 12), "out": affine(FEATURES, CLASSES)}, sequence()
        ),
    ),
    Other(
        "grouped queries",
        lambda: plain(
            grouped_query, {"qkv": affine(FEATURES, 16), "out": affine(8, CLASSES)}, sequence()
        ),
        layers=2,
    ),
    Other(  # one layer or four
        "LSTM of four gates",
        lambda: plain(
            lstm_of_gates, {g: affine(2 * FEATURES, FEATURES) for g in "ifgo"} | HEAD, sequence()
        ),
    ),
    Other("LSTM of two kernels", lambda: plain(lstm_of_inputs, JOINED | HEAD, sequence())),
    Other(
        "tied embedding",
        lambda: plain(tied_embedding, TABLE | {"dense": affine(FEATURES, FEATURES)}, tokens()),
        layers=2,
    ),
    Other(
        "positions",
        lambda: plain(with_positions, TABLE | HEAD | {"position": (6, FEATURES)}, tokens()),
        layers=3,
    ),
    Other("one-hot words", lambda: plain(one_hot, TABLE | HEAD, tokens()), layers=2),
    Other("dense mixture", lambda: plain(dense_mixture, MIXTURE, vector()), layers=3),
    Other("dispatched mixture", lambda: plain(dispatched_mixture, MIXTURE, vector()), layers=3),
    # a product with runs of rows is no dot_general
    Other("ragged mixture", lambda: plain(ragged_mixture, MIXTURE, vector()), ("up", "down")),
    Other("GPT-2", lambda: plain(gpt2, GPT2, tokens()), layers=9),
    Other(
        "adaptive norm",
        lambda: plain(
            adaptive_norm,
            HEAD | {"modulation": affine(FEATURES, 12), "dense": affine(FEATURES, FEATURES)},
            sequence(),
        ),
        layers=3,
    ),
    Other("ResNet block NHWC", lambda: resnet_block("NHWC"), layers=6),
    Other("ResNet block NCHW", lambda: resnet_block("NCHW"), layers=6),
    Other(
        "transposed convolution",
        lambda: plain(
            upsample, {"up": {"w": (3, 3, 4, 6), "b": (6,)}, "head": affine(6, 3)}, image()
        ),
        layers=2,
    ),
    Other(
        "separable convolution",
        lambda: plain(separable, SEPARABLE | {"head": affine(6, CLASSES)}, image()),
        layers=3,
    ),
    Other(
        "equalized learning rate",
        lambda: plain(equalized, [affine(FEATURES, 5), affine(5, CLASSES)], vector()),
        layers=2,
    ),
    Other(  # A ⊗ G knows of no mask: the masked weights would take part
        "masked kernel",
        lambda: plain(masked, [affine(FEATURES, HIDDEN), affine(HIDDEN, CLASSES)], vector()),
        ("0/w",),
    ),
    Other(
        "scan of checkpointed layers",
        lambda: plain(scanned, HEAD | {"stack": {"w": (2, 4, 4), "b": (2, 4)}}, vector()),
        layers=2,
    ),
    Other(
        "state space",
        lambda: plain(state_space, STATES | HEAD, sequence()),
        layers=8,
    ),
    Other(
        "spectral convolution",
        lambda: plain(
            spectral,
            HEAD | {"skip": affine(FEATURES, FEATURES), "w": (2, FEATURES, FEATURES, 2)},
            sequence(),
        ),
        layers=3,
    ),
    Other("tied autoencoder", tied_autoencoder),
    Other(  # which branch runs is not known before
        "conditional",
        lambda: plain(
            conditional, HEAD | {k: affine(FEATURES, FEATURES) for k in ("steep", "flat")}, vector()
        ),
        ("steep/w", "steep/b", "flat/w", "flat/b"),
    ),
    Other("shard_map", on_one_device, layers=3),
]


def named(group: str, others: list[Other]) -> list[Other]:
    """With the group's name in front; problems of arrays never change: each is made once."""
    return [x._replace(name=f"{group}: {x.name}", make=cache(x.make)) for x in others]


CASES = named("plain", PLAIN)
