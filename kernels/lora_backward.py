"""The LoRA part of a backward in two passes, one over g and one over x, each of which does two things at once.

    over g [M, N]    dS = s g B [M, r]                          dB^T = s S^T g                       [r, N]
    over x [M, K]    dx = mask/(1-p) * (dS A) [M, K]            dA = 1/(1-p) dS^T (mask * x)         [r, K]

g, x, dx  bf16 / fp16 / fp32      S, dS fp32      sums fp32      one adapter of one block of ranks (BLOCK_R)

dx is the LoRA term alone: the library's GEMM adds g W to it. The pass over x draws the mask once for both results.
A program owns BLOCK_C columns and one of SPLIT_K chunks of rows. Its share of a gradient of the parameters lands in a
plane for its chunk, and the last program to arrive adds the planes, always in the same order, so the same inputs give
the same bits. Its share of dS lands in a plane for its columns; these planes hold more than one program should add, so
torch adds them in a launch of its own.

Bytes: over g  e M N + 8 M r C / BLOCK_C + 8 SPLIT_K r N;  over x  2 e M K + 8 SPLIT_K r K; the floor is e M N and
2 e M K. Flops 4 M r N and 4 M r K.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from .config import LaunchConfig, capability, pick, precision
from .dropout import keep_bits, keep_scale, threshold, zero_dropped
from .launch import Launch
from .lora_shrink import is_single
from .sync import counters, last_to_arrive
from .tiles import addressable, load_tile, store_tile, sum_planes


@triton.jit
def _lora_backward_kernel(
    z_ptr, t_ptr, q_ptr, out_ptr, grad_ptr, grad_planes_ptr, seeds_ptr, sync_ptr,
    bound, out_scale, grad_scale,
    M, C, R,
    stride_zm, stride_zc,
    stride_qr, stride_qc,
    stride_gr, stride_gc,
    EXPAND: tl.constexpr, DROP: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """z [M, C], t [M, R], q [R, C]: grad = t^T z, and out = t q with EXPAND, else the planes of out = z q^T.

    With EXPAND out_scale is part of t, once a row instead of once an element of out, but for fp32 without a mask, whose
    products take t from memory as it is.
    """
    OPERAND: tl.constexpr = tl.float32 if UPCAST else z_ptr.dtype.element_ty
    EARLY: tl.constexpr = EXPAND and (DROP or z_ptr.dtype.element_ty != tl.float32)
    zero = tl.full((), 0, tl.int64)
    column, chunk, chunks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    c0 = column * BLOCK_C
    rows = tl.cdiv(tl.cdiv(M, BLOCK_M), chunks) * BLOCK_M
    begin = chunk * rows
    end = tl.minimum(M, begin + rows)
    seed = tl.load(seeds_ptr) if DROP else 0
    q = load_tile(q_ptr, 0, c0, stride_qr, stride_qc, R, C, BLOCK_R, BLOCK_C).to(OPERAND)
    if not EXPAND:
        out_ptr += (zero + column) * M * R  # a plane for these columns
    grad = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for m in range(begin, end, BLOCK_M):
        z = load_tile(z_ptr, m, c0, stride_zm, stride_zc, M, C, BLOCK_M, BLOCK_C)
        t = load_tile(t_ptr, 0, m, 1, R, R, M, BLOCK_R, BLOCK_M)
        t = (t * out_scale if EARLY else t).to(OPERAND)
        if not EXPAND:
            out = tl.dot(q, tl.trans(z.to(OPERAND)), input_precision=PRECISION) * out_scale
            store_tile(out_ptr, out, 0, m, 1, R, R, M, BLOCK_R, BLOCK_M)
        else:
            out = tl.dot(tl.trans(t), q, input_precision=PRECISION)
            if not EARLY:
                out *= out_scale
            if DROP:
                bits = keep_bits(seed, bound, m, c0, BLOCK_M, BLOCK_C)
                out = zero_dropped(out, bits, BLOCK_M, BLOCK_C)
                z = zero_dropped(z, bits, BLOCK_M, BLOCK_C)
            store_tile(out_ptr, out, m, c0, C, 1, M, C, BLOCK_M, BLOCK_C)
        grad = tl.dot(t, z.to(OPERAND), grad, input_precision=PRECISION)
    grad *= grad_scale
    store_tile(grad_planes_ptr + (zero + chunk) * R * C, grad, 0, c0, C, 1, R, C, BLOCK_R, BLOCK_C)
    if last_to_arrive(sync_ptr + column, chunks):
        grad = sum_planes(grad_planes_ptr, chunks, (zero + R) * C, 0, c0, C, 1, R, C, BLOCK_R, BLOCK_C)
        store_tile(grad_ptr, grad, 0, c0, stride_gr, stride_gc, R, C, BLOCK_R, BLOCK_C)


def _launch(
    z, q, R, q_strides, grad_strides, expand, dropout, out_scale, grad_scale, config
) -> tuple[Launch, int, int]:
    """The launch, the size of the planes of the parameters' gradient and the number of its counters.

    q is given as it is stored, with the strides of the kernel's [R, C]; those of the gradient are the kernel's, too.
    """
    (M, C), columns, chunks = z.shape, -(-z.shape[1] // config.BLOCK_N), config.SPLIT_K
    launch = Launch(
        (columns, chunks),
        threshold(dropout) - 32768, float(out_scale), float(grad_scale),
        M, C, R, *addressable(z).stride(), *q_strides, *grad_strides,
        EXPAND=expand, DROP=dropout > 0, UPCAST=config.upcasts(q.dtype, z.dtype), PRECISION=precision(z.dtype),
        BLOCK_M=config.BLOCK_M, BLOCK_C=config.BLOCK_N, BLOCK_R=config.BLOCK_R, **config.options(),
    ).__call__  # fmt: skip
    return launch, chunks * R * C, columns


def lora_backward_g(
    g: torch.Tensor, S: torch.Tensor, lora_B: torch.Tensor, scaling: float, config: LaunchConfig | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """dS = s g B, fp32 [M, r], and dB = s g^T S, [N, r] in the dtype of ``lora_B``. Two launches, the second small.

    g [M, N] and lora_B [N, r] of any strides; S fp32 [M, r], unscaled, as the forward returns it.
    """
    run, room = prepare_backward_g(g, lora_B, scaling, config)
    return run(g, S, lora_B, S.new_empty(room))


def prepare_backward_g(
    g: torch.Tensor, lora_B: torch.Tensor, scaling: float, config: LaunchConfig | None = None
) -> tuple[Callable[..., tuple[torch.Tensor, torch.Tensor]], int]:
    """``lora_backward_g`` as a function of (g, S, lora_B, planes), for tensors of these shapes, strides and dtypes.

    And how many fp32 numbers of memory the planes are: launches that follow each other may share it.
    """
    (M, N), r, device = g.shape, lora_B.shape[1], g.device
    if g.numel() == 0:
        return lambda g, S, lora_B, planes: (torch.zeros_like(S), lora_B.new_zeros((N, r))), 0
    config = config or pick("backward_g", M, N, 0, r, g.dtype, False, capability(device), lora_B.dtype != g.dtype)
    q_strides = addressable(lora_B).stride()[::-1]
    launch, room, flags = _launch(g, lora_B, r, q_strides, (1, r), False, 0.0, scaling, scaling, config)
    parts, kernel = -(-N // config.BLOCK_N), _lora_backward_kernel
    dS_size, fit = (M, r) if parts == 1 else (parts, M, r), is_single([g]) and is_single([lora_B])

    def run(g, S, lora_B, planes):
        dS, dB = S.new_empty(*dS_size), lora_B.new_empty(N, r)
        if not fit:
            g, lora_B = addressable(g), addressable(lora_B)
        launch(kernel, g, S, lora_B, dS, dB, planes, None, counters(flags, device))
        return dS if parts == 1 else dS.sum(0), dB

    return run, room


def lora_backward_x(
    x: torch.Tensor,
    dS: torch.Tensor,
    lora_A: torch.Tensor,
    dropout: float,
    seeds: torch.Tensor | None,
    config: LaunchConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """mask/(1-p) * (dS A), [M, K] in the dtype of x, and dA = dS^T D(x), [r, K] in that of ``lora_A``. One launch.

    x [M, K] and lora_A [r, K] of any strides; dS fp32 [M, r]; seeds int64 [1], None for no mask.
    """
    drop = seeds is not None and dropout > 0
    run, room = prepare_backward_x(x, lora_A, dropout, drop, config)
    return run(x, dS, lora_A, seeds, dS.new_empty(room))


def prepare_backward_x(
    x: torch.Tensor, lora_A: torch.Tensor, dropout: float, drop: bool, config: LaunchConfig | None = None
) -> tuple[Callable[..., tuple[torch.Tensor, torch.Tensor]], int]:
    """``lora_backward_x`` as a function of (x, dS, lora_A, seeds, planes), and the room as above."""
    (M, K), r, scale, device = x.shape, lora_A.shape[0], keep_scale(dropout), x.device
    if x.numel() == 0:
        return lambda x, dS, lora_A, seeds, planes: (x.new_empty((M, K)), lora_A.new_zeros((r, K))), 0
    config = config or pick("backward_x", M, K, 0, r, x.dtype, drop, capability(device), lora_A.dtype != x.dtype)
    q_strides, p = addressable(lora_A).stride(), dropout if drop else 0.0
    grad_scale = 1.0 if drop or x.dtype != torch.float32 else scale  # where dS has it already
    launch, room, flags = _launch(x, lora_A, r, q_strides, (K, 1), True, p, scale, grad_scale, config)
    kernel, fit = _lora_backward_kernel, is_single([x]) and is_single([lora_A])

    def run(x, dS, lora_A, seeds, planes):
        dx, dA = x.new_empty(M, K), lora_A.new_empty(r, K)
        seeds, sync = seeds if drop else None, counters(flags, device)
        if not fit:
            x, lora_A = addressable(x), addressable(lora_A)
        launch(kernel, x, dS, lora_A, dx, dA, planes, seeds, sync)
        return dx, dA

    return run, room
