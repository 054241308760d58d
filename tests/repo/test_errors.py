"""Bad input, and what the library says about it: what was expected, what came, what to write."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import natgrad_jax as ng

KEY = jax.random.key(0)
X = jnp.asarray(np.random.default_rng(0).normal(size=(8, 4)), jnp.float32)
Y = jnp.asarray(np.arange(8) % 3)
LOGITS = jnp.zeros((8, 3))


class Model(NamedTuple):
    loss_fn: Any
    params: Any
    layers: ng.Layers


@functools.cache
def model(features=3, name="head", x=4) -> Model:
    """One dense layer under a name of its own, or two."""
    module = nn.Sequential([nn.Dense(features)])
    params = {name: jax.jit(module.init)(KEY, jnp.ones((8, x)))["params"]["layers_0"]}

    def loss_fn(params: Any, x: Any, y: Any) -> ng.Loss:
        return ng.Categorical(nn.Dense(features).apply({"params": params[name]}, x)).nll(y)

    return Model(loss_fn, params, ng.find_layers(loss_fn, params, jnp.ones((8, x)), Y))


@functools.cache
def measured(fisher="mc", **kwargs):
    """Gradients and statistics of one model."""
    m = model(**kwargs)
    grad_fn = jax.jit(ng.value_and_grad(m.loss_fn, m.layers, fisher=fisher))
    return grad_fn(m.params, jnp.ones((8, kwargs.get("x", 4))), Y, rng=KEY)[1:]


def find(loss_fn, params, *args):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ng.UncoveredWarning)
        return ng.find_layers(loss_fn, params, *args)


def call(loss_fn=None, layers=None, params=None, args=(X, Y), rng=KEY, opt_state=None, **kwargs):
    """``grad_fn`` of the model, one thing changed."""
    m = model()
    grad_fn = ng.value_and_grad(loss_fn or m.loss_fn, layers or m.layers, **kwargs)
    return grad_fn(m.params if params is None else params, *args, rng=rng, opt_state=opt_state)


def update(grads=None, statistics=None, wrap=lambda tx: tx, **kwargs):
    """One update of ``scale_by_kfac``, one thing changed."""
    m = model()
    tx = wrap(ng.scale_by_kfac(m.layers))
    grads = measured()[0] if grads is None else grads
    statistics = measured()[1] if statistics is None else statistics
    return tx.update(grads, tx.init(m.params), m.params, **{"statistics": statistics, **kwargs})


def bare_scalar(params, x, y):
    return model().loss_fn(params, x, y).value


def pair(params, x, y):
    return model().loss_fn(params, x, y), {"accuracy": 1.0}


def constant_loss(params, x, y):
    """It keeps the scalar and drops the distribution."""
    return ng.Loss((), bare_scalar(params, x, y))


def masked(mask):
    return lambda tx: optax.masked(tx, {"head": mask})


def nnx_loss(model, x, y):
    return ng.Categorical(model(x)).nll(y)


def nnx_model():
    return nnx.Linear(4, 3, rngs=nnx.Rngs(0))


def in_shard_map(axis_name=None):
    """The batch divided over the devices."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    grad_fn = ng.value_and_grad(model().loss_fn, model().layers, axis_name=axis_name)
    mapped = jax.shard_map(
        lambda params, x, y: grad_fn(params, x, y, rng=KEY)[0],
        mesh=mesh,
        in_specs=(P(), P("data"), P("data")),
        out_specs=P(),
        check_vma=True,
    )
    return jax.eval_shape(mapped, model().params, X, Y)


def kfac(**kwargs):
    return ng.kfac(0.1, model().layers, **kwargs)


def scale(**kwargs):
    return ng.scale_by_kfac(model().layers, **kwargs)


class Theirs:
    """A distribution of another library."""

    event_shape = ()

    def __init__(self, loc=LOGITS):
        self.batch_shape = loc.shape

    def log_prob(self, targets):
        return targets

    def __call__(self):
        return self


