"""The eager path of the LoRA linear and of the LoRA term: plain torch, fast on CPUs, correct on any device.

One rule shapes it: nothing of size [M, K] is stored, neither the mask nor the dropped input. The mask is drawn again
where it is needed: inside the products, in C, where the package was built with a compiler, else for a block of rows.

16-bit tensors on a CPU are computed in fp32 and rounded once: a bf16 or fp16 GEMM without hardware support is
hundreds of times slower than the same GEMM in fp32. The weight is converted in blocks of rows, so that the copy stays
small and no fp32 weight is ever kept. The same blocks are those of a packed weight (``ops/linear/packed.py``), which
stands here for a tensor: it has ``shape``, ``dtype`` and ``blocks``.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch.nn.functional import linear

from fused_lora.ops import native
from fused_lora.ops.masks import times_mask
from fused_lora.reference import dropout_lanes, keep_scale, mask_cut

_MASK_ELEMENTS = 1 << 20  # row block of the mask and of the dropped input: 4 MiB of fp32
_WEIGHT_ELEMENTS = 1 << 21  # row block of a 16-bit or packed weight in fp32: 8 MiB
_WORTH_ONEDNN = 1 << 15  # elements of a result for which its call is worth its time
_CHAIN = 128  # products that it adds up one after the other
_TRIAL = (9, 20), (9, 30), (30, 20)  # shapes of x, y and W in its trial
_FEW_ROWS = 8  # below it some BLAS code paths add each product to the result, at twice the rounding error of a sum


def compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """fp32 for 16-bit tensors on a CPU, else the dtype itself."""
    return torch.float32 if dtype.itemsize == 2 and device.type == "cpu" else dtype


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
    rows = _wide(x)
    acc = _widest(rows.dtype, lora_A)
    total = _as(_matmul_weight_t(rows, weight, bias), acc)  # PEFT's base rounds its bias in, too
    S = _add_terms(total, rows, lora_A, lora_B, scaling, dropout, seeds)
    return _as(total, x.dtype), S if acc.itemsize > 2 else S.float()


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
    total = y.to(torch.promote_types(accumulate_dtype(x, lora_A), compute_dtype(y.dtype, y.device)), copy=True)
    if bias is not None:
        total += bias
    S = _add_terms(total, _wide(x), lora_A, lora_B, scaling, dropout, seeds)
    return _as(total, y.dtype), S.to(shrink_dtype(x, lora_A))


def _add_terms(total, rows, lora_A, lora_B, scaling, dropout, seeds) -> torch.Tensor:
    """total += sum_i s_i S_i B_i^T in its dtype; S = concatenation of D_i(x) A_i^T, [M, sum r], in the same."""
    acc, terms, seeds = total.dtype, [], _numbers(seeds)
    for i, (A, B, s, p) in enumerate(zip(lora_A, lora_B, scaling, dropout, strict=True)):
        A = _as(A, acc)
        # both operands lie along the sum, which BLAS libraries add up in several accumulators: half the rounding error
        if p == 0.0:
            S = linear(_as(rows, acc), A)
        else:
            S = dropped_products(seeds[i], p, _as(rows, acc), A, None, (True, False, False))[0]
            S.mul_(keep_scale(p))
        total.addmm_(S, _as(B, acc).t(), alpha=s)
        terms.append(S)
    return S if len(terms) == 1 else torch.cat(terms, 1)


def dropped_products(
    seed: Any, p: float, x: torch.Tensor, A: Any, dS: Any, wanted: tuple[bool, bool, bool]
) -> tuple[Any, Any, Any]:
    """(D(x) A^T, mask * (dS A), dS^T D(x)), None for what is not wanted, with D(x) = x * mask; one mask for all.

    Without dS the second is D(x) itself. x, A and dS are of one dtype.
    """
    need_S, need_x, need_A = wanted
    if p == 1.0:
        sizes = (x.shape[0], len(A)), x.shape, A.shape
        S, term, dA = (x.new_zeros(size) if need else None for size, need in zip(sizes, wanted, strict=True))
        return S, term, dA
    found = native.products(seed, mask_cut(p), x, A, dS, wanted)
    if found is not None:
        return found
    S, term, dA = [], [], None
    # a block's mask stays in a CPU's cache; elsewhere this path is the fallback, and each block would round dA
    step = max(1, _MASK_ELEMENTS // max(x.shape[1], 1) if x.is_cpu else x.shape[0])
    for start in range(0, max(x.shape[0], 1), step):
        rows, part = x[start : start + step], None if dS is None else dS[start : start + step]
        given = [rows] if need_S or need_A else []
        if need_x:
            given.append(rows if part is None else part @ A)
        if x.is_cpu:
            keep = dropout_lanes(seed, start, len(rows), x.shape[1])[:, : x.shape[1]] >= mask_cut(p)
            kept = [tensor * keep for tensor in given]
        else:
            kept = times_mask(seed, p, False, *given)
        if need_S:
            S.append(linear(kept[0], A))
        if need_x:
            term.append(kept[-1])
        if need_A:
            dA = torch.mm(part.t(), kept[0]) if dA is None else dA.addmm_(part.t(), kept[0])
    return _joined(S), _joined(term), dA


def _joined(parts: list[torch.Tensor]) -> torch.Tensor | None:
    return torch.cat(parts) if len(parts) > 1 else parts[0] if parts else None


def lora_linear_backward(
    g: torch.Tensor,
    x: torch.Tensor,
    weight: Any,
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

    weight: a tensor [N, K], a packed weight, or None. Without one dx is the LoRA term alone, and g may have another
    dtype than x.
    """
    g_rows, rows, n, numbers = _wide(g), _wide(x), len(lora_A), _numbers(seeds)
    acc = _widest(rows.dtype, lora_A)
    if g_rows.dtype is not acc:
        acc = torch.promote_types(acc, g_rows.dtype)
    g_acc, S = _as(g_rows, acc), _as(S, acc)
    parts = (S,) if n == 1 else S.split([B.shape[1] for B in lora_B], 1)
    dx: Any = None  # a tensor from the first adapter on, where it is needed
    dA: list[torch.Tensor | None] = [None] * n
    dB: list[torch.Tensor | None] = [None] * n
    for i, (A, B, part, s, p) in enumerate(zip(lora_A, lora_B, parts, scaling, dropout, strict=True)):
        B_acc = _as(B, acc)
        if need_B[i]:
            # S^T g is a third faster than g^T S, and into a contiguous result a sixth faster still
            like = g_acc.new_empty((part.shape[1], g_acc.shape[1]))
            dB[i] = _as(_scaled(part.t(), g_acc, s, like).t().contiguous(), B.dtype)
        if not (need_x or need_A[i]):
            continue
        dS = _scaled(g_acc, B_acc, s * keep_scale(p), part)  # both factors, one rounding
        A_acc = _as(A, acc)
        if p:
            wanted = False, need_x, need_A[i]
            _, term, found = dropped_products(numbers[i], p, _as(rows, acc), A_acc, dS, wanted)
            dx = dx.add_(term) if need_x and dx is not None else term
        else:
            if need_x:
                dx = torch.mm(dS, A_acc) if dx is None else dx.addmm_(dS, A_acc)
            found = torch.mm(dS.t(), _as(rows, acc)) if need_A[i] else None
        dA[i] = found if found is None else _as(found, A.dtype)
    if need_x and weight is not None:
        ready = _is_ready(weight, g_rows.dtype)
        for start, stop, block in ((0, None, weight),) if ready else _converted_blocks(weight, g_rows.dtype):
            columns = g_rows if ready else g_rows[:, start:stop]
            if acc is g_rows.dtype and dx.shape[0] >= _FEW_ROWS:
                dx = _plus_product(dx, columns, block)
            else:
                dx += torch.mm(columns, block)
            del block  # its memory is that of the next one
    dW = _as(g_rows.t() @ rows, weight.dtype) if need_weight else None
    db = g_acc.sum(0) if need_bias else None
    return (_as(dx, x.dtype) if need_x else None), dA, dB, dW, db


