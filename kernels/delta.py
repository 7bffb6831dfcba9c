"""D = B A in fp32 with bits that depend on nothing but A and B.

    D[n, k] = fma(B[n, R-1], A[R-1, k], ... fma(B[n, 0], A[0, k], 0))        one rounding per step

A chain over the rank in a fixed order, not ``tl.dot``, whose order is the backend's business: every tile shape, grid
and chip gives the same bits, and an exact unmerge depends on it. It costs R fma a weight on the fp32 pipes, which the
traffic of W hides up to an R of about 16.
"""

import triton
import triton.language as tl


@triton.jit
def zeros_like(w):
    """fp32 zeros that the compiler takes for a function of w: the chain lives in w's layout, without a conversion."""
    bits = w.to(tl.int16 if w.dtype.primitive_bitwidth == 16 else tl.int32, bitcast=True).to(tl.int32)
    return tl.maximum(tl.minimum(bits, 0), 0).to(tl.float32)


@triton.jit
def add_delta(d, a_row, b_col, cols, rows, col_ok, row_ok, R, stride_ar, stride_br):
    """d + the chain; a_row + cols and b_col + rows point at rank 0. What lies outside is undefined."""
    STEP: tl.constexpr = 4  # ranks of a turn: their loads are in flight together
    whole = R // STEP * STEP
    for _ in range(0, whole, STEP):
        for i in tl.static_range(STEP):
            a = tl.load(a_row + i * stride_ar + cols, mask=col_ok)
            b = tl.load(b_col + i * stride_br + rows, mask=row_ok)
            d = tl.fma(tl.broadcast_to(b[:, None], d.shape), tl.broadcast_to(a[None, :], d.shape), d)
        a_row += STEP * stride_ar
        b_col += STEP * stride_br
    for _ in range(whole, R):
        a = tl.load(a_row + cols, mask=col_ok)
        b = tl.load(b_col + rows, mask=row_ok)
        d = tl.fma(tl.broadcast_to(b[:, None], d.shape), tl.broadcast_to(a[None, :], d.shape), d)
        a_row += stride_ar
        b_col += stride_br
    return d
