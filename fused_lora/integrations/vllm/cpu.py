"""vLLM's LoRA wrapper on a CPU."""

from __future__ import annotations

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from fused_lora.integrations.vllm.terms import EagerTerms
from fused_lora.integrations.vllm.wrapper import Grouped
from fused_lora.ops import native


class GroupedWrapperCPU(Grouped, PunicaWrapperCPU):
    """Rows by adapter, products in fp32, one rounding. Adapters are held in fp32 where a product would convert them."""

    kernels = f"{native.describe()}, in fp32"

    def new_terms(self) -> EagerTerms:
        """The terms of one kind of rows."""
        return EagerTerms(torch.device(self.device))

    def adapter_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """What adapters of this dtype are held in."""
        return dtype if dtype in native.TYPES and native.usable() else torch.promote_types(dtype, torch.float32)
