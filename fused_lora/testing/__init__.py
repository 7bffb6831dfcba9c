"""Helpers for tests and benchmarks: numeric.py compares with float64, interpreter.py checks kernels on the CPU."""
