"""The table of transformations: one row each, on one small net.

A row grows the conformance suite and the table of faults; it is never copied. ``given`` are the
keyword arguments of the public function on a :class:`Setting`.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import natgrad_jax as ng
from natgrad_jax.state.walk import states

EXAMPLES, INPUTS, CLASSES = 8, 4, 3


class OwnNorm(nn.LayerNorm):
    """Of no type that the library knows: its parameters are left over."""


class Net(nn.Module):
    """A leftover parameter and ``depth`` dense layers."""

    depth: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.depth - 1):
            x = nn.tanh(nn.Dense(5, name=f"hidden_{i}")(x))
        x = OwnNorm(use_bias=False, name="norm")(x)
        return nn.Dense(CLASSES, name="head")(x)


class OwnNormNNX(nnx.LayerNorm):
    """The same in NNX."""


class NetNNX(nnx.Module):
    """The same in NNX, of depth 1, at parameters of the Linen net's."""

    def __init__(self, params: Any):
        self.norm = OwnNormNNX(INPUTS, use_bias=False, rngs=nnx.Rngs(0))
        self.head = nnx.Linear(INPUTS, CLASSES, rngs=nnx.Rngs(0))
        nnx.update(self, fresh(params))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(self.norm(x))


class Batch(NamedTuple):
    """``y``: probabilities of the classes; ``weights``: how much examples count."""

    x: jax.Array
    y: jax.Array
    weights: jax.Array


def batch(seed: int = 0, n: int = EXAMPLES) -> Batch:
    random = np.random.default_rng(seed)
    x = jnp.asarray(random.normal(size=(n, INPUTS)), jnp.float32)
    y = jnp.asarray(np.eye(CLASSES)[random.integers(CLASSES, size=n)], jnp.float32)
    return Batch(x, y, jnp.ones(n))


class Setting(NamedTuple):
    """``model`` makes of the parameters what ``loss_fn`` takes: of an NNX state its model."""

    params: Any
    layers: ng.Layers
    loss_fn: Any
    model: Callable[[Any], Any] = lambda params: params


def setting(dtype: Any = jnp.float32, depth: int = 1) -> Setting:
    net = Net(depth)

    def loss_fn(params: Any, batch: Batch) -> ng.Loss:
        x = batch.x.astype(params["norm"]["scale"].dtype)  # half precision throughout
        logits = net.apply({"params": params}, x)
        return ng.Categorical(logits).nll(batch.y, weights=batch.weights)

    shapes = jax.eval_shape(net.init, jax.random.key(0), batch().x)["params"]
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda s: jnp.asarray(random.normal(size=s.shape) / 2, dtype), shapes)
    return Setting(params, find_layers(loss_fn, params, batch(), blocks=LEFT), loss_fn)


def setting_nnx() -> Setting:
    """The setting whose parameters are a model."""

    def loss_fn(model: NetNNX, batch: Batch) -> ng.Loss:
        return ng.Categorical(model(batch.x)).nll(batch.y, weights=batch.weights)

    model = NetNNX(setting().params)
    return Setting(model, find_layers(loss_fn, model, batch(), blocks=LEFT), loss_fn)


# a norm with the diagonal alone
LEFT = {"norm": "diagonal"}


def find_layers(*args: Any, **kwargs: Any) -> ng.Layers:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ng.UncoveredWarning)
        return ng.find_layers(*args, **kwargs)


class Row(NamedTuple):
    """``static``: arguments that are no hyperparameters. ``whole``: it calls ``loss_fn``, so that
    it needs all of the parameters. ``base``: its program is run in every circumstance; the others
    differ from a base row by an option."""

    factory: Callable[..., optax.GradientTransformation]
    given: Callable[[Setting], dict[str, Any]]
    static: tuple[str, ...] = ()
    whole: bool = False
    base: bool = True

    def make(self, s: Setting) -> optax.GradientTransformationExtraArgs:
        return optax.with_extra_args_support(self.factory(**self.given(s)))


def _layers(factory: Any, base: bool = False, static: tuple[str, ...] = (), **kwargs: Any) -> Row:
    return Row(factory, lambda s: {"layers": s.layers, **kwargs}, static, base=base)


