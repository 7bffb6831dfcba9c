"""The eager path of the LoRA linear and of the LoRA term: plain torch, fast on CPUs, correct on any device.

One rule shapes it: nothing of size [M, K] is stored, neither the mask nor the dropped input. The mask is drawn again
where it is needed, for a block of rows that fits the cache, in C or by numpy's Philox (5 times faster than
F.dropout).

16-bit tensors on a CPU are computed in fp32 and rounded once: a bf16 or fp16 GEMM without hardware support is
hundreds of times slower than the same GEMM in fp32. The weight is converted in blocks of rows, so that the copy stays
small and no fp32 weight is ever kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch

from fused_lora.ops import native
from fused_lora.reference import dropout_lanes, dropout_lanes_on, dropout_threshold, keep_scale

_MASK_ELEMENTS = 1 << 19  # row block of the mask and of the dropped input: 2 MiB of fp32
_WEIGHT_ELEMENTS = 1 << 22  # row block of a 16-bit weight in fp32: 16 MiB
_FEW_ROWS = 8  # below it some BLAS code paths add each product to the result, at twice the rounding error of a sum


def compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """fp32 for 16-bit tensors on a CPU, else the dtype itself."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) and device.type == "cpu" else dtype


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_A: Sequence[torch.Tensor],
    lora_B: Sequence[torch.Tensor],
    scaling: Sequence[float],
    dropout: Sequence[float],
    seeds: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y [M, N] in x's dtype, S [M, sum r] in the accumulation dtype. Arguments as ``reference.lora_linear``, x 2-D."""
    rows = _as(x, compute_dtype(x.dtype, x.device))
    acc = _widest(rows.dtype, lora_A)
    S = _shrink(rows, lora_A, dropout, seeds, acc)
    total = _as(_matmul_weight_t(rows, weight, bias if acc == rows.dtype else None), acc)
    if bias is not None and acc != rows.dtype:
        total += bias
    return _as(_add_terms(total, S, lora_B, scaling), x.dtype), _as(S, torch.promote_types(acc, torch.float32))


