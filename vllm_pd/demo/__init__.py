"""The demo model, and untrained models of any size for tests and benchmarks."""