def accumulate_dtype(x: torch.Tensor, lora_A: Sequence[torch.Tensor]) -> torch.dtype:
    """The widest dtype involved: fp32 adapters over a 16-bit base are used in fp32, as PEFT does."""
    return _widest(compute_dtype(x.dtype, x.device), lora_A)


def shrink_dtype(x: torch.Tensor, lora_A: Sequence[torch.Tensor]) -> torch.dtype:
    """dtype in which S is kept for the backward, whatever computed it: fp32, or fp64 where that takes part."""
    return torch.promote_types(accumulate_dtype(x, lora_A), torch.float32)


def _widest(acc: torch.dtype, lora_A: Sequence[torch.Tensor]) -> torch.dtype:
    for A in lora_A:
        if A.dtype is not acc:
            acc = torch.promote_types(acc, A.dtype)
    return acc


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """In the dtype that is computed in."""
    return tensor.float() if tensor.dtype.itemsize == 2 and tensor.is_cpu else tensor


def _as(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor if tensor.dtype is dtype else tensor.to(dtype)  # the question takes a fifth of the call


def _scaled(left: torch.Tensor, right: torch.Tensor, s: float, like: torch.Tensor) -> torch.Tensor:
    """s * (left @ right) in one call; ``like`` only has the result's shape and dtype."""
    return torch.addmm(like, left, right, beta=0, alpha=s)


def _plus_product(dx: torch.Tensor, g: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """dx + g block, perhaps in dx's memory."""
    worth = dx.numel() >= _WORTH_ONEDNN and dx.dtype is torch.float32 and dx.is_cpu
    worth = worth and block.is_contiguous()  # of any other layout oneDNN's product takes a thousand times as long
    if not worth or not torch.backends.mkldnn.enabled or (plus_linear := _onednn()) is None:
        return dx.addmm_(g, block)
    for start in range(0, g.shape[1], _CHAIN):
        rows = slice(start, start + _CHAIN)
        dx = plus_linear(g[:, rows], dx, block[rows].t(), None, "add")
    return dx


@lru_cache(maxsize=1)
def _onednn() -> Any:
    """y + x W^T by oneDNN, on processors that torch's MKL is slow on; None on others.

    It has one chain of sums along the inner side. Pieces of it are more exact than MKL's product.
    """
    plus_linear = getattr(getattr(torch.ops.mkldnn, "_linear_pointwise", None), "binary", None)
    if plus_linear is None or not native.mkl_is_slow():
        return None
    x, y, W = (torch.arange(m * n, dtype=torch.float32, device="cpu").reshape(m, n) % 7 for m, n in _TRIAL)
    if torch.equal(plus_linear(x, y, W, None, "add"), y + x @ W.t()):
        return plus_linear
    warnings.warn("fused_lora: oneDNN's sum of a matrix and a product is not what is expected: not used", stacklevel=3)
    return None


def _numbers(seeds: torch.Tensor | None) -> Any:
    """The seeds as a list of numbers where nothing has to wait for them, else as they are."""
    return seeds.tolist() if seeds is not None and seeds.is_cpu else seeds


def _is_ready(weight, dtype: torch.dtype) -> bool:
    return weight.dtype is dtype and isinstance(weight, torch.Tensor)  # else it is packed


def _converted_blocks(weight, dtype: torch.dtype) -> Iterator[tuple[int, int, torch.Tensor]]:
    """(start, stop, rows of the weight in ``dtype``). Whoever drops one before the next has one in memory."""
    N, K = weight.shape
    step = max(1, _WEIGHT_ELEMENTS // max(K, 1))
    if not isinstance(weight, torch.Tensor):
        return map(lambda found: (*found[:2], _as(found[2], dtype)), weight.blocks(step))
    return ((start, min(start + step, N), weight[start : start + step].to(dtype)) for start in range(0, N, step))


def _matmul_weight_t(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """rows W^T (+ bias) in the dtype of rows."""
    bias = None if bias is None else _as(bias, rows.dtype)
    if _is_ready(weight, rows.dtype):
        return linear(rows, weight, bias)
    y = rows.new_empty((rows.shape[0], weight.shape[0]))
    for start, stop, block in _converted_blocks(weight, rows.dtype):
        torch.mm(rows, block.t(), out=y[:, start:stop])
        del block
    return y if bias is None else y.add_(bias)
