"""Networks of real widths, of shapes alone: nothing of them is ever computed.

``KINDS``: towers of one kind of layer, at widths on both sides of every constant of size in the
library; ``EDGES``: depths, batches and chosen blocks on both sides of the others. A new row grows
the tests; a constant that changes moves the sizes.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from transformations import Setting, find_layers

import natgrad_jax as ng
from natgrad_jax.curvature.inverse_methods import RANK
from natgrad_jax.curvature.layer_sums import MAX_CHUNK_BYTES
from natgrad_jax.layers.limits import MAX_FREE, MAX_FULL, MAX_FULL_NORM
from natgrad_jax.linalg.cholesky import LEAF, WHOLE
from natgrad_jax.statistics.spec import ENOUGH
from natgrad_jax.transforms.common.options import EIGENVECTORS
from natgrad_jax.transforms.common.refresh_schedule import PERIOD

Array = jax.Array
KEY = jax.random.key(0)
CLASSES = 3


def around(*sizes: int) -> tuple[int, ...]:
    """Each size, one less and one more."""
    return tuple(sorted({n + d for n in sizes for d in (-1, 0, 1)}))


# A normalization has a scale and a bias, and half as many units as numbers.
FORMS = 2 * RANK, 2 * EIGENVECTORS, MAX_FREE, MAX_FULL_NORM // 2
SIZES = RANK, *FORMS, LEAF, MAX_FULL_NORM, WHOLE
EVERY = around(*SIZES)
# Both sides of what decides the form of a state: low rank or whole, one block or one a unit.
SIDES = tuple(sorted({n + d for n in FORMS for d in (0, 1)}))
MAIN = 2 * EIGENVECTORS, 2 * EIGENVECTORS + 1


class Shape(NamedTuple):
    """Of an input; ``ids`` are whole numbers."""

    shape: tuple[int, ...]
    ids: bool = False

    @property
    def struct(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(self.shape, jnp.int32 if self.ids else jnp.float32)


class Network(NamedTuple):
    """A setting of abstract parameters, and its abstract batch."""

    setting: Setting
    batch: Any


def fit(x: Array, n: int) -> Array:
    """``x`` with n channels, without parameters."""
    return jnp.tile(x, -(-n // x.shape[-1]))[..., :n]


class Tower(nn.Module):
    """What ``make(n)`` gives, called one after the other on n channels."""

    make: Callable[[int], Any]
    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for n in self.widths:
            x = self.make(n)(fit(x, n))
        return x


def first_classes(out: Array) -> ng.Categorical:
    """An example's first few outputs as logits."""
    return ng.Categorical(out.reshape(len(out), -1)[:, :CLASSES])


def of_positions(out: Array, y: Array) -> ng.Loss:
    return ng.Categorical(out[..., :CLASSES]).nll(y)


def linen(
    module: nn.Module,
    x: Shape,
    loss: Callable[..., ng.Loss] | None = None,
    y: Shape | None = None,
    blocks: dict[str, str] | None = None,
) -> Network:
    """``loss(module(x), y)``; by default the class of each example. What a module changes beside
    its parameters is dropped."""
    variables = jax.eval_shape(module.init, KEY, x.struct)
    params = variables.pop("params")
    loss = loss or (lambda out, y: first_classes(out).nll(y))

    def loss_fn(params: Any, batch: Any) -> ng.Loss:
        rest = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), variables)
        out, _ = module.apply({"params": params, **rest}, batch["x"], mutable=["batch_stats"])
        return loss(out, batch["y"])

    batch = {"x": x.struct, "y": (y or Shape(x.shape[:1], ids=True)).struct}
    layers = find_layers(loss_fn, params, batch, blocks=blocks)
    return Network(Setting(params, layers, loss_fn), batch)


def of_nnx(make: Callable[[nnx.Rngs], nnx.Module], x: Shape) -> Network:
    """The class of each example, by an NNX model."""
    model = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss_fn(model: Any, batch: Any) -> ng.Loss:
        return first_classes(model(batch["x"])).nll(batch["y"])

    batch = {"x": x.struct, "y": Shape(x.shape[:1], ids=True).struct}
    layers = find_layers(loss_fn, model, batch)
    return Network(Setting(params, layers, loss_fn, lambda p: nnx.merge(graph, p, rest)), batch)


# --------------------------------------------------------------------------------- small networks


class Free(nn.Module):
    """A vector and a matrix that belong to no layer."""

    n: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = x * self.param("scale", nn.initializers.ones, (self.n,))
        return x + self.param("grid", nn.initializers.zeros, (2, self.n)).sum(0)


