"""Pruned convolutional networks that run faster."""
