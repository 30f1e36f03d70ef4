"""What ``optimize()`` returns: heads and backbones for inference."""
