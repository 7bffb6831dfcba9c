"""fused_lora: LoRA layers in one pass. Train, merge exactly, serve many adapters at once."""

__version__ = "0.1.0"