class Bad(NamedTuple):
    """A call, the exception that it raises, and what the message says."""

    name: str
    call: Callable[[], Any]
    exception: type[Exception]
    message: str


LAYERS = [
    Bad("unknown path", lambda: model().layers[("nope",)], KeyError,
        r"no layer at path \('nope',\).*tuple of str.*\('head',\)"),
    Bad("path as a string", lambda: model().layers["head"], KeyError, "tuple of str"),
    Bad("bare scalar, searching", lambda: find(bare_scalar, model().params, X, Y), TypeError,
        r"must return a natgrad_jax\.Loss; got .*ng\.Categorical\(logits\)\.nll"),
    Bad("no distribution", lambda: find(constant_loss, model().params, X, Y), TypeError,
        "without a distribution"),
    Bad("integer params", lambda: find(lambda p, x: None, {"n": jnp.arange(3)}, X), TypeError,
        "parameter n has dtype int32.*another argument"),
    Bad("key in params", lambda: find(lambda p, x: None, {"k": KEY}, X), TypeError,
        "parameter k has dtype key"),
    Bad("Python float in params", lambda: find(lambda p, x: None, {"w": 1.0}, X), TypeError,
        "parameter w has float; expected a floating-point array"),
    Bad("empty params", lambda: find(lambda p, x: None, {}, X), ValueError, "no parameters"),
    Bad("empty batch", lambda: find(model().loss_fn, model().params, X[:0], Y[:0]), ValueError,
        r"empty batch.*\(0, 3\)"),
    Bad("nnx.State", lambda: find(nnx_loss, nnx.state(nnx_model(), nnx.Param), X, Y), TypeError,
        r"the NNX model itself, got its nnx\.State.*loss_fn\(model, batch\)"),
    Bad("several NNX models in a dict", lambda: find(
        lambda models, x, y: nnx_loss(models["m"], x, y), {"m": nnx_model()}, X, Y), TypeError,
        r"nnx\.Dict|nnx\.Module|one NNX model"),
]  # fmt: skip

