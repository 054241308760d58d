"""Natural-gradient training for JAX models, as pure functions behind optax transformations."""

import importlib
import typing

from natgrad_jax import diagnostics, posterior
from natgrad_jax.curvature.eigenbases import Eigenbasis
from natgrad_jax.curvature.inverse_methods import Cholesky, Eigh, LowRank, NewtonSchulz, Woodbury
from natgrad_jax.diagnostics.rank import rank_for
from natgrad_jax.exact.conjugate_gradients import natural_gradient
from natgrad_jax.exact.explicit_fisher import fisher, fisher_diagonal
from natgrad_jax.exact.matvec import (
    fisher_vector_product,
    gauss_newton_vector_product,
    quadratic_forms,
)
from natgrad_jax.layers.approximation import Approximation
from natgrad_jax.layers.collection import Layers
from natgrad_jax.layers.layer import Layer
from natgrad_jax.losses.distributions import Bernoulli, Categorical, Gaussian
from natgrad_jax.losses.likelihood import Distribution, loss
from natgrad_jax.losses.other_distributions import (
    Beta,
    GaussianMixture,
    NegativeBinomial,
    Poisson,
    VonMises,
)
from natgrad_jax.losses.other_libraries import from_distribution
from natgrad_jax.losses.terms import Loss
from natgrad_jax.reparametrization.coordinates import Coordinates
from natgrad_jax.reparametrization.modules import WhitenedConv, WhitenedDense
from natgrad_jax.reparametrization.parameters import (
    unwhiten,
    whiten,
    whitening,
    whitening_variables,
)
from natgrad_jax.state.accessors import bases, damping, factors
from natgrad_jax.state.checkpoints import check_state, restore_state
from natgrad_jax.state.train_state import TrainState
from natgrad_jax.statistics.accumulation import accumulate
from natgrad_jax.statistics.batch_statistics import Statistics
from natgrad_jax.statistics.fisher_rows import Rows
from natgrad_jax.statistics.grad import value_and_grad
from natgrad_jax.tagging import UncoveredWarning, find_layers
from natgrad_jax.tracing.mark import as_layer
from natgrad_jax.transforms.adaptive_damping import (
    AdaptiveDampingState,
    DampingRule,
    adaptive_damping,
    bernacchia,
    levenberg_marquardt,
)
from natgrad_jax.transforms.adaptive_kfac import adaptive_kfac
from natgrad_jax.transforms.common.kronecker import KFACState
from natgrad_jax.transforms.common.refresh_schedule import every, staggered
from natgrad_jax.transforms.common.trust_radius import PerExample
from natgrad_jax.transforms.ekfac import EKFACState, ekfac, scale_by_ekfac
from natgrad_jax.transforms.exact_ngd import ExactNGDState, exact_ngd, scale_by_exact_ngd
from natgrad_jax.transforms.in_coordinates import InCoordinatesState, in_coordinates
from natgrad_jax.transforms.kfac import kfac, scale_by_kfac
from natgrad_jax.transforms.ngd import linear_natural_gradient, ngd
from natgrad_jax.transforms.prong import prong
from natgrad_jax.transforms.quadratic_model import QuadraticModelState, scale_by_quadratic_model
from natgrad_jax.transforms.shampoo import ShampooState, scale_by_shampoo, shampoo
from natgrad_jax.transforms.soap import SOAPState, scale_by_soap, soap
from natgrad_jax.transforms.trust_region import clip_by_trust_radius

__version__ = "0.2.0.dev0"

__all__ = [
    "AdaptiveDampingState",
    "Approximation",
    "Bernoulli",
    "Beta",
    "Categorical",
    "Cholesky",
    "Coordinates",
    "DampingRule",
    "Distribution",
    "EKFACState",
    "Eigenbasis",
    "Eigh",
    "ExactNGDState",
    "Gaussian",
    "GaussianMixture",
    "InCoordinatesState",
    "KFACState",
    "Layer",
    "Layers",
    "Loss",
    "LowRank",
    "NegativeBinomial",
    "NewtonSchulz",
    "PerExample",
    "Poisson",
    "QuadraticModelState",
    "Rows",
    "SOAPState",
    "ShampooState",
    "Statistics",
    "TrainState",
    "UncoveredWarning",
    "VonMises",
    "WhitenedConv",
    "WhitenedDense",
    "Woodbury",
    "accumulate",
    "adaptive_damping",
    "adaptive_kfac",
    "as_layer",
    "bases",
    "bernacchia",
    "check_state",
    "clip_by_trust_radius",
    "damping",
    "diagnostics",
    "ekfac",
    "every",
    "exact_ngd",
    "factors",
    "find_layers",
    "fisher",
    "fisher_diagonal",
    "fisher_vector_product",
    "from_distribution",
    "gauss_newton_vector_product",
    "in_coordinates",
    "kfac",
    "levenberg_marquardt",
    "linear_natural_gradient",
    "loss",
    "natural_gradient",
    "ngd",
    "posterior",
    "prong",
    "quadratic_forms",
    "rank_for",
    "restore_state",
    "scale_by_ekfac",
    "scale_by_exact_ngd",
    "scale_by_kfac",
    "scale_by_quadratic_model",
    "scale_by_shampoo",
    "scale_by_soap",
    "shampoo",
    "soap",
    "staggered",
    "unwhiten",
    "value_and_grad",
    "whiten",
    "whitening",
    "whitening_variables",
]


if typing.TYPE_CHECKING:
    from natgrad_jax.diagnostics import plots as plots
else:  # hidden from type checkers, which would take any name to be defined

    def __getattr__(name):
        """``plots`` needs matplotlib, an optional dependency: it is imported on first use."""
        if name == "plots":
            return importlib.import_module("natgrad_jax.diagnostics.plots")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__", "plots"]
