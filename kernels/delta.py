"""D = B A in fp32 with bits that depend on nothing but A and B.

    D[n, k] = fma(B[n, R-1], A[R-1, k], ... fma(B[n, 0], A[0, k], 0))        one rounding per step

A chain over the rank in a fixed order, not ``tl.dot``, whose order is the backend's business: every tile shape, grid
and chip gives the same bits, and an exact unmerge depends on it. It costs R fma a weight on the fp32 pipes, which the
traffic of W hides up to an R of about 16.
"""

import triton
import triton.language as tl


@triton.jit
def bits_of(w, INT: tl.constexpr):
    return w.to(tl.int16 if w.dtype.primitive_bitwidth == 16 else tl.int32, bitcast=True).to(INT)


@triton.jit
def zeros_like(w):
    """fp32 zeros that the compiler takes for a function of w: the chain lives in w's layout, without a conversion."""
    return tl.maximum(tl.minimum(bits_of(w, tl.int32), 0), 0).to(tl.float32)


@triton.jit
def add_delta(
    d, a_ptr, b_ptr, rows, cols, row_ok, col_ok, R, stride_ar, stride_ak, stride_bn, stride_br, GATHER: tl.constexpr
):
    """The chain at rows x cols; cols is one vector for all rows, or with GATHER a matrix."""
    for j in range(R):
        a = tl.load(a_ptr + j * stride_ar + cols * stride_ak, mask=col_ok, other=0.0)
        b = tl.load(b_ptr + rows * stride_bn + j * stride_br, mask=row_ok, other=0.0)
        if not GATHER:
            a = a[None, :]
        d = tl.fma(tl.broadcast_to(b[:, None], d.shape), tl.broadcast_to(a, d.shape), d)
    return d
