"""PRONG: gradient descent in whitened coordinates (Natural Neural Networks)."""

import optax

from natgrad_jax.layers.approximation import Approximation
from natgrad_jax.layers.collection import Layers, check_layers
from natgrad_jax.transforms.common.chain import descent, trace
from natgrad_jax.transforms.common.options import renamed_keywords
from natgrad_jax.transforms.common.refresh_schedule import Refresh
from natgrad_jax.transforms.in_coordinates import in_coordinates
from natgrad_jax.utils.hyperparams import Scalar


@renamed_keywords
def prong(
    learning_rate: Scalar, layers: Layers, *, epsilon: Scalar = 1e-2, plus: bool = False,
    decay: Scalar = 0.95, statistics_period: Scalar | None = None,
    refresh_period: Scalar | None = None, samples: Scalar | None = None,
    momentum: Scalar | None = 0.9, nesterov: bool = False, weight_decay: Scalar = 0.0,
    on_refresh: str = "transport", approximation: Approximation | str = "sua",
    refresh: Refresh | str | None = None, rank: int | None = None,
) -> optax.GradientTransformationExtraArgs:  # fmt: skip
    """Gradient descent with momentum in coordinates in which every layer's inputs are white.

    ``V ← V − η ∂ℓ/∂V``, ``d ← d − η ∂ℓ/∂d`` in ``s = (U (h − c)) V + d``. In canonical coordinates
    this multiplies the gradient of ``K̄ = [K; b]`` by ``Ā⁻¹`` (for ε = 0): K-FAC with ``G = I``,
    with momentum in the whitened space. ``plus`` (PRONG+) also keeps each whitened unit's variance
    at 1 on every batch. No Fisher pass is needed, and with ``opt_state`` none is made.

    :func:`in_coordinates` around ``optax.trace(momentum)``, then ``weight_decay · params`` added
    (in the coordinates), then the learning rate.

    Args:
      learning_rate: η, a float, an array or a schedule.
      layers: from :func:`natgrad_jax.find_layers`.
      epsilon, decay, statistics_period, refresh_period, samples, on_refresh, approximation,
        refresh, rank: as in :func:`in_coordinates`.
      plus: PRONG+ instead of PRONG.
      momentum: decay of the trace of whitened gradients; None: no momentum.
      nesterov: Nesterov's momentum, as in ``optax.sgd``.
      weight_decay: per step, times the learning rate.

    Returns:
      A transformation with ``update(grads, state, params, *, statistics)``.

    Raises:
      ValueError: as :func:`in_coordinates`.

    Source: Desjardins et al. 2015, algorithm 1 (PRONG) and section 3.3 (PRONG+).

    >>> import natgrad_jax as ng
    >>> tx = ng.prong(0.1, ng.Layers({}))
    """
    check_layers(layers)
    return in_coordinates(
        descent(optax.identity(), layers, learning_rate, trace(momentum, nesterov), weight_decay),
        layers,
        "whitening_plus" if plus else "whitening",
        epsilon=epsilon,
        decay=decay,
        statistics_period=statistics_period,
        refresh_period=refresh_period,
        samples=samples,
        on_refresh=on_refresh,
        approximation=approximation,
        refresh=refresh,
        rank=rank,
    )
