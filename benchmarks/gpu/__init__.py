"""What only a GPU can show, and what the compiler made of the CUDA kernels."""
