"""Losses, their predictive distributions, and the cotangents of outputs that measure curvature."""
