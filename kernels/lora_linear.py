"""The adapted linear layer and its input gradient: one kernel, because both are

    Y = X W' + mask_out * (expand_scale * S Q)        S = shrink_scale * (mask_in * X) P^T

    forward          X = x [M, K]   W' = W^T   P = A [R, K]     Q = B^T [R, N]   mask on x     shrink 1/(1-p), expand s
    input gradient   X = g [M, N]   W' = W     P = B^T [R, N]   Q = A [R, K]     mask on dx    shrink s, expand 1/(1-p)

    x, g, W, Y  bf16 / fp16 / fp32, one dtype; A and B any of the three; S [M, R] fp32; sums fp32, one rounding of Y

Variants, by how a tile of Y gets its S:
    recompute   one launch. Every program forms the S of its rows beside its tile of Y and applies Q after the K loop.
                Linear in S, so K can be split over programs, the last of which sums their planes in order.
    publish     one launch. The program of column 0 forms S and releases a flag of its row block; the others acquire it
                after their K loop. A program takes the next tile when it starts, and column 0 of a row block comes
                before its other columns: nobody waits for a program that does not run already, whatever else the
                device does. Column 0 of the next group of row blocks comes before the rest of this one, so S is there
                long before it is asked for.
    split       two launches. The shrink reads X once, draws the mask once and leaves S in memory; the GEMM starts its
                accumulator from S Q. For any number of adapters, each with its own mask, and any rank.
The first two take one adapter whose rank fits BLOCK_R.

Bytes (e = size of an element) against the floor of the base GEMM, e (M K + K N + M N): all add A and B, e R (K + N),
and S, 4 M R; split reads X once more, e M K, and S once. Flops: base 2 M K N; split and publish + 2 M R (K + N),
recompute + 2 M R (K ceil(N / BLOCK_N) + N). ``traffic`` has the numbers. LoRA: Hu et al. 2021, arXiv:2106.09685.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .config import LaunchConfig, capability, pick, precision, processors, without_tma
from .descriptors import describable, descriptor_memory
from .dropout import keep_scale
from .lora_expand import finish, finish_split, lora_term
from .lora_shrink import adapter_table, lora_shrink, stack
from .sync import acquire, clear, counters, last_to_arrive, release
from .tiles import addressable, contract, grouped_order, published_order, store_tile


@triton.jit
def _lora_linear_kernel(
    x_ptr, w_ptr, bias_ptr, p_ptr, q_ptr, s_ptr, y_ptr, planes_ptr, seeds_ptr, sync_ptr,
    rank_ends, bounds, shrink_scales, expand_scales,
    M, N, K, R,
    stride_xm, stride_xk,
    stride_wk, stride_wn,
    stride_pr, stride_pk,
    stride_qr, stride_qn,
    stride_plane,
    NUM_ADAPTERS: tl.constexpr, VARIANT: tl.constexpr, DROP_IN: tl.constexpr, DROP_OUT: tl.constexpr,
    HAS_BIAS: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    TMA: tl.constexpr, W_IS_NK: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    num_m, num_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    k_begin, k_end = 0, K
    if SPLIT:
        chunk = tl.cdiv(tl.cdiv(K, BLOCK_K), tl.num_programs(1)) * BLOCK_K
        k_begin = tl.program_id(1) * chunk
        k_end = tl.minimum(K, k_begin + chunk)
    x_src, w_src = x_ptr, w_ptr
    if TMA:
        x_src = tl.make_tensor_descriptor(x_ptr, [M, K], [stride_xm, 1], [BLOCK_M, BLOCK_K])
        if W_IS_NK:
            w_src = tl.make_tensor_descriptor(w_ptr, [N, K], [stride_wn, 1], [BLOCK_N, BLOCK_K])
        else:
            w_src = tl.make_tensor_descriptor(w_ptr, [K, N], [stride_wk, 1], [BLOCK_K, BLOCK_N])
    seed, bound = 0, 0
    if DROP_IN and VARIANT != "split":
        seed, bound = tl.load(seeds_ptr), bounds[0]
    first = tl.program_id(0)
    if VARIANT == "publish":
        first = tl.atomic_add(sync_ptr, 1, sem="relaxed")
    # one tile a program, or several under a persistent grid: the launch decides
    for tile in range(first, num_m * num_n, tl.num_programs(0)):
        if VARIANT == "publish":
            pid_m, pid_n = published_order(tile, num_m, num_n, GROUP_M)
        else:
            pid_m, pid_n = grouped_order(tile, num_m, num_n, GROUP_M)
        m0, n0 = pid_m * BLOCK_M, pid_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        s_t = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
        if VARIANT == "split":
            acc = lora_term(
                acc, s_t, s_ptr, q_ptr, seeds_ptr, rank_ends, bounds, expand_scales, m0, n0, M, N, R,
                stride_qr, stride_qn, NUM_ADAPTERS, DROP_OUT, False, UPCAST, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R,
            )  # fmt: skip
        if VARIANT == "recompute" or (VARIANT == "publish" and pid_n == 0):
            acc, s_t = contract(
                acc, s_t, x_src, w_src, p_ptr, m0, n0, 0, k_begin, k_end, M, N, K, R,
                stride_xm, stride_xk, stride_wk, stride_wn, stride_pr, stride_pk, seed, bound,
                True, True, DROP_IN, False, TMA, W_IS_NK, UPCAST, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R,
            )  # fmt: skip
        else:
            acc, s_t = contract(
                acc, s_t, x_src, w_src, p_ptr, m0, n0, 0, k_begin, k_end, M, N, K, R,
                stride_xm, stride_xk, stride_wk, stride_wn, stride_pr, stride_pk, seed, bound,
                True, False, False, False, TMA, W_IS_NK, UPCAST, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R,
            )  # fmt: skip
        s = tl.trans(s_t) * shrink_scales[0]
        y_to, s_to = y_ptr, s_ptr
        if SPLIT:
            y_to = planes_ptr + tl.program_id(1).to(tl.int64) * stride_plane
            s_to = y_to + (tl.full((), 0, tl.int64) + M) * N
        s_rows = tl.where(pid_n == 0, M, 0)  # all programs of a row block have the same S, or only the first
        if VARIANT != "split":
            store_tile(s_to, s, m0, 0, R, 1, s_rows, R, BLOCK_M, BLOCK_R)
        if VARIANT == "publish":
            if pid_n == 0:
                release(sync_ptr + 2 + pid_m)
            acquire(sync_ptr + 2 + pid_m)
        # by halves: the LoRA term of a whole tile next to its accumulator does not fit the registers
        half0, half1 = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
        finish(
            half0, s, y_to, bias_ptr, s_ptr, q_ptr, seeds_ptr, rank_ends, bounds, expand_scales, m0, n0, M, N, R,
            stride_qr, stride_qn, NUM_ADAPTERS, VARIANT, DROP_OUT, HAS_BIAS and not SPLIT, UPCAST, PRECISION,
            BLOCK_M, BLOCK_N // 2, BLOCK_R,
        )  # fmt: skip
        finish(
            half1, s, y_to, bias_ptr, s_ptr, q_ptr, seeds_ptr, rank_ends, bounds, expand_scales,
            m0, n0 + BLOCK_N // 2, M, N, R,
            stride_qr, stride_qn, NUM_ADAPTERS, VARIANT, DROP_OUT, HAS_BIAS and not SPLIT, UPCAST, PRECISION,
            BLOCK_M, BLOCK_N // 2, BLOCK_R,
        )  # fmt: skip
    # after the loop, for the sake of registers: with a split it has run once
    if SPLIT:
        if last_to_arrive(sync_ptr + tl.program_id(0), tl.num_programs(1)):
            finish_split(
                y_ptr, s_ptr, planes_ptr, bias_ptr, tl.num_programs(1), stride_plane, M, N, R,
                HAS_BIAS, BLOCK_M, BLOCK_N, BLOCK_R, GROUP_M,
            )  # fmt: skip
    if VARIANT == "publish":
        if last_to_arrive(sync_ptr + 1, tl.num_programs(0)):
            clear(sync_ptr, 2 + num_m)


def _linear(
    op: str,
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    P: Sequence[torch.Tensor],
    Q: Sequence[torch.Tensor],
    shrink: tuple[Sequence[float], Sequence[float]],
    expand: tuple[Sequence[float], Sequence[float]],
    seeds: torch.Tensor | None,
    config: LaunchConfig | None,
    variant: str | None,
    shrink_config: LaunchConfig | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(Y, S) of the module's formula; w is W' [K, N]. shrink, expand: the scales and the dropout of that side."""
    (M, K), N, ranks = x.shape, w.shape[1], [p.shape[0] for p in P]
    drop_in, drop_out = seeds is not None and any(shrink[1]), seeds is not None and any(expand[1])
    upcast = any(t.dtype != x.dtype for t in (*P, *Q))
    config = config or pick(
        op, M, N, K, max(ranks), x.dtype, drop_in or drop_out, capability(x.device), upcast, len(P), variant
    )
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    S_here = config.variant != "split" and y.numel() > 0
    draw_in = drop_in and S_here
    if S_here:
        S = torch.empty((M, ranks[0]), dtype=torch.float32, device=x.device)
    else:
        S = lora_shrink(x, P, *shrink, seeds, shrink_config)
    if y.numel() == 0:
        return y, S
    x, w, P_all, Q_all = addressable(x), addressable(w), addressable(stack(P)), addressable(stack(Q))
    w_is_nk = w.stride(0) == 1
    if config.tma and not (describable(x) and describable(w.t() if w_is_nk else w)):
        config = without_tma(config)
    num_m = triton.cdiv(M, config.BLOCK_M)
    tiles = num_m * triton.cdiv(N, config.BLOCK_N)
    planes = sync = None
    if config.SPLIT_K > 1:
        planes = torch.empty((config.SPLIT_K, y.numel() + S.numel()), dtype=torch.float32, device=x.device)
        sync = counters(tiles, x.device)
    elif config.variant == "publish":
        sync = counters(2 + num_m, x.device)
    elif config.tma:
        tiles = min(tiles, processors(x.device))
    ends, bounds = adapter_table(ranks, expand[1] if drop_out else shrink[1])
    with torch.cuda.device_of(x), descriptor_memory(config.tma and x.is_cuda):
        _lora_linear_kernel[(tiles, config.SPLIT_K)](
            x, w, bias, P_all, Q_all, S, y, planes,
            seeds if draw_in or drop_out else None, sync,
            ends, bounds, tuple(map(float, shrink[0])), tuple(map(float, expand[0])),
            M, N, K, S.shape[1],
            *x.stride(),
            *w.stride(),
            *P_all.stride(),
            *Q_all.stride(),
            0 if planes is None else planes.stride(0),
            NUM_ADAPTERS=len(P), VARIANT=config.variant, DROP_IN=draw_in, DROP_OUT=drop_out,
            HAS_BIAS=bias is not None, UPCAST=upcast, PRECISION=precision(x.dtype),
            TMA=config.tma, W_IS_NK=w_is_nk, SPLIT=planes is not None,
            BLOCK_M=config.BLOCK_M, BLOCK_N=config.BLOCK_N, BLOCK_K=config.BLOCK_K, BLOCK_R=config.BLOCK_R,
            GROUP_M=config.GROUP_M, **config.options(),
        )  # fmt: skip
    return y, S


