"""What every training kernel shares: the order of tiles, the masked load, the one K loop and the ordered sum.

    acc [BLOCK_M, BLOCK_N] += X W               the base product, where a kernel has one
    s   [BLOCK_R, BLOCK_M] += P (mask * X)^T    the LoRA product, transposed

The forward, the input gradient, the shrink and both weight gradients are this loop with other pointers. Sums are fp32.

Why the LoRA product is kept transposed. On sm_90 a pipelined wgmma whose left operand sits in registers can read them
too late (triton-lang/triton#9433), and here X does sit in registers, masked or upcast. As the right operand it goes
through shared memory. P on the left comes from memory as it is, or, where it has to be converted, ``config`` keeps
BLOCK_R below the 64 rows of a wgmma. The expand, whose left operand S is computed, stays outside pipelined loops.

Precision of 32-bit dots (PRECISION). fp32 x: "ieee", as eager. 16-bit x under fp32 adapters: "tf32x3", because x is
exact in tf32 (11 significant bits), and the two tf32 halves of the other operand carry 22 bits, so each product is as
good as an fp32 product at tensor-core speed; "ieee" where the backend has no tf32x3.
"""

import torch
import triton
import triton.language as tl

from .config import SCALE_GROUP
from .dequant_4bit import load_absmax, scale_of
from .dropout import keep_bits, zero_dropped

GROUP = tl.constexpr(SCALE_GROUP)


@triton.jit
def grouped_order(tile, num_m, num_n, GROUP_M: tl.constexpr):
    """(row block, column block) of a tile: GROUP_M row blocks share a sweep over the columns, so W stays in L2."""
    per_group = GROUP_M * num_n
    first_m = tile // per_group * GROUP_M
    group_m = min(num_m - first_m, GROUP_M)
    return first_m + tile % per_group % group_m, tile % per_group // group_m


