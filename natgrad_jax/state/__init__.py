"""Optimizer states: the clock in each, the walk that finds them, accessors, checkpoints."""
