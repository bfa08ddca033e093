"""How fast the package is, and how it compares: ``python -m benchmarks.run --help``."""
