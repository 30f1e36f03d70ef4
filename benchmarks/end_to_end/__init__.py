"""Flows, whole models and training, compared with alternatives that users would run."""
