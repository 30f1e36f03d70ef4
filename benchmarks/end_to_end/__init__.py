"""Flows, whole models and training, compared with what users would run instead."""
