"""Seeds of the Fisher pass: what is back-propagated from the outputs to measure curvature.

Every mode is a sequence of seeds, one cotangent for each distribution of the loss; the Fisher of a
term is the sum of the outer products of what its seeds become. Seeds are per example: not divided
by the batch size.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from natgrad_jax.losses.loss import Loss, Part, Term
from natgrad_jax.utils.sharding import devices_along, sharded_like

Seeds = tuple[jax.Array, ...]

# Which axis of each term's outputs counts examples; None where they depend on one another.
Axes = Sequence[int | None]


def check_key(rng: Any) -> None:
    """Raise unless ``rng`` is one key, of either kind, or None."""
    dtype, shape = getattr(rng, "dtype", None), getattr(rng, "shape", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        good = shape == ()
    else:  # a key as jax.random.PRNGKey makes it
        good = dtype == jnp.uint32 and len(shape or ()) == 1
    if not (good or rng is None):
        came = f"an array of {dtype}, shape {shape}" if dtype is not None else repr(rng)
        raise TypeError(
            f"rng takes one key, as jax.random.key(0) makes it; got {came}. Split it for each "
            "step: key, now = jax.random.split(key)."
        )


def sampled(
    loss: Loss, axes: Sequence[str], key: jax.Array, samples: int, of: Axes, terms: Sequence[int]
) -> Seeds:
    """``∇ −log p(ŷ)`` at labels ŷ drawn from the model: mode "mc", one draw of ``samples``.

    Of these ``terms``, and zeros of the others, as in the other modes.
    """
    keys = jax.random.split(key, len(loss.terms))

    def seed(i: int, term: Term) -> jax.Array:
        return _gradient(term, sample_targets(term, axes, keys[i], of[i] or 0), 1 / samples)

    return _only(loss, terms, seed)


def observed(
    loss: Loss, axes: Sequence[str], key: jax.Array, of: Axes, terms: Sequence[int]
) -> Seeds:
    """``∇ −log p(y)`` at the true labels, each example with a random sign: mode "empirical"."""

    def seed(i: int, term: Term) -> jax.Array:
        return _random_signs(_gradient(term, term.targets, 1.0), key, axes, term, of[i] or 0)

    return _only(loss, terms, seed)


def exact_columns(
    loss: Loss, axes: Sequence[str], key: jax.Array, of: Axes
) -> list[tuple[int, Callable[[jax.Array], Seeds]]]:
    """Mode "exact": for each distribution the number of its seeds, and the seed of each index.

    A seed is one column of a root of one output Hessian, for every example at once. Other axes of
    the outputs (tokens, pixels) may depend on one another, so each of their positions has seeds of
    its own; and each example, where examples do.
    """

    def of_term(i: int, term: Term) -> tuple[int, Callable[[jax.Array], Seeds]]:
        apart = tuple(
            1 if axis == of[i] else n for axis, n in enumerate(term.distribution.examples)
        )
        positions, columns = math.prod(apart), term.distribution.columns

        def seed(index: jax.Array) -> Seeds:
            root = term.distribution.root_column(index % columns)
            at = jax.nn.one_hot(index // columns, positions, dtype=root.dtype)
            root = root * term.distribution.beside_event(at.reshape(apart))
            key_of_column = jax.random.fold_in(key, index)
            root = _random_signs(root, key_of_column, axes, term, of[i] or 0)
            return _only(loss, (i,), lambda _, term: _weigh(root, term, 1.0))

        return columns * positions, seed

    return [of_term(i, term) for i, term in enumerate(loss.terms)]


def sample_targets(term: Term, axes: Sequence[str], key: jax.Array, axis: int = 0) -> jax.Array:
    """Labels from the model's own distribution, each from a key of its own global example index.

    ``axis``: of the examples. The draw is the same on one device and on many, in one batch and in
    micro-batches, however the batch is divided.
    """
    distribution, part = term.distribution, term.part
    if not distribution.examples:
        return distribution.sample(key if part is None else jax.random.fold_in(key, part.number))

    def draw(natural: jax.Array, key: jax.Array) -> jax.Array:
        return distribution.with_natural(natural).sample(key)

    keys = _example_keys(key, distribution.natural, axes, part, axis)
    return jax.vmap(draw, in_axes=(axis, 0), out_axes=axis)(distribution.natural, keys)


def _example_keys(
    key: jax.Array, natural: jax.Array, axes: Sequence[str], part: Part | None, axis: int
) -> jax.Array:
    """A key for each element of the examples' axis, by its index over devices and micro-batches."""
    examples = jnp.moveaxis(natural, axis, 0)
    index = jnp.arange(len(examples))
    if axes:
        index = index + len(examples) * jax.lax.axis_index(tuple(axes))
    if part is not None:
        index = index + len(examples) * devices_along(axes) * part.number
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(sharded_like(index, examples))


def _random_signs(
    seed: jax.Array, key: jax.Array, axes: Sequence[str], term: Term, axis: int
) -> jax.Array:
    """A sign for each element of the examples' axis.

    Outer products stay as they are, and the squared sum over examples (the diagonal blocks)
    becomes an unbiased estimate of the sum of squares.
    """
    if not term.distribution.examples:
        return seed
    keys = _example_keys(key, seed, axes, term.part, axis)
    signs = jax.vmap(lambda k: jax.random.rademacher(k, (), seed.dtype))(keys)
    return seed * signs.reshape(-1, *[1] * (seed.ndim - axis - 1))


def _only(loss: Loss, terms: Sequence[int], seed: Callable[[int, Term], jax.Array]) -> Seeds:
    return tuple(
        seed(i, t) if i in terms else jnp.zeros_like(t.distribution.natural)
        for i, t in enumerate(loss.terms)
    )


def _gradient(term: Term, targets: Any, share: float) -> jax.Array:
    distribution, targets = term.distribution, jax.lax.stop_gradient(targets)
    total = lambda z: distribution.with_natural(z).nll_per_example(targets).sum()
    return _weigh(jax.grad(total)(distribution.natural), term, share)


def _weigh(seed: jax.Array, term: Term, share: float) -> jax.Array:
    """The seed times the root of its weight: outer products then carry the weight itself."""
    factor = jnp.sqrt(jnp.maximum(term.scale * share, 0)).astype(seed.dtype)
    if term.weight is not None:
        weight = jnp.sqrt(term.distribution.beside_event(term.weight)).astype(seed.dtype)
        seed = jnp.where(weight > 0, seed * weight, 0)
    return (seed * factor).astype(term.distribution.natural.dtype)