@triton.jit
def tile_ptrs(
    ptr, row0, col0, stride_row, stride_col, num_rows, num_cols, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """(pointers, mask) [ROWS, COLS] of the tile at (row0, col0) of a num_rows x num_cols matrix.

    The start is 64-bit, since M * K passes 2^31; offsets inside a tile are 32-bit (``addressable`` sees to it), which
    saves registers and multiplies in every loop.
    """
    zero = tl.full((), 0, tl.int64)
    ptr += (zero + row0) * stride_row + (zero + col0) * stride_col
    rows, cols = tl.arange(0, ROWS), tl.arange(0, COLS)
    mask = (rows[:, None] < num_rows - row0) & (cols[None, :] < num_cols - col0)
    return ptr + (rows[:, None] * stride_row + cols[None, :] * stride_col), mask


@triton.jit
def load_tile(
    ptr, row0, col0, stride_row, stride_col, num_rows, num_cols, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """The tile at (row0, col0), zero outside the matrix."""
    ptrs, mask = tile_ptrs(ptr, row0, col0, stride_row, stride_col, num_rows, num_cols, ROWS, COLS)
    return tl.load(ptrs, mask=mask, other=0.0)


@triton.jit
def store_tile(
    ptr, tile, row0, col0, stride_row, stride_col, num_rows, num_cols, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """Round the tile to the matrix's dtype and store what lies inside the matrix."""
    ptrs, mask = tile_ptrs(ptr, row0, col0, stride_row, stride_col, num_rows, num_cols, ROWS, COLS)
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=mask)


def addressable(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix, copied only where a stride of 2^23 or more would overflow the 32-bit offsets inside a tile."""
    return matrix if max(matrix.stride()) < 2**23 else matrix.contiguous()


@triton.jit
def load_absmax_tile(
    w, row0, col0, num_rows, num_cols, shift, shift8, NESTED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """What is stored of the scales of a tile: one for each GROUP of a row, [ROWS * COLS // GROUP]."""
    GROUPS: tl.constexpr = COLS // GROUP
    at = tl.arange(0, ROWS * GROUPS)
    row, col = at // GROUPS, col0 + at % GROUPS * GROUP
    which = ((tl.full((), 0, tl.int64) + row0) * num_cols + (row * num_cols + col)) >> shift
    inside = (row < num_rows - row0) & (col < num_cols)
    return load_absmax(w[2], w[4] if NESTED else None, which, inside, shift8, NESTED)


@triton.jit
def load_4bit_tile(
    w, code, absmax, absmax8, row0, col0, num_rows, num_cols,
    NESTED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """The tile at (row0, col0) of a num_rows x num_cols matrix of 4 bits, dequantised to fp32; zero outside of it.

    w: packed, code, absmax, and of a double quantised one code8, absmax8, offset, as in dequant_4bit.py. code: all of
    its 16 values: a gather finds them in shared memory, where a load from global memory would be pipelined as data is.
    """
    packed = load_tile(w[0], row0, col0 // 2, num_cols // 2, 1, num_rows, num_cols // 2, ROWS, COLS // 2).to(tl.int32)
    values = tl.gather(code, tl.reshape(tl.interleave(packed >> 4, packed & 15), (ROWS * COLS,)), 0)
    scale = scale_of(absmax, absmax8, w[3] if NESTED else None, w[5] if NESTED else None, NESTED)
    return tl.reshape(tl.reshape(values, (ROWS * COLS // GROUP, GROUP)) * scale[:, None], (ROWS, COLS))


@triton.jit
def contract(
    acc, s,
    x_src, w_src, p_ptr,
    m0, n0, r0,
    k_begin, k_end,
    M, N, K, r_end,
    stride_xm, stride_xk,
    stride_wk, stride_wn,
    stride_pr, stride_pk,
    seed, bound,
    BASE: tl.constexpr, SHRINK: tl.constexpr, DROP: tl.constexpr, ROWS_ARE_K: tl.constexpr,
    TMA: tl.constexpr, W_IS_NK: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    shift=0, shift8=0, FOUR_BIT: tl.constexpr = False, NESTED: tl.constexpr = False,
):  # fmt: skip
    """Run over k in [k_begin, k_end), a range that starts at a multiple of BLOCK_K and ends at one or at K.

    x_src, w_src: pointers, or tensor descriptors with TMA (w's over [N, K] memory if W_IS_NK, else over [K, N]).
    BASE, SHRINK: which of the two sums to form; the other is returned as it came.
    DROP: apply the mask of (seed, bound) to the x of the LoRA product.
    ROWS_ARE_K: the contraction runs over the rows of the stored matrix, X^T in the formula (weight gradients);
    stride_xm and stride_xk keep their meaning in the formula, the mask belongs to the stored matrix.
    UPCAST: form the LoRA product in fp32, for adapters that are not of x's dtype.
    FOUR_BIT, NESTED: w_src is the ``w`` of ``load_4bit_tile``, [N, K], K a multiple of GROUP; it is dequantised to x's
    dtype, tile by tile. shift, shift8: log2 of the values to a scale, and of the scales to a scale of theirs.
    """
    if FOUR_BIT:
        code = tl.load(w_src[1] + tl.arange(0, 16))
        next_absmax, next_absmax8 = load_absmax_tile(
            w_src, n0, k_begin, N, K, shift, shift8, NESTED, BLOCK_N, BLOCK_K
        )  # fmt: skip
    for k in range(k_begin, k_end, BLOCK_K):
        if TMA:
            x = x_src.load([m0, k])
        elif ROWS_ARE_K:
            x = load_tile(x_src, k, m0, stride_xk, stride_xm, K, M, BLOCK_K, BLOCK_M)
        else:
            x = load_tile(x_src, m0, k, stride_xm, stride_xk, M, K, BLOCK_M, BLOCK_K)
        if BASE:
            if FOUR_BIT:
                # one tile ahead: loads this narrow are not pipelined
                absmax, absmax8 = next_absmax, next_absmax8
                next_absmax, next_absmax8 = load_absmax_tile(
                    w_src, n0, k + BLOCK_K, N, K, shift, shift8, NESTED, BLOCK_N, BLOCK_K
                )  # fmt: skip
                w = load_4bit_tile(w_src, code, absmax, absmax8, n0, k, N, K, NESTED, BLOCK_N, BLOCK_K)
                w = tl.trans(w.to(x.dtype))
            elif not TMA:
                w = load_tile(w_src, k, n0, stride_wk, stride_wn, K, N, BLOCK_K, BLOCK_N)
            elif W_IS_NK:
                w = tl.trans(w_src.load([n0, k]))
            else:
                w = w_src.load([k, n0])
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
        if SHRINK:
            p = load_tile(p_ptr, r0, k, stride_pr, stride_pk, r_end, K, BLOCK_R, BLOCK_K)
            if DROP and ROWS_ARE_K:
                x = zero_dropped(x, keep_bits(seed, bound, k, m0, BLOCK_K, BLOCK_M), BLOCK_K, BLOCK_M)
            elif DROP:
                x = zero_dropped(x, keep_bits(seed, bound, m0, k, BLOCK_M, BLOCK_K), BLOCK_M, BLOCK_K)
            OPERAND: tl.constexpr = tl.float32 if UPCAST else x.dtype
            x_t = x.to(OPERAND) if ROWS_ARE_K else tl.trans(x.to(OPERAND))  # [BLOCK_K, BLOCK_M]
            s = tl.dot(p.to(OPERAND), x_t, s, input_precision=PRECISION)
    return acc, s


@triton.jit
def sum_planes(
    ptr, num_planes, stride_plane, row0, col0, stride_row, stride_col, num_rows, num_cols,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """The sum of one tile over fp32 planes, in their order: the same planes give the same bits, whoever adds them."""
    acc = tl.zeros((ROWS, COLS), tl.float32)
    zero = tl.full((), 0, tl.int64)
    for plane in range(num_planes):
        at = ptr + (zero + plane) * stride_plane
        acc += load_tile(at, row0, col0, stride_row, stride_col, num_rows, num_cols, ROWS, COLS)
    return acc