DISTRIBUTIONS = [
    Bad("label too large", lambda: ng.Categorical(LOGITS).nll(Y.at[2].set(3)), ValueError,
        r"labels must lie in 0\.\.2.*from 0 to 3.*where="),
    Bad("negative label", lambda: ng.Categorical(LOGITS).nll(Y - 1), ValueError, "from -1 to 1"),
    Bad("label of numpy", lambda: ng.Categorical(LOGITS).nll(np.full(8, 7)), ValueError,
        "from 7 to 7"),
    Bad("too few labels", lambda: ng.Categorical(LOGITS).nll(Y[:7]), ValueError,
        r"take integer targets of shape \(8,\).*got int32 targets of shape \(7,\)"),
    Bad("float labels", lambda: ng.Categorical(LOGITS).nll(Y * 1.0), ValueError,
        r"probabilities of shape \(8, 3\); got float32 targets of shape \(8,\)"),
    Bad("integer one-hot", lambda: ng.Categorical(LOGITS).nll(jnp.zeros((8, 3), int)), ValueError,
        r"probabilities of shape \(8, 3\); got int32"),
    Bad("Bernoulli shape", lambda: ng.Bernoulli(LOGITS).nll(jnp.zeros(8)), ValueError,
        r"the shape of logits, \(8, 3\); got \(8,\)"),
    Bad("Bernoulli above 1", lambda: ng.Bernoulli(LOGITS).nll(LOGITS + 255), ValueError,
        r"lie in \[0, 1\]; got values from 255 to 255.*1/255"),
    Bad("Bernoulli below 0", lambda: ng.Bernoulli(LOGITS).nll(LOGITS - 1), ValueError, "Gaussian"),
    Bad("Bernoulli NaN", lambda: ng.Bernoulli(LOGITS).nll(LOGITS * jnp.nan), ValueError, "nan"),
    Bad("Gaussian shape", lambda: ng.Gaussian(LOGITS).nll(LOGITS[0]), ValueError,
        r"the shape of mean, \(8, 3\); got \(3,\)"),
    Bad("Gaussian variance", lambda: ng.Gaussian(LOGITS, jnp.ones(2)).nll(LOGITS).value, ValueError,
        r"a number or has shape \(3,\) or \(8, 3\); got shape \(2,\)"),
    Bad("covariance as a variance", lambda: ng.Gaussian(LOGITS, jnp.eye(3)).nll(LOGITS), ValueError,
        r"got shape \(3, 3\)\. Write covariance= for a matrix"),
    Bad("covariance as a square batch's variance", lambda: ng.Gaussian(
        jnp.zeros((3, 3)), jnp.eye(3)).nll(jnp.zeros((3, 3))), UserWarning,
        r"the mean's shape, is the variance of each number.*a covariance matrix, write cov"),
    Bad("covariance of another shape", lambda: ng.Gaussian(LOGITS, covariance=jnp.eye(2)).nll(
        LOGITS), ValueError, r"a covariance has shape \(3, 3\) or \(8, 3, 3\); got \(2, 2\)"),
    Bad("variance and covariance", lambda: ng.Gaussian(LOGITS, 1.0, jnp.eye(3)).nll(LOGITS),
        ValueError, "variance= or covariance=, not both"),
    Bad("covariance of single numbers", lambda: ng.Gaussian(
        LOGITS, covariance=jnp.eye(3), event_ndims=0).nll(LOGITS), ValueError,
        "for one event axis; got event_ndims=0"),
    Bad("negative counts", lambda: ng.Poisson(LOGITS).nll(LOGITS - 1), ValueError,
        "counts, 0, 1, 2, …; got values from -1 to -1.*where="),
    Bad("half a count", lambda: ng.NegativeBinomial(LOGITS, 1.0).nll(LOGITS + 0.5), ValueError,
        "from 0.5 to 0.5, not all of them whole"),
    Bad("share of 1", lambda: ng.Beta(LOGITS + 1, 1.0).nll(LOGITS + 1), ValueError,
        r"inside \(0, 1\); got values from 1 to 1.*Bernoulli"),
    Bad("von Mises shape", lambda: ng.VonMises(LOGITS, 1.0).nll(LOGITS[0]), ValueError,
        r"the shape of mean, \(8, 3\)"),
    Bad("one variance of a mixture", lambda: ng.GaussianMixture(LOGITS, LOGITS, 1.0).nll(
        LOGITS[:, 0]), ValueError, r"a last axis.*variance \* jnp\.ones\(K\)"),
    Bad("exact Fisher of a mixture", lambda: ng.fisher(lambda p: ng.GaussianMixture(
        p, p, jnp.ones(3), event_ndims=0).nll(LOGITS[:, 0]), LOGITS), ValueError,
        r'GaussianMixture over \(logits, means\) has no formula here.*fisher="mc"'),
    Bad("exact Fisher of a dispersion", lambda: ng.fisher(lambda p: ng.NegativeBinomial(
        p, jnp.exp(p)).nll(Y[:, None] + 0 * LOGITS), LOGITS), ValueError,
        r"NegativeBinomial over \(log_mean, dispersion\) has no formula"),
    Bad("distribution without a Fisher", lambda: type("Own", (ng.Distribution,), {
        "log_prob": lambda self, y: y}), TypeError,
        r"Own: a distribution defines log_prob\(self, targets\), and sample\(self, key\) or "
        r"fisher\(self\)"),
    Bad("distribution without a likelihood", lambda: type("Own", (ng.Distribution,), {
        "sample": lambda self, key: key}), TypeError, "Own: a distribution defines log_prob"),
    Bad("distribution of another library", lambda: ng.from_distribution(Theirs()), TypeError,
        r"takes what builds the distribution.*got a Theirs\. Write "
        r"ng\.from_distribution\(Theirs, loc=loc"),
    Bad("no outputs", lambda: ng.from_distribution(Theirs), TypeError, "arguments by name"),
    Bad("targets of another library", lambda: ng.from_distribution(Theirs, loc=LOGITS).nll(Y),
        ValueError, r"a Theirs of batch_shape \(8, 3\) and event_shape \(\).*got \(8,\)"),
    Bad("loss without distributions", lambda: ng.loss(0.0), TypeError, "at least one distribution"),
    Bad("loss of logits", lambda: ng.loss(0.0, LOGITS), TypeError,
        r"pass distributions.*ng\.Categorical\(logits\).*or 0\.5 \* ng\.Gaussian"),
    Bad("loss of a penalized loss", lambda: ng.loss(0.0, ng.Gaussian(LOGITS).nll(LOGITS) + 1.0),
        TypeError, "pass distributions.*got Loss"),
    Bad("loss of losses", lambda: ng.loss(LOGITS[:, 0], ng.Gaussian(LOGITS)), TypeError,
        r"cannot add to a Loss an array of shape \(8,\)"),
    Bad("true labels of a loss without", lambda: ng.fisher(lambda p: ng.loss(
        0.0, ng.Gaussian(p)), LOGITS, fisher="empirical", rng=KEY), ValueError,
        r'fisher="empirical" needs the true labels of every term.*"mc" or "exact"'),
    Bad("Gaussian of one axis", lambda: ng.Gaussian(LOGITS[:, 0]).nll(LOGITS[:, 0]), ValueError,
        r"Gaussian\(mean, event_ndims=0\) for 8 examples of one number each, or "
        r"Gaussian\(mean, event_ndims=1\) for one example of 8 numbers, as inside vmap"),
    Bad("Bernoulli of one axis", lambda: jax.eval_shape(
        lambda z: ng.Bernoulli(z).nll(z).value, LOGITS[:, 0]), ValueError,
        r"Bernoulli\(logits, event_ndims=0\) for 8 examples"),
    Bad("column and one axis", lambda: ng.Gaussian(LOGITS[:, :1]).nll(LOGITS[:, 0]),
        ValueError, r"the shape of mean, \(8, 1\); got \(8,\)\. Write targets\[\.\.\., None\]"),
    Bad("more event axes than axes", lambda: ng.Gaussian(LOGITS, event_ndims=3).nll(LOGITS),
        ValueError, r"0 to 2 for shape \(8, 3\); got 3"),
    Bad("event axes as a bool", lambda: ng.Gaussian(LOGITS, event_ndims=True).nll(LOGITS),
        ValueError, "got True"),
    Bad("variances of single numbers", lambda: ng.Gaussian(
        LOGITS[0], LOGITS, event_ndims=0).nll(LOGITS[0]).value, ValueError,
        r"a number or has shape \(3,\) or \(3,\); got shape \(8, 3\)"),
    Bad("negative weights", lambda: ng.Gaussian(LOGITS).nll(LOGITS, weights=-jnp.ones(8)),
        ValueError, "weights must not be negative.*from -1 to -1.*where=mask.*no Fisher"),
    Bad("NaN weights", lambda: ng.Gaussian(LOGITS).nll(LOGITS, weights=jnp.nan), ValueError,
        "weights must not be negative"),
    Bad("negative mask", lambda: ng.Gaussian(LOGITS).nll(LOGITS, where=LOGITS[:, 0] - 1),
        ValueError, "where must not be negative"),
    Bad("weights of an empty batch", lambda: ng.Gaussian(LOGITS[:0]).nll(
        LOGITS[:0], weights=LOGITS[:0, 0]), ValueError, "empty batch"),
    Bad("weights of another shape", lambda: ng.Gaussian(LOGITS).nll(LOGITS, weights=jnp.ones(7)),
        ValueError, r"weights.*\(8,\).*\(7,\)"),
    Bad("mask of outputs", lambda: ng.Gaussian(LOGITS).nll(LOGITS, where=LOGITS > 0), ValueError,
        r"where.*\(8,\).*\(8, 3\).*where\.any\(-1\).*"
        r"ng\.Gaussian\(mean, event_ndims=0\)\.nll\(targets, where=where\)"),
    Bad("weights of outputs", lambda: ng.Bernoulli(LOGITS).nll(LOGITS, weights=LOGITS), ValueError,
        r"weights\.mean\(-1\).*ng\.Bernoulli\(logits, event_ndims=0\)\.nll\(targets, weights=w"),
    Bad("mask of classes", lambda: ng.Categorical(LOGITS).nll(Y, where=LOGITS > 0), ValueError,
        r"such as where\.any\(-1\)\.$"),
    Bad("mask with an axis too many", lambda: ng.Gaussian(LOGITS).nll(
        LOGITS, where=LOGITS[None] > 0), ValueError, r"got \(1, 8, 3\)\.$"),
    Bad("empty batch", lambda: ng.Categorical(LOGITS[:0]).nll(Y[:0]), ValueError,
        "empty batch.*before the loss"),
    Bad("product of losses", lambda: ng.Gaussian(LOGITS).nll(LOGITS)
        * ng.Gaussian(LOGITS).nll(LOGITS), TypeError, "multiply a Loss by a Loss"),
    Bad("float of a loss", lambda: float(ng.Categorical(LOGITS).nll(Y)), TypeError,
        r"float\(loss\.value\)"),
    Bad("loss in a format", lambda: f"{ng.Categorical(LOGITS).nll(Y):.3f}", TypeError,
        r"float\(loss\.value\)"),
    Bad("gradient of a loss", lambda: jax.grad(lambda z: ng.Categorical(z).nll(Y) + 1.0)(LOGITS),
        TypeError, r"Output was Loss\(Categorical nll of logits \(8, 3\) \+ scalar\): "
        r"differentiate it with ng\.value_and_grad\(loss_fn, layers\), or loss\.value"),
    Bad("sum with a vector", lambda: ng.Gaussian(LOGITS).nll(LOGITS) + jnp.ones(3), TypeError,
        r"multiplied by scalars.*shape \(3,\)"),
]  # fmt: skip

