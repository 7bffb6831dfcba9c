"""Adapters from a folder by name, for vLLM's server: each is read by our strict reader before vLLM loads it."""

from __future__ import annotations

import asyncio
import os
from logging import Logger

from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

from fused_lora.adapters.checkpoint import MAX_WEIGHT_BYTES, of_another_base, read_checked
from fused_lora.adapters.errors import AdapterError


class StrictResolver(LoRAResolver):
    """``root/NAME`` is the adapter NAME, or ``root/ORG/NAME``; links may not lead out of ``root``.

    vLLM is told of an adapter only if its config and the header of its weights are whole and plain LoRA. Any other is
    not found, and the log says what is wrong with it.
    """

    def __init__(self, root: str, log: Logger):
        self._root, self._log = os.path.realpath(root), log

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """The adapter of that name, or None."""
        folder = os.path.join(self._root, lora_name)
        if not (os.path.realpath(folder).startswith(self._root + os.sep) and os.path.isdir(folder)):
            return None
        try:
            _, plan = await asyncio.to_thread(
                read_checked, folder, MAX_WEIGHT_BYTES, lambda plan: plan, inside=self._root, tensors=False
            )
        except AdapterError as error:
            self._log.warning("fused_lora: adapter %s: not served: %s", lora_name, error)
            return None
        for field in ("use_dora", "alora_invocation_tokens"):
            if getattr(plan.config, field):
                self._log.warning("fused_lora: adapter %s: not served: %s", lora_name, field)
                return None
        trained_on = plan.config.base_model_name_or_path
        if of_another_base(trained_on, base_model_name):
            self._log.warning("fused_lora: adapter %s says %s is its base model", lora_name, trained_on)
        return LoRARequest(lora_name, 1, folder)  # vLLM gives it another number


def register_resolver(root: str, log: Logger) -> None:
    """Have vLLM look for adapters in the folder ``root``. log: vLLM's logger.

    Raises:
        ValueError: there is no such folder.
    """
    if not os.path.isdir(root):
        raise ValueError(f"FUSED_LORA_ADAPTERS: expected a folder of adapters, got {root!r}")
    LoRAResolverRegistry.register_resolver("fused_lora", StrictResolver(root, log))