def lora_linear_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_A: Sequence[torch.Tensor],
    lora_B: Sequence[torch.Tensor],
    scaling: Sequence[float],
    dropout: Sequence[float],
    seeds: torch.Tensor | None = None,
    config: LaunchConfig | None = None,
    variant: str | None = None,
    shrink_config: LaunchConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y = x W^T + b + sum_i s_i S_i B_i^T [M, N] and S_i = D_i(x) A_i^T, fp32 [M, sum of ranks], unscaled.

    x [M, K], weight [N, K] of x's dtype, any strides; bias [N]; lora_A_i [r_i, K], lora_B_i [N, r_i]; seeds int64, one
    for each adapter, on x's device. Arguments are checked by the op above, not here.
    """
    shrink = [keep_scale(p) for p in dropout], dropout
    none = [0.0] * len(dropout)
    return _linear(
        "linear", x, weight.t(), bias, lora_A, [B.t() for B in lora_B], shrink, (scaling, none), seeds,
        config, variant, shrink_config,
    )  # fmt: skip


def lora_linear_input_grad(
    g: torch.Tensor,
    weight: torch.Tensor,
    lora_A: Sequence[torch.Tensor],
    lora_B: Sequence[torch.Tensor],
    scaling: Sequence[float],
    dropout: Sequence[float],
    seeds: torch.Tensor | None = None,
    config: LaunchConfig | None = None,
    variant: str | None = None,
    shrink_config: LaunchConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dx = g W + sum_i mask_i / (1 - p_i) * (dS_i A_i) [M, K] and dS_i = s_i g B_i, fp32 [M, sum of ranks]."""
    expand = [keep_scale(p) for p in dropout], dropout
    none = [0.0] * len(dropout)
    return _linear(
        "input_grad", g, weight, None, [B.t() for B in lora_B], lora_A, (scaling, none), expand, seeds,
        config, variant, shrink_config,
    )  # fmt: skip
