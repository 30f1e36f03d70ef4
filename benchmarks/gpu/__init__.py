"""Measurements on a GPU, and the registers and memory of the compiled CUDA kernels."""
