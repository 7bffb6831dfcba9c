"""Which rows of a batch use which adapters, and how the layers get to know it."""
