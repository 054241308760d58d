"""Coordinates in which plain gradients are natural ones: whitened inputs and outputs (PRONG)."""
