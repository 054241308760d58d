"""Natural-gradient training for Flax models, as pure functions behind optax transformations."""

from natgrad_jax import diagnostics
from natgrad_jax.distributions import Bernoulli, Categorical, Gaussian
from natgrad_jax.layer import Layer
from natgrad_jax.layers import Layers
from natgrad_jax.losses import Loss
from natgrad_jax.quadratic import (
    fisher,
    fisher_diagonal,
    fisher_vector_product,
    gauss_newton_vector_product,
)
from natgrad_jax.readers import bases, damping, factors
from natgrad_jax.statistics import Statistics, value_and_grad
from natgrad_jax.tagging import UncoveredWarning, find_layers
from natgrad_jax.train_state import TrainState
from natgrad_jax.transforms.ekfac import EKFACState, ekfac, scale_by_ekfac
from natgrad_jax.transforms.kfac import KFACState, kfac, scale_by_kfac

__all__ = [
    "Bernoulli",
    "Categorical",
    "EKFACState",
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
    "diagnostics",
    "ekfac",
    "factors",
    "find_layers",
    "fisher",
    "fisher_diagonal",
    "fisher_vector_product",
    "gauss_newton_vector_product",
    "kfac",
    "scale_by_ekfac",
    "scale_by_kfac",
    "value_and_grad",
]
