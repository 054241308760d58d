"""Linear algebra on factors, one algorithm a file."""