def _damped(s: Setting, alias: Any, rate: float) -> Any:
    return lambda damping: alias(rate, s.layers, damping=damping)


def falling(value: float) -> Callable[[Any], Any]:
    return lambda step: value * 0.5**step


def changing(step: Any) -> Any:
    """A period that is a schedule."""
    return jnp.where(step < 2, 1, 2)


TABLE = {
    "scale_by_kfac": _layers(ng.scale_by_kfac, base=True),
    "kfac": _layers(ng.kfac, base=True, learning_rate=0.1),
    "kfac, weight decay, reduce, groups": _layers(
        ng.kfac, learning_rate=0.1, weight_decay=1e-3, 
        approximation=ng.Approximation(group_size=2, weight_sharing="reduce"),
    ),
    "kfac, schedules": _layers(
        ng.kfac, learning_rate=falling(0.1), damping=falling(0.1), decay=falling(0.9),
        statistics_period=changing, refresh_period=changing, trust_radius=falling(1e-2),
    ),
    "kfac, eigh": _layers(ng.kfac, learning_rate=0.1, inverse="eigh"),
    "kfac, Newton-Schulz, bfloat16 factors": _layers(
        ng.kfac, learning_rate=0.1, inverse="newton_schulz", factor_dtype=jnp.bfloat16,
        static=("factor_dtype",),
    ),
    "kfac, low rank, spread, a half": _layers(
        ng.kfac, learning_rate=0.1, inverse=ng.LowRank(1), statistics_fraction=0.5,
        refresh=ng.staggered(2), static=("statistics_fraction",),
    ),
    "kfac, woodbury": _layers(
        ng.kfac, learning_rate=0.1, inverse=ng.Woodbury(2), statistics_period=1,
    ),
    "scale_by_ekfac": _layers(ng.scale_by_ekfac, base=True),
    "ekfac": _layers(ng.ekfac, base=True, learning_rate=0.1),
    "ekfac, running average, qr, schedules": _layers(
        ng.ekfac, learning_rate=falling(0.1), damping=falling(0.1), decay=falling(0.9), basis="qr",
        approximation=ng.Approximation(group_size=3), moments="running_average",
        refresh_period=changing,
    ),
    "ekfac, low rank, spread, a half": _layers(
        ng.ekfac, learning_rate=0.1, basis=ng.LowRank(1), statistics_period=1,
        statistics_fraction=0.5, refresh=ng.staggered(2), static=("statistics_fraction",),
    ),
    "ekfac, low rank, running average, weight decay, reduce": _layers(
        ng.ekfac, learning_rate=0.1, basis=ng.LowRank(1), moments="running_average",
        weight_decay=1e-3, refresh_period=1,
        approximation=ng.Approximation(weight_sharing="reduce"),
    ),
    "ekfac, tolerance, a half": _layers(
        ng.ekfac, learning_rate=0.1, basis=ng.Eigenbasis(tolerance=0.1), statistics_fraction=0.5,
        refresh_period=1,
        static=("statistics_fraction",),
    ),
    "ngd": _layers(ng.ngd, base=True, learning_rate=0.5),
    "ngd, Moore-Penrose": _layers(ng.ngd, learning_rate=0.5, inverse="eigh", damping=0.0),
    "prong": _layers(ng.prong, base=True, learning_rate=0.1),
    "prong, samples": _layers(ng.prong, learning_rate=0.1, samples=20, refresh_period=2),
    "prong, plus": _layers(ng.prong, base=True, learning_rate=0.1, plus=True),
    "prong, plus, rank, reset, schedules": _layers(
        ng.prong, learning_rate=falling(0.1), plus=True, rank=1, epsilon=falling(0.1),
        refresh_period=changing, on_refresh="reset", static=("rank",),
    ),
    **{
        f"in_coordinates, {coordinates}": _layers(
            # an eps that float16 holds, and that a vanishing gradient does not outgrow
            ng.in_coordinates, base=coordinates != "whitening", inner=optax.adam(0.1, eps=1e-3),
            coordinates=coordinates, refresh_period=2,
        )
        for coordinates in ("whitening", "whitening_plus", "both_sides", "eigenbasis", "identity")
    },
    # a gradient's null space has any basis: what is compared is of low rank
    "scale_by_soap": Row(
        ng.scale_by_soap, lambda s: {"eps": 1e-2, "basis": ng.LowRank(2)}, ("max_size",)
    ),
    "scale_by_soap, whole bases": Row(
        ng.scale_by_soap, lambda s: {"b1": 0.9}, ("max_size",), base=False
    ),
    "soap, low rank, schedules, weight decay": Row(
        ng.soap,
        lambda s: {"learning_rate": falling(0.01), "b1": falling(0.9), "b2": falling(0.9),
                   "weight_decay": 1e-2, "basis": ng.LowRank(2), "refresh": "every"},
        ("max_size",),
    ),
    "scale_by_shampoo": Row(
        ng.scale_by_shampoo, lambda s: {"graft": optax.identity()}, ("max_size", "graft")
    ),
    "shampoo": Row(ng.shampoo, lambda s: {"learning_rate": 0.01}, ("max_size",)),
    "scale_by_exact_ngd": Row(ng.scale_by_exact_ngd, lambda s: {"damping": 1e-2}),
    "exact_ngd": Row(
        ng.exact_ngd, lambda s: {"learning_rate": 0.1, "damping": 1e-2, "momentum": 0.5}
    ),
    "exact_ngd, schedules, weight decay": Row(
        ng.exact_ngd,
        lambda s: {"learning_rate": falling(0.1), "damping": falling(0.1), "weight_decay": 1e-3,
                   "momentum": falling(0.9), "trust_radius": falling(1e-2)},
        base=False,
    ),
    "adaptive_kfac": Row(
        ng.adaptive_kfac, lambda s: {"layers": s.layers, "loss_fn": s.loss_fn}, ("loss_fn",), True
    ),
    "adaptive_damping": Row(
        ng.adaptive_damping,
        lambda s: {"make": _damped(s, ng.ekfac, 0.1), "rule": ng.levenberg_marquardt(period=2),
                   "loss_fn": s.loss_fn},
        ("make", "loss_fn"), True,
    ),
    "adaptive_damping, Bernacchia": Row(
        ng.adaptive_damping,
        lambda s: {"make": _damped(s, ng.ngd, 1.0), "rule": ng.bernacchia(1.0),
                   "loss_fn": s.loss_fn},
        ("make", "loss_fn"), True, base=False,
    ),
    "scale_by_quadratic_model": Row(
        ng.scale_by_quadratic_model, lambda s: {"loss_fn": s.loss_fn}, ("loss_fn",), True
    ),
    "clip_by_trust_radius": Row(
        ng.clip_by_trust_radius, lambda s: {"trust_radius": 1e-2, "loss_fn": s.loss_fn},
        ("loss_fn",), True,
    ),
}  # fmt: skip

