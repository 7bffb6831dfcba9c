"""Embeddings and convolutions, for merges: the weight is a matrix, transposed or with its last dimensions in one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fused_lora.bases.base import Base, Factors, why_not_plain_weight
from fused_lora.ops.checks import overlaps_itself
from fused_lora.ops.merge import op as merging


class AsMatrix(Base):
    """A weight [N, ...] as [N, K], or where ``transposed`` a weight [K, N]: lora_A is [r, K], lora_B [N, r]."""

    in_one_pass = False  # a model has few of them

    def __init__(self, transposed: bool):
        self.transposed = transposed

    def why_not_merged(self, module: Any) -> str | None:
        """None for an ordinary weight, in any order of memory."""
        weight = module._parameters.get("weight")
        if type(weight) is not nn.Parameter:
            return why_not_plain_weight(weight) or "a weight is no parameter"
        if getattr(module, "groups", 1) != 1:
            return "a convolution in groups"
        if weight.layout is not torch.strided or overlaps_itself(weight):
            return "a weight has no memory of its own for every number"
        return why_not_plain_weight(weight.detach().flatten(1)) if weight.dim() > 1 else "a weight is no matrix"

    def features(self, module: Any) -> tuple[int, int]:
        """(K, N): the weight's shape, turned where it is not ``transposed``."""
        N, K = module.weight.flatten(1).shape
        return (N, K) if self.transposed else (K, N)

    def why_not_adapted(self, module: Any) -> str | None:
        """As :meth:`Base.why_not_adapted`; and an embedding must not change its rows in its forward."""
        changes = getattr(module, "max_norm", None) is not None
        return "max_norm changes rows in the forward" if changes else super().why_not_adapted(module)

    def merge_(self, module: Any, factors: Factors, fan_in_fan_out: bool) -> merging.MergeRecord:
        """As :meth:`Base.merge_`, whatever the layer's fan_in_fan_out is."""
        A, B, scaling, row_scale, seed = factors
        turned = self.transposed
        return self._changed(module, lambda W: merging.merge_(W, A, B, scaling, row_scale, seed, fan_in_fan_out=turned))

    def unmerge_(self, module: Any, record: merging.MergeRecord) -> None:
        """As :meth:`Base.unmerge_`."""
        self._changed(module, lambda W: merging.unmerge_(W, record))

    def _changed(self, module: Any, change: Callable[[Tensor], Any]) -> Any:
        """``change`` of the matrix, and its result. Of a weight in channels_last it is a copy, to be written back."""
        weight = super().matrix(module).detach()
        if weight.is_contiguous():
            return change(weight.flatten(1))
        before, changed = weight.clone(), weight.clone(memory_format=torch.contiguous_format)
        result = change(changed.flatten(1))
        try:
            weight.copy_(changed)
        except BaseException:  # an interrupt comes behind the copy
            weight.copy_(before)
            raise
        return result

    def factors(self, record: merging.MergeRecord, fan_in_fan_out: bool) -> Factors:
        """As :meth:`Base.factors`."""
        return super().factors(record, self.transposed)

    def matrix(self, module: Any) -> Tensor:
        """As :meth:`Base.matrix`; a copy where the weight is not contiguous."""
        return super().matrix(module).detach().flatten(1)


EMBEDDING, CONVOLUTION = AsMatrix(transposed=True), AsMatrix(transposed=False)
