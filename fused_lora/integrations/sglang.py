"""The two products of SGLang's torch-native LoRA backend, by the grouped operators.

They take the place of ``sgemm_lora_a_fwd`` and ``sgemm_lora_b_fwd`` of ``sglang.srt.lora.torch_ops.lora_ops``
(docs/serving.md says how). Segments of one adapter share a product, and what lies between the two stays in fp32, so
that an output is rounded once. Nothing here needs SGLang.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from fused_lora.ops.grouped.op import RowLayout, Terms, lora_grouped_


def sgemm_lora_a_fwd(
    inputs: Tensor,
    weights: Tensor,
    weight_indices: Tensor,
    seg_len_tensor: Tensor,
    lora_ranks: Tensor,
    scaling_tensor: Tensor,
    num_slices: int = 1,
) -> Tensor:
    """scaling * A x of each row's adapter, for all slices of a stacked layer.

    Args:
        inputs: x [T, K], floating. weights: A [slots, num_slices * max_rank, K]; a slot of rank r fills its first
            num_slices * r rows, r for each slice.
        weight_indices: slot of each segment; seg_len_tensor: its rows. Both on the host, as the next two are.
        lora_ranks: r of each slot, 0 for the base model. scaling_tensor: of each slot.

    Returns:
        [T, num_slices * max_rank] in fp32 (fp64 for fp64 inputs); the columns that a rank leaves, and base rows, are 0.

    Raises:
        TypeError, ValueError: an argument does not fit the others. The message names it.
    """
    _check_floating(inputs, weights)
    if inputs.shape[1] != weights.shape[2]:
        raise ValueError(f"inputs: expected {weights.shape[2]} columns as weights have, got {inputs.shape[1]}")
    if len(scaling_tensor) != len(lora_ranks):
        raise ValueError(f"scaling_tensor: expected {len(lora_ranks)} numbers, got {len(scaling_tensor)}")
    width, ranks = weights.shape[1], lora_ranks.tolist()
    _check_ranks(ranks, len(weights), width // num_slices)
    layout = _layout(weight_indices, seg_len_tensor, ranks, inputs)
    S = inputs.new_zeros(len(inputs), width, dtype=torch.promote_types(inputs.dtype, torch.float32))
    one = torch.eye(width, dtype=weights.dtype, device=weights.device)
    sizes = {slot: num_slices * r for slot, r in enumerate(ranks) if r and slot in layout.groups}
    scales = scaling_tensor.tolist()
    factors = {slot: [(weights[slot, :n].t(), one[:n], scales[slot])] for slot, n in sizes.items()}
    if factors:
        lora_grouped_(S, inputs, layout, Terms(factors))
    return S


def sgemm_lora_b_fwd(
    inputs: Tensor,
    weights: Tensor,
    weight_indices: Tensor,
    seg_len_tensor: Tensor,
    lora_ranks: Tensor,
    slice_offsets: Tensor,
    base_output: Tensor | None = None,
) -> Tensor:
    """base_output + B S of each row's adapter, slice by slice, in place.

    Args:
        inputs: S [T, num_slices * max_rank] of :func:`sgemm_lora_a_fwd`. weights: B [slots, N, max_rank].
        slice_offsets: where each slice begins in the N columns, and N; on the host.
        base_output: [T, N], whose base rows keep their bits; None: zeros in the dtype of ``weights``.

    Raises:
        TypeError, ValueError: an argument does not fit the others. The message names it, and nothing is written.
    """
    _check_floating(inputs, weights)
    ranks, ends = lora_ranks.tolist(), slice_offsets.tolist()
    if len(ends) < 2 or ends[0] != 0 or ends[-1] != weights.shape[1] or sorted(ends) != ends:
        raise ValueError(f"slice_offsets: expected rising numbers from 0 to {weights.shape[1]}, got {ends}")
    _check_ranks(ranks, len(weights), min(weights.shape[2], inputs.shape[1] // (len(ends) - 1)))
    y = base_output
    if y is None:
        y = weights.new_zeros(len(inputs), ends[-1])
    elif tuple(y.shape) != (len(inputs), ends[-1]):
        raise ValueError(f"base_output: expected shape {(len(inputs), ends[-1])}, got {tuple(y.shape)}")
    layout = _layout(weight_indices, seg_len_tensor, ranks, inputs)
    if not layout.groups:
        return y
    one = torch.eye(inputs.shape[1], dtype=weights.dtype, device=weights.device)
    used = [(slot, ranks[slot]) for slot in layout.groups]
    for g, (start, end) in enumerate(zip(ends, ends[1:], strict=False)):
        # the rows of S are packed by rank: slice g of an adapter of rank r begins at column g * r
        terms = Terms({s: [(one[g * r :][:r].t(), weights[s, start:end, :r].t(), 1.0)] for s, r in used})
        lora_grouped_(y[:, start:end], inputs, layout, terms)
    return y


def _check_floating(inputs: Tensor, weights: Tensor) -> None:
    for name, tensor, dims in (("inputs", inputs, 2), ("weights", weights, 3)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: expected floating numbers, got {tensor.dtype}")
        if tensor.dim() != dims:
            raise ValueError(f"{name}: expected {dims} dimensions, got shape {tuple(tensor.shape)}")


def _check_ranks(ranks: list[int], slots: int, most: int) -> None:
    if len(ranks) > slots or not all(0 <= r <= most for r in ranks):
        raise ValueError(f"lora_ranks: expected at most {slots} ranks, each 0 to {most}, got {ranks!r:.200}")


def _layout(weight_indices: Tensor, seg_len_tensor: Tensor, ranks: list[int], inputs: Tensor) -> RowLayout:
    slots, lengths = tuple(weight_indices.tolist()), tuple(seg_len_tensor.tolist())
    if not all(0 <= slot < len(ranks) for slot in slots):
        raise ValueError(f"weight_indices: expected slots 0 to {len(ranks) - 1}, got {slots!r:.200}")
    if len(lengths) != len(slots) or sum(lengths) != len(inputs) or not all(n >= 0 for n in lengths):
        text = f"{len(slots)} numbers of rows, {len(inputs)} in all"
        raise ValueError(f"seg_len_tensor: expected {text}, got {lengths!r:.200}")
    return _layout_of(slots, lengths, tuple(ranks), inputs.device)


@lru_cache(maxsize=16)
def _layout_of(
    slots: tuple[int, ...], lengths: tuple[int, ...], ranks: tuple[int, ...], device: torch.device
) -> RowLayout:
    """The rows of a batch, of which all layers have the same."""
    of_segment = np.array([slot if ranks[slot] else -1 for slot in slots], np.int32)
    return RowLayout(np.repeat(of_segment, np.array(lengths, np.int64)), device)
