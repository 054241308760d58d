"""Natural-gradient training for Flax models, as pure functions behind optax transformations."""

from natgrad_jax import diagnostics
from natgrad_jax.coordinates import Coordinates
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
from natgrad_jax.transforms.in_coordinates import InCoordinatesState, in_coordinates
from natgrad_jax.transforms.kfac import KFACState, kfac, scale_by_kfac
from natgrad_jax.transforms.prong import prong
from natgrad_jax.whitened import (
    WhitenedConv,
    WhitenedDense,
    unwhiten,
    whiten,
    whitening,
    whitening_variables,
)

__all__ = [
    "Bernoulli",
    "Categorical",
    "Coordinates",
    "EKFACState",
    "Gaussian",
    "InCoordinatesState",
    "KFACState",
    "Layer",
    "Layers",
    "Loss",
    "Statistics",
    "TrainState",
    "UncoveredWarning",
    "WhitenedConv",
    "WhitenedDense",
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
    "in_coordinates",
    "kfac",
    "prong",
    "scale_by_ekfac",
    "scale_by_kfac",
    "unwhiten",
    "value_and_grad",
    "whiten",
    "whitening",
    "whitening_variables",
]
