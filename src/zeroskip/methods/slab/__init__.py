"""Sparse matrix product with the input in slabs of shared memory."""
