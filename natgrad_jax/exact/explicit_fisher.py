"""The Fisher of a small model as a matrix, and its diagonal: references for approximations.

All use J, the Jacobian of the network's outputs for the whole batch. Operations that couple
examples (batch statistics) therefore act as in training.
"""

from collections.abc import Callable
from functools import partial, reduce
from typing import Any, overload

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from natgrad_jax.exact.matvec import Model, model_of
from natgrad_jax.layers.collection import Layers, check_layers
from natgrad_jax.layers.layer import Parameter
from natgrad_jax.losses import output_cotangents
from natgrad_jax.losses.distribution_base import Outputs
from natgrad_jax.losses.terms import Loss, LossFn, Term, positive
from natgrad_jax.utils import tree_paths
from natgrad_jax.utils.precision import HIGHEST, at_least_float32
from natgrad_jax.utils.tree_paths import Path

MAX_PARAMETERS = 20_000  # a matrix of 1.6 GB in float32

# Passes for one term of the loss: their number, the cotangents of pass i, and the term's index.
_Passes = tuple[int, Callable[[Int[Array, ""]], output_cotangents.Cotangents], int]


@overload
def fisher(
    loss_fn: LossFn,
    params: PyTree,
    *args: Any,
    fisher: str = "exact",
    rng: PRNGKeyArray | None = None,
    samples: int = 1,
    layers: None = None,
) -> Float[Array, "P P"]: ...
@overload
def fisher(
    loss_fn: LossFn,
    params: PyTree,
    *args: Any,
    fisher: str = "exact",
    rng: PRNGKeyArray | None = None,
    samples: int = 1,
    layers: Layers,
) -> dict[Path, Float[Array, "P P"]]: ...
def fisher(
    loss_fn: LossFn,
    params: PyTree,
    *args: Any,
    fisher: str = "exact",
    rng: PRNGKeyArray | None = None,
    samples: int = 1,
    layers: Layers | None = None,
) -> Float[Array, "P P"] | dict[Path, Float[Array, "P P"]]:
    """The Fisher information of a small model, as an explicit matrix.

    ``F = (1/N) Σₙ vₙ vₙᵀ`` over examples and their labels, where ``vₙ = ∇ −log p`` is the gradient
    of one example. The labels are all labels (``"exact"``: ``F = Σₙ Jₙᵀ Hₙ Jₙ / N``), labels
    sampled from the model (``"mc"``: the same as :func:`natgrad_jax.value_and_grad` samples with
    this ``rng``), or the true labels (``"empirical"``). The last two expect examples on the leading
    axis of the network's output.

    Args:
      loss_fn, params, *args: as for :func:`natgrad_jax.find_layers`.
      fisher: ``"exact"``, ``"mc"`` or ``"empirical"``.
      rng: a key, required for ``"mc"``.
      samples: the number of labels sampled for each example, for ``"mc"``.
      layers: compute the blocks of these layers instead of the whole matrix.

    Returns:
      ``(P, P)`` over the P parameters, in the order of ``jax.flatten_util.ravel_pytree(params)``.
      With ``layers`` a dict from each layer's path, and each leftover parameter's path, to its
      block, over the parameters of the layer in their order, each raveled.

    Raises:
      ValueError: an unknown ``fisher``, a missing ``rng``, fewer than one sample, layers of another
        model, or too many parameters for an explicit matrix.

    Source: Martens & Grosse 2015, section 2; Martens 2020, sections 8 and 9.

    >>> import jax.numpy as jnp, natgrad_jax as ng
    >>> params, x, y = {"kernel": jnp.ones((4, 3))}, jnp.ones((8, 4)), jnp.zeros(8, jnp.int32)
    >>> loss_fn = lambda p, x, y: ng.Categorical(x @ p["kernel"]).nll(y)
    >>> ng.fisher(loss_fn, params, x, y).shape
    (12, 12)
    """
    model = model_of(loss_fn, params, args)
    if layers is None:
        return _block(model, tree_paths.leaves(model.tree), fisher, rng, samples)
    check_layers(layers)
    groups = {path: layer.parameters for path, layer in layers.items()}
    groups |= {x.path: (x.parameter,) for x in layers.leftover}
    chosen = {path: _choose(model.tree, own) for path, own in groups.items()}
    return {path: _block(model, own, fisher, rng, samples) for path, own in chosen.items()}