def lora_term(
    y: torch.Tensor,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    lora_A: Sequence[torch.Tensor],
    lora_B: Sequence[torch.Tensor],
    scaling: Sequence[float],
    dropout: Sequence[float],
    seeds: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y + bias + the terms [M, N] in y's dtype, S [M, sum r] as :func:`lora_linear` returns it. y and x are 2-D."""
    acc = torch.promote_types(accumulate_dtype(x, lora_A), compute_dtype(y.dtype, y.device))
    S = _shrink(_as(x, compute_dtype(x.dtype, x.device)), lora_A, dropout, seeds, acc)
    total = y.to(acc, copy=True)
    if bias is not None:
        total += bias
    return _as(_add_terms(total, S, lora_B, scaling), y.dtype), S.to(shrink_dtype(x, lora_A))


def _add_terms(total, S, lora_B, scaling) -> torch.Tensor:
    """total += sum_i s_i S_i B_i^T, in place and in its dtype."""
    for B, s, part in zip(lora_B, scaling, _columns(S, lora_B), strict=True):
        total.addmm_(part, _as(B, total.dtype).t(), alpha=s)
    return total


def lora_linear_backward(
    g: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    lora_A: Sequence[torch.Tensor],
    lora_B: Sequence[torch.Tensor],
    S: torch.Tensor,
    scaling: Sequence[float],
    dropout: Sequence[float],
    seeds: torch.Tensor | None,
    need_x: bool,
    need_A: Sequence[bool],
    need_B: Sequence[bool],
    need_weight: bool,
    need_bias: bool,
) -> tuple[torch.Tensor | None, list, list, torch.Tensor | None, torch.Tensor | None]:
    """dx [M, K], dA and dB lists, dW [N, K], db [N]; None where the matching ``need`` is False. g, x are 2-D.

    Without a weight dx is the LoRA term alone, and g may have another dtype than x.
    """
    g_rows, x_rows = _as(g, compute_dtype(g.dtype, g.device)), _as(x, compute_dtype(x.dtype, x.device))
    acc, seeds = _widest(x_rows.dtype, lora_A), _numbers(seeds)
    if g_rows.dtype != acc:
        acc = torch.promote_types(acc, g_rows.dtype)
    g_acc, dx, dA, dB = _as(g_rows, acc), None, [None] * len(lora_A), [None] * len(lora_A)
    for i, (A, B, part) in enumerate(zip(lora_A, lora_B, _columns(_as(S, acc), lora_B), strict=True)):
        s, p, B_acc = scaling[i], dropout[i], _as(B, acc)
        if need_B[i]:
            dB[i] = _as(_scaled(g_acc.t(), part, s, B_acc), B.dtype)
        if need_x or need_A[i]:
            dS = _scaled(g_acc, B_acc, s * keep_scale(p), part)  # both factors, one rounding
            dx, dA[i] = _input_side(dS, x_rows, A, p, seeds[i] if p else None, dx, need_x, need_A[i])
    if need_x and weight is not None:
        _add_matmul_weight(dx, g_rows, weight)
    dW = _as(g_rows.t() @ x_rows, weight.dtype) if need_weight else None
    db = g_acc.sum(0) if need_bias else None
    return (_as(dx, x.dtype) if need_x else None), dA, dB, dW, db


def accumulate_dtype(x: torch.Tensor, lora_A: Sequence[torch.Tensor]) -> torch.dtype:
    """The widest dtype involved: fp32 adapters over a 16-bit base are used in fp32, as PEFT does."""
    return _widest(compute_dtype(x.dtype, x.device), lora_A)


def _widest(acc: torch.dtype, lora_A: Sequence[torch.Tensor]) -> torch.dtype:
    for A in lora_A:
        if A.dtype != acc:
            acc = torch.promote_types(acc, A.dtype)
    return acc


def shrink_dtype(x: torch.Tensor, lora_A: Sequence[torch.Tensor]) -> torch.dtype:
    """dtype in which S is kept for the backward, whatever computed it: fp32, or fp64 where that takes part."""
    return torch.promote_types(accumulate_dtype(x, lora_A), torch.float32)


def _as(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor if tensor.dtype is dtype else tensor.to(dtype)  # the question takes a fifth of the call


def _scaled(left: torch.Tensor, right: torch.Tensor, s: float, like: torch.Tensor) -> torch.Tensor:
    """s * (left @ right) in one call; ``like`` only has the result's shape and dtype."""
    return torch.addmm(like, left, right, beta=0, alpha=s)


def _columns(S: torch.Tensor, lora_B: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """The part of S of each adapter."""
    return [S] if len(lora_B) == 1 else S.split([B.shape[1] for B in lora_B], 1)


def _row_blocks(rows: torch.Tensor) -> Sequence[tuple[int, int]]:
    """Blocks whose mask stays in a CPU's cache. Elsewhere one: the mask is there, and each block would round dA."""
    M, K = rows.shape
    if M * K <= _MASK_ELEMENTS or not rows.is_cpu:
        return ((0, M),)
    step = max(1, _MASK_ELEMENTS // K)
    return [(start, min(start + step, M)) for start in range(0, M, step)]


def _buffer(rows: torch.Tensor, dtype: torch.dtype, blocks: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Room for one row block, reused for all of them."""
    return rows.new_empty(blocks[0][1], rows.shape[1], dtype=dtype)


def _part(rows: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    return rows if stop - start == len(rows) else rows[start:stop]  # as most often, and a view takes longer


class _Mask:
    """Row blocks of one call's keep mask, without holding the whole on a CPU."""

    def __init__(self, seed: int | torch.Tensor, p: float, rows: torch.Tensor):
        self._seed, self._cut = seed, dropout_threshold(p) - 32768
        (M, self._K), self._whole = rows.shape, None
        if not rows.is_cpu:  # there this path is the fallback, and drawing the mask whole costs the fewest launches
            self._whole = dropout_lanes_on(rows.device, seed, M, self._K)[:, : self._K] >= self._cut

    def multiply(
        self, start: int, stop: int, rows: torch.Tensor | None, out: torch.Tensor | None, in_place: torch.Tensor | None
    ) -> None:
        """out = rows * mask and in_place *= mask, [stop - start, K] of rows [start, stop); None leaves one out."""
        if self._whole is not None:
            if rows is not None:
                torch.mul(rows, self._whole[start:stop], out=out)
            if in_place is not None:
                in_place.mul_(self._whole[start:stop])
            return
        if native.multiply_by_mask(self._seed, start, self._cut, rows, out, in_place):
            return
        keep = dropout_lanes(self._seed, start, stop - start, self._K)[:, : self._K] >= self._cut
        if rows is not None:  # numpy's product with a bool is twice as fast as torch's
            np.multiply(rows.numpy(), keep, out=out.numpy())
        if in_place is not None:
            np.multiply(in_place.numpy(), keep, out=in_place.numpy())


def _shrink(rows, lora_A, dropout, seeds, acc) -> torch.Tensor:
    """S = concatenation of D_i(x) A_i^T, [M, sum r] in ``acc``."""
    seeds = _numbers(seeds)
    terms = [
        _shrink_one(rows, _as(A, acc), p, seeds[i] if p else None)
        for i, (A, p) in enumerate(zip(lora_A, dropout, strict=True))
    ]
    return terms[0] if len(terms) == 1 else torch.cat(terms, 1)


def _numbers(seeds: torch.Tensor | None) -> Sequence | None:
    """The seeds as numbers where nothing has to wait for them."""
    return seeds.tolist() if seeds is not None and seeds.is_cpu else seeds


def _shrink_one(rows, A, p, seed) -> torch.Tensor:
    if p == 0.0:
        return torch.nn.functional.linear(_as(rows, A.dtype), A)
    if p == 1.0 or not len(rows):
        return rows.new_zeros((len(rows), A.shape[0]), dtype=A.dtype)
    mask, blocks, parts = _Mask(seed, p, rows), _row_blocks(rows), []
    buffer = _buffer(rows, rows.dtype, blocks)
    for start, stop in blocks:
        block = _part(buffer, 0, stop - start)
        mask.multiply(start, stop, _part(rows, start, stop), block, None)
        parts.append(torch.nn.functional.linear(_as(block, A.dtype), A))
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).mul_(_scale(p))


@lru_cache(maxsize=256)
def _scale(p: float) -> torch.Tensor:
    """keep_scale(p) as a tensor of no dimension, which torch multiplies by in a third of the time of a number."""
    return torch.tensor(keep_scale(p), dtype=torch.float64)


def _input_side(
    dS: torch.Tensor, rows: torch.Tensor, A: torch.Tensor, p: float, seed, dx, need_x: bool, need_A: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(dx + mask * (dS A), dA = dS^T (mask * x)), None for what is not needed; ``dx`` None for the first adapter.

    One mask for both. ``dS`` already holds the 1 / (1 - p). The sum may be formed in ``dx``.
    """
    acc, A_acc, dA = dS.dtype, _as(A, dS.dtype), None
    if p == 0.0:
        if need_x:
            dx = torch.mm(dS, A_acc) if dx is None else dx.addmm_(dS, A_acc)
        return dx, _as(torch.mm(dS.t(), _as(rows, acc)), A.dtype) if need_A else None
    first = dx is None
    if need_x and first:  # no pass to add its part
        dx = rows.new_empty(rows.shape, dtype=acc) if p < 1.0 else rows.new_zeros(rows.shape, dtype=acc)
    if p < 1.0:
        mask, blocks = _Mask(seed, p, rows), _row_blocks(rows)
        dropped = _buffer(rows, acc, blocks) if need_A else None
        part = None if first or not need_x else _buffer(rows, acc, blocks)
        for start, stop in blocks:
            source = kept = target = None
            dS_rows = _part(dS, start, stop)
            if need_A:
                source, kept = _as(_part(rows, start, stop), acc), _part(dropped, 0, stop - start)
            if need_x:
                target = _part(dx, start, stop) if first else _part(part, 0, stop - start)
                torch.mm(dS_rows, A_acc, out=target)
            mask.multiply(start, stop, source, kept, target)
            if need_A:
                dA = torch.mm(dS_rows.t(), kept) if dA is None else dA.addmm_(dS_rows.t(), kept)
            if part is not None:
                dx[start:stop] += target
    if need_A:
        dA = A.new_zeros(A.shape) if dA is None else _as(dA, A.dtype)
    return dx, dA


def _weight_blocks(weight: torch.Tensor, dtype: torch.dtype) -> Iterator[tuple[int, int, torch.Tensor]]:
    N, K = weight.shape
    if weight.dtype == dtype:
        yield 0, N, weight
        return
    step = max(1, _WEIGHT_ELEMENTS // max(K, 1))
    for start in range(0, N, step):
        stop = min(start + step, N)
        yield start, stop, weight[start:stop].to(dtype)


def _matmul_weight_t(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """rows W^T (+ bias) in the dtype of rows."""
    if weight.dtype == rows.dtype:
        return torch.nn.functional.linear(rows, weight, None if bias is None else _as(bias, rows.dtype))
    y = rows.new_empty((rows.shape[0], weight.shape[0]))
    for start, stop, block in _weight_blocks(weight, rows.dtype):
        y[:, start:stop] = rows @ block.t()
    return y if bias is None else y.add_(bias.to(rows.dtype))


def _add_matmul_weight(dx: torch.Tensor, g: torch.Tensor, weight: torch.Tensor) -> None:
    """dx += g W, the product in the dtype of g."""
    for start, stop, block in _weight_blocks(weight, g.dtype):
        part = g if stop - start == len(weight) else g[:, start:stop]
        if dx.dtype == g.dtype and len(g) >= _FEW_ROWS:
            dx.addmm_(part, block)
        else:
            dx += part @ block
