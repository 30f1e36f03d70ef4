"""Long measurements that are no race between providers: accuracy, ablations, memory, throughput under load."""