class Heads(nn.Module):
    """A DenseGeneral to two heads and one from them, and each head by itself."""

    n: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.DenseGeneral((2, self.n))(x)
        x = nn.Einsum((2, self.n, self.n), "bthd,hde->bthe")(x)
        return nn.DenseGeneral(self.n, axis=(-2, -1))(x)


class Doubled(nn.Module):
    """A scale alone, so of twice as many units."""

    n: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return nn.RMSNorm()(fit(x, 2 * self.n))


class Grouped(nn.Module):
    """n channels in each of two groups."""

    n: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return nn.Conv(2 * self.n, (3, 3), feature_group_count=2)(fit(x, 2 * self.n))


class Ids(nn.Module):
    """As many ids as channels, whose table is read, and attended to where it is ``tied``."""

    n: int
    tied: bool = False

    @nn.compact
    def __call__(self, ids: Array) -> Array:
        table = nn.Embed(self.n, self.n)
        return table.attend(table(ids)) if self.tied else table(ids)


class Summed(nn.Module):
    """Each of the modules on the same input; the sum of a few of their outputs."""

    make: Callable[[int], Any]
    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        outs = [self.make(n)(x)[..., :CLASSES] for n in self.widths]
        return functools.reduce(jnp.add, outs)


class Thrice(nn.Module):
    """Called several times."""

    n: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shared, norm = nn.Dense(self.n), nn.LayerNorm()
        for _ in range(3):
            x = norm(shared(x))
        return x


class Body(nn.Module):
    """A dense layer, a normalization and a free parameter, in the form that ``nn.scan`` takes."""

    n: int

    @nn.compact
    def __call__(self, x: Array, _: Any = None) -> Any:
        x = nn.LayerNorm()(nn.Dense(self.n)(x))
        return x * self.param("gain", nn.initializers.ones, (self.n,)), None


def scanned(n: int) -> nn.Module:
    body = nn.scan(Body, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
    return Carried(body(n))


def ensemble(n: int) -> nn.Module:
    how = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "axis_size": 2}
    return Carried(nn.vmap(Body, in_axes=None, **how)(n), members=True)


class Carried(nn.Module):
    """What a scan carries, or the mean over an ensemble's members."""

    inner: nn.Module
    members: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x, _ = self.inner(x, None) if not self.members else self.inner(x)
        return x.mean(0) if self.members else x


