"""Sparse formats: frozen records of tensors, torch and NumPy only, any device."""
