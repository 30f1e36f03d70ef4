"""Read data sets: one module for each, with ``read`` and ``categories``."""
