"""Factorisations that failed, tried again with more damping."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax.linalg.batching import over_batch

ATTEMPTS = 8
RAISED = 10.0


class Retried(NamedTuple):
    """``solution``: the last result; ``failures``: how often each matrix failed, int32
    ``(*batch,)``."""

    solution: jax.Array
    failures: jax.Array


def raised(
    factor: jax.Array,
    damping: jax.Array,
    *,
    op: Callable[[jax.Array, jax.Array], jax.Array],
) -> Retried:
    """``op(factor, damping)``, the damping of a matrix raised tenfold until its result is finite.

    In float32 a damping below a factor's rounding (its largest eigenvalue times 1e-7) may leave it
    indefinite. Seven times at most; where that does not help the result is not finite.

    Args:
      factor: ``(*batch, n, n)``; damping: ``(*batch,)``, positive.
      op: gives an array ``(*batch, n, m)``, of each matrix on its own.

    Returns:
      The result, and how often each matrix failed.

    >>> import jax.numpy as jnp
    >>> from natgrad_jax.linalg.cholesky import damped_inverse
    >>> indefinite = jnp.diag(jnp.array([1.0, -0.5]))
    >>> found, failures = raised(indefinite, jnp.array(0.1), op=damped_inverse)
    >>> print(found.round(2), failures)
    [[0.5 0. ]
     [0.  2. ]] 1
    """
    return over_batch(lambda f, d: _raised(f, d, op), factor, damping)


def _raised(factor: jax.Array, damping: jax.Array, op: Any) -> Retried:
    def attempt(carry: Any) -> Any:
        damping, _, _, failures, attempts = carry
        found = op(factor, damping)
        failed = ~jnp.isfinite(found.sum((-2, -1)))
        damping = jnp.where(failed, RAISED * damping, damping)
        return damping, found, failed, failures + failed.astype(failures.dtype), attempts + 1

    def unfinished(carry: Any) -> jax.Array:
        _, _, failed, _, attempts = carry
        return jnp.any(failed) & (attempts < ATTEMPTS)

    # made of the damping, so that they vary over the same mesh axes as what replaces them
    none = damping * 0
    shape = jax.eval_shape(op, factor, damping)
    nothing = jnp.broadcast_to(none[..., None, None], shape.shape).astype(shape.dtype)
    failures, attempts = none.astype(jnp.int32), none.sum().astype(jnp.int32)
    start = (damping, nothing, none == 0, failures, attempts)
    _, found, _, failures, _ = jax.lax.while_loop(unfinished, attempt, start)
    return Retried(found, failures)
