"""Benchmarks: lm-eval's tasks and groups, and where their data comes from."""
