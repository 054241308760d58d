"""Brute force: Kronecker factors as explicit matrices over the layer's parameters.

Nothing here knows how a layer is arranged: patches and inputs come out of the Jacobian of the
layer's output by its own parameters, so that a wrong patch cannot agree with itself.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import natgrad_jax as ng
from natgrad_jax.layers.layer import Layer


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
    arrays = layer.from_matrix(places)
    leaves = {p.path[-1]: x for p, x in zip(layer.parameters, arrays, strict=True)}
    order = np.concatenate([np.ravel(leaves[k]) for k in sorted(params)])
    dense = np.zeros((size, size))
    n = shape[1] * shape[2]
    for b in range(len(A)):
        dense[b * n : (b + 1) * n, b * n : (b + 1) * n] = np.kron(A[b], G[b])
    return dense[np.ix_(order, order)]


def reduced(J: np.ndarray, g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Activations averaged, output gradients summed over positions."""
    return J.mean(1, keepdims=True), g.sum(1, keepdims=True)


def example_fisher(J: np.ndarray, g: np.ndarray, examples: float, seeds: np.ndarray) -> np.ndarray:
    """The Fisher itself: ``Σ v vᵀ / examples``, v the gradient of one example.

    ``seeds``: the example of each row of ``g``.
    """
    v = np.einsum("stbop,stbo->sp", J[seeds], g)
    return v.T @ v / examples


class Place(NamedTuple):
    """Where one parameter stands in its layer: what the approximations ask of it."""

    bias: bool
    block: int
    place: int
    channel: int
    output: int


def places(layer: Layer, params: Any) -> list[Place]:
    """Every flattened parameter's place. Rows are (place, channel) in that order, the bias last."""
    blocks, rows = max(int(np.prod(layer.blocks)), 1), layer.inputs + (layer.bias is not None)
    arrays_of = jax.jit(layer.from_matrix)
    shape = (*layer.blocks, rows, layer.outputs)
    channels = layer.inputs
    if layer.kind.startswith("conv"):
        channels = layer.layouts[0].split[layer.layouts[0].inputs[-1]]
    found = {}
    for i, grid in enumerate(np.indices((blocks, rows, layer.outputs))):
        arrays = arrays_of(grid.reshape(shape))
        leaves = {p.path[-1]: x for p, x in zip(layer.parameters, arrays, strict=True)}
        found[i] = np.concatenate([np.ravel(leaves[k]) for k in sorted(params)])

    def place(block: int, row: int, output: int) -> Place:
        bias = row == layer.inputs
        spatial = layer.inputs > channels
        at = (0, 0) if bias and spatial else divmod(row, channels) if not bias else (0, channels)
        return Place(bias, block, *at, output)

    return [place(*map(int, index)) for index in zip(*found.values(), strict=True)]


