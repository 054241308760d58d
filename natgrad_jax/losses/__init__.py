"""Losses, the distributions behind them, and the output cotangents that measure curvature."""
