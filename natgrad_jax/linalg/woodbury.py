"""Update an inverse after a change of rank one or of rank B, without a new inversion."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from natgrad_jax.linalg import nystrom
from natgrad_jax.linalg.batching import over_batch, trace_of
from natgrad_jax.utils.precision import HIGHEST


def sherman_morrison(
    inverse: Float[Array, "*batch n n"], u: Float[Array, "*batch n"], decay: Float[Array, ""]
) -> Float[Array, "*batch n n"]:
    """``(δ M + (1 − δ) u uᵀ)⁻¹`` from ``P = M⁻¹``, in ``4 n²`` operations.

    ``P/δ − (1−δ) (Pu)(Pu)ᵀ / (δ (δ + (1−δ) uᵀPu))``.

    Args:
      inverse: P, ``(*batch, n, n)``, symmetric.
      u: ``(*batch, n)``.
      decay: δ, a scalar in (0, 1].

    Source: Sherman & Morrison 1950; Amari, Park & Fukumizu 2000 for natural gradients.

    >>> import jax.numpy as jnp
    >>> sherman_morrison(jnp.eye(2), jnp.array([1.0, 0.0]), jnp.array(0.5))
    Array([[1., 0.],
           [0., 2.]], dtype=float32)
    """
    return woodbury(inverse, u[..., None], decay)


def woodbury(
    inverse: Float[Array, "*batch n n"],
    U: Float[Array, "*batch n B"],
    decay: Float[Array, ""] | Float[Array, "*batch 1 1"],
) -> Float[Array, "*batch n n"]:
    """``(δ M + (1 − δ) U Uᵀ)⁻¹`` from ``P = M⁻¹``, in ``4 n² B + B³`` operations.

    ``P/δ − (1−δ)/δ² · PU (I + (1−δ)/δ · UᵀPU)⁻¹ UᵀP``.

    Args:
      inverse: P, ``(*batch, n, n)``, symmetric.
      U: ``(*batch, n, B)``.
      decay: δ in (0, 1], a scalar or ``(*batch, 1, 1)``.

    Source: Woodbury 1950.

    >>> import jax.numpy as jnp
    >>> woodbury(jnp.eye(2), jnp.eye(2), jnp.array(0.5))
    Array([[1., 0.],
           [0., 1.]], dtype=float32)
    """
    decay = jnp.asarray(decay, inverse.dtype)
    ratio = (1 - decay) / decay
    PU = jnp.matmul(inverse, U, precision=HIGHEST)
    eye = jnp.eye(U.shape[-1], dtype=U.dtype)
    inner = eye + ratio * jnp.matmul(U.mT, PU, precision=HIGHEST)
    half = over_batch(_half, inner, PU.mT)
    return inverse / decay - ratio / decay * jnp.matmul(half.mT, half, precision=HIGHEST)


def _half(
    inner: Float[Array, "*batch B B"], right: Float[Array, "*batch B n"]
) -> Float[Array, "*batch B n"]:
    """``L⁻¹ R``, where ``L Lᵀ = inner`` and R is ``right``."""
    return jax.scipy.linalg.solve_triangular(jnp.linalg.cholesky(inner), right, lower=True)


def root(factor: Float[Array, "*batch n n"], rank: int) -> Float[Array, "*batch n rank"]:
    """U with ``U Uᵀ ≈ F``, exact if the rank of F is at most ``rank``.

    The Nyström approximation from a random subspace Ω: ``Y = F Ω``, ``U = Y chol(ΩᵀY)⁻ᵀ``, in
    ``4 n² rank`` operations. As in Tropp et al., F is shifted by about its rounding error first.

    Source: Tropp, Yurtsever, Udell & Cevher 2017, algorithm 3.

    >>> import jax.numpy as jnp
    >>> root(jnp.diag(jnp.array([4.0, 0.0])), 1).round(2) ** 2
    Array([[4.],
           [0.]], dtype=float32)
    """
    n = factor.shape[-1]
    test = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (n, rank), factor.dtype))[0]
    return nystrom.root(jnp.matmul(factor, test, precision=HIGHEST), test, trace_of(factor))
