"""PEFT's ``Embedding`` and convolutions: exact merges for both, and a shorter forward for embeddings."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fused_lora.bases import Base
from fused_lora.bases.base import why_not_own_call, why_not_plain_tensor
from fused_lora.bases.matrices import CONVOLUTION, EMBEDDING
from fused_lora.integrations.peft_linear import BEHAVIOURS, FUSED, AcceleratedLinear, _count
from fused_lora.modules.changes import CHANGING, wait_for_change
from fused_lora.modules.embedding import EmbeddingBehaviour, Factor, embed_scale
from fused_lora.modules.fusable import why_not_here
from fused_lora.modules.mixin import FusedLoraBehaviour


class _ExactMerges(AcceleratedLinear):
    """Merge and unmerge of a layer whose weight is another matrix than a linear layer's."""

    kind: Base
    fan_in_fan_out = False  # convolutions have no such attribute

    def _parts(self, names: list[str]) -> list[Any]:
        return [part for name in names for part in (*map(Factor, self._pair(name)), self.lora_dropout[name])]

    def _merge_place(self) -> tuple[nn.Module, Base]:
        return self.get_base_layer(), self.kind

    def _with_bias(self, names: list[str]) -> list[str]:
        return []

    def _fits_exactly(self, names: list[str]) -> bool:
        base = self.get_base_layer()
        if self.kind.why_not_merged(base) or base.weight.is_meta:
            return False
        if any(name in self.lora_variant or self.lora_bias.get(name) for name in names):
            return False
        shape, device = self.kind.features(base)[::-1], base.weight.device
        pairs = {name: self._pair(name) for name in names}
        return all(self._fits(name, A, B, shape, device) for name, (A, B) in pairs.items())


class AcceleratedEmbedding(EmbeddingBehaviour, _ExactMerges):
    """Forward, merge and unmerge of a ``lora.Embedding``, for a class that has PEFT's as its next base."""

    kind = EMBEDDING

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """PEFT's forward: base(x) + sum over active adapters of scaling * A^T[x] B^T. It ignores dropout."""
        if CHANGING:
            wait_for_change(self)
        reason = self.why_class_replaced() or self.why_not_fused()
        reason = reason or ("further arguments" if args or kwargs else None) or why_not_here()
        if reason:
            _count(reason)
            return super(FusedLoraBehaviour, self).forward(x, *args, **kwargs)
        _count(FUSED)
        return self._with_terms(self.base_layer(x), x, self._present(self.active_adapters))

    def why_not_fused(self) -> str | None:
        """Why a call runs PEFT's own forward; None where it does not."""
        if self.disable_adapters:
            return "adapters are disabled"
        if self.merged:
            return "merged: the base layer alone"
        names = self._present(self.active_adapters)
        if not names:
            return "no active adapter in this layer"
        if getattr(self, "tp_layer", None) is not None:  # PEFT 0.19 and later
            return "tensor parallel"
        base = self.get_base_layer()
        if embed_scale(base) is not None and not hasattr(self, "_get_embed_scale"):
            return "PEFT before 0.18 does not scale the adapter with the embedding"
        if base.max_norm is not None or why_not_own_call(base, "the base layer"):
            return why_not_own_call(base, "the base layer") or "max_norm changes rows"
        for name in names:
            A, B = (why_not_plain_tensor(part, "a part of the adapter") for part in self._pair(name))
            if why := self._why_not_term(name) or A or B:
                return why
        return None


class AcceleratedConvolution(_ExactMerges):
    """Merge and unmerge of a ``lora.Conv1d``, ``Conv2d`` or ``Conv3d``; the forward is PEFT's."""

    kind = CONVOLUTION

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """PEFT's own."""
        if CHANGING:
            wait_for_change(self)
        _count(self.why_not_fused())
        return super(FusedLoraBehaviour, self).forward(x, *args, **kwargs)

    def why_not_fused(self) -> str:
        """Always a reason: two convolutions are two calls of the library."""
        return "a convolution runs PEFT's own forward"

    def _pair(self, name: str) -> tuple[Tensor, Tensor]:
        return self.lora_A[name].weight.flatten(1), self.lora_B[name].weight.flatten(1)


BEHAVIOURS["Embedding"] = AcceleratedEmbedding
BEHAVIOURS |= dict.fromkeys(("Conv1d", "Conv2d", "Conv3d"), AcceleratedConvolution)
