"""Benchmarks of neat-kernels against what a user would run instead."""
