"""The Fisher without approximation: as a matrix, in products with vectors, and inverted."""
