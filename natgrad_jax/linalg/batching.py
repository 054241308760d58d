"""Batches of small matrices, as each platform takes them."""

from collections.abc import Callable
from typing import Any

import jax


def over_batch(op: Callable[..., Any], matrices: jax.Array, *others: jax.Array) -> Any:
    """``op(matrices, *others)``, where all have the batch axes of ``matrices`` ``(*batch, n, n)``.

    On CPU one matrix after the other: batched LAPACK calls divide their batch among the threads
    that run the program itself, and several at once wait for one another for ever (seen on two
    cores with jax 0.10.2, eight Cholesky factorisations of 16 × 128 × 128). Elsewhere as one
    batched call.
    """
    lead = matrices.ndim - 2
    if lead == 0:
        return op(matrices, *others)

    def one_by_one(*arrays: jax.Array) -> Any:
        flat = [x.reshape(-1, *x.shape[lead:]) for x in arrays]
        found = jax.lax.map(lambda pair: op(*pair), tuple(flat))
        return jax.tree.map(lambda x: x.reshape(*matrices.shape[:lead], *x.shape[1:]), found)

    return jax.lax.platform_dependent(matrices, *others, cpu=one_by_one, default=op)


def trace_of(x: jax.Array) -> jax.Array:
    """``(*batch, n, n)`` → ``(*batch,)``, reading n numbers where ``jnp.trace`` writes n × n."""
    n = x.shape[-1]
    return x.reshape(*x.shape[:-2], n * n)[..., :: n + 1].sum(-1)
