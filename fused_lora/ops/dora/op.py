"""DoRA beside the LoRA operators: norms of the adapted rows, the scale of the columns, the base under dropout.

    n_j = ||W_j + s (B A)_j||, no gradient      c = m / n      m [N] the magnitude
    y   = c (x W^T + s x A^T B^T) + b                                              without dropout
    y   = x W^T + b + (c - 1) D(x) W^T + c s D(x) A^T B^T                          in training with dropout

as PEFT has it. The norms take one pass over W, a block of rows at a time, and W + s B A is never whole in memory. What
is differentiable is made of differentiable operations, so derivatives of any order exist. DoRA: arXiv:2402.09353.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fused_lora.ops import guard
from fused_lora.ops.linear import eager
from fused_lora.ops.linear.op import _rows, is_batched, is_direct, without_autocast
from fused_lora.ops.masks import times_mask
from fused_lora.reference import keep_scale

Blocks = Callable[[], Iterator[tuple[int, int, Tensor]]]  # (start, stop, rows start to stop) of a weight [N, K]
_BLOCK_ELEMENTS = 1 << 17  # of W + s B A at a time: 512 KiB of fp32


def row_norms(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """||W_j + scaling (B A)_j|| for each row j: [N], fp32 or wider, without a gradient.

    Args:
        weight: [N, K], fp64, fp32, bf16 or fp16, any strides. lora_A: [r, K]; lora_B: [N, r], any floating dtype.
    """
    if torch._C._are_functorch_transforms_active():  # A or B alone may be a batch; Dynamo cannot trace is_batched
        dtype = _wide(weight, lora_A, lora_B)
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            adapted = torch.addmm(weight.to(dtype), lora_B.to(dtype), lora_A.to(dtype), alpha=scaling)
            return torch.linalg.vector_norm(adapted, dim=1)
    if torch.compiler.is_compiling():
        return _row_norms(weight.detach(), lora_A.detach(), lora_B.detach(), scaling)
    return _find_norms(weight, lora_A, lora_B, scaling)


@torch.library.custom_op("fused_lora::row_norms", mutates_args=())
def _row_norms(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    return _find_norms(weight, lora_A, lora_B, scaling)


@_row_norms.register_fake
def _(weight, lora_A, lora_B, scaling):
    return weight.new_empty(weight.shape[0], dtype=_wide(weight, lora_A, lora_B))


@torch.no_grad()
def _find_norms(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    tensors = weight.resolve_neg(), lora_A.resolve_neg(), lora_B.resolve_neg()  # a kernel would not see the sign
    if not guard.usable(weight.device) or not guard.DTYPES.issuperset(t.dtype for t in tensors):
        return _eager_norms(*tensors, scaling)
    from fused_lora.kernels.row_norms import row_norms as kernel

    dtypes = weight.dtype, lora_A.dtype, lora_B.dtype
    check = lambda: _check(kernel, *dtypes, weight.device)  # noqa: E731
    return guard.guarded(("row_norms", *dtypes, weight.device), kernel, _eager_norms, check)(*tensors, scaling)


def _eager_norms(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    return norms_of_blocks(row_blocks(weight), lora_A, lora_B, scaling)


def row_blocks(weight: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """(start, stop, rows start to stop) of a weight [N, K]."""
    step = max(1, _BLOCK_ELEMENTS // max(1, weight.shape[1]))
    for start in range(0, len(weight), step):
        stop = min(start + step, len(weight))
        yield start, stop, weight[start:stop]


@torch.no_grad()
def norms_of_blocks(
    blocks: Iterator[tuple[int, int, Tensor]], lora_A: Tensor, lora_B: Tensor, scaling: float
) -> Tensor:
    """:func:`row_norms` of a weight that comes in blocks of rows."""
    found: Any = None
    memory: Any = None
    with torch.autocast(lora_A.device.type, enabled=False):
        for start, stop, block in blocks:
            if memory is None:  # for all blocks: the first is the largest
                dtype = _wide(block, lora_A, lora_B)
                memory, found = block.new_empty(block.shape, dtype=dtype), block.new_empty(len(lora_B), dtype=dtype)
                lora_A, lora_B = lora_A.to(dtype), lora_B.to(dtype)
            rows = memory[: stop - start].copy_(block).addmm_(lora_B[start:stop], lora_A, alpha=scaling)
            found[start:stop] = torch.linalg.vector_norm(rows, dim=1)
    return lora_B.new_empty(0, dtype=_wide(lora_A, lora_B)) if found is None else found


def _check(kernel: Callable, weight_dtype, A_dtype, B_dtype, device: torch.device) -> str | None:
    N, K, r = 37, 150, 5
    line = torch.arange(N * K, device=device, dtype=torch.float32)
    W = torch.sin(line * 12.9898).reshape(N, K).to(weight_dtype)
    A, B = torch.sin(line[: r * K]).reshape(r, K).to(A_dtype), torch.cos(line[: N * r]).reshape(N, r).to(B_dtype)
    exact = (W.double() + 1.5 * B.double() @ A.double()).norm(dim=1)
    return guard.compare([kernel(W, A, B, 1.5)], [exact], torch.float32)


def scale_columns(y: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """scale * y + bias, differentiable in all three. y: [..., N]; scale, bias: [N]; in the widest dtype."""
    if bias is None:
        return y * scale
    with without_autocast(y):  # a GPU's takes no addcmul of bf16 beside fp16
        return torch.addcmul(bias, y, scale)


def dropped(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """D(x) for x [..., K], any floating dtype, and the mask of (seed int64 [1], p). Differentiable, any order."""
    return _Dropped.apply(x, seed, p) if is_direct(x) and not is_batched(x) else _dropped(x, seed, p)


class _Dropped(torch.autograd.Function):
    """The operator past the dispatcher, whose bookkeeping takes longer than the kernel."""

    @staticmethod
    def forward(ctx, x, seed, p):
        ctx.seed, ctx.p = seed, p
        return _draw(x, seed, p)

    @staticmethod
    def backward(ctx, g):
        return dropped(g, ctx.seed, ctx.p), None, None


@torch.library.custom_op("fused_lora::dropped", mutates_args=())
def _dropped(x: Tensor, seed: Tensor, p: float) -> Tensor:
    return _draw(x, seed, p)


@_dropped.register_fake
def _(x, seed, p):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _keep_seed(ctx, inputs, output) -> None:
    _, ctx.seed, ctx.p = inputs


_dropped.register_autograd(lambda ctx, g: (dropped(g, ctx.seed, ctx.p), None, None), setup_context=_keep_seed)


def _draw(x: Tensor, seed: Tensor, p: float) -> Tensor:
    if p == 1.0:
        return torch.zeros_like(x, memory_format=torch.contiguous_format)
    rows = _rows(x)
    if not x.is_cpu or guard.usable(x.device):
        return times_mask(seed, p, True, rows)[0].reshape(x.shape)
    wide: Any = rows.to(torch.promote_types(x.dtype, torch.float32))
    kept = eager.dropped_products(seed.item(), p, wide, None, None, (False, True, False))[1]
    return kept.mul_(keep_scale(p)).to(x.dtype).reshape(x.shape)


def product(x: Tensor, blocks: Blocks, N: int) -> Tensor:
    """x W^T in x's dtype, differentiable in x, for a frozen weight that comes in blocks of rows: it is never whole."""
    return _product(x, blocks, N, True)


