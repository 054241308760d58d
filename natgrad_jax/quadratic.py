"""The exact Fisher of a small model, and matrix-free products with it for any.

Everything starts from ``J``, the Jacobian of the network's natural outputs over the whole batch, so
that what couples examples (batch statistics) is as in training. References for approximations, and
the curvature of exact methods.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax import paths, seeds
from natgrad_jax.layers import Layers, check_layers
from natgrad_jax.losses import Loss, Term, positive
from natgrad_jax.paths import Path
from natgrad_jax.tagging import as_loss, frontend_of

# Largest explicit matrix: 1.6 GB in float32.
MAX_PARAMETERS = 20_000


class _Model(NamedTuple):
    """A loss at its parameters, as functions of the parameter tree."""

    tree: Any
    naturals: Callable[[Any], tuple[jax.Array, ...]]
    loss: Loss


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
    ones (``"empirical"``).

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
      ValueError: unknown ``fisher``, a missing ``rng``, more parameters than an explicit matrix
        should have.

    Source: Martens & Grosse 2015, section 2; Martens 2020, sections 8 and 9.

    >>> import flax.linen as nn, jax, jax.numpy as jnp, natgrad_jax as ng
    >>> model, x, y = nn.Dense(3), jnp.ones((8, 4)), jnp.zeros(8, jnp.int32)
    >>> params = model.init(jax.random.key(0), x)["params"]
    >>> loss_fn = lambda p, x, y: ng.Categorical(model.apply({"params": p}, x)).nll(y)
    >>> ng.fisher(loss_fn, params, x, y).shape
    (15, 15)
    """
    model = _model(loss_fn, params, args)
    by_path = paths.leaves(model.tree)
    if layers is None:
        return _block(model, dict(by_path), fisher, rng, samples)
    check_layers(layers)
    groups = {path: [p.path for p in layer.parameters] for path, layer in layers.items()}
    groups |= {x.path: [x.path] for x in layers.leftover}
    return {
        path: _block(model, {p: by_path[p] for p in own}, fisher, rng, samples)
        for path, own in groups.items()
    }


def fisher_diagonal(
    loss_fn: Callable[..., Any],
    params: Any,
    *args: Any,
    fisher: str = "exact",
    rng: Any = None,
    samples: int = 1,
) -> Any:
    """The diagonal of the Fisher, one example's gradient at a time.

    ``diag F = (1/N) Σₙ vₙ²``, as in :func:`fisher`, in memory for one gradient: N backward passes a
    label.

    Args:
      loss_fn, params, *args, fisher, rng, samples: as for :func:`fisher`.

    Returns:
      A tree like the parameters (for an NNX model like ``nnx.state(model, nnx.Param)``).

    Raises:
      ValueError: unknown ``fisher``, a missing ``rng``.

    Source: Martens 2020, section 10 (diagonal methods).

    >>> import flax.linen as nn, jax, jax.numpy as jnp, natgrad_jax as ng
    >>> model, x, y = nn.Dense(3), jnp.ones((8, 4)), jnp.zeros(8, jnp.int32)
    >>> params = model.init(jax.random.key(0), x)["params"]
    >>> loss_fn = lambda p, x, y: ng.Categorical(model.apply({"params": p}, x)).nll(y)
    >>> ng.fisher_diagonal(loss_fn, params, x, y)["kernel"].shape
    (4, 3)
    """
    model = _model(loss_fn, params, args)
    naturals, pullback = jax.vjp(model.naturals, model.tree)
    total = jax.tree.map(jnp.zeros_like, model.tree)
    for count, seed in _passes(model.loss, fisher, rng, samples):

        def of_index(total: Any, index: jax.Array, seed: Any = seed) -> Any:
            cotangents = seed(index)

            def of_example(total: Any, n: jax.Array) -> Any:
                one = tuple(
                    jnp.where(jnp.expand_dims(jnp.arange(len(c)) == n, range(1, c.ndim)), c, 0)
                    for c in cotangents
                )
                return jax.tree.map(lambda t, v: t + v**2, total, pullback(one)[0]), None

            most = max(len(z) for z in naturals)
            return jax.lax.scan(of_example, total, jnp.arange(most))

        total, _ = jax.lax.scan(of_index, total, jnp.arange(count))
    examples = positive(model.loss.terms[0].count)
    return jax.tree.map(lambda x: (x / examples).astype(x.dtype), total)


