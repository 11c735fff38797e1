"""Workloads and statistics of the benchmarks. Nothing here does I/O but reading files."""
