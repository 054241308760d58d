"""Natural gradient descent that is exact in deep linear networks."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import DTypeLike

from natgrad_jax.curvature.factor_averages import stored_as
from natgrad_jax.curvature.inverse_methods import Eigh, Inverse, Woodbury
from natgrad_jax.layers.approximation import Approximation
from natgrad_jax.layers.collection import Layers, check_layers
from natgrad_jax.statistics.spec import StatisticsSpec, stride_of
from natgrad_jax.transforms.common.chain import descent, trace
from natgrad_jax.transforms.common.kronecker import kronecker
from natgrad_jax.transforms.common.options import (
    approximation_of,
    inverse_method,
    renamed_keywords,
)
from natgrad_jax.transforms.common.preconditioner import PreconditionerConfig
from natgrad_jax.transforms.common.refresh_schedule import Refresh, every, refresh_schedule
from natgrad_jax.transforms.common.trust_radius import PerExample, before_rate
from natgrad_jax.utils.hyperparams import Scalar, at, check_not_negative


@renamed_keywords
def ngd(
    learning_rate: Scalar, layers: Layers, *, damping: Scalar = 1e-3, decay: Scalar = 0.0,
    statistics_period: Scalar = 1, refresh_period: Scalar | None = None,
    momentum: Scalar | None = None, nesterov: bool = False, weight_decay: Scalar = 0.0,
    trust_radius: Scalar | PerExample | None = None, inverse: Inverse | str = "cholesky",
    approximation: Approximation | str = "kfc", refresh: Refresh | str | None = None,
    statistics_fraction: float | None = None, factor_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:  # fmt: skip
    """Natural gradient descent by the inverse covariances of each layer.

    For a network of L layers, α the learning rate::

        Δ = −(α / L) (A + √λ I)⁺ ∇K̄ (G + √λ I)⁺

    With λ = 0 and a linear network this is the natural gradient itself, although the Fisher is
    singular and not block-diagonal, and the excess loss falls as ``e^{−2αt}`` whatever the depth or
    the conditioning. Each step inverts the factors of its own batch (of about 1000 examples).

    Args:
      learning_rate: α, 1 in the paper's nonlinear networks.
      layers: from :func:`natgrad_jax.find_layers`; L counts those with a Kronecker block.
      damping: λ ≥ 0, in the units of the Fisher; 0 only with ``inverse="eigh"``.
      decay, statistics_period, approximation, refresh, factor_dtype: as in
        :func:`natgrad_jax.scale_by_kfac`; statistics_fraction too, but None is all examples.
      refresh_period: steps between inversions; None: 1.
      inverse: as in :func:`natgrad_jax.scale_by_kfac`; ``"eigh"`` gives Moore–Penrose inverses,
        :class:`~natgrad_jax.Woodbury` needs a ``decay``.
      momentum: decay of the trace of natural gradients; None: no momentum.
      nesterov: Nesterov's momentum, as in ``optax.sgd``.
      weight_decay: decoupled, per step, times α.
      trust_radius: κ, as in :func:`natgrad_jax.kfac`.

    Returns:
      A transformation with ``update(grads, state, params, *, statistics)``.

    Raises:
      ValueError: as :func:`natgrad_jax.scale_by_kfac`; λ = 0 without ``inverse="eigh"``.

    Source: Bernacchia, Lengyel & Hennequin 2018, equation 10 and section 5.

    >>> import natgrad_jax as ng
    >>> tx = ng.ngd(1.0, ng.Layers({}))
    """
    check_layers(layers)
    check_not_negative(damping=damping)
    method = inverse_method(inverse)
    if not isinstance(method, Eigh) and isinstance(damping, int | float) and damping == 0:
        raise ValueError(
            'damping=0 needs Moore–Penrose inverses: use inverse="eigh", or a positive damping.'
        )
    if isinstance(method, Woodbury) and isinstance(decay, int | float) and decay == 0:
        raise ValueError("ng.Woodbury updates a running inverse: give a decay, such as decay=0.95.")
    count = max(sum(layer.block == "kronecker" for layer in layers.values()), 1)
    config = PreconditionerConfig(
        "ngd",
        StatisticsSpec(
            approximation_of(approximation),
            stride=stride_of(statistics_fraction, 1),
            split="equal",
        ),
        damping,
        decay,
        statistics_period,
        refresh_schedule(refresh, refresh_period, every(1)),
        before_rate(trust_radius, learning_rate),
        stored_as(factor_dtype),
    )
    inner = kronecker(layers, config, method)
    rate = _over(learning_rate, count)
    return descent(inner, layers, rate, trace(momentum, nesterov), weight_decay)


def _over(value: Scalar, divisor: int) -> Scalar:
    if callable(value):
        return lambda step: at(value, step) / divisor
    return value / divisor


def linear_natural_gradient(
    kernels: list[jax.Array], x: jax.Array, error: jax.Array
) -> list[jax.Array]:
    """The natural gradient of a deep linear network, through pseudo-inverses of its weights.

    For ``ŷ = x W₁ ⋯ W_L`` with Gaussian outputs of variance 1 and the error ``ε = ŷ − y``, this
    is exactly ``(1 / L) A⁺ ∇ G⁺`` with the exact expectations::

        (1 / L) (C_iᵀ Σ C_i)⁺ C_iᵀ ⟨x ε⟩ B_i⁺,   C_i = W₁ ⋯ W_{i−1},   B_i = W_{i+1} ⋯ W_L

    that is, the error is propagated back through ``B_i⁺`` instead of ``B_iᵀ``.

    Args:
      kernels: ``W_i (n_{i−1}, n_i)``, in Flax's layout; x: ``(N, n₀)``; error: ``(N, n_L)``.

    Returns:
      A list like ``kernels``; descend by subtracting α times it.

    Source: Bernacchia, Lengyel & Hennequin 2018, equation 16.

    >>> import jax.numpy as jnp, natgrad_jax as ng
    >>> ng.linear_natural_gradient([jnp.eye(2)], jnp.eye(2), jnp.eye(2))[0].round(3)
    Array([[1., 0.],
           [0., 1.]], dtype=float32)
    """
    count, found = len(kernels), []
    for i, kernel in enumerate(kernels):
        inputs = x
        for before in kernels[:i]:
            inputs = inputs @ before
        after = jnp.eye(kernel.shape[1], dtype=kernel.dtype)
        for later in kernels[i + 1 :]:
            after = after @ later
        moment = inputs.T @ inputs / len(x)
        cross = inputs.T @ error / len(x)
        found.append(_pinv(moment) @ cross @ _pinv(after) / count)
    return found


def _pinv(matrix: jax.Array) -> Any:
    return jnp.linalg.pinv(matrix, rtol=max(matrix.shape) * 10 * jnp.finfo(matrix.dtype).eps)
