"""The eager path of the LoRA linear: plain torch, fast on CPUs, correct on any device.

One rule shapes it: nothing of size [M, K] is stored, neither the mask nor the dropped input. The mask is drawn again
where it is needed, for a block of rows that fits the cache, by a compiled loop or numpy's Philox (5 times faster than
F.dropout).

16-bit tensors on a CPU are computed in fp32 and rounded once: a bf16 or fp16 GEMM without hardware support is
hundreds of times slower than the same GEMM in fp32. The weight is converted in blocks of rows, so that the copy stays
small and no fp32 weight is ever kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from fused_lora.ops import compiled
from fused_lora.reference import dropout_lanes, dropout_lanes_on, dropout_threshold, keep_scale

_MASK_ELEMENTS = 1 << 19  # row block of the mask and of the dropped input: 2 MiB of fp32
_WEIGHT_ELEMENTS = 1 << 22  # row block of a 16-bit weight in fp32: 16 MiB
_FEW_ROWS = 8  # below it some BLAS code paths add each product to the result, at twice the rounding error of a sum


def compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """fp32 for 16-bit tensors on a CPU, else the dtype itself."""
    return torch.float32 if device.type == "cpu" and dtype in (torch.bfloat16, torch.float16) else dtype


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
    acc = accumulate_dtype(x, lora_A)
    rows = x.to(compute_dtype(x.dtype, x.device))
    S = _shrink(rows, lora_A, dropout, seeds, acc)
    y = _matmul_weight_t(rows, weight, None if acc != rows.dtype else bias)
    term = y if y.dtype == acc else y.to(acc)
    if bias is not None and acc != rows.dtype:
        term += bias
    column = 0
    for B, s in zip(lora_B, scaling, strict=True):
        term.addmm_(S[:, column : column + B.shape[1]], B.to(acc).t(), alpha=s)
        column += B.shape[1]
    return term.to(x.dtype), S.to(shrink_dtype(x, lora_A))


def lora_linear_backward(
    g: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
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
    """dx [M, K], dA and dB lists, dW [N, K], db [N]; None where the matching ``need`` is False. g, x are 2-D."""
    acc = accumulate_dtype(x, lora_A)
    work = compute_dtype(x.dtype, x.device)
    g_rows, x_rows = g.to(work), x.to(work)
    g_acc, S = g_rows.to(acc), S.to(acc)
    dx = torch.empty(x.shape, dtype=acc, device=x.device) if need_x else None
    dA, dB, column = [], [], 0
    for i, (A, B) in enumerate(zip(lora_A, lora_B, strict=True)):
        r, s = A.shape[0], scaling[i]
        # the short side first: a third less time than g^T S, transposed where it is small
        dB.append((S[:, column : column + r].t() @ g_acc).t().mul(s).to(B.dtype).contiguous() if need_B[i] else None)
        column += r
        if not (need_x or need_A[i]):
            dA.append(None)
            continue
        dS = _narrow(g_acc, B.to(acc).t().contiguous()).mul_(s * keep_scale(dropout[i]))  # both factors, one rounding
        seed = seeds[i] if dropout[i] else None
        dA.append(_input_side(dS, x_rows, A, dropout[i], seed, dx, i == 0, need_A[i]))
    if need_x:
        _add_matmul_weight(dx, g_rows, weight)
    dW = (g_rows.t() @ x_rows).to(weight.dtype) if need_weight else None
    db = g_acc.sum(0) if need_bias else None
    return (dx.to(x.dtype) if need_x else None), dA, dB, dW, db


def accumulate_dtype(x: torch.Tensor, lora_A: Sequence[torch.Tensor]) -> torch.dtype:
    """The widest dtype involved: fp32 adapters over a 16-bit base are used in fp32, as PEFT does."""
    acc = compute_dtype(x.dtype, x.device)
    for A in lora_A:
        acc = torch.promote_types(acc, A.dtype)
    return acc


def shrink_dtype(x: torch.Tensor, lora_A: Sequence[torch.Tensor]) -> torch.dtype:
    """dtype in which S is kept for the backward, whatever computed it: fp32, or fp64 where that takes part."""
    return torch.promote_types(accumulate_dtype(x, lora_A), torch.float32)


def _row_blocks(rows: torch.Tensor) -> Iterator[tuple[int, int]]:
    """Blocks whose mask stays in a CPU's cache. Elsewhere one: the mask is there, and each block would round dA."""
    M, K = rows.shape
    step = max(1, _MASK_ELEMENTS // max(K, 1) if rows.device.type == "cpu" else M)
    for start in range(0, M, step):
        yield start, min(start + step, M)


def _buffer(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Room for one row block, reused for all of them."""
    first = next(_row_blocks(rows), (0, 0))
    return torch.empty((first[1], rows.shape[1]), dtype=dtype, device=rows.device)


class _Mask:
    """Row blocks of one call's keep mask, without holding the whole on a CPU."""

    def __init__(self, seed: torch.Tensor, p: float, M: int, K: int, device: torch.device):
        self._cut = dropout_threshold(p) - 32768
        self.scale, self._K = keep_scale(p), K
        self._seed = int(seed) if device.type == "cpu" else None
        # off the CPU this path is the fallback, and drawing the mask whole costs the fewest launches
        self._whole = None if device.type == "cpu" else dropout_lanes_on(device, seed, M, K)[:, :K] >= self._cut

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
        loops = compiled.loops()
        if loops is not None and all(t is None or t.is_contiguous() for t in (rows, out, in_place)):
            loops.multiply_by_mask(self._seed, start, self._cut, rows, out, in_place)
            return
        keep = dropout_lanes(self._seed, start, stop - start, self._K)[:, : self._K] >= self._cut
        if rows is not None:  # numpy's product with a bool is twice as fast as torch's
            np.multiply(rows.numpy(), keep, out=out.numpy())
        if in_place is not None:
            np.multiply(in_place.numpy(), keep, out=in_place.numpy())


def _shrink(rows, lora_A, dropout, seeds, acc) -> torch.Tensor:
    """S = concatenation of D_i(x) A_i^T, [M, sum r] in ``acc``."""
    terms = [
        _shrink_one(rows, A.to(acc), p, seeds[i] if p else None)
        for i, (A, p) in enumerate(zip(lora_A, dropout, strict=True))
    ]
    return terms[0] if len(terms) == 1 else torch.cat(terms, 1)


def _shrink_one(rows, A, p, seed) -> torch.Tensor:
    M, K = rows.shape
    if p == 0.0:
        return _narrow(rows.to(A.dtype), A)
    S = rows.new_zeros((M, A.shape[0]), dtype=A.dtype)
    if p < 1.0:
        mask, buffer = _Mask(seed, p, M, K, rows.device), _buffer(rows, rows.dtype)
        for start, stop in _row_blocks(rows):
            block = buffer[: stop - start]
            mask.multiply(start, stop, rows[start:stop], block, None)
            S[start:stop] = _narrow(block.to(A.dtype), A)
        S.mul_(mask.scale)
    return S


def _narrow(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """rows [M, L] times matrix [r, L] transposed: long sums for few results.

    Both operands lie along the sum, which BLAS libraries add up in several accumulators: half the rounding error of
    the other layout. For a single result they do not, so a pairwise sum takes over.
    """
    if rows.shape[0] == 1:
        return (rows * matrix).sum(1).reshape(1, -1)
    return torch.nn.functional.linear(rows, matrix)


def _input_side(dS, rows, A, p, seed, dx, first: bool, need_A: bool) -> torch.Tensor | None:
    """dx += mask * (dS A) where dx is given, dx = ... for the ``first``; returns dA = dS^T (mask * x) where needed.

    One mask for both. ``dS`` already holds the 1 / (1 - p).
    """
    acc, A_acc = dS.dtype, A.to(dS.dtype)
    if p == 0.0:
        if dx is not None:
            torch.mm(dS, A_acc, out=dx) if first else dx.addmm_(dS, A_acc)
        return (dS.t() @ rows.to(acc)).to(A.dtype) if need_A else None
    dA = torch.zeros_like(A_acc) if need_A else None
    if p == 1.0:
        if dx is not None and first:
            dx.zero_()
    else:
        M, K = rows.shape
        mask, dropped = _Mask(seed, p, M, K, rows.device), _buffer(rows, acc)
        part = None if dx is None or first else _buffer(rows, acc)
        for start, stop in _row_blocks(rows):
            source = kept = target = None
            if need_A:
                source, kept = rows[start:stop].to(acc), dropped[: stop - start]
            if dx is not None:  # the first adapter needs no pass to add its part
                target = dx[start:stop] if first else part[: stop - start]
                torch.mm(dS[start:stop], A_acc, out=target)
            mask.multiply(start, stop, source, kept, target)
            if need_A:
                dA.addmm_(dS[start:stop].t(), kept)
            if part is not None:
                dx[start:stop] += target
    return dA.to(A.dtype) if need_A else None


def _weight_blocks(weight: torch.Tensor, dtype: torch.dtype) -> Iterator[tuple[int, int, torch.Tensor]]:
    N, K = weight.shape
    step = N if weight.dtype == dtype else max(1, _WEIGHT_ELEMENTS // max(K, 1))
    for start in range(0, N, max(step, 1)):
        stop = min(start + step, N)
        yield start, stop, weight[start:stop].to(dtype)


def _matmul_weight_t(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """rows W^T (+ bias) in the dtype of rows."""
    if weight.dtype == rows.dtype:
        return torch.nn.functional.linear(rows, weight, None if bias is None else bias.to(rows.dtype))
    y = rows.new_empty((rows.shape[0], weight.shape[0]))
    for start, stop, block in _weight_blocks(weight, rows.dtype):
        y[:, start:stop] = rows @ block.t()
    return y if bias is None else y.add_(bias.to(rows.dtype))


def _add_matmul_weight(dx: torch.Tensor, g: torch.Tensor, weight: torch.Tensor) -> None:
    """dx += g W, the product in the dtype of g."""
    for start, stop, block in _weight_blocks(weight, g.dtype):
        if dx.dtype == g.dtype and len(g) >= _FEW_ROWS:
            dx.addmm_(g[:, start:stop], block)
        else:
            dx += g[:, start:stop] @ block
