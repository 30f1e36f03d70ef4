"""Optimized heads and backbones for inference, the results of ``optimize()``."""
