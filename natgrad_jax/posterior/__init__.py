"""Curvature beyond training: its inverse, samples of a Laplace posterior, evidence, influence."""

from natgrad_jax.posterior.evidence import log_determinant, log_marginal_likelihood
from natgrad_jax.posterior.from_batches import from_data
from natgrad_jax.posterior.from_optimizer import from_state
from natgrad_jax.posterior.influences import influence
from natgrad_jax.posterior.laplace import sample
from natgrad_jax.posterior.powers import power, solve
from natgrad_jax.posterior.record import Curvature, select

__all__ = [
    "Curvature",
    "from_data",
    "from_state",
    "influence",
    "log_determinant",
    "log_marginal_likelihood",
    "power",
    "sample",
    "select",
    "solve",
]
