"""Tagging: which equations of the traced loss use which parameter, and which form one layer."""

from natgrad_jax.tagging.find import UncoveredWarning, find_layers

__all__ = ["UncoveredWarning", "find_layers"]
