"""The explicit Fisher of a small model, and its diagonal.

Everything starts from ``J``, the Jacobian of the network's natural outputs over the whole batch, so
that what couples examples (batch statistics) is as in training. References for approximations, and
the curvature of exact methods.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from natgrad_jax.exact.matvec import Model, model_of
from natgrad_jax.layers.collection import Layers, check_layers
from natgrad_jax.layers.layer import Parameter
from natgrad_jax.losses import output_cotangents
from natgrad_jax.losses.loss import Loss, Term, positive
from natgrad_jax.utils import tree_paths
from natgrad_jax.utils.precision import HIGHEST, at_least_float32
from natgrad_jax.utils.tree_paths import Path

# Largest explicit matrix: 1.6 GB in float32.
MAX_PARAMETERS = 20_000

# How many seeds, the seed of each index, and of which term.
_Pass = tuple[int, Callable[[Any], output_cotangents.Cotangents], int]


def fisher(
    loss_fn: Callable[..., Any],
    params: Any,
    *args: Any,
    fisher: str = "exact",
    rng: Any = None,
    samples: int = 1,
    layers: Layers | None = None,
) -> Any:
    """The explicit Fisher information of a small model.

    ``F = (1/N) Σₙ vₙ vₙᵀ`` over examples and labels, ``v = ∇ −log p`` of one example: over all
    labels (``"exact"``: ``Σ Jₙᵀ Hₙ Jₙ / N``), over labels drawn as
    :func:`natgrad_jax.value_and_grad` draws them from the same ``rng`` (``"mc"``), or over the true
    ones (``"empirical"``). Examples of those two lie on the leading axis of the outputs.

    Args:
      loss_fn, params, *args: as for :func:`natgrad_jax.find_layers`.
      fisher: ``"exact"``, ``"mc"`` or ``"empirical"``.
      rng: a key, needed by ``"mc"``.
      samples: labels drawn for each example, for ``"mc"``.
      layers: for blocks instead of the whole matrix.

    Returns:
      ``(P, P)`` over the parameters in the order of ``jax.flatten_util.ravel_pytree(params)``; with
      ``layers`` a dict from layer path (and leftover parameter's path) to that block, over the
      layer's parameters in their order, each raveled.

    Raises:
      ValueError: unknown ``fisher``, a missing ``rng``, fewer than one sample, layers of another
        model, more parameters than an explicit matrix should have.

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
    loss_fn: Callable[..., Any],
    params: Any,
    *args: Any,
    fisher: str = "exact",
    rng: Any = None,
    samples: int = 1,
) -> Any:
    """The diagonal of the Fisher, one example's gradient at a time.

    ``diag F = (1/N) Σₙ vₙ²``, as in :func:`fisher`, in memory for one gradient: N backward passes
    (of the whole batch) a label.

    Arguments and errors are those of :func:`fisher`. Returns a tree like the parameters (for an NNX
    model like ``nnx.state(model, nnx.Param)``), in at least float32.

    Source: Martens 2020 (the diagonal of the Fisher).

    >>> import jax.numpy as jnp, natgrad_jax as ng
    >>> params, x, y = {"kernel": jnp.ones((4, 3))}, jnp.ones((8, 4)), jnp.zeros(8, jnp.int32)
    >>> loss_fn = lambda p, x, y: ng.Categorical(x @ p["kernel"]).nll(y)
    >>> ng.fisher_diagonal(loss_fn, params, x, y)["kernel"].shape
    (4, 3)
    """
    model = model_of(loss_fn, params, args)
    _, pullback = jax.vjp(model.naturals, model.tree)
    zeros = lambda x: jnp.zeros(x.shape, at_least_float32(x.dtype))
    total = jax.tree.map(zeros, model.tree)
    for count, seed, i in _passes(model.loss, fisher, rng, samples):
        n = _length(model.loss.terms[i])
        add = lambda k, sums, seed=seed, i=i, n=n: _squares(pullback, sums, seed(k), n, i)
        sums = jax.lax.fori_loop(0, count, add, jax.tree.map(jnp.zeros_like, total))
        examples = positive(model.loss.terms[i].count)
        total = jax.tree.map(lambda t, s, n=examples: (t + s / n).astype(t.dtype), total, sums)
    return total


