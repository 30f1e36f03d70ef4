"""What ``accelerate`` is made of: fast forwards, the change of class, the comparison."""
