"""LoraEmbedding: an nn.Embedding with LoRA adapters, with PEFT's attributes, keys, draws and rules.

    y = W[x] + sum over active adapters of scaling * A^T[x] B^T        lora_embedding_A [r, tokens], _B [dim, r]

What the embedding multiplies its rows with (``embed_scale``) multiplies the terms, too. Dropout has no effect, as in
PEFT.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_lora.bases import Base
from fused_lora.bases.matrices import EMBEDDING
from fused_lora.modules.changes import CHANGING, alone, wait_for_change
from fused_lora.modules.config import LayerTensors
from fused_lora.modules.layer import LoraLayer, check_options, check_tensors
from fused_lora.modules.mixed import MixedBatch
from fused_lora.modules.mixin import FusedLoraBehaviour, wide
from fused_lora.modules.offload import execution_device
from fused_lora.modules.targets import adapter_dtype, in_out_features, why_not_supported
from fused_lora.ops.checks import as_scaling

_unsafe_view = torch.ops.aten._unsafe_view.default  # no view, so that it may be changed in place


class Factor(NamedTuple):
    """lora_A or lora_B as a matrix under the name that a linear layer has for it."""

    weight: Tensor


class EmbeddingBehaviour(FusedLoraBehaviour):
    """What PEFT's layer and ours share: ``lora_embedding_A``, ``lora_embedding_B``, their terms and their merge."""

    def _present(self, names: list[str]) -> list[str]:
        return [name for name in names if name in self.lora_embedding_A]

    def _pair(self, name: str) -> tuple[Tensor, Tensor]:
        """lora_A [r, tokens] and lora_B [dim, r] of one adapter."""
        return self.lora_embedding_A[name], self.lora_embedding_B[name]

    def _parts(self, names: list[str]) -> list[Any]:
        return [part for name in names for part in (*map(Factor, self._pair(name)), self.lora_dropout[name])]

    def _merge_place(self) -> tuple[nn.Module, Base]:
        return self._modules["base_layer"], EMBEDDING

    def _with_bias(self, names: list[str]) -> list[str]:
        return []

    def _with_terms(self, y: Tensor, x: Tensor, names: list[str]) -> Tensor:
        """y [..., dim], the rows of the tokens x, plus the terms of these adapters: summed in fp32, rounded once."""
        base = self._modules["base_layer"]
        total = y.reshape(-1, y.shape[-1])
        for name in names:
            A, B = self._pair(name)
            rows = F.embedding(
                x, A.t(), padding_idx=base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq, sparse=base.sparse
            )
            scaling = as_scaling(self.scaling[name])
            total = add_rows(total, rows.reshape(-1, len(A)), B.t(), scaling, embed_scale(base))
        return _unsafe_view(total.to(y.dtype), y.shape) if names else y


def add_rows(y: Tensor, rows: Tensor, B_t: Tensor, scaling: float, scale: Tensor | None) -> Tensor:
    """y [n, dim] + scaling * scale * rows [n, r] B_t [r, dim], in fp32 or wider."""
    rows = rows if scale is None else rows * scale.to(rows.dtype)
    wide = torch.promote_types(torch.promote_types(y.dtype, rows.dtype), torch.float32)
    with torch.autocast(y.device.type, enabled=False):
        return torch.addmm(y.to(wide), rows.to(wide), B_t.to(wide), alpha=scaling)


def embed_scale(base: nn.Module) -> Tensor | None:
    """What the forward of an embedding multiplies its rows with, where its class does so; PEFT's rule."""
    scale = getattr(base, "embed_scale", None)
    if scale is None or isinstance(scale, Tensor):
        return scale
    return torch.tensor(scale, dtype=torch.float64, device="cpu")  # of no dimension: for a product on any device


