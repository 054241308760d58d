"""Seeds of the Fisher pass: what is back-propagated from the outputs to measure curvature.

Every mode is a sequence of seeds, one cotangent for each distribution of the loss; the Fisher is
the sum of the outer products of what they become. Seeds are per example: not divided by the
batch size.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from natgrad_jax.losses import Loss, Part, Term, positive, whole_count
from natgrad_jax.parallel import devices_along, sharded_like

Seeds = tuple[jax.Array, ...]


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


def sampled(loss: Loss, axes: Sequence[str], key: jax.Array, samples: int) -> Seeds:
    """``∇ −log p(ŷ)`` at labels ŷ drawn from the model: mode "mc", one draw of ``samples``."""
    keys = jax.random.split(key, len(loss.terms))
    targets = [sample_targets(t, axes, k) for t, k in zip(loss.terms, keys, strict=True)]
    return _gradients(loss, axes, targets, 1 / samples)


def observed(loss: Loss, axes: Sequence[str], key: jax.Array) -> Seeds:
    """``∇ −log p(y)`` at the true labels, each example with a random sign: mode "empirical"."""
    seeds = _gradients(loss, axes, [t.targets for t in loss.terms], 1.0)
    return tuple(_random_signs(s, key, axes, t) for s, t in zip(seeds, loss.terms, strict=True))


def exact_columns(
    loss: Loss, axes: Sequence[str], key: jax.Array
) -> list[tuple[int, Callable[[jax.Array], Seeds]]]:
    """Mode "exact": for each distribution the number of its seeds, and the seed of each index.

    A seed is one column of a root of one output Hessian, for every example of the leading axis
    at once. Other example axes (tokens, pixels) may depend on one another, so each of their
    positions has seeds of its own.
    """

    def of_term(i: int, term: Term) -> tuple[int, Callable[[jax.Array], Seeds]]:
        examples = term.distribution.examples
        positions = math.prod(examples[1:])
        columns = term.distribution.columns

        def seed(index: jax.Array) -> Seeds:
            root = term.distribution.root_column(index % columns)
            at = jax.nn.one_hot(index // columns, positions, dtype=root.dtype)
            root = root * term.distribution.beside_event(at.reshape(examples[1:]))
            root = _random_signs(root, jax.random.fold_in(key, index), axes, term)
            seeds = [jnp.zeros_like(t.distribution.natural) for t in loss.terms]
            seeds[i] = _weigh(root, term, loss, axes, 1.0)
            return tuple(seeds)

        return columns * positions, seed

    return [of_term(i, term) for i, term in enumerate(loss.terms)]


def sample_targets(term: Term, axes: Sequence[str], key: jax.Array) -> jax.Array:
    """Labels from the model's own distribution, each from a key of its own global example index.

    The draw is the same on one device and on many, in one batch and in micro-batches, however the
    batch is divided.
    """
    distribution, part = term.distribution, term.part
    if not distribution.examples:
        return distribution.sample(key if part is None else jax.random.fold_in(key, part.number))

    def draw(natural: jax.Array, key: jax.Array) -> jax.Array:
        return distribution.with_natural(natural).sample(key)

    keys = _example_keys(key, distribution.natural, axes, part)
    return jax.vmap(draw)(distribution.natural, keys)


def _example_keys(
    key: jax.Array, natural: jax.Array, axes: Sequence[str], part: Part | None
) -> jax.Array:
    """A key for each element of the leading axis, by its index over devices and micro-batches."""
    index = jnp.arange(len(natural))
    if axes:
        index = index + len(natural) * jax.lax.axis_index(tuple(axes))
    if part is not None:
        index = index + len(natural) * devices_along(axes) * part.number
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(sharded_like(index, natural))


def _random_signs(seed: jax.Array, key: jax.Array, axes: Sequence[str], term: Term) -> jax.Array:
    """A sign for each element of the leading axis.

    Outer products stay as they are, and the squared sum over examples (the diagonal blocks)
    becomes an unbiased estimate of the sum of squares.
    """
    if not term.distribution.examples:
        return seed
    keys = _example_keys(key, seed, axes, term.part)
    signs = jax.vmap(lambda k: jax.random.rademacher(k, (), seed.dtype))(keys)
    return seed * signs.reshape(-1, *[1] * (seed.ndim - 1))


def _gradients(loss: Loss, axes: Sequence[str], targets: list[Any], share: float) -> Seeds:
    def seed(term: Term, y: jax.Array) -> jax.Array:
        distribution = term.distribution
        total = lambda z: distribution.with_natural(z).nll_per_example(y).sum()
        return _weigh(jax.grad(total)(distribution.natural), term, loss, axes, share)

    return tuple(
        seed(t, jax.lax.stop_gradient(y)) for t, y in zip(loss.terms, targets, strict=True)
    )


def _weigh(seed: jax.Array, term: Term, loss: Loss, axes: Sequence[str], share: float) -> jax.Array:
    """The seed times the root of its weight: outer products then carry the weight itself.

    Terms with other example counts than the first one's are brought to its count, which is the
    one that the sums are divided by.
    """
    ratio = positive(whole_count(loss.terms[0], axes)) / positive(whole_count(term, axes))
    factor = jnp.sqrt(jnp.maximum(term.scale * ratio * share, 0)).astype(seed.dtype)
    if term.weight is not None:
        weight = jnp.sqrt(term.distribution.beside_event(term.weight)).astype(seed.dtype)
        seed = jnp.where(weight > 0, seed * weight, 0)
    return (seed * factor).astype(term.distribution.natural.dtype)