BASE = {name: row for name, row in TABLE.items() if row.base}


class Poison(NamedTuple):
    """What a step adds to one number of the gradients, and of each kind of statistics."""

    grads: Any = 0.0
    A: Any = 0.0
    G: Any = 0.0
    leftover: Any = 0.0
    moments: Any = 0.0

    def into(self, grads: Any, statistics: Any) -> tuple[Any, Any]:
        def add(x: Any, y: Any) -> Any:
            if x is None or not x.size:
                return x
            return x.at[(0,) * x.ndim].add(jnp.asarray(y, x.dtype))

        if isinstance(statistics, ng.Rows):
            rows = {path: add(x, self.A) for path, x in statistics.J.items()}
            residual = add(statistics.residual, self.G)
            return jax.tree.map(lambda g: add(g, self.grads), grads), statistics._replace(
                J=rows, residual=residual
            )
        sums = {path: s._replace(A=add(s.A, self.A), G=add(s.G, self.G))
                for path, s in statistics.layers.items()}  # fmt: skip
        every = lambda tree, y: None if tree is None else {k: add(x, y) for k, x in tree.items()}
        return jax.tree.map(lambda g: add(g, self.grads), grads), statistics._replace(
            sums={**statistics.sums, "expand": sums},
            leftover=every(statistics.leftover, self.leftover),
            moments=every(statistics.moments, self.moments),
        )


