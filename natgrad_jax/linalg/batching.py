"""Run an algorithm over a batch of small matrices, as each platform does it best."""

from collections.abc import Callable
from typing import TypeVar

import jax
from jaxtyping import Array, Float, Shaped

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
