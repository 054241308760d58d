"""Curvature of one layer: sums, factors, damping, inverses, eigenbases; no state, no Flax."""
