"""A compiled step, minibatches, and the training curve that comes of them."""

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from lib.autoencoder import Problem

EVALUATIONS = 100  # points on a curve
EVALUATED_IMAGES = 2000


class Curve(NamedTuple):
    """A run so far, at the evaluated steps."""

    steps: list[int]
    seconds: list[float]
    loss: list[float]
    validation: list[float]  # the loss on what is held out; empty where nothing is
    params: Any  # the last


class Scale(NamedTuple):
    """How long to train: long enough that Adam's curve has flattened."""

    steps: int
    batch_size: int


SCALES = {
    "digits": Scale(1500, 500),
    "mnist": Scale(1000, 512),
    "fashion": Scale(1000, 512),
    "cifar10": Scale(500, 512),
}


class Compiled(NamedTuple):
    """An optimizer ready to run."""

    init: Callable[[Any], Any]
    step: Callable[..., tuple[Any, Any, jax.Array]]  # params, opt_state, images, indices, i, key
    seconds: float  # what it took to get there


def evaluated_images(problem: Problem) -> np.ndarray:
    """At most EVALUATED_IMAGES of the training set, evenly spaced."""
    return problem.images[:: -(-len(problem.images) // EVALUATED_IMAGES)]


def compile_step(
    problem: Any, images: Any, make: Callable[..., Any], rate: float, size: int
) -> Compiled:
    """Compiles, and takes one step that is thrown away: what only a first call costs is paid.

    ``images``, or what else there is to learn from: a pytree of arrays.
    """
    start = time.perf_counter()
    params = problem.init(0)
    contender = make(rate, problem.loss_fn, params, rows(images, slice(size)))

    def step(params, opt_state, images, indices, i, key):
        return contender.step(params, opt_state, rows(images, indices), jax.random.fold_in(key, i))

    opt_state, key = contender.init(params), jax.random.key(0)
    inputs = (params, opt_state, images, jnp.arange(size, dtype=jnp.int32), jnp.int32(0), key)
    # Donated, as any real training loop does: the state is updated in place. Compiled ahead of
    # time: a state that changed its types would be an error, not a silent second compilation.
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*inputs).compile()
    jax.block_until_ready(compiled(*inputs))
    return Compiled(contender.init, compiled, time.perf_counter() - start)


def rows(tree: Any, which: Any) -> Any:
    """Some examples of a pytree of arrays."""
    return jax.tree.map(lambda x: x[which], tree)


def train(*args: Any, **kwargs: Any) -> tuple[list[int], list[float], list[float]]:
    """Steps, seconds and losses of a whole run: the arguments are those of :func:`curves`."""
    *_, curve = curves(*args, **kwargs)
    return curve.steps, curve.seconds, curve.loss


def curves(
    compiled: Compiled,
    params: Any,
    images: Any,
    order: np.ndarray,
    seed: int,
    evaluate: Callable[[Any], jax.Array],
    show: Callable[[int, float, float], None] = lambda *_: None,
    evaluations: int = EVALUATIONS,
    validate: Callable[[Any], jax.Array] | None = None,
) -> Iterator[Curve]:
    """The curve so far, at every evaluation. Stops early where the loss is no longer finite."""
    opt_state = compiled.init(params)
    key = jax.random.key(seed + 1)
    held_out = lambda params: [float(validate(params))] if validate else []
    steps, seconds, losses, validation = [0], [0.0], [float(evaluate(params))], held_out(params)
    every = max(1, len(order) // evaluations)
    yield Curve(steps, seconds, losses, validation, params)
    while steps[-1] < len(order) and np.isfinite(losses[-1]):
        show(steps[-1], seconds[-1], losses[-1])
        chunk = range(steps[-1], min(steps[-1] + every, len(order)))
        jax.block_until_ready((params, opt_state))
        start = time.perf_counter()
        for i in chunk:
            params, opt_state, _ = compiled.step(
                params, opt_state, images, jnp.asarray(order[i]), jnp.int32(i), key
            )
        jax.block_until_ready((params, opt_state))
        seconds.append(seconds[-1] + time.perf_counter() - start)
        steps.append(chunk.stop)
        losses.append(float(evaluate(params)))
        validation += held_out(params)
        yield Curve(steps, seconds, losses, validation, params)
    show(steps[-1], seconds[-1], losses[-1])


def minibatches(count: int, batch_size: int, steps: int, seed: int) -> np.ndarray:
    """Indices (steps, batch_size): a fresh shuffle each epoch, the rest of an epoch dropped."""
    rng = np.random.default_rng(seed)
    each = count // batch_size
    epochs = [rng.permutation(count)[: each * batch_size] for _ in range(-(-steps // each))]
    return np.concatenate(epochs).astype(np.int32).reshape(-1, batch_size)[:steps]
