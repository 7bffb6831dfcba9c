"""Base layers under LoRA: what each kind of module answers, one file a kind, found by the module's type.

dense              nn.Linear and transformers' Conv1D: one operator for base and adapters
bitsandbytes_4bit  Linear4bit: the same over a weight that is dequantised for each product
bitsandbytes_8bit  Linear8bitLt: its own call, the terms added to its output; a merge quantises again
transformers_fp8   FP8Linear of transformers: as Linear8bitLt
torchao            nn.Linear whose weight is a quantised tensor of torchao: as 4 bits
experts            stacked experts of transformers: grouped products, and merges expert by expert
foreign            any other module that maps [..., K] to [..., N]: it is called, and the terms are added to its output
"""

from fused_lora.bases import bitsandbytes_4bit, bitsandbytes_8bit, dense, experts, foreign, torchao, transformers_fp8
from fused_lora.bases.base import Adapters, Base, base_of, register

__all__ = [
    "Adapters",
    "Base",
    "base_of",
    "bitsandbytes_4bit",
    "bitsandbytes_8bit",
    "dense",
    "experts",
    "foreign",
    "register",
    "torchao",
    "transformers_fp8",
]
