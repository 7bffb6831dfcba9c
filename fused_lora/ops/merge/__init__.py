"""Merging an adapter into a weight, and restoring the original bits."""