STATISTICS = [
    Bad("bogus fisher", lambda: call(fisher="bogus"), ValueError,
        "'mc', 'exact', 'empirical', 'none'; got 'bogus'"),
    Bad("no samples", lambda: call(samples=0), ValueError, "at least 1; got 0"),
    Bad("half a sample", lambda: call(samples=1.5), ValueError, "whole number.*1.5"),
    Bad("missing rng", lambda: call(rng=None), ValueError, r"rng=key"),
    Bad("bare scalar", lambda: call(bare_scalar), TypeError, r"must return a natgrad_jax\.Loss"),
    Bad("rng as a seed", lambda: call(rng=0), TypeError, r"jax\.random\.key\(0\).*got 0"),
    Bad("several keys", lambda: call(rng=jax.random.split(KEY)), TypeError,
        r"one key.*got an array of key<fry>, shape \(2,\)"),
    Bad("rng as an array", lambda: call(rng=jnp.zeros(2)), TypeError, "array of float32"),
    Bad("rng of accumulate as a seed", lambda: ng.accumulate(model().loss_fn, model().layers)(
        model().params, X[None], Y[None], rng=np.uint32(0)), TypeError, "one key"),
    Bad("rng of fisher as a seed", lambda: ng.fisher(
        model().loss_fn, model().params, X, Y, fisher="mc", rng=0), TypeError, "got 0"),
    Bad("aux not announced", lambda: call(pair), TypeError, r"Pass has_aux=True"),
    Bad("aux not given", lambda: call(has_aux=True), TypeError, "Drop has_aux, or"),
    Bad("label out of range", lambda: call(args=(X, Y + 1)), ValueError, r"lie in 0\.\.2"),
    Bad("empty batch", lambda: call(args=(X[:0], Y[:0])), ValueError, "empty batch"),
    Bad("layers of another model", lambda: call(layers=model(name="other").layers), ValueError,
        r"found on another model.*other/kernel.*no such parameter.*find_layers again"),
    Bad("layers of another size", lambda: call(layers=model(5).layers), ValueError,
        r"head/\w+ of shape \(.*5.*\), params has shape"),
    Bad("params instead of layers", lambda: call(layers=model().params), TypeError, "find_layers"),
    Bad("arguments swapped", lambda: ng.value_and_grad(model().layers, model().loss_fn), TypeError,
        "find_layers"),
    Bad("state of another optimizer", lambda: call(opt_state=optax.adam(1.0).init(model().params)),
        ValueError, "opt_state holds no natgrad_jax transformation.*scale_by_kfac"),
    Bad("nnx.State", lambda: call(params=nnx.state(nnx_model(), nnx.Param)), TypeError,
        "NNX model itself"),
    Bad("no axis_name in shard_map", in_shard_map, ValueError,
        "varies over the mesh axis 'data'.*pass axis_name='data'"),
]  # fmt: skip