def fresh(tree: Any) -> Any:
    """A copy that may be donated."""
    return jax.tree.map(jnp.copy, tree)


def stepper(tx: Any, s: Setting) -> Callable[..., Any]:
    """The step that users write, with every extra argument; and a poison, if one is given."""

    def step(params: Any, state: Any, batch: Batch, key: Any, poison: Poison | None = None) -> Any:
        grad_fn = ng.value_and_grad(s.loss_fn, layers_for(state, s))
        model = s.model(params)
        split = {"split": nnx.split(model)} if isinstance(model, nnx.Module) else {}
        loss, grads, statistics = grad_fn(model, batch, rng=key, opt_state=asks(state))
        if poison is not None:
            grads, statistics = poison.into(grads, statistics)
        updates, state = tx.update(
            grads, state, params, statistics=statistics, value=loss, grad=grads, args=(batch,),
            value_fn=lambda model: s.loss_fn(model, batch).value, **split,
        )  # fmt: skip
        return optax.apply_updates(params, updates), state, updates, loss

    return step


def layers_for(state: Any, s: Setting) -> ng.Layers | None:
    """The layers, but for what needs none."""
    alone = any(isinstance(x, ng.ExactNGDState) for x in states(state))
    return None if alone else s.layers


def asks(state: Any) -> Any:
    """The state, where it says what to measure: what needs no statistics has no clock."""
    return state if states(state) else None


class Jitted:
    """``fun``, compiled; ``traces`` counts how often it was traced. (What JAX counts itself it
    forgets where many functions are alive.)"""

    def __init__(self, fun: Callable[..., Any], **options: Any) -> None:
        self.traces = 0

        def counted(*args: Any) -> Any:
            self.traces += 1
            return fun(*args)

        self.jitted = jax.jit(counted, **options)

    def __call__(self, *args: Any) -> Any:
        return self.jitted(*args)


@functools.cache
def compiled(name: str, depth: int = 1) -> tuple[Any, Any, Any]:
    """The setting, the state before the first step and the compiled step of a row."""
    s = setting(depth=depth)
    tx = TABLE[name].make(s)
    return s, tx.init(s.params), Jitted(stepper(tx, s))


def finite(tree: Any) -> bool:
    """Whether every number is; the damping's history is NaN where it has not come to yet."""
    return all(bool(np.isfinite(x).all()) for x in jax.tree.leaves(_without_history(tree)))


def _without_history(tree: Any) -> Any:
    is_damped = lambda x: isinstance(x, ng.AdaptiveDampingState)
    drop = lambda x: (
        x._replace(history=jnp.nan_to_num(x.history, posinf=jnp.inf)) if is_damped(x) else x
    )
    return jax.tree.map(drop, tree, is_leaf=is_damped)


def signature(tree: Any) -> Any:
    return jax.tree.structure(tree), [
        (x.shape, x.dtype, getattr(x, "weak_type", False)) for x in jax.tree.leaves(tree)
    ]


def assert_types_stay(tx: Any, s: Setting, own: Any = None) -> Any:
    """After a step the state is of the types of before, and updates of the parameters'.

    Returns the types of the state."""
    own = batch() if own is None else own
    state = jax.eval_shape(tx.init, s.params)
    params, later, updates, _ = jax.eval_shape(
        stepper(tx, s), s.params, state, own, jax.random.key(0)
    )
    assert signature(later) == signature(state)
    assert signature(updates) == signature(params) == signature(s.params)
    return later


def run_steps(tx: Any, s: Setting, batches: list[Batch]) -> Any:
    """Parameters, state and updates after a step on each, in one compiled program."""
    params, state, updates = s.params, tx.init(s.params), None
    step = Jitted(stepper(tx, s))
    for i, own in enumerate(batches):
        params, state, updates, _ = step(params, state, own, jax.random.key(i))
        assert finite((params, state, updates))
    assert step.traces == 1
    return params, state, updates
