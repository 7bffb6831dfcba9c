"""The LoRA term alone, onto a base output that somebody else computed."""