def _choose(tree: Any, parameters: tuple[Parameter, ...]) -> dict[Path, jax.Array]:
    by_path = tree_paths.leaves(tree)
    for path, shape, *_ in parameters:
        came = getattr(by_path.get(path), "shape", "no such parameter")
        if came != shape:
            raise ValueError(
                f"these Layers were found on another model: they have {tree_paths.join(path)} of "
                f"shape {shape}, params has {came}. Call find_layers again with these params."
            )
    return {p.path: by_path[p.path] for p in parameters}


def _passes(loss: Loss, fisher: str, rng: Any, samples: int) -> list[_Pass]:
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ValueError(f"samples must be a whole number, at least 1; got {samples!r}.")
    output_cotangents.check_key(rng)
    signs, leading = jax.random.key(0), [0] * len(loss.terms)
    if fisher == "exact":
        columns = enumerate(output_cotangents.exact_columns(loss, (), signs, leading))
        return [(count, seed, i) for i, (count, seed) in columns]
    if fisher == "mc" and rng is None:
        raise ValueError('fisher="mc" samples labels from the model and needs a key: pass rng=key.')
    if fisher == "mc":
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
    """Of the leading axis; without any example axis the output is one example, not D of them."""
    return (*term.distribution.examples, 1)[0]


def _block(
    model: Model, own: dict[Path, jax.Array], fisher: str, rng: Any, samples: int
) -> jax.Array:
    """The Fisher over some of the parameters, in the order of ``own``."""
    size = sum(x.size for x in own.values())
    check_size(size)
    outputs = lambda own: model.naturals(tree_paths.replace(model.tree, own))
    dtype = jnp.result_type(jnp.float32, *own.values())
    flat = lambda j, shape: [j[p].reshape(*shape, -1).astype(dtype) for p in own]
    J = [
        jnp.concatenate(flat(j, t.distribution.natural.shape), axis=-1)
        for j, t in zip(jax.jacrev(outputs)(own), model.loss.terms, strict=True)
    ]
    F = jnp.zeros((size, size), dtype)
    for count, seed, i in _passes(model.loss, fisher, rng, samples):
        n, examples = _length(model.loss.terms[i]), positive(model.loss.terms[i].count)
        add = lambda k, F, seed=seed, i=i, n=n: F + _outer(J[i], seed(k)[i], n)
        F = F + jax.lax.fori_loop(0, count, add, jnp.zeros_like(F)) / examples.astype(dtype)
    return F


def check_size(size: int) -> None:
    """Raise for more parameters than an explicit matrix should have."""
    if size > MAX_PARAMETERS:
        raise ValueError(
            f"an explicit Fisher over {size:,} parameters would take {size**2 * 4 / 1e9:.0f} GB; "
            f"the limit is {MAX_PARAMETERS:,} parameters. Pass layers= for blocks, or use "
            "fisher_diagonal or fisher_vector_product."
        )


def _outer(J: jax.Array, seed: jax.Array, n: int) -> jax.Array:
    """``Σₙ vₙ vₙᵀ`` over n examples of one term."""
    einsum = partial(jnp.einsum, precision=HIGHEST)
    rows = lambda x, *last: x.astype(J.dtype).reshape(n, -1, *last)
    v = einsum("nd,ndp->np", rows(seed), rows(J, J.shape[-1]))
    return einsum("np,nq->pq", v, v)


def _squares(
    pullback: Any, total: Any, seed: output_cotangents.Cotangents, n: int, term: int
) -> Any:
    """``total + Σₙ vₙ²`` over n examples of one term, one after another."""

    def only(i: int, c: jax.Array, example: jax.Array) -> jax.Array:
        if i != term:
            return jnp.zeros_like(c)
        here = jnp.arange(n)[:, None] == example
        return jnp.where(here, c.reshape(n, -1), 0).reshape(c.shape)

    def add(example: jax.Array, total: Any) -> Any:
        (v,) = pullback(tuple(only(i, c, example) for i, c in enumerate(seed)))
        return jax.tree.map(lambda t, v: t + v.astype(t.dtype) ** 2, total, v)

    return jax.lax.fori_loop(0, n, add, total)
