"""Read and write checkpoints of other packages."""
