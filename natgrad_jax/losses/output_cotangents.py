"""Output cotangents: what is back-propagated from the outputs to measure curvature.

Every ``fisher`` mode is a sequence of backward passes, each with one cotangent for every
distribution of the loss. The Fisher of a term is the sum of the outer products of the parameter
gradients that result. Cotangents belong to one example each: they are not divided by the batch
size.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, Shaped

from natgrad_jax.losses.distribution_base import Outputs, Predictive, has_sampler
from natgrad_jax.losses.terms import Loss, Part, Term
from natgrad_jax.utils.sharding import devices_along, sharded_like

# For each term of the loss the cotangents of the network's outputs there, in their shapes.
Cotangents = tuple[Outputs, ...]

# For each term which axis of its output counts examples; None where examples interact.
Axes = Sequence[int | None]


def check_key(rng: object) -> None:
    """Raise TypeError unless ``rng`` is one key, new-style or old-style, or None."""
    dtype, shape = getattr(rng, "dtype", None), getattr(rng, "shape", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        good = shape == ()
    else:  # a key of jax.random.PRNGKey
        good = dtype == jnp.uint32 and len(shape or ()) == 1
    if not (good or rng is None):
        came = f"an array of {dtype}, shape {shape}" if dtype is not None else repr(rng)
        raise TypeError(
            f"rng must be one key, for example jax.random.key(0); got {came}. Split it for each "
            "step: key, now = jax.random.split(key)."
        )


def sampled(
    loss: Loss,
    axes: Sequence[str],
    key: PRNGKeyArray,
    samples: int,
    of: Axes,
    terms: Sequence[int],
) -> Cotangents:
    """Mode "mc": ``∇ −log p(ŷ)`` at labels ŷ sampled from the model, one of ``samples`` draws.

    Where a distribution cannot sample, ``R ε`` with random signs ε, which has the same covariance.
    For the listed ``terms``, and zeros for the others, as in the other modes.
    """
    keys = jax.random.split(key, len(loss.terms))

    def cotangent(i: int, term: Term) -> Outputs:
        if not has_sampler(term.distribution):
            return _weigh(_signed_root(term, axes, keys[i], of[i] or 0), term, 1 / samples)
        return _gradient(term, sample_targets(term, axes, keys[i], of[i] or 0), 1 / samples)

    return _only(loss, terms, cotangent)


def observed(
    loss: Loss, axes: Sequence[str], key: PRNGKeyArray | None, of: Axes, terms: Sequence[int]
) -> Cotangents:
    """Mode "empirical": ``∇ −log p(y)`` at the true labels, with a random sign for each example
    unless ``key`` is None."""

    def cotangent(i: int, term: Term) -> Outputs:
        if term.targets is None:
            raise ValueError(
                'fisher="empirical" needs the true labels of every term; distributions given to '
                'ng.loss, and .curvature(), have none. Use fisher="mc" or "exact".'
            )
        return _random_signs(_gradient(term, term.targets, 1.0), key, axes, term, of[i] or 0)

    return _only(loss, terms, cotangent)


def exact_columns(
    loss: Loss, axes: Sequence[str], key: PRNGKeyArray | None, of: Axes
) -> list[tuple[int, Callable[[Int[Array, ""]], Cotangents]]]:
    """Mode "exact": for each term the number of its passes, and the cotangents of pass i.

    A pass takes one column of the square root of the output Hessian, for all examples at once.
    Positions of one example (tokens, pixels) may depend on each other, so each position takes
    passes of its own; so does each example where examples interact.
    """

    def of_term(i: int, term: Term) -> tuple[int, Callable[[Int[Array, ""]], Cotangents]]:
        apart = tuple(
            1 if axis == of[i] else n for axis, n in enumerate(term.distribution.examples)
        )
        positions, columns = math.prod(apart), term.distribution.columns

        def cotangents(index: Int[Array, ""]) -> Cotangents:
            root = term.distribution.root_column(index % columns)
            at = (jnp.arange(positions) == index // columns).reshape(apart)
            beside = term.distribution.beside
            root = {k: jnp.where(beside(k, at), x, 0) for k, x in root.items()}
            key_of_column = None if key is None else jax.random.fold_in(key, index)
            root = _random_signs(root, key_of_column, axes, term, of[i] or 0)
            return _only(loss, (i,), lambda _, term: _weigh(root, term, 1.0))

        return columns * positions, cotangents

    return [of_term(i, term) for i, term in enumerate(loss.terms)]


def sample_targets(
    term: Term, axes: Sequence[str], key: PRNGKeyArray, axis: int = 0
) -> Shaped[Array, "..."]:
    """Labels sampled from the model; each example's key is folded from its global index.

    So the labels do not depend on how the batch is divided: among devices, or in micro-batches.
    ``axis``: the axis of the outputs that counts examples.
    """
    distribution = term.distribution
    if not distribution.examples:
        return distribution.sample(_key_of(term, key))

    def draw(distribution: Predictive, key: PRNGKeyArray) -> Shaped[Array, "..."]:
        return distribution.sample(key)

    return _over_examples(draw, term, axes, key, axis)


def _over_examples(
    draw: Callable[[Predictive, PRNGKeyArray], Any],
    term: Term,
    axes: Sequence[str],
    key: PRNGKeyArray,
    axis: int,
) -> Any:
    """``draw`` for each example, with a key of its own."""
    wide = term.distribution.wide()
    given = wide.of_examples
    keys = _example_keys(key, given[wide.first], axes, term.part, axis)
    each = lambda given, key: draw(wide.with_outputs(given), key)
    return jax.vmap(each, in_axes=(axis, 0), out_axes=axis)(given, keys)


def _signed_root(term: Term, axes: Sequence[str], key: PRNGKeyArray, axis: int) -> Outputs:
    """``Σ_c ε_c R_c``, ε_c random signs."""

    def draw(distribution: Predictive, key: PRNGKeyArray) -> Outputs:
        signs = jax.random.rademacher(key, (distribution.columns,), float)
        root = jax.vmap(distribution.root_column)(jnp.arange(distribution.columns))
        return jax.tree.map(lambda r: jnp.tensordot(signs.astype(r.dtype), r, 1), root)

    if not term.distribution.examples:
        return draw(term.distribution, _key_of(term, key))
    return _over_examples(draw, term, axes, key, axis)


def _key_of(term: Term, key: PRNGKeyArray) -> PRNGKeyArray:
    """The key of a whole output that is one example."""
    return key if term.part is None else jax.random.fold_in(key, term.part.number)


def _example_keys(
    key: PRNGKeyArray,
    outputs: Float[Array, "*outputs"],
    axes: Sequence[str],
    part: Part | None,
    axis: int,
) -> Shaped[Array, " N *key"]:
    """A key for each example: by its index over all devices and micro-batches."""
    examples = jnp.moveaxis(outputs, axis, 0)
    index = jnp.arange(len(examples))
    if axes:
        index = index + len(examples) * jax.lax.axis_index(tuple(axes))
    if part is not None:
        index = index + len(examples) * devices_along(axes) * part.number
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(sharded_like(index, examples))


def _random_signs(
    cotangent: Outputs, key: PRNGKeyArray | None, axes: Sequence[str], term: Term, axis: int
) -> Outputs:
    """The cotangent with a random sign for each example.

    Outer products do not change. The square of a sum over examples, from which diagonal blocks
    are estimated, becomes an unbiased estimate of the sum of squares.
    """
    if key is None or not term.distribution.examples:
        return cotangent
    first = next(iter(cotangent.values()))
    keys = _example_keys(key, first, axes, term.part, axis)
    signs = jax.vmap(lambda k: jax.random.rademacher(k, (), first.dtype))(keys)
    of = lambda x: x * signs.astype(x.dtype).reshape(-1, *[1] * (x.ndim - axis - 1))
    return {name: of(x) for name, x in cotangent.items()}


def _only(
    loss: Loss, terms: Sequence[int], cotangent: Callable[[int, Term], Outputs]
) -> Cotangents:
    """The cotangents of the listed terms, and zeros for the others."""
    return tuple(
        cotangent(i, t) if i in terms else jax.tree.map(jnp.zeros_like, t.distribution.outputs)
        for i, t in enumerate(loss.terms)
    )


def _gradient(term: Term, targets: Shaped[Array, "..."], share: float) -> Outputs:
    distribution, targets = term.distribution, jax.lax.stop_gradient(targets)
    total = lambda z: distribution.with_outputs(z).nll_per_example(targets).sum()
    return _weigh(jax.grad(total)(distribution.outputs), term, share)


def _weigh(cotangent: Outputs, term: Term, share: float) -> Outputs:
    """The cotangent times the square root of its weight: outer products then have the weight."""
    factor = jnp.sqrt(jnp.maximum(term.scale * share, 0))

    def of(name: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
        if term.weight is not None:
            weight = jnp.sqrt(term.distribution.beside(name, term.weight)).astype(x.dtype)
            x = jnp.where(weight > 0, x * weight, 0)
        return (x * factor.astype(x.dtype)).astype(term.distribution.outputs[name].dtype)

    return {name: of(name, x) for name, x in cotangent.items()}