TRANSFORMATIONS = [
    Bad("model instead of layers", lambda: ng.scale_by_kfac(nn.Dense(3)), TypeError,
        r"find_layers\(loss_fn, params, batch\).*got Dense"),
    Bad("params instead of layers", lambda: ng.kfac(0.1, model().params), TypeError, "got dict"),
    Bad("arguments swapped", lambda: ng.kfac(model().layers, 0.1), TypeError,
        r"kfac\(learning_rate, layers\)"),
    Bad("no damping", lambda: scale(damping=0), ValueError, "damping must be positive; got 0"),
    Bad("negative damping", lambda: kfac(damping=-1e-3), ValueError, "damping must be positive"),
    Bad("negative damping, an array", lambda: scale(damping=jnp.asarray(-1.0)), ValueError,
        "damping must be positive"),
    Bad("NaN damping", lambda: scale(damping=float("nan")), ValueError, "damping must be positive"),
    Bad("damping for each layer", lambda: scale(damping=jnp.ones(2)), ValueError, "damping"),
    Bad("damping as a word", lambda: scale(damping="auto"), (TypeError, ValueError), "damping"),
    Bad("no damping at all", lambda: scale(damping=None), (TypeError, ValueError), "damping"),
    Bad("period 0", lambda: scale(statistics_period=0), ValueError,
        "statistics_period counts optimizer steps.*got 0.*statistics_period=1"),
    Bad("period 2.5", lambda: kfac(refresh_period=2.5), ValueError,
        "refresh_period counts optimizer steps.*got 2.5"),
    Bad("infinite period", lambda: kfac(refresh_period=float("inf")), ValueError, "refresh_period"),
    Bad("decay 1", lambda: scale(decay=1.0), ValueError, r"decay must lie in \[0, 1\); got 1.0"),
    Bad("negative decay", lambda: kfac(decay=-0.1), ValueError, "decay must lie in"),
    Bad("trust radius 0", lambda: scale(trust_radius=0), ValueError, "trust_radius must be posi"),
    Bad("step 0 is early", lambda: ng.staggered(early=[0]), ValueError, "whole numbers from 1 on"),
    Bad("no trust per example", lambda: ng.PerExample(0.0), ValueError, "rate must be positive"),
    Bad("no decay", lambda: ng.PerExample(decay_steps=-1), ValueError, "decay_steps must be pos"),
    Bad("no warm-up", lambda: ng.PerExample(warmup_steps=0), ValueError, "warmup_steps must be"),
    Bad("negative trust radius", lambda: kfac(trust_radius=-1), ValueError, "trust_radius must be"),
    Bad("negative learning rate", lambda: ng.kfac(-0.1, model().layers), ValueError,
        "learning_rate must be positive"),
    Bad("missing statistics", lambda: ng.scale_by_kfac(model().layers).update(
        measured()[0], ng.scale_by_kfac(model().layers).init(model().params)), ValueError,
        r"tx\.update\(grads, opt_state, params, statistics=statistics\)"),
    Bad("something else as statistics", lambda: update(statistics={"head": 1.0}), TypeError,
        "what ng.value_and_grad returns as its third result; got dict"),
    Bad("statistics of other layers", lambda: update(statistics=measured(name="other")[1]),
        ValueError, "different Layers: head, other"),
    Bad("statistics of another size", lambda: update(statistics=measured(x=6)[1]), ValueError,
        r"A of shape \(7, 7\), these Layers need \(5, 5\)"),
    Bad("statistics of another width", lambda: update(statistics=measured(features=5)[1]),
        ValueError, r"G of shape \(5, 5\), these Layers need \(3, 3\)"),
    Bad("inputs alone", lambda: update(statistics=measured("none")[1]), ValueError,
        r'value_and_grad\(fisher="none"\).*"mc"'),
    Bad("gradients of another model", lambda: update(grads=measured(name="other")[0]), ValueError,
        r"the gradients have other/\w+ of shape.*no such parameter.*find_layers again"),
    Bad("gradients of another size", lambda: update(grads=measured(x=6)[0]), ValueError,
        r"head/kernel of shape \(6, 3\); these Layers have shape \(4, 3\)"),
    Bad("layer masked in part", lambda: update(wrap=masked({"kernel": True, "bias": False})),
        ValueError, "layer head is masked in part: head/bias is missing"),
    Bad("everything masked", lambda: update(wrap=masked(False)), ValueError, "masked out"),
]  # fmt: skip

