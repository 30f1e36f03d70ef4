"""The benchmark suite: `python -m benchmarks`, or `pytest benchmarks --benchmark-only`; see README.md."""
