"""LoRA terms of a batch whose rows have different adapters."""
