"""Long measurements: accuracy, ablations, memory, and throughput under load."""
