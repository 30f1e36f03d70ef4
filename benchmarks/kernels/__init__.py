"""Single operations and metrics, compared with PyTorch and scikit-learn."""