def fisher_diagonal(
    loss_fn: LossFn,
    params: PyTree,
    *args: Any,
    fisher: str = "exact",
    rng: PRNGKeyArray | None = None,
    samples: int = 1,
) -> optax.Params:
    """The diagonal of the Fisher, from the gradients of single examples.

    ``diag F = (1/N) Σₙ vₙ²`` with vₙ as in :func:`fisher`. It needs memory for one gradient, and
    for each label N backward passes over the whole batch.

    Arguments and errors are those of :func:`fisher`. Returns a tree like the parameters (for an NNX
    model, like ``nnx.state(model, nnx.Param)``), in at least float32.

    Source: Martens 2020 (the diagonal of the Fisher).

    >>> import jax.numpy as jnp, natgrad_jax as ng
    >>> params, x, y = {"kernel": jnp.ones((4, 3))}, jnp.ones((8, 4)), jnp.zeros(8, jnp.int32)
    >>> loss_fn = lambda p, x, y: ng.Categorical(x @ p["kernel"]).nll(y)
    >>> ng.fisher_diagonal(loss_fn, params, x, y)["kernel"].shape
    (4, 3)
    """
    model = model_of(loss_fn, params, args)
    _, pullback = jax.vjp(model.outputs, model.tree)
    zeros = lambda x: jnp.zeros(x.shape, at_least_float32(x.dtype))
    total = jax.tree.map(zeros, model.tree)
    for count, cotangents, i in _passes(model.loss, fisher, rng, samples):
        n = _length(model.loss.terms[i])
        add = lambda k, sums, of=cotangents, i=i, n=n: _squares(pullback, sums, of(k), n, i)
        sums = jax.lax.fori_loop(0, count, add, jax.tree.map(jnp.zeros_like, total))
        examples = positive(model.loss.terms[i].count)
        total = jax.tree.map(lambda t, s, n=examples: (t + s / n).astype(t.dtype), total, sums)
    return total


def _choose(
    tree: optax.Params, parameters: tuple[Parameter, ...]
) -> dict[Path, Float[Array, "..."]]:
    """The arrays of these parameters by path; raises ValueError if their shapes differ."""
    by_path = tree_paths.leaves(tree)
    for path, shape, *_ in parameters:
        came = getattr(by_path.get(path), "shape", "no such parameter")
        if came != shape:
            raise ValueError(
                f"these Layers were found on another model: they have {tree_paths.join(path)} of "
                f"shape {shape}, params has {came}. Call find_layers again with these params."
            )
    return {p.path: by_path[p.path] for p in parameters}


def _passes(loss: Loss, fisher: str, rng: PRNGKeyArray | None, samples: int) -> list[_Passes]:
    """The backward passes that measure each term of the loss."""
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ValueError(f"samples must be a whole number, at least 1; got {samples!r}.")
    output_cotangents.check_key(rng)
    signs, leading = jax.random.key(0), [0] * len(loss.terms)
    if fisher == "exact":
        columns = enumerate(output_cotangents.exact_columns(loss, (), signs, leading))
        return [(count, cotangents, i) for i, (count, cotangents) in columns]
    if fisher == "mc":
        if rng is None:
            raise ValueError(
                'fisher="mc" samples labels from the model and needs a key: pass rng=key.'
            )
        keys = rng[None] if samples == 1 else jax.random.split(rng, samples)
        draw = lambda i: (
            lambda k: output_cotangents.sampled(loss, (), keys[k], samples, leading, (i,))
        )
        return [(samples, draw(i), i) for i in range(len(loss.terms))]
    if fisher == "empirical":
        true = lambda i: lambda k: output_cotangents.observed(loss, (), signs, leading, (i,))
        return [(1, true(i), i) for i in range(len(loss.terms))]
    raise ValueError(f'fisher must be "exact", "mc" or "empirical"; got {fisher!r}.')


