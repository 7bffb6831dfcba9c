"""The adapted linear layer: the base product, the LoRA term and the bias in one launch, or after a shrink in two.

    Y = X W^T + bias + sum_i s_i S_i B_i^T [M, N]        S_i = D_i(X) A_i^T [M, r_i], fp32

    x, W, Y  bf16 / fp16 / fp32, one dtype; A and B any of the three; sums fp32, one rounding of Y

Variants, by how a tile of Y gets its S:
    recompute   one launch. Every program forms the S of its rows beside its tile of Y and applies B after the K loop.
                Linear in S, so K can be split over programs, the last of which sums their planes in order. For one
                adapter whose rank fits BLOCK_R, without dropout: many programs would draw the same mask.
    split       two launches. The shrink reads X once, draws the mask once and leaves S in memory; the GEMM starts its
                accumulator from S B^T, or that of one plane, where K is split. For any number of adapters, each with
                its own mask, and any rank.
                ``late``, for one adapter of one block of ranks: S and B are loaded before the K loop and multiplied
                after it, s S rounded in place of S.

A weight of 4 bits (``FourBit``) is read as 4 bits, for few rows: the K loop dequantises its tiles to the values that
``dequant_4bit`` would write. N K / 2 bytes and the scales take the place of e N K, where a dequantisation moves
(1/2 + e) N K more; each block of rows reads them anew.

Bytes (e = size of an element) against the floor of the base GEMM, e (M K + K N + M N): all add A and B, e R (K + N),
and S, 4 M R; split reads X once more, e M K, and S once. Flops: base 2 M K N; split + 2 M R (K + N), recompute
+ 2 M R (K ceil(N / BLOCK_N) + N). ``traffic`` has the numbers. LoRA: Hu et al. 2021, arXiv:2106.09685.
"""

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl

from .config import SCALE_GROUP, LaunchConfig, capability, pick, precision, processors, without_tma
from .dequant_4bit import shifts, tensors_of
from .descriptors import describable
from .dropout import keep_scale
from .launch import Launch
from .lora_expand import add_bias, lora_term
from .lora_shrink import adapter_table, is_single, prepare_shrink, stacked
from .sync import counters, last_to_arrive
from .tiles import addressable, contract, grouped_order, load_tile, store_tile, sum_planes


