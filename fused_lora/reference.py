"""The specification: every operation of fused_lora in plain torch, one line of maths per line of code.

Symbols, with all leading dimensions of x flattened to M rows:

    x [M, K]   weight W [N, K]   bias b [N]   lora_A A_i [r_i, K]   lora_B B_i [N, r_i]   scaling s_i (float)
    D_i(x) = x * mask_i / (1 - p_i)                        dropout on the input of A_i only, one mask per adapter

    S_i = D_i(x) A_i^T                                     [M, r_i]
    y   = x W^T + b + sum_i s_i S_i B_i^T                  [M, N]      lora_term: any y in place of x W^T + b
    dS_i = s_i g B_i                                       [M, r_i]      g = dL/dy
    dx  = g W + sum_i mask_i / (1 - p_i) * (dS_i A_i)      [M, K]
    dA_i = dS_i^T D_i(x)    dB_i = s_i g^T S_i    dW = g^T x    db = sum_m g

Everything is computed in ``dtype`` (float64 by default in the tests) and returned in it, so these functions say what
the right answer is; the fast paths say how to get there. LoRA: Hu et al. 2021, arXiv:2106.09685.

The dropout mask is part of the specification. Element (row, k) of a mask reads one 16-bit lane of the counter-based
generator Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), the one of cuRAND and of
torch on a GPU:

    four 32-bit words = Philox4x32-10(counter=(k // 8, row, 0, 0), key=(low, high half of the seed))
    value = lane-th 16-bit piece of those words, lowest bits first, read as a signed integer in [-32768, 32767]
    lane  = k % 8        kept = value >= threshold - 32768        threshold = p in units of 2^-16

so a mask depends on (seed, row, k, p) alone: not on tiles, grids, devices or the number of rows.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch

CPU = torch.device("cpu")
LANES = 8  # 16-bit lanes in one block of Philox4x32
# multipliers and Weyl increments of Philox4x32, from the paper
PHILOX = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW32 = 0xFFFFFFFF


@functools.lru_cache(maxsize=256)
def dropout_threshold(p: float) -> int:
    """p in units of 2^-16: how many of the 65536 lane values drop. 0 only for p = 0, 65536 only for p = 1."""
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout p must be in [0, 1], got {p}")
    if p in (0.0, 1.0):
        return int(p * 65536)
    return min(max(round(p * 65536), 1), 65535)


def mask_cut(p: float) -> int:
    """Lanes that are no smaller are kept: :func:`dropout_threshold` as a signed 16-bit number, 32768 for p = 1."""
    return dropout_threshold(p) - 32768


@functools.lru_cache(maxsize=256)
def keep_scale(p: float) -> float:
    """1 / (1 - p) with the p that the 16-bit threshold really applies, so that E[D(x)] = x; 0 for p = 1."""
    threshold = dropout_threshold(p)
    return 0.0 if threshold == 65536 else 65536.0 / (65536 - threshold)


def dropout_lanes(seed: int | torch.Tensor, row: int, rows: int, K: int, device: torch.device = CPU) -> torch.Tensor:
    """The signed 16-bit lanes of rows [row, row + rows): int16 [rows, ceil(K / 8) * 8], unused from column K on.

    From torch operations: on any device, without a transfer or a wait. ``seed`` may be a tensor on the device.
    """
    blocks = -(-K // LANES)
    if not isinstance(seed, torch.Tensor):
        seed = (int(seed) + 2**63) % 2**64 - 2**63  # as a signed integer
    seed = torch.as_tensor(seed, dtype=torch.int64, device=device).reshape(())
    c1 = torch.arange(row, row + rows, dtype=torch.int64, device=device)[:, None] & _LOW32
    c0 = torch.arange(blocks, dtype=torch.int64, device=device)[None, :]
    c2 = c3 = torch.zeros((), dtype=torch.int64, device=device)
    k0, k1 = seed & _LOW32, (seed >> 32) & _LOW32
    for _ in range(10):
        # the product of two 32-bit numbers fills the 64 bits of a signed one
        a, b = c0 * PHILOX[0], c2 * PHILOX[1]
        c0, c1 = ((b >> 32) & _LOW32) ^ c1 ^ k0, b & _LOW32
        c2, c3 = ((a >> 32) & _LOW32) ^ c3 ^ k1, a & _LOW32
        k0, k1 = (k0 + WEYL[0]) & _LOW32, (k1 + WEYL[1]) & _LOW32
    words = torch.stack([word.expand(rows, blocks) for word in (c0, c1, c2, c3)], 2)
    return words.to(torch.int32).view(torch.int16).reshape(rows, blocks * LANES)  # the cast keeps the low 32 bits


def dropout_mask(
    seed: int | torch.Tensor, shape: Sequence[int], p: float, device: torch.device | str | None = None
) -> torch.Tensor:
    """The keep mask that a call with this seed used: bool, True = kept.

    Args:
        seed: the call's 64-bit seed (an int, or an int64 tensor of one element).
        shape: (..., K) of the call's input; leading dimensions are flattened to rows.
        p: dropout probability in [0, 1]; it acts as ``round(p * 65536) / 65536``.
        device: device of the result (default: CPU).

    Returns:
        bool tensor of ``shape``.

    Raises:
        ValueError: shape is empty or has a negative size, or p is not in [0, 1].
        TypeError: shape is no sequence of ints, seed no integer, p no number.
    """
    if isinstance(shape, (str, torch.Tensor)) or not isinstance(shape, Sequence):
        raise TypeError(f"shape: expected a sequence of ints, got {type(shape).__name__}")
    if not all(isinstance(size, (int, np.integer)) and not isinstance(size, bool) for size in shape):
        raise TypeError(f"shape: expected a sequence of ints, got {tuple(shape)}")
    if isinstance(seed, torch.Tensor):
        odd = seed.is_floating_point() or seed.is_complex() or seed.dtype is torch.bool
        if seed.numel() != 1 or odd or seed.is_meta and torch.device(device or CPU).type != "meta":
            raise TypeError(f"seed: expected one integer, got {seed.dtype} {tuple(seed.shape)} on {seed.device}")
    elif isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
        raise TypeError(f"seed: expected one integer, got {seed!r}")
    if isinstance(p, bool) or not isinstance(p, (int, float)):
        raise TypeError(f"p: expected a number in [0, 1], got {p!r}")
    if len(shape) == 0 or min(shape) < 0:
        raise ValueError(f"shape: expected (..., K) with no negative size, got {tuple(shape)}")
    *leading, K = tuple(shape)
    M = int(np.prod(leading, dtype=np.int64))
    lanes = dropout_lanes(seed, 0, M, K, CPU if device is None else torch.device(device))[:, :K]
    # as 32-bit numbers: 32768, for p = 1, has no 16-bit one
    return lanes.int().ge(mask_cut(p)).reshape(tuple(shape))


def _dropped(x: torch.Tensor, p: float, seeds: torch.Tensor | None, i: int) -> torch.Tensor:
    if p == 0.0:
        return x
    if seeds is None:
        raise ValueError(f"seeds: expected int64 seeds, because dropout[{i}] is {p}, got None")
    return x * dropout_mask(seeds[i], x.shape, p, x.device) * keep_scale(p)


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_A: Sequence[torch.Tensor],
    lora_B: Sequence[torch.Tensor],
    scaling: Sequence[float],
    dropout: Sequence[float],
    seeds: torch.Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y = x W^T + b + sum_i s_i D_i(x) A_i^T B_i^T.

    Args:
        x: [..., K]; weight: [N, K]; bias: [N] or None; lora_A[i]: [r_i, K]; lora_B[i]: [N, r_i].
        scaling, dropout: one float per adapter. dropout[i] = 0 draws nothing.
        seeds: int64 [len(lora_A)], needed where a dropout is not 0.
        dtype: dtype of the arithmetic and of the results.

    Returns:
        y [..., N] and S [M, sum(r_i)], the concatenated S_i.
    """
    y = x.reshape(-1, x.shape[-1]).to(dtype) @ weight.to(dtype).T
    y, S = lora_term(y, x.reshape(-1, x.shape[-1]), lora_A, lora_B, scaling, dropout, seeds, bias, dtype=dtype)
    return y.reshape(*x.shape[:-1], weight.shape[0]), S


