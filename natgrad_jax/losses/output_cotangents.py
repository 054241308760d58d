"""Output cotangents: what is back-propagated from the outputs to measure curvature.

Every ``fisher`` mode is a sequence of backward passes, each with one cotangent for every
distribution of the loss. The Fisher of a term is the sum of the outer products of the parameter
gradients that result. Cotangents belong to one example each: they are not divided by the batch
size.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, Shaped

from natgrad_jax.losses.loss import Loss, Part, Term
from natgrad_jax.utils.sharding import devices_along, sharded_like

# One cotangent for each term of the loss, in the shape of the network's output there.
Cotangents = tuple[Float[Array, "..."], ...]

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

    For the listed ``terms``, and zeros for the others, as in the other modes.
    """
    keys = jax.random.split(key, len(loss.terms))

    def cotangent(i: int, term: Term) -> Float[Array, "*outputs"]:
        return _gradient(term, sample_targets(term, axes, keys[i], of[i] or 0), 1 / samples)

    return _only(loss, terms, cotangent)


def observed(
    loss: Loss, axes: Sequence[str], key: PRNGKeyArray, of: Axes, terms: Sequence[int]
) -> Cotangents:
    """Mode "empirical": ``∇ −log p(y)`` at the true labels, with a random sign for each example."""

    def cotangent(i: int, term: Term) -> Float[Array, "*outputs"]:
        return _random_signs(_gradient(term, term.targets, 1.0), key, axes, term, of[i] or 0)

    return _only(loss, terms, cotangent)


def exact_columns(
    loss: Loss, axes: Sequence[str], key: PRNGKeyArray, of: Axes
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
            at = jax.nn.one_hot(index // columns, positions, dtype=root.dtype)
            root = root * term.distribution.beside_event(at.reshape(apart))
            key_of_column = jax.random.fold_in(key, index)
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
    distribution, part = term.distribution, term.part
    if not distribution.examples:
        return distribution.sample(key if part is None else jax.random.fold_in(key, part.number))

    def draw(natural: Float[Array, "..."], key: PRNGKeyArray) -> Shaped[Array, "..."]:
        return distribution.with_natural(natural).sample(key)

    keys = _example_keys(key, distribution.natural, axes, part, axis)
    return jax.vmap(draw, in_axes=(axis, 0), out_axes=axis)(distribution.natural, keys)


def _example_keys(
    key: PRNGKeyArray,
    natural: Float[Array, "*outputs"],
    axes: Sequence[str],
    part: Part | None,
    axis: int,
) -> Shaped[Array, " N *key"]:
    """A key for each example: by its index over all devices and micro-batches."""
    examples = jnp.moveaxis(natural, axis, 0)
    index = jnp.arange(len(examples))
    if axes:
        index = index + len(examples) * jax.lax.axis_index(tuple(axes))
    if part is not None:
        index = index + len(examples) * devices_along(axes) * part.number
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(sharded_like(index, examples))


def _random_signs(
    cotangent: Float[Array, "*outputs"],
    key: PRNGKeyArray,
    axes: Sequence[str],
    term: Term,
    axis: int,
) -> Float[Array, "*outputs"]:
    """The cotangent with a random sign for each example.

    Outer products do not change. The square of a sum over examples, from which diagonal blocks
    are estimated, becomes an unbiased estimate of the sum of squares.
    """
    if not term.distribution.examples:
        return cotangent
    keys = _example_keys(key, cotangent, axes, term.part, axis)
    signs = jax.vmap(lambda k: jax.random.rademacher(k, (), cotangent.dtype))(keys)
    return cotangent * signs.reshape(-1, *[1] * (cotangent.ndim - axis - 1))


def _only(
    loss: Loss, terms: Sequence[int], cotangent: Callable[[int, Term], Float[Array, "..."]]
) -> Cotangents:
    """The cotangents of the listed terms, and zeros for the others."""
    return tuple(
        cotangent(i, t) if i in terms else jnp.zeros_like(t.distribution.natural)
        for i, t in enumerate(loss.terms)
    )


def _gradient(term: Term, targets: Shaped[Array, "..."], share: float) -> Float[Array, "*outputs"]:
    distribution, targets = term.distribution, jax.lax.stop_gradient(targets)
    total = lambda z: distribution.with_natural(z).nll_per_example(targets).sum()
    return _weigh(jax.grad(total)(distribution.natural), term, share)


def _weigh(
    cotangent: Float[Array, "*outputs"], term: Term, share: float
) -> Float[Array, "*outputs"]:
    """The cotangent times the square root of its weight: outer products then have the weight."""
    factor = jnp.sqrt(jnp.maximum(term.scale * share, 0)).astype(cotangent.dtype)
    if term.weight is not None:
        weight = jnp.sqrt(term.distribution.beside_event(term.weight)).astype(cotangent.dtype)
        cotangent = jnp.where(weight > 0, cotangent * weight, 0)
    return (cotangent * factor).astype(term.distribution.natural.dtype)
