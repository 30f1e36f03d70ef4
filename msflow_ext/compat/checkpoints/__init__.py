"""Checkpoints of other packages, read and written."""