def lora_term(
    y: torch.Tensor,
    x: torch.Tensor,
    lora_A: Sequence[torch.Tensor],
    lora_B: Sequence[torch.Tensor],
    scaling: Sequence[float],
    dropout: Sequence[float],
    seeds: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y + bias + sum_i s_i D_i(x) A_i^T B_i^T for a given y [..., N]; the other arguments and S as in lora_linear."""
    shape, rows = y.shape, x.reshape(-1, x.shape[-1]).to(dtype)
    y = y.reshape(-1, shape[-1]).to(dtype)
    if bias is not None:
        y = y + bias.to(dtype)
    S = [rows.new_empty(rows.shape[0], 0)]
    for i, (A, B) in enumerate(zip(lora_A, lora_B, strict=True)):
        S.append(_dropped(rows, dropout[i], seeds, i) @ A.to(dtype).T)
        y = y + scaling[i] * (S[-1] @ B.to(dtype).T)
    return y.reshape(shape), torch.cat(S, dim=1)


def lora_linear_backward(
    g: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: Sequence[torch.Tensor],
    lora_B: Sequence[torch.Tensor],
    scaling: Sequence[float],
    dropout: Sequence[float],
    seeds: torch.Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Gradients of :func:`lora_linear`: dx [..., K], dA list, dB list, dW [N, K], db [N], all in ``dtype``."""
    rows, g_rows = x.reshape(-1, x.shape[-1]).to(dtype), g.reshape(-1, g.shape[-1]).to(dtype)
    dx, dA, dB = lora_term_backward(g, x, lora_A, lora_B, scaling, dropout, seeds, dtype=dtype)
    return dx + (g_rows @ weight.to(dtype)).reshape(x.shape), dA, dB, g_rows.T @ rows, g_rows.sum(0)


def lora_term_backward(
    g: torch.Tensor,
    x: torch.Tensor,
    lora_A: Sequence[torch.Tensor],
    lora_B: Sequence[torch.Tensor],
    scaling: Sequence[float],
    dropout: Sequence[float],
    seeds: torch.Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """Gradients of :func:`lora_term`: dx [..., K], dA list, dB list; that of y is g, of bias its column sums."""
    rows, g_rows = x.reshape(-1, x.shape[-1]).to(dtype), g.reshape(-1, g.shape[-1]).to(dtype)
    dx, dA, dB = torch.zeros_like(rows), [], []
    for i, (A, B) in enumerate(zip(lora_A, lora_B, strict=True)):
        dropped = _dropped(rows, dropout[i], seeds, i)
        dS = scaling[i] * (g_rows @ B.to(dtype))
        dx = dx + _dropped(dS @ A.to(dtype), dropout[i], seeds, i)
        dA.append(dS.T @ dropped)
        dB.append(scaling[i] * (g_rows.T @ (dropped @ A.to(dtype).T)))
    return dx.reshape(x.shape), dA, dB


def delta_weight(
    lora_A: Sequence[torch.Tensor],
    lora_B: Sequence[torch.Tensor],
    scaling: Sequence[float],
    *,
    fan_in_fan_out: bool = False,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """sum_i s_i B_i A_i: [N, K], or [K, N] for a base weight that is stored transposed (fan_in_fan_out)."""
    terms = [s * (B.to(dtype) @ A.to(dtype)) for A, B, s in zip(lora_A, lora_B, scaling, strict=True)]
    delta = sum(terms[1:], start=terms[0])
    return delta.T if fan_in_fan_out else delta


def merge(weight: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """round(W + delta): the sum in delta's dtype, one rounding to W's dtype."""
    return (weight.to(delta.dtype) + delta).to(weight.dtype)


def unmerge_correction(weight: torch.Tensor, merged: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """bool: True where round(merged - delta) differs from W in a bit. An exact unmerge must store these elements."""
    return bits((merged.to(delta.dtype) - delta).to(weight.dtype)) != bits(weight)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as signed integers of the same size: bits compare where values cannot (-0, NaN, subnormals)."""
    return tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