READERS = [
    Bad(f"{reader.__name__} of another optimizer",
        lambda reader=reader: reader(optax.adam(1.0).init(model().params)), ValueError,
        f"holds no natgrad_jax state with {reader.__name__}.*scale_by_kfac")
    for reader in (ng.factors, ng.bases, ng.damping)
] + [
    Bad("damping of two", lambda: ng.damping(
        optax.chain(scale(), scale()).init(model().params)), ValueError, "2 transformations"),
]  # fmt: skip

BAD = LAYERS + DISTRIBUTIONS + STATISTICS + TRANSFORMATIONS + READERS
GROUPS = {"layers": LAYERS, "distributions": DISTRIBUTIONS, "statistics": STATISTICS,
          "transformations": TRANSFORMATIONS, "readers": READERS}  # fmt: skip


@pytest.mark.parametrize(
    "bad", BAD, ids=[f"{group}: {bad.name}" for group, rows in GROUPS.items() for bad in rows]
)
def test_bad_input_is_told(bad):
    with pytest.raises(bad.exception, match=f"(?s){bad.message}"):
        bad.call()


def test_the_good_calls_of_this_file_pass():
    """Each error above comes from what was changed."""
    assert np.isfinite(call()[0])
    assert np.isfinite(call(rng=jax.random.PRNGKey(0))[0])
    assert np.isfinite(call(pair, has_aux=True)[0][0])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(update()[0]))
    assert in_shard_map("data").shape == ()
    assert len(find(nnx_loss, nnx_model(), X, Y)) == 1


def test_out_of_range_labels_under_jit_cannot_be_seen():
    """Traced labels have no values; the check is for concrete ones alone."""
    assert jax.eval_shape(lambda y: ng.Categorical(LOGITS).nll(y).value, Y + 9).shape == ()


def test_a_penalty_may_map_params_with_another_tree():
    """loss_fn sees its own params and nothing else."""
    scales = jax.tree.map(lambda x: 0.1, model().params)

    def penalized(params, x, y):
        squares = jax.tree.map(lambda p, s: s * jnp.sum(p**2), params, scales)
        return model().loss_fn(params, x, y) + sum(jax.tree.leaves(squares))

    layers = find(penalized, model().params, X, Y)
    _, grads, _ = ng.value_and_grad(penalized, layers)(model().params, X, Y, rng=jax.random.key(0))
    wanted = jax.grad(lambda params: penalized(params, X, Y).value)(model().params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), grads, wanted)
