"""Run an algorithm over a batch of small matrices, as each platform does it best."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

T = TypeVar("T")  # a pytree of arrays


def over_batch(
    op: Callable[..., T], matrices: Float[Array, "*batch n m"], *others: Shaped[Array, "..."]
) -> T:
    """``op(matrices, *others)``; all arguments and results have the same batch axes in front.

    On CPU ``op`` runs on one matrix after another: batched LAPACK calls split their batch over the
    threads that also run the program itself, and several such calls can deadlock (seen on two cores
    with jax 0.10.2, eight Cholesky factorisations of 16 × 128 × 128). On other platforms it is one
    batched call.
    """
    lead = matrices.ndim - 2
    if lead == 0:
        return op(matrices, *others)

    def one_by_one(*arrays: Shaped[Array, "..."]) -> T:
        flat = [x.reshape(-1, *x.shape[lead:]) for x in arrays]
        found = jax.lax.map(lambda elements: op(*elements), tuple(flat))
        return jax.tree.map(lambda x: x.reshape(*matrices.shape[:lead], *x.shape[1:]), found)

    return jax.lax.platform_dependent(matrices, *others, cpu=one_by_one, default=op)


def trace_of(x: Float[Array, "*batch n n"]) -> Float[Array, "*batch"]:
    """The trace; it reads n numbers of a matrix, where ``jnp.trace`` writes n × n."""
    n = x.shape[-1]
    return x.reshape(*x.shape[:-2], n * n)[..., :: n + 1].sum(-1)


def run_time_indices(count: int) -> list[Int[Array, ""]]:
    """0, 1, 2, … as numbers that the compiler does not know: what differs in an index alone is then
    compiled once. 72 elements of an array, each with some arithmetic, take 0.3 s instead of 2."""
    if count == 0:
        return []
    zeros, known = ([jnp.int32(k) for k in each] for each in ([0] * count, range(count)))
    # it keeps a loop that runs twice, whatever is in it
    again = lambda carry: (carry[0] + 1, known)
    return jax.lax.while_loop(lambda carry: carry[0] < 2, again, (jnp.int32(0), zeros))[1]


def element(x: Shaped[Array, "count ..."], index: Int[Array, ""]) -> Shaped[Array, "..."]:
    """``x[index]``."""
    return jax.lax.dynamic_index_in_dim(x, index, 0, keepdims=False)