def fisher_vector_product(
    loss_fn: Callable[..., Any], params: Any, *args: Any, damping: Any = 0.0
) -> Callable[[Any], Any]:
    """The function ``v ↦ F v + λ v``, F the exact Fisher, without any matrix.

    ``F v = Σ Jₙᵀ Hₙ (J v)ₙ / N``, H the Fisher of the predictive distribution in its natural
    output: one forward and one backward pass a product; the network is linearized once.

    Args:
      loss_fn, params, *args: as for :func:`natgrad_jax.find_layers`.
      damping: λ.

    Returns:
      A linear function of trees like the parameters (for an NNX model like
      ``nnx.state(model, nnx.Param)``).

    Source: Schraudolph 2002, section 3; Martens & Grosse 2015, appendix C.

    >>> import flax.linen as nn, jax, jax.numpy as jnp, natgrad_jax as ng
    >>> model, x, y = nn.Dense(3), jnp.ones((8, 4)), jnp.zeros(8, jnp.int32)
    >>> params = model.init(jax.random.key(0), x)["params"]
    >>> loss_fn = lambda p, x, y: ng.Categorical(model.apply({"params": p}, x)).nll(y)
    >>> ng.fisher_vector_product(loss_fn, params, x, y)(params)["kernel"].shape
    (4, 3)
    """
    return _product(loss_fn, params, args, damping, _fisher_of_output)


def gauss_newton_vector_product(
    loss_fn: Callable[..., Any], params: Any, *args: Any, damping: Any = 0.0
) -> Callable[[Any], Any]:
    """The function ``v ↦ G v + λ v``, G the generalized Gauss-Newton matrix of the loss.

    ``G v = Σ Jₙᵀ ∇²(−log p)ₙ (J v)ₙ / N`` with the true labels. For the distributions here, whose
    outputs are natural parameters, it equals the Fisher. Scalars added to the loss have no part.

    Args:
      loss_fn, params, *args: as for :func:`natgrad_jax.find_layers`.
      damping: λ.

    Returns:
      A linear function of trees like the parameters (for an NNX model like
      ``nnx.state(model, nnx.Param)``).

    Source: Schraudolph 2002, section 3; Martens 2020, section 9.

    >>> import flax.linen as nn, jax, jax.numpy as jnp, natgrad_jax as ng
    >>> model, x, y = nn.Dense(3), jnp.ones((8, 4)), jnp.zeros(8, jnp.int32)
    >>> params = model.init(jax.random.key(0), x)["params"]
    >>> loss_fn = lambda p, x, y: ng.Categorical(model.apply({"params": p}, x)).nll(y)
    >>> ng.gauss_newton_vector_product(loss_fn, params, x, y)(params)["bias"].shape
    (3,)
    """
    return _product(loss_fn, params, args, damping, _hessian_of_output)


def _model(loss_fn: Any, params: Any, args: Any) -> _Model:
    frontend = frontend_of(params)
    tree, rest = frontend.split(params)

    def loss(tree: Any) -> Loss:
        return as_loss(frontend.instrument(loss_fn, tree, rest, {}, args)[0])

    def naturals(tree: Any) -> tuple[jax.Array, ...]:
        return tuple(t.distribution.natural for t in loss(tree).terms)

    return _Model(tree, naturals, loss(tree))


def _passes(
    loss: Loss, fisher: str, rng: Any, samples: int
) -> list[tuple[int, Callable[[Any], seeds.Seeds]]]:
    """How many seeds there are of each sort, and the seed of each index."""
    signs = jax.random.key(0)
    if fisher == "exact":
        return seeds.exact_columns(loss, (), signs)
    if fisher == "empirical":
        return [(1, lambda i: seeds.observed(loss, (), signs))]
    if fisher != "mc":
        raise ValueError(f'fisher must be "exact", "mc" or "empirical"; got {fisher!r}.')
    if rng is None:
        raise ValueError('fisher="mc" samples labels from the model and needs a key: pass rng=key.')
    keys = rng[None] if samples == 1 else jax.random.split(rng, samples)
    return [(samples, lambda i: seeds.sampled(loss, (), keys[i], samples))]


