"""Depthwise convolution on NVIDIA GPUs.  See README.md."""
