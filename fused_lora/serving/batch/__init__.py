"""Which rows of a batch have which adapters, and how that reaches the layers."""
