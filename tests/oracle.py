"""Brute force: Kronecker factors as explicit matrices over the layer's parameters.

Nothing here knows how a layer is arranged: patches and inputs come out of the Jacobian of the
layer's output by its own parameters, so that a wrong patch cannot agree with itself.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import natgrad_jax as ng
from natgrad_jax.layers import Layer


def jacobians(
    output: Callable[[Any, jax.Array], jax.Array], params: Any, x: jax.Array, arrange: Any
) -> np.ndarray:
    """``∂s/∂θ`` of every example: ``(N, positions, blocks, outputs, parameters)``."""
    theta, unravel = ravel_pytree(params)
    one = lambda theta, x: output(unravel(theta), x[None])[0]
    s = jax.eval_shape(one, theta, x[0])
    index = arrange(np.arange(s.size).reshape(s.shape))
    full = jax.jit(jax.vmap(jax.jacrev(one), (None, 0)))(theta, x)
    return np.asarray(full).reshape(len(x), s.size, theta.size)[:, index]


def kronecker(J: np.ndarray, g: np.ndarray, examples: float) -> np.ndarray:
    """``Σ_b Σ v vᵀ / (rows · examples)``, ``v = J[n, t, b]ᵀ g[m, u, b]`` over all (n, t), (m, u).

    This is ``A ⊗ G`` block by block: activations and output gradients taken as independent.

    Args:
      J: ``(N, T, B, O, P)``; g: output gradients of the seeds, ``(seeds, T, B, O)``.
    """
    n, t, blocks, _, p = J.shape
    total = np.zeros((p, p))
    for b in range(blocks):
        rows, gradients = J[:, :, b].reshape(n * t, -1, p), g[:, :, b].reshape(-1, g.shape[-1])
        v = np.einsum("rop,so->rsp", rows, gradients).reshape(-1, p)
        total += v.T @ v
    return total / (n * t * examples)


def as_matrix(layer: Layer, A: jax.Array, G: jax.Array, params: Any) -> np.ndarray:
    """The library's ``A ⊗ G`` over the flattened parameters, to compare with :func:`kronecker`."""
    A, G = (np.asarray(f).reshape(-1, *f.shape[-2:]) for f in (A, G))
    shape = (len(A), A.shape[-1], G.shape[-1])
    size = int(np.prod(shape))

    # where each element of the matrices lies in the flattened parameters
    places = jnp.arange(size).reshape(*layer.blocks, *shape[1:])
    kernel, bias = layer.from_matrix(places)
    leaves = {"kernel": kernel} | ({} if bias is None else {"bias": bias})
    order = np.concatenate([np.ravel(leaves[k]) for k in sorted(params)])
    dense = np.zeros((size, size))
    n = shape[1] * shape[2]
    for b in range(len(A)):
        dense[b * n : (b + 1) * n, b * n : (b + 1) * n] = np.kron(A[b], G[b])
    return dense[np.ix_(order, order)]


def seed_columns(distribution: Any) -> np.ndarray:
    """Roots of the output Hessians by ``jax.hessian`` and ``eigh``: ``(examples, columns, D)``."""

    def nll(z: jax.Array) -> jax.Array:
        one = distribution.with_natural(z)
        target = jnp.zeros((), int) if isinstance(one, ng.Categorical) else jnp.zeros_like(z)
        return one.nll_per_example(target)

    flat = distribution.natural.reshape(-1, distribution.natural.shape[-1])
    H = np.asarray(jax.vmap(jax.hessian(nll))(flat))
    values, vectors = np.linalg.eigh(H)
    return np.swapaxes(vectors * np.sqrt(np.maximum(values, 0))[:, None, :], 1, 2)


def relative(a: Any, b: Any) -> float:
    """``‖a − b‖ / ‖b‖``."""
    a, b = np.asarray(a), np.asarray(b)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))
