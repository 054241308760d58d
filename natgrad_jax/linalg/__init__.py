"""Batched linear algebra on Kronecker factors, one algorithm in each file."""
