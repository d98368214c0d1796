"""Sputnik's sparse matrix product: one-dimensional tiles, subwarps, reverse-offset alignment, row swizzle."""
