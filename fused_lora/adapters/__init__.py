"""PEFT adapter checkpoints: strict reading, atomic writing."""

from fused_lora.adapters.checkpoint import Adapter, read_adapter
from fused_lora.adapters.errors import AdapterError
from fused_lora.adapters.pretrained import SavesAdapters
from fused_lora.adapters.read import load_adapter
from fused_lora.adapters.write import save_adapter

__all__ = ["Adapter", "AdapterError", "SavesAdapters", "load_adapter", "read_adapter", "save_adapter"]
