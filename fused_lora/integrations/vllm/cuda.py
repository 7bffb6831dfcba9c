"""vLLM's LoRA wrapper on an NVIDIA GPU."""

from __future__ import annotations

from typing import Any

import torch
from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU

from fused_lora.integrations.vllm.terms import KernelTerms
from fused_lora.integrations.vllm.wrapper import Grouped, log
from fused_lora.ops import guard
from fused_lora.ops.grouped.launch import DTYPES, MAX_RANK


class GroupedWrapperGPU(Grouped, PunicaWrapperGPU):
    """Two launches for a layer, over tables that a step fills without waiting for the device."""

    kernels = "Triton kernels grouped_shrink and grouped_expand"

    def new_terms(self) -> KernelTerms:
        """The terms of one kind of rows."""
        return KernelTerms(len(self._token_lora_indices), self.lora_config.max_loras, torch.device(self.device))

    def update_own(self, mapping: Any, lora_index_to_id: list, max_loras: int, vocab_size: int, **kwargs: Any) -> None:
        """What vLLM's wrapper does for a step, without the sorts that wait for the device if no layer needs them."""
        if self.leaves_some:
            super().update_own(mapping, lora_index_to_id, max_loras, vocab_size, **kwargs)
        else:
            self.is_prefill = mapping.is_prefill
            self._update_base_metadata(mapping, lora_index_to_id, max_loras, vocab_size)


def grouped_wrapper_gpu(*args: Any, **kwargs: Any) -> PunicaWrapperGPU:
    """Our wrapper; vLLM's own, with a warning, where the kernels cannot run or do not know the adapters' dtype or rank.

    args, kwargs: of both.
    """
    config, device = kwargs["lora_config"], torch.device(kwargs["device"] if "device" in kwargs else args[2])
    why = guard.why_not(device)
    if why is None and (config.lora_dtype not in DTYPES or config.max_lora_rank > MAX_RANK):
        why = f"there are no kernels for adapters of {config.lora_dtype} and rank {config.max_lora_rank}"
    if why is None:
        return GroupedWrapperGPU(*args, **kwargs)
    log.warning("fused_lora leaves LoRA to vLLM's own wrapper: %s", why)
    return PunicaWrapperGPU(*args, **kwargs)
