"""A kernel that feeds a wgmma from registers, in a loop of NUM_STAGES stages: what the watch over wgmmas must find.

Y [64, 64] = (2 X) W, with X [64, K] in fp32, scaled and rounded in registers, and W [K, 64] in bf16.
"""

import triton
import triton.language as tl


@triton.jit
def _register_wgmma_kernel(x_ptr, w_ptr, y_ptr, K, NUM_STAGES: tl.constexpr):
    rows, ks = tl.arange(0, 64), tl.arange(0, 64)
    acc = tl.zeros((64, 64), tl.float32)
    for k in tl.range(0, K, 64, num_stages=NUM_STAGES):
        x = tl.load(x_ptr + rows[:, None] * K + (k + ks)[None, :])
        w = tl.load(w_ptr + (k + ks)[:, None] * 64 + rows[None, :])
        acc = tl.dot((x * 2.0).to(tl.bfloat16), w, acc)
    tl.store(y_ptr + rows[:, None] * 64 + rows[None, :], acc)


def ptx(num_stages: int) -> str:
    """The kernel as sm_90 would run it."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = dict(x_ptr="*fp32", w_ptr="*bf16", y_ptr="*fp32", K="i32", NUM_STAGES="constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(4)}
    source = ASTSource(_register_wgmma_kernel, signature, {(4,): num_stages}, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=4)).asm["ptx"]