class LoRA(nnx.Module):
    """Pairs whose inner widths are on both sides too."""

    def __init__(self, widths: tuple[int, ...], rngs: nnx.Rngs):
        make = functools.partial(nnx.LoRALinear, rngs=rngs)
        self.widths = widths
        self.layers = nnx.List([make(n, n, lora_rank=n // 2) for n in widths])

    def __call__(self, x: Array) -> Array:
        for n, layer in zip(self.widths, self.layers, strict=True):
            x = layer(fit(x, n))
        return x


class Mixed(nn.Module):
    """One of every kind at each of a few widths: what pairs of options are tried on."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        n, wide = MAIN[1], MAX_FREE + 1
        x = nn.BatchNorm(use_running_average=False)(nn.Conv(n, (3, 3))(x))
        x = nn.Conv(n, (3, 3), feature_group_count=n)(x)
        x = x.reshape(len(x), -1, n)
        x = nn.LayerNorm()(x + nn.MultiHeadDotProductAttention(1)(x))
        x = nn.Dense(n)(nn.Dense(wide)(x))
        x = x + self.param("shift", nn.initializers.zeros, (n,))
        return nn.RMSNorm()(nn.Dense(RANK, use_bias=False)(x))


VECTOR, SEQUENCE, IMAGE = Shape((32, 8)), Shape((32, 5, 8)), Shape((32, 4, 4, 8))
IDS = Shape((32, 5), ids=True)


class Kind(NamedTuple):
    """``make``: of widths; ``many``: whether there are several layers for each width; ``without``:
    options that make no difference."""

    make: Callable[[tuple[int, ...]], Network]
    many: bool = False
    without: tuple[str, ...] = ()


def tower(make: Callable[[int], Any], x: Shape, *without: str, many: bool = False) -> Kind:
    return Kind(lambda widths: linen(Tower(make, widths), x), many, without)


def tables(make: Callable[[int], Any]) -> Kind:
    return Kind(lambda widths: linen(Summed(make, widths), IDS), without=("convolution",))


dense = tower(lambda n: nn.Dense(n), VECTOR, "convolution", "weight_sharing")
layers = functools.partial(tower, many=True)
norm = lambda make, x: tower(make, x, "convolution", "group_size", "weight_sharing")
KINDS: dict[str, Kind] = {
    "dense": dense,
    "dense on positions, no bias": tower(
        lambda n: nn.Dense(n, use_bias=False), SEQUENCE, "convolution"
    ),
    "dense, loss on positions": Kind(
        lambda widths: linen(
            Tower(lambda n: nn.Dense(n), widths), SEQUENCE, of_positions, Shape((32, 5), ids=True)
        ),
        without=("convolution",),
    ),
    "heads": layers(Heads, SEQUENCE, "convolution"),
    "attention": layers(lambda n: nn.MultiHeadDotProductAttention(1), SEQUENCE, "convolution"),
    "conv 1-d": tower(lambda n: nn.Conv(n, (3,)), SEQUENCE),
    "conv 2-d": tower(lambda n: nn.Conv(n, (3, 3)), IMAGE),
    "conv 3-d": tower(lambda n: nn.Conv(n, (2, 2, 2)), Shape((32, 3, 2, 2, 8))),
    "conv grouped": tower(Grouped, IMAGE),
    "conv depthwise": tower(lambda n: nn.Conv(n, (3, 3), feature_group_count=n), IMAGE),
    "conv transpose": tower(lambda n: nn.ConvTranspose(n, (2, 2)), IMAGE),
    "conv local": tower(lambda n: nn.ConvLocal(n, (2, 2)), Shape((32, 2, 2, 8))),
    "embed": tables(Ids),
    "embed, tied": tables(lambda n: Ids(n, tied=True)),
    "layer norm": norm(lambda n: nn.LayerNorm(), SEQUENCE),
    "rms norm": norm(Doubled, SEQUENCE),
    "group norm": norm(lambda n: nn.GroupNorm(1), IMAGE),
    "batch norm": norm(lambda n: nn.BatchNorm(use_running_average=False), IMAGE),
    "free": norm(Free, VECTOR),
    "LSTM": layers(lambda n: nn.RNN(nn.LSTMCell(n)), SEQUENCE, "convolution"),
    "optimized LSTM": layers(lambda n: nn.RNN(nn.OptimizedLSTMCell(n)), SEQUENCE, "convolution"),
    "called thrice": layers(Thrice, VECTOR, "convolution"),
    "scanned": layers(scanned, SEQUENCE, "convolution"),
    "ensemble": layers(ensemble, SEQUENCE, "convolution"),
    "LoRA": Kind(
        lambda widths: of_nnx(functools.partial(LoRA, widths), SEQUENCE), True, ("convolution",),
    ),
}  # fmt: skip


@functools.cache
def small(kind: str, widths: tuple[int, ...]) -> Network:
    return KINDS[kind].make(widths)


@functools.cache
def mixed() -> Network:
    return linen(Mixed(), IMAGE)


# ------------------------------------------------------------------- what is no width of a layer


class Chosen(nn.Module):
    """A normalization, a free parameter and a dense layer of 16 outputs, each on n channels."""

    n: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.LayerNorm()(x) * self.param("scale", nn.initializers.ones, (self.n,))
        return nn.Dense(16)(x)


def chosen(block: str, parameters: int) -> Network:
    """That block for everything, a dense layer of as many parameters among it."""
    return linen(Tower(Chosen, (parameters // 16 - 1,)), VECTOR, blocks={"*": block})


def batch_of(make: Callable[[int], Any], examples: int, *place: int) -> Network:
    return linen(Tower(make, MAIN), Shape((examples, *place)))


def filling(numbers: int) -> tuple[int, ...]:
    """Around as many examples of so many numbers as one chunk holds."""
    return around(MAX_CHUNK_BYTES // (4 * numbers))


BLOCKS = ("full", "unit", "diagonal", "gradient", "frozen")
EDGES: dict[str, Callable[[], Network]] = {
    f"{n} layers, which take turns": functools.partial(dense.make, (4,) * n) for n in around(PERIOD)
}
EDGES |= {
    f"{n} examples, all or a half": functools.partial(batch_of, lambda n: nn.Dense(n), n, 8)
    for n in around(2 * ENOUGH)
}
EDGES |= {
    f"{n} examples of dense in chunks": functools.partial(batch_of, lambda n: nn.Dense(n), n, 5, 8)
    for n in filling(5 * (MAIN[0] + 1))
}
EDGES |= {
    f"{n} examples of conv in chunks": functools.partial(
        batch_of, lambda n: nn.Conv(n, (3, 3)), n, 4, 4, 8
    )
    for n in filling(16 * (9 * MAIN[0] + 1))
}
EDGES |= {
    f"{block} block, {n} numbers": functools.partial(chosen, block, n)
    for block in BLOCKS
    for n in (2 * RANK, 2 * EIGENVECTORS, MAX_FULL)
}