def _block(
    model: _Model, own: dict[Path, jax.Array], fisher: str, rng: Any, samples: int
) -> jax.Array:
    """The Fisher over some of the parameters, in the order of ``own``."""
    size = sum(x.size for x in own.values())
    if size > MAX_PARAMETERS:
        raise ValueError(
            f"an explicit Fisher over {size:,} parameters would take {size**2 * 4 / 1e9:.0f} GB; "
            f"the limit is {MAX_PARAMETERS:,} parameters. Pass layers= for blocks, or use "
            "fisher_vector_product."
        )

    def outputs(own: dict[Path, jax.Array]) -> tuple[jax.Array, ...]:
        return model.naturals(paths.replace(model.tree, own))

    J = [
        jnp.concatenate([j[p].reshape(*z.shape, -1) for p in own], axis=-1)
        for j, z in zip(jax.jacrev(outputs)(own), outputs(own), strict=True)
    ]
    F = jnp.zeros((size, size), J[0].dtype)
    for count, seed in _passes(model.loss, fisher, rng, samples):
        body = lambda F, index, seed=seed: (F + sum(_outer(J, seed(index))), None)
        F, _ = jax.lax.scan(body, F, jnp.arange(count))
    return F / positive(model.loss.terms[0].count).astype(F.dtype)


def _outer(J: list[jax.Array], cotangents: seeds.Seeds) -> Iterator[jax.Array]:
    """``Σₙ vₙ vₙᵀ``; terms over the same examples add up within v."""
    precision = jax.lax.Precision.HIGHEST
    rows = [
        jnp.einsum("nd,ndp->np", c.reshape(len(c), -1), j.reshape(len(c), -1, j.shape[-1]),
                   precision=precision)
        for j, c in zip(J, cotangents, strict=True)
    ]  # fmt: skip
    if len({len(v) for v in rows}) == 1:
        rows = [sum(rows[1:], rows[0])]
    for v in rows:
        yield jnp.einsum("np,nq->pq", v, v, precision=precision)


def _product(
    loss_fn: Any, params: Any, args: Any, damping: Any, of_output: Callable[[Term, Any], Any]
) -> Callable[[Any], Any]:
    model = _model(loss_fn, params, args)
    _, forward = jax.linearize(model.naturals, model.tree)
    backward = jax.linear_transpose(forward, model.tree)

    def product(v: Any) -> Any:
        tangents = forward(v)
        pairs = zip(model.loss.terms, tangents, strict=True)
        weighed = tuple(_weigh(term, of_output(term, u)) for term, u in pairs)
        (Fv,) = backward(weighed)
        return jax.tree.map(lambda f, x: f + jnp.asarray(damping, x.dtype) * x, Fv, v)

    return product


def _weigh(term: Term, u: jax.Array) -> jax.Array:
    weight = 1 if term.weight is None else term.weight[..., None]
    return u * (weight * term.scale / positive(term.count)).astype(u.dtype)


def _fisher_of_output(term: Term, u: jax.Array) -> jax.Array:
    """``H u``, from the columns of a root of H."""

    def add(total: jax.Array, column: jax.Array) -> tuple[jax.Array, None]:
        r = term.distribution.root_column(column)
        return total + r * jnp.sum(r * u, axis=-1, keepdims=True), None

    return jax.lax.scan(add, jnp.zeros_like(u), jnp.arange(term.distribution.columns))[0]


def _hessian_of_output(term: Term, u: jax.Array) -> jax.Array:
    """``∇²(−log p) u`` at the true labels."""
    distribution = term.distribution
    total = lambda z: distribution.with_natural(z).nll_per_example(term.targets).sum()
    return jax.jvp(jax.grad(total), (distribution.natural,), (u,))[1]