def _product(x: Tensor, blocks: Blocks, N: int, transposed: bool) -> Tensor:
    if torch.compiler.is_compiling() or not is_batched(x):  # Dynamo cannot ask
        return _Product.apply(x, blocks, N, transposed)
    with torch.autocast(x.device.type, enabled=False):  # a batch cannot be written into a tensor block by block
        weight = torch.cat([block for _, _, block in blocks()]).to(x.dtype)
        return x @ (weight.t() if transposed else weight)


class _Product(torch.autograd.Function):
    """x W^T, or g W where not ``transposed``: each is the other's gradient."""

    @staticmethod
    def forward(ctx, x, blocks, N, transposed):
        ctx.weight = blocks, N, transposed
        rows = _rows(x)
        out = None
        with torch.autocast(x.device.type, enabled=False):
            for start, stop, block in blocks():
                block = block.to(x.dtype)
                if out is None:
                    size = N if transposed else block.shape[1]
                    out = x.new_zeros((len(rows), size))
                if transposed:
                    out[:, start:stop] = rows @ block.t()
                else:
                    out.addmm_(rows[:, start:stop], block)
        return out.reshape(*x.shape[:-1], out.shape[-1])

    @staticmethod
    def backward(ctx, g):
        blocks, N, transposed = ctx.weight
        return _product(g, blocks, N, not transposed), None, None, None


def _wide(*tensors: Tensor) -> torch.dtype:
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype
