"""Readers of data sets, one a file: ``read`` and ``categories``."""