class LoraEmbedding(EmbeddingBehaviour, LoraLayer):
    """An nn.Embedding and its adapters. State-dict keys are PEFT's: ``lora_embedding_A.<name>``.

    Args:
        base_layer: nn.Embedding without max_norm, or a subclass; it is frozen and kept, not copied.
        r, lora_alpha, adapter_name, use_rslora, autocast_adapter_dtype: as for :class:`LoraLinear`.
        lora_dropout: kept for files; it has no effect, as in PEFT.
        init_lora_weights: False (A and B normal), or anything else of LoraLinear (A zero, B normal). Same seed, same
            draws as PEFT.
        tensors: A [r, tokens] and B [dim, r] instead of drawn ones.

    Raises:
        TypeError: base_layer is no such embedding, or an argument has the wrong type.
        ValueError: r, lora_alpha, lora_dropout or the adapter's name is out of range, or tensors do not fit.
    """

    base_layer: Any
    fan_in_fan_out = True  # the weight is [tokens, dim]
    kinds_of_parts = ("lora_embedding_A", "lora_embedding_B")

    def __init__(
        self,
        base_layer: nn.Module,
        r: int = 8,
        lora_alpha: float = 8,
        adapter_name: str = "default",
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        autocast_adapter_dtype: bool = True,
        tensors: LayerTensors | None = None,
    ):
        super().__init__()
        reason = why_not_supported(base_layer) if isinstance(base_layer, nn.Embedding) else "it is no embedding"
        if reason:
            raise TypeError(f"base_layer: expected an nn.Embedding, got {type(base_layer).__name__}: {reason}")
        self.base_layer = base_layer
        self.in_features, self.out_features = in_out_features(base_layer)
        self.lora_embedding_A, self.lora_embedding_B = nn.ParameterDict(), nn.ParameterDict()
        self._start()
        options = (lora_dropout, use_rslora, init_lora_weights, autocast_adapter_dtype)
        self.add_adapter(adapter_name, r, lora_alpha, *options, tensors=tensors)
        base_layer.requires_grad_(False)
        self.train(base_layer.training)
        self.set_adapter(adapter_name)

    @alone
    def add_adapter(
        self,
        adapter_name: str,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        autocast_adapter_dtype: bool = True,
        tensors: LayerTensors | None = None,
    ) -> None:
        """Add an adapter, inactive and frozen until :meth:`set_adapter`. Arguments as for the class."""
        flags = dict(use_rslora=use_rslora, autocast_adapter_dtype=autocast_adapter_dtype)
        check_options(r, lora_alpha, lora_dropout, init_lora_weights, **flags)
        self._check_new(adapter_name)
        K, N = self.in_features, self.out_features
        if tensors is not None:
            check_tensors(tensors, (r, K), (N, r), None, None)
            A, B = tensors.lora_A, tensors.lora_B
        else:
            A, B = torch.randn(r, K), torch.randn(N, r)
            if init_lora_weights:
                A, B = torch.zeros(r, K), B.normal_()  # drawn twice, as by PEFT
        device, dtype = execution_device(self.base_layer), adapter_dtype(self.base_layer)
        for held, part in ((self.lora_embedding_A, A), (self.lora_embedding_B, B)):
            placed = self._placed(part, device, dtype, autocast_adapter_dtype, tensors is None)
            held[adapter_name] = nn.Parameter(placed, requires_grad=False)
        self._note(adapter_name, r, lora_alpha, lora_dropout, use_rslora)

    def forward(self, x: Tensor, *, adapter_names: Sequence[str | None] | None = None) -> Tensor:
        """Tokens x, integers [...] -> [..., dim]. ``adapter_names`` names one adapter per row (None: base)."""
        if CHANGING:
            wait_for_change(self)
        if isinstance(adapter_names, str):  # its letters would pass for names
            raise TypeError(f"adapter_names: expected one entry per row, got the str {adapter_names!r}")
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x)
        if adapter_names is not None or self.mixed_batch is not None:
            return self._mixed_rows(x, adapter_names, self.mixed_batch)
        y = self.base_layer(x)
        return y if self.merged_adapters else self._with_terms(y, x, self._present(self.active_adapters))

    def _mixed_rows(self, x: Tensor, adapter_names: Sequence[str | None] | None, batch: MixedBatch | None) -> Tensor:
        """Rows of one batch under different adapters; base rows keep the embedding's bits."""
        rows_of = self._rows_of(x.unsqueeze(-1), adapter_names, batch)
        y = self.base_layer(x)
        flat, tokens = y.reshape(-1, y.shape[-1]), x.flatten().clone()  # a backward reads them after x was changed
        for name in self._present(list(rows_of)):
            rows = rows_of[name]
            flat[rows] = self._with_terms(flat[rows], tokens[rows], [name])
        return flat.view(y.shape)

    def why_not_fused(self) -> str | None:
        """None: the terms are always ours."""
        return None

    def file_tensors(self, name: str) -> dict[str, tuple[Tensor | None, tuple[int, ...]]]:
        """Of one adapter: end of its key in a file -> (tensor, shape of the whole)."""
        (A, B), r = self._pair(name), self.r[name]
        return {
            ".lora_embedding_A": (A, (r, self.in_features)),
            ".lora_embedding_B": (B, (self.out_features, r)),
        }

    def get_delta_weight(self, adapter: str) -> Tensor:
        """s (B A)^T of one adapter [tokens, dim], in the adapter's dtype."""
        A, B = self._pair(adapter)
        return ((wide(B) @ wide(A)).t() * self._scaling(adapter)).to(B.dtype)

    def extra_repr(self) -> str:
        return f"tokens={self.in_features}, dim={self.out_features}, active={self.active_adapters}"