@triton.jit
def _finish(
    acc, s, y_ptr, bias_ptr, s_ptr, b_ptr, rank_ends, scales, m0, n0, M, N, R,
    stride_br, stride_bn,
    NUM_ADAPTERS: tl.constexpr, VARIANT: tl.constexpr, HAS_BIAS: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The epilogue: what is missing of LoRA term and bias, one rounding, the store."""
    if VARIANT == "recompute":
        acc = lora_term(
            acc, s, s_ptr, b_ptr, None, rank_ends, None, scales, m0, n0, M, N, R, stride_br, stride_bn,
            NUM_ADAPTERS, False, True, OPERAND, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R,
        )  # fmt: skip
    acc = add_bias(acc, bias_ptr, n0, N, HAS_BIAS, BLOCK_N)
    store_tile(y_ptr, acc, m0, n0, N, 1, M, N, BLOCK_M, BLOCK_N)


@triton.jit
def _finish_split_k(
    y_ptr, s_ptr, planes_ptr, bias_ptr, splits, stride_plane, M, N, R,
    VARIANT: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One tile of Y, and of a recomputed S in column 0, from the planes of all programs that share it."""
    pid_m, pid_n = grouped_order(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    m0, n0 = pid_m * BLOCK_M, pid_n * BLOCK_N
    y = sum_planes(planes_ptr, splits, stride_plane, m0, n0, N, 1, M, N, BLOCK_M, BLOCK_N)
    y = add_bias(y, bias_ptr, n0, N, HAS_BIAS, BLOCK_N)
    store_tile(y_ptr, y, m0, n0, N, 1, M, N, BLOCK_M, BLOCK_N)
    if VARIANT == "recompute":
        if pid_n == 0:
            s_planes = planes_ptr + (tl.full((), 0, tl.int64) + M) * N  # a plane holds Y, then S
            s = sum_planes(s_planes, splits, stride_plane, m0, 0, R, 1, M, R, BLOCK_M, BLOCK_R)
            store_tile(s_ptr, s, m0, 0, R, 1, M, R, BLOCK_M, BLOCK_R)


@triton.jit
def _lora_linear_kernel(
    x_ptr, w_ptr, bias_ptr, a_ptr, b_ptr, s_ptr, y_ptr, planes_ptr, sync_ptr,
    rank_ends, scales,
    M, N, K, R,
    stride_xm, stride_xk,
    stride_wk, stride_wn,
    stride_ar, stride_ak,
    stride_br, stride_bn,
    stride_plane,
    shift, shift8,
    NUM_ADAPTERS: tl.constexpr, VARIANT: tl.constexpr, HAS_BIAS: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr, W_IS_NK: tl.constexpr, SPLIT: tl.constexpr,
    FOUR_BIT: tl.constexpr, NESTED: tl.constexpr, LATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    OPERAND: tl.constexpr = tl.float32 if UPCAST else x_ptr.dtype.element_ty
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
    # a persistent grid, or one tile a program: a loop that the compiler can see through, which saves 80 registers
    PERSISTENT: tl.constexpr = TMA and not SPLIT
    first = tl.program_id(0)
    end, step = (num_m * num_n, tl.num_programs(0)) if PERSISTENT else (first + 1, 1)
    for tile in range(first, end, step):
        pid_m, pid_n = grouped_order(tile, num_m, num_n, GROUP_M)
        m0, n0 = pid_m * BLOCK_M, pid_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        s_t = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
        if VARIANT == "split":
            s_rows = tl.where(tl.program_id(1) == 0, M, 0) if SPLIT else M  # one plane has the term
            if LATE:
                scaled = load_tile(s_ptr, m0, 0, R, 1, s_rows, R, BLOCK_M, BLOCK_R) * scales[0]
                q = load_tile(b_ptr, 0, n0, stride_br, stride_bn, R, N, BLOCK_R, BLOCK_N)
            else:
                acc = lora_term(
                    acc, s_t, s_ptr, b_ptr, None, rank_ends, None, scales, m0, n0, s_rows, N, R,
                    stride_br, stride_bn, NUM_ADAPTERS, False, False, OPERAND, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R,
                )  # fmt: skip
        acc, s_t = contract(
            acc, s_t, x_src, w_src, a_ptr, m0, n0, 0, k_begin, k_end, M, N, K, R,
            stride_xm, stride_xk, stride_wk, stride_wn, stride_ar, stride_ak, 0, 0,
            True, VARIANT == "recompute", False, False, TMA, W_IS_NK, UPCAST, PRECISION,
            BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, shift, shift8, FOUR_BIT, NESTED,
        )  # fmt: skip
        s = tl.trans(s_t)
        y_to, s_to = y_ptr, s_ptr
        if SPLIT:
            y_to = planes_ptr + tl.program_id(1).to(tl.int64) * stride_plane
            s_to = y_to + (tl.full((), 0, tl.int64) + M) * N
        if VARIANT == "recompute":
            s_rows = tl.where(pid_n == 0, M, 0)  # all programs of a row block have the same S
            store_tile(s_to, s, m0, 0, R, 1, s_rows, R, BLOCK_M, BLOCK_R)
        # by halves: the LoRA term of a whole tile next to its accumulator does not fit the registers
        if LATE:
            acc = tl.dot(scaled.to(OPERAND), q.to(OPERAND), acc, input_precision=PRECISION)
        half0, half1 = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
        _finish(
            half0, s, y_to, bias_ptr, s_ptr, b_ptr, rank_ends, scales, m0, n0, M, N, R,
            stride_br, stride_bn, NUM_ADAPTERS, VARIANT, HAS_BIAS and not SPLIT, OPERAND, PRECISION,
            BLOCK_M, BLOCK_N // 2, BLOCK_R,
        )  # fmt: skip
        _finish(
            half1, s, y_to, bias_ptr, s_ptr, b_ptr, rank_ends, scales, m0, n0 + BLOCK_N // 2, M, N, R,
            stride_br, stride_bn, NUM_ADAPTERS, VARIANT, HAS_BIAS and not SPLIT, OPERAND, PRECISION,
            BLOCK_M, BLOCK_N // 2, BLOCK_R,
        )  # fmt: skip
    # after the loop, for the sake of registers: with a split it has run once
    if SPLIT:
        if last_to_arrive(sync_ptr + tl.program_id(0), tl.num_programs(1)):
            _finish_split_k(
                y_ptr, s_ptr, planes_ptr, bias_ptr, tl.num_programs(1), stride_plane, M, N, R,
                VARIANT, HAS_BIAS, BLOCK_M, BLOCK_N, BLOCK_R, GROUP_M,
            )  # fmt: skip


def launch_options(config: LaunchConfig, nested: bool) -> dict[str, int | bool]:
    """Triton's; a double quantised scale is a product and a sum, which must not be contracted."""
    return config.options() | (dict(enable_fp_fusion=False) if nested else {})


def lora_linear_forward(
    x: torch.Tensor,
    weight,
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
    for each adapter, on x's device. A weight of 4 bits is the arguments of ``dequant_4bit``, x's dtype the last, as a
    named tuple (``FourBit`` of fused_lora/ops/dequant.py). Arguments are checked by the op above, not here; ValueError
    for a mask with the variant "recompute", for 4 bits whose rows or scales do not fit the tiles, and for what
    ``config.late`` does not take.
    """
    arguments = x, weight, bias, lora_A, lora_B
    drop = seeds is not None and any(dropout)
    return prepare_linear(*arguments, scaling, dropout, drop, config, variant, shrink_config)(*arguments, seeds)


def prepare_linear(
    x: torch.Tensor,
    weight,
    bias: torch.Tensor | None,
    lora_A: Sequence[torch.Tensor],
    lora_B: Sequence[torch.Tensor],
    scaling: Sequence[float],
    dropout: Sequence[float],
    drop: bool,
    config: LaunchConfig | None = None,
    variant: str | None = None,
    shrink_config: LaunchConfig | None = None,
) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """``lora_linear_forward`` as a function of (x, weight, bias, lora_A, lora_B, seeds).

    For tensors of these shapes, strides and dtypes, and like these in whether they begin at a multiple of 16 bytes.
    """
    (M, K), N, ranks, device, dtype = x.shape, weight.shape[0], [A.shape[0] for A in lora_A], x.device, x.dtype
    R, wide = sum(ranks), next((t.dtype for t in (*lora_A, *lora_B) if t.dtype != dtype), dtype)
    four_bit = not isinstance(weight, torch.Tensor)
    if four_bit and (K % SCALE_GROUP or weight.blocksize < SCALE_GROUP):
        raise ValueError(
            f"weight: expected rows and blocks of a multiple of {SCALE_GROUP} values, got {K} and {weight.blocksize}"
        )
    if config is None:
        op = "linear_4bit" if four_bit else "linear"
        config = pick(op, M, N, K, max(ranks), dtype, drop, capability(device), wide != dtype, len(ranks), variant)
    if config.variant == "recompute" and drop:
        raise ValueError("dropout: expected none with the variant 'recompute', which draws no mask")
    if config.late and ((config.variant, len(ranks)) != ("split", 1) or R > config.BLOCK_R or dtype == torch.float16):
        raise ValueError(
            f"config: expected late for the variant 'split', one adapter of r <= {config.BLOCK_R} and no fp16, "
            f"got {config.variant!r}, r = {', '.join(map(str, ranks))} and {dtype}"
        )
    recompute, shrink = config.variant == "recompute" and M * N > 0, None
    if not recompute:
        shrink = prepare_shrink(x, lora_A, [keep_scale(p) for p in dropout], dropout, drop, shrink_config)
        if M * N == 0:
            return lambda x, weight, bias, lora_A, lora_B, seeds: (x.new_empty((M, N)), shrink(x, lora_A, seeds))
    B_t = [B.t() for B in lora_B]
    copied = config.copied(dtype)
    one_A, one_B = is_single(lora_A) and not copied, is_single(B_t) and not copied
    rows, A, B = addressable(x), stacked(lora_A, False, copied), stacked(B_t, False, copied)
    if four_bit:
        nested, stride_w = weight.nested is not None, (1, K)
        log2s = shifts(weight.blocksize, weight.nested[2] if nested else 0)
    else:
        w = addressable(weight).t()
        nested, log2s, stride_w = False, (0, 0), w.stride()
        if config.tma and not (describable(rows) and describable(w.t() if w.stride(0) == 1 else w)):
            config = without_tma(config)
    tiles, splits = -(-M // config.BLOCK_M) * -(-N // config.BLOCK_N), config.SPLIT_K
    planes_size = (splits, M * (N + R)) if splits > 1 else None
    launch = Launch(
        (min(tiles, processors(device)) if config.tma and splits == 1 else tiles, splits),
        adapter_table(ranks, ())[0], tuple(map(float, scaling)),
        M, N, K, R, *rows.stride(), *stride_w, *A.stride(), *B.stride(), M * (N + R) if splits > 1 else 0,
        *log2s,
        NUM_ADAPTERS=len(ranks), VARIANT=config.variant,
        HAS_BIAS=bias is not None, UPCAST=config.upcasts(wide, dtype), PRECISION=precision(dtype),
        TMA=config.tma, W_IS_NK=stride_w[0] == 1, SPLIT=splits > 1, FOUR_BIT=four_bit, NESTED=nested, LATE=config.late,
        BLOCK_M=config.BLOCK_M, BLOCK_N=config.BLOCK_N, BLOCK_K=config.BLOCK_K, BLOCK_R=config.BLOCK_R,
        GROUP_M=config.GROUP_M, **launch_options(config, nested),
    ).__call__  # fmt: skip
    kernel, f32 = _lora_linear_kernel, torch.float32

    def run(x, weight, bias, lora_A, lora_B, seeds):
        y, planes, sync = x.new_empty(M, N), None, None
        S = shrink(x, lora_A, seeds) if shrink else x.new_empty(M, R, dtype=f32)
        if planes_size:
            planes, sync = S.new_empty(*planes_size), counters(tiles, device)
        A = lora_A[0] if one_A else stacked(lora_A, False, copied)
        B = lora_B[0] if one_B else stacked(lora_B, True, copied)
        w = tensors_of(*weight[:4]) if four_bit else addressable(weight)
        bias = bias if bias is None else bias.contiguous()
        launch(kernel, addressable(x), w, bias, A, B, S, y, planes, sync)
        return y, S

    return run