def approximate(F: np.ndarray, at: list[Place], convolution: str, group: int | None) -> np.ndarray:
    """An explicit ``A ⊗ G`` with the patterns of SUA and groups zeroed, and SUA's places averaged.

    The bias of a convolution stands apart, that of a dense layer is one more channel.
    """
    spatial = len({p.place for p in at}) > 1
    bias, block, place, channel, output = (np.array([p[i] for p in at]) for i in range(5))
    same = lambda x: x[:, None] == x
    kept = same(block)
    if group is not None:
        kept &= same(channel // group) & same(output // group)
    if spatial and (group is not None or convolution == "sua"):
        kept &= same(bias)
    if not (spatial and convolution == "sua"):
        return np.where(kept, F, 0)
    F = np.where(kept & same(place), F, 0)
    # elements that differ in nothing but their place share the mean over places
    out, keys = np.zeros_like(F), {}
    for i, p in enumerate(at):
        keys[p] = i
    count = place.max() + 1
    for i, p in enumerate(at):
        for j, q in enumerate(at):
            if F[i, j] == 0 or p.place != q.place:
                continue
            if p.bias:
                out[i, j] = F[i, j]
                continue
            moved = [(keys[p._replace(place=k)], keys[q._replace(place=k)]) for k in range(count)]
            out[i, j] = np.mean([F[a, b] for a, b in moved])
    return out


def damped(layer: Layer, factors: Any, F: np.ndarray, damping: float, params: Any) -> np.ndarray:
    """``(A + π√λ I) ⊗ (G + √λ/π I)`` block by block, or ``F + λ I`` for one matrix, explicitly.

    From the explicit ``F = A ⊗ G``: its partial traces are the factors, up to a scale that
    cancels, and so are their mean eigenvalues.
    """
    eye = np.eye(len(F))
    if factors.G is None:
        return F + damping * eye
    at = places(layer, params)
    block, output = (np.array([p[i] for p in at]) for i in (1, 4))
    row = np.array([hash((p.bias, p.place, p.channel)) for p in at])
    out = np.zeros_like(F)
    for b in np.unique(block):
        index = np.where(block == b)[0]
        order = index[np.lexsort((output[index], row[index]))]
        n = len(np.unique(output[index]))
        m = len(order) // n
        T = F[np.ix_(order, order)].reshape(m, n, m, n)
        A, G = np.einsum("iojo->ij", T), np.einsum("ioip->op", T)
        scale = np.trace(A)
        A, G = A / np.sqrt(scale), G / np.sqrt(scale)
        pi = np.sqrt((np.trace(A) / m) / (np.trace(G) / n))
        root = np.sqrt(damping)
        product = np.kron(A + pi * root * np.eye(m), G + root / pi * np.eye(n))
        out[np.ix_(order, order)] = product
    return out


def dense(layer: Layer, apply: Any, params: Any) -> np.ndarray:
    """A linear map of one layer's ``K̄`` as a matrix over the flattened parameters."""
    names = [p.path[-1] for p in layer.parameters]
    order = sorted(range(len(names)), key=names.__getitem__)
    sizes = [np.size(params[n]) for n in names]
    ends = np.cumsum(sizes)

    def of(vector: jax.Array) -> jax.Array:
        parts = jnp.split(vector, ends[:-1])
        arrays = [x.reshape(np.shape(params[n])) for x, n in zip(parts, names, strict=True)]
        mapped = layer.from_matrix(layer.unpack(apply(layer.pack(layer.to_matrix(*arrays)))))
        return jnp.concatenate([jnp.ravel(x) for x in mapped])

    columns = np.asarray(jax.jit(jax.vmap(of))(jnp.eye(sum(sizes)))).T
    starts = ends - np.array(sizes)
    index = np.concatenate([np.arange(starts[i], ends[i]) for i in order])
    return columns[np.ix_(index, index)]


def completed(basis: jax.Array) -> jax.Array:
    """Orthonormal columns, and any others that make the basis whole."""
    others = jnp.linalg.svd(basis, full_matrices=True)[0][..., basis.shape[-1] :]
    return jnp.concatenate([basis, others], axis=-1)


def seed_columns(distribution: Any) -> np.ndarray:
    """Roots of the output Hessians by ``jax.hessian`` and ``eigh``: ``(examples, columns, D)``."""

    def nll(z: jax.Array) -> jax.Array:
        one = distribution.with_outputs({distribution.first: z})
        target = jnp.zeros((), int) if isinstance(one, ng.Categorical) else jnp.zeros_like(z)
        return one.nll_per_example(target)

    natural = distribution.outputs[distribution.first]
    flat = natural.reshape(-1, natural.shape[-1])
    H = np.asarray(jax.vmap(jax.hessian(nll))(flat))
    values, vectors = np.linalg.eigh(H)
    return np.swapaxes(vectors * np.sqrt(np.maximum(values, 0))[:, None, :], 1, 2)


def relative(a: Any, b: Any) -> float:
    """``‖a − b‖ / ‖b‖``."""
    a, b = np.asarray(a), np.asarray(b)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))
