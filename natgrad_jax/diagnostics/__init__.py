"""Diagnostics of the curvature: errors of approximations, spectra, and a report on training."""

from natgrad_jax.diagnostics.errors import approximation_error, dense, matrices
from natgrad_jax.diagnostics.reports import Report, report
from natgrad_jax.diagnostics.spectrum import Spectra, condition_number, fisher_spectra, spectra

__all__ = [
    "Report",
    "Spectra",
    "approximation_error",
    "condition_number",
    "dense",
    "fisher_spectra",
    "matrices",
    "report",
    "spectra",
]
