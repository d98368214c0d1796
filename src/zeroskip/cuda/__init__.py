"""CUDA C++ at run time: template instances compiled by NVRTC, kept in the user's cache, launched on torch's streams."""
