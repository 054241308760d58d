"""Retry failed factorisations with more damping."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from natgrad_jax.linalg.batching import over_batch

ATTEMPTS = 8
RAISED = 10.0  # the factor by which a retry multiplies the damping

# From a factor and its damping to the result, for each matrix of the batch independently.
Solver = Callable[[Float[Array, "*batch n n"], Float[Array, "*batch"]], Float[Array, "*batch n m"]]


class Retried(NamedTuple):
    """``solution``: the last result. ``failures``: the number of failures of each matrix."""

    solution: Float[Array, "*batch n m"]
    failures: Int[Array, "*batch"]


def raised(
    factor: Float[Array, "*batch n n"], damping: Float[Array, "*batch"], *, op: Solver
) -> Retried:
    """``op(factor, damping)``, with ten times the damping after each result that is not finite.

    In float32 a matrix can stay indefinite if its damping is smaller than the rounding errors of
    its factor, about 1e-7 times the largest eigenvalue. There are at most seven retries, for each
    matrix of the batch on its own; the result is not finite if all fail.

    Args:
      factor: ``(*batch, n, n)``.
      damping: ``(*batch,)``, positive.
      op: returns ``(*batch, n, m)``; it solves each matrix independently.

    Returns:
      The result, and the number of failures of each matrix, int32 ``(*batch,)``.

    >>> import jax.numpy as jnp
    >>> from natgrad_jax.linalg.cholesky import damped_inverse
    >>> indefinite = jnp.diag(jnp.array([1.0, -0.5]))
    >>> found, failures = raised(indefinite, jnp.array(0.1), op=damped_inverse)
    >>> print(found.round(2), failures)
    [[0.5 0. ]
     [0.  2. ]] 1
    """
    return over_batch(lambda f, d: _raised(f, d, op), factor, damping)


# The damping, the result, whether it failed, the number of failures, and of attempts.
State = tuple[
    Float[Array, "*batch"],
    Float[Array, "*batch n m"],
    Bool[Array, "*batch"],
    Int[Array, "*batch"],
    Int[Array, ""],
]


def _raised(
    factor: Float[Array, "*batch n n"], damping: Float[Array, "*batch"], op: Solver
) -> Retried:
    def attempt(state: State) -> State:
        damping, _, _, failures, attempts = state
        found = op(factor, damping)
        failed = ~jnp.isfinite(found.sum((-2, -1)))
        damping = jnp.where(failed, RAISED * damping, damping)
        return damping, found, failed, failures + failed.astype(failures.dtype), attempts + 1

    def unfinished(state: State) -> Bool[Array, ""]:
        _, _, failed, _, attempts = state
        return jnp.any(failed) & (attempts < ATTEMPTS)

    # computed from the damping: inside shard_map a carry must vary over the same mesh axes
    none = damping * 0
    shape = jax.eval_shape(op, factor, damping)
    nothing = jnp.broadcast_to(none[..., None, None], shape.shape).astype(shape.dtype)
    failures, attempts = none.astype(jnp.int32), none.sum().astype(jnp.int32)
    start = (damping, nothing, none == 0, failures, attempts)
    _, found, _, failures, _ = jax.lax.while_loop(unfinished, attempt, start)
    return Retried(found, failures)
