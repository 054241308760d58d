"""A case of the table as a network of one layer, for brute force: what to train and on what."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from cases import Case
from flax import nnx

import natgrad_jax as ng
from natgrad_jax.utils.tree_paths import leaves

EXAMPLES = 4
DISTRIBUTIONS = {
    "categorical": lambda z: ng.Categorical(z),
    "bernoulli": lambda z: ng.Bernoulli(z),
    "gaussian": lambda z: ng.Gaussian(
        z, covariance=np.array([[0.5, 0.1, 0], [0.1, 1.0, 0.2], [0, 0.2, 2.0]])
    ),
}


class Setup(NamedTuple):
    """A network of one layer under a fixed readout, and everything brute force needs."""

    loss_fn: Any
    params: Any  # the tree, or the NNX model
    tree: Any  # {"kernel": …, "bias": …}
    output: Any  # (tree, x) → s
    natural: Any  # s → natural output of the distribution
    batch: Any


def build(case: Case, framework: str, distribution: str, dtype: Any) -> Setup:
    # NumPy's randomness: compiling JAX's for every shape would take most of the suite's time
    random = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(random.normal(size=shape), dtype)
    x = normal(EXAMPLES, *case.shape)
    if case.ids:
        x = jnp.asarray(random.integers(case.ids, size=(EXAMPLES, *case.shape)))
    if framework == "linen":
        module = case.linen()
        shapes = dict(jax.eval_shape(module.init, jax.random.key(0), x))
        abstract = shapes.pop("params")
        state = jax.tree.map(lambda v: jnp.full(v.shape, 0.7, dtype), shapes)
        output = lambda tree, x: module.apply({"params": tree, **state}, x)
    else:
        model = nnx.eval_shape(lambda: case.nnx(nnx.Rngs(0)))
        abstract = {path[-1]: v for path, v in leaves(nnx.state(model, nnx.Param)).items()}

        def output(tree: Any, x: jax.Array) -> jax.Array:
            return with_parameters(model, tree)(x)

    tree = {k: normal(*v.shape) / np.sqrt(v.shape[0]) for k, v in abstract.items()}
    s = jax.eval_shape(output, tree, x).shape
    lead = s[:-1] if case.tokens else s[:1]
    readout = normal(int(np.prod(s[len(lead) :])), 3)
    natural = lambda s: jnp.tanh(s).reshape(*s.shape[: len(lead)], -1) @ readout
    make = DISTRIBUTIONS[distribution]
    categorical = distribution == "categorical"
    y = jnp.asarray(random.integers(3, size=lead) if categorical else random.random((*lead, 3)))
    if framework == "linen":
        loss_fn = lambda tree, b: make(natural(output(tree, b[0]))).nll(b[1])
        return Setup(loss_fn, tree, tree, output, natural, (x, y))
    loss_fn = lambda model, b: make(natural(model(b[0]))).nll(b[1])
    return Setup(loss_fn, with_parameters(model, tree), tree, output, natural, (x, y))


def with_parameters(model: nnx.Module, tree: Any) -> nnx.Module:
    copy = nnx.clone(model)
    for name, value in tree.items():
        setattr(copy, name, nnx.Param(value))
    for name, variable in vars(model).items():
        if isinstance(variable, nnx.BatchStat):
            setattr(copy, name, nnx.BatchStat(jnp.full(variable.shape, 0.7, variable.dtype)))
    return copy


def fresh(params: Any) -> Any:
    """An NNX model of this trace: its batch statistics are updated in place."""
    return nnx.clone(params) if isinstance(params, nnx.Module) else params
