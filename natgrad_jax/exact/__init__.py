"""The Fisher without approximation: as a matrix, as products with vectors, and solved with."""