def _length(term: Term) -> int:
    """The length of the leading axis of examples; 1 if the whole output is one example."""
    return (*term.distribution.examples, 1)[0]


def _block(
    model: Model,
    own: dict[Path, Float[Array, "..."]],
    fisher: str,
    rng: PRNGKeyArray | None,
    samples: int,
) -> Float[Array, "P P"]:
    """The Fisher's block of the parameters ``own``, in their order."""
    size = sum(x.size for x in own.values())
    check_size(size)
    outputs = lambda own: model.outputs(tree_paths.replace(model.tree, own))
    dtype = jnp.result_type(jnp.float32, *own.values())
    flat = lambda j: [
        j[p].reshape(*j[p].shape[: j[p].ndim - x.ndim], -1).astype(dtype) for p, x in own.items()
    ]
    J = [
        {name: jnp.concatenate(flat(j), -1) for name, j in term.items()}
        for term in jax.jacrev(outputs)(own)
    ]
    F = jnp.zeros((size, size), dtype)
    for count, cotangents, i in _passes(model.loss, fisher, rng, samples):
        n, examples = _length(model.loss.terms[i]), positive(model.loss.terms[i].count)
        add = lambda k, F, of=cotangents, i=i, n=n: F + _outer(J[i], of(k)[i], n)
        F = F + jax.lax.fori_loop(0, count, add, jnp.zeros_like(F)) / examples.astype(dtype)
    return F


def check_size(size: int) -> None:
    """Raise ValueError if an explicit matrix over ``size`` parameters would be too large."""
    if size > MAX_PARAMETERS:
        raise ValueError(
            f"an explicit Fisher over {size:,} parameters would take {size**2 * 4 / 1e9:.0f} GB; "
            f"the limit is {MAX_PARAMETERS:,} parameters. Pass layers= for blocks, or use "
            "fisher_diagonal or fisher_vector_product."
        )


def _outer(
    J: dict[str, Float[Array, "*outputs P"]], cotangent: Outputs, n: int
) -> Float[Array, "P P"]:
    """``Σₙ vₙ vₙᵀ`` over the n examples of one term."""
    einsum = partial(jnp.einsum, precision=HIGHEST)

    def rows(j: Float[Array, "*outputs P"], x: Float[Array, "*outputs"]) -> Float[Array, "n P"]:
        flat = x.astype(j.dtype).reshape(n, -1)
        return einsum("nd,ndp->np", flat, j.reshape(n, -1, j.shape[-1]))

    v = reduce(jnp.add, [rows(j, cotangent[name]) for name, j in J.items() if name in cotangent])
    return einsum("np,nq->pq", v, v)


def _squares(
    pullback: Callable[[output_cotangents.Cotangents], tuple[optax.Params]],
    total: optax.Params,
    cotangents: output_cotangents.Cotangents,
    n: int,
    term: int,
) -> optax.Params:
    """``total + Σₙ vₙ²`` over the n examples of one term, one after another."""

    def only(i: int, outputs: Outputs, example: Int[Array, ""]) -> Outputs:
        if i != term:
            return jax.tree.map(jnp.zeros_like, outputs)
        here = jnp.arange(n)[:, None] == example
        of = lambda x: jnp.where(here, x.reshape(n, -1), 0).reshape(x.shape)
        return jax.tree.map(of, outputs)

    def add(example: Int[Array, ""], total: optax.Params) -> optax.Params:
        (v,) = pullback(tuple(only(i, c, example) for i, c in enumerate(cotangents)))
        return jax.tree.map(lambda t, v: t + v.astype(t.dtype) ** 2, total, v)

    return jax.lax.fori_loop(0, n, add, total)
