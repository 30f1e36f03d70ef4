"""Parts of ``accelerate``: fast forwards, the change of class, the comparison."""
