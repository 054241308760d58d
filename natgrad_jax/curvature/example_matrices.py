"""Kronecker factors from the examples' own gradient matrices.

Where a loss differentiates its model, one kernel is used many times for each example, forwards and
backwards, and the uses cancel or reinforce one another. Their rows cannot be pooled then; the
examples' gradients ``Mₙ = Σ_u x_u g_uᵀ`` hold all of it. With E the mean over examples::

    W = (E[MᵀM] + ε)⁻¹,   A = E[M W Mᵀ],   V = (A + ε)⁻¹,   G = E[Mᵀ V M],
    F ≈ A ⊗ G · E‖M‖² / (tr A · tr G)

with each matrix in units of its mean eigenvalue: one step of the iteration whose fixed point is the
likeliest ``A ⊗ G`` of Gaussian matrices, from the partial trace ``E[MᵀM]``. It assumes that rows
and columns of M have separable correlations, and nothing of how derivatives were taken. Sources:
Dangel, Müller & Zeinhofer 2024 (K-FAC for derivatives); Dutilleul 1999 (the iteration).
"""

import jax
import jax.numpy as jnp

from natgrad_jax.curvature.layer_sums import Sums
from natgrad_jax.layers.layer import Layer
from natgrad_jax.linalg.gram import gram
from natgrad_jax.utils.precision import HIGHEST

# ε, in units of the mean eigenvalue: between 0.1 and 10 times as much changes little.
RIDGE = 1e-2


def sums_of_matrices(layer: Layer, M: jax.Array) -> Sums:
    """The sums whose factors are those above; ``M (N, *blocks, inputs + bias, outputs)``."""
    rows = jnp.swapaxes(M, -1, -2)
    R = _gram(rows)
    A = _gram(_whitened(M, R))
    G = _gram(_whitened(rows, A))
    total = jnp.trace(R, axis1=-2, axis2=-1)[..., None, None]
    scale = jnp.sqrt(total * len(M))
    A, G = (_unit(x) / x.shape[-1] * scale for x in (A, G))
    assert layer.output_side is not None
    first = M.reshape(len(M), -1)[:, 0]
    count = jnp.sum((first == first) | True, dtype=M.dtype)
    return Sums(layer.input_side.narrow(A), layer.output_side.narrow(G), count)


def _gram(M: jax.Array) -> jax.Array:
    """``Σ M Mᵀ``."""
    return gram(jnp.moveaxis(M, -1, 1), M.dtype)


def _whitened(M: jax.Array, R: jax.Array) -> jax.Array:
    """``M (R + ε)^{-1/2}``, from the right, up to a rotation."""
    n = R.shape[-1]
    L = jnp.linalg.cholesky(_unit(R) + RIDGE * jnp.eye(n, dtype=R.dtype))
    flat = jnp.moveaxis(M, 0, -3)  # (*blocks, N, rows, columns)
    columns = flat.reshape(*flat.shape[:-3], -1, n).mT
    solved = jax.scipy.linalg.solve_triangular(L, columns, lower=True).mT
    return jnp.moveaxis(solved.reshape(flat.shape), -3, 0)


def _unit(R: jax.Array) -> jax.Array:
    """A matrix in units of its mean eigenvalue; zero stays zero."""
    mean = jnp.trace(R, axis1=-2, axis2=-1)[..., None, None] / R.shape[-1]
    return R / jnp.where(mean > 0, mean, 1)


def outer_products(layer: Layer, inputs: jax.Array, outputs: jax.Array) -> jax.Array:
    """``Mₙ`` of one use from rows ``(N, T, *blocks, ·)``."""
    pair = (x.astype(layer.factor_dtype) for x in (inputs, outputs))
    return jnp.einsum("nt...i,nt...o->n...io", *pair, precision=HIGHEST)
