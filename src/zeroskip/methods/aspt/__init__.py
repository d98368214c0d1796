"""Adaptive sparse tiling in one pass."""
