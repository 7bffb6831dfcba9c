"""Compile every kernel configuration ahead of time, without a GPU, and read the binaries."""
