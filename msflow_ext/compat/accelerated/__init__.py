"""The parts of ``accelerate``: fast forwards, the change of class, and the comparison."""
