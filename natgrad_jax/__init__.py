"""Natural-gradient training for Flax models, as pure functions behind optax transformations."""

from natgrad_jax.distributions import Bernoulli, Categorical, Gaussian
from natgrad_jax.layers import Layer, Layers
from natgrad_jax.losses import Loss
from natgrad_jax.readers import bases, damping, factors
from natgrad_jax.statistics import Statistics, value_and_grad
from natgrad_jax.tagging import UncoveredWarning, find_layers
from natgrad_jax.train_state import TrainState
from natgrad_jax.transforms.kfac import KFACState, kfac, scale_by_kfac

__all__ = [
    "Bernoulli",
    "Categorical",
    "Gaussian",
    "KFACState",
    "Layer",
    "Layers",
    "Loss",
    "Statistics",
    "TrainState",
    "UncoveredWarning",
    "bases",
    "damping",
    "factors",
    "find_layers",
    "kfac",
    "scale_by_kfac",
    "value_and_grad",
]
