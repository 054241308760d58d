"""Tagging: which parameters are which kind of layer, and the model with a tap at each of them."""

from natgrad_jax.tagging.find import UncoveredWarning, find_layers
from natgrad_jax.tagging.frontend import frontend_of

__all__ = ["UncoveredWarning", "find_layers", "frontend_of"]
