"""The same products by torch, in tiles of ``LEAST`` rows, filled up with copies of a row.

A BLAS picks its code by the height of a product, and another code may sum in another order: the bits of a row would
depend on who shares the batch with it. A BLAS may also look at how an operand is aligned, so every tile starts at a
multiple of 64 bytes, and A and B^T have to as well.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from fused_lora.ops import native
from fused_lora.ops.grouped.terms import LEAST, Factors, RowLayout, Terms

_WORDS = 16  # numbers in 64 bytes of fp32


@native.safe_in_a_child
def add_terms_(y: Tensor, x: Tensor, layout: RowLayout, terms: Terms) -> None:
    """y [rows, N of all outputs or more] += the terms of x [rows, K], rounded once; on any device."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, terms.dtype), torch.float32)
    threads = torch.get_num_threads()
    for part, output in zip(y[:, : terms.N].split(terms.columns, 1), terms.outputs, strict=True):
        for g, members in output.items():
            if g not in layout.groups:
                continue
            # as in the trial: a BLAS has other code for operands that lie otherwise
            wide = [(A_t.t().contiguous().to(dtype).t(), B_t.contiguous().to(dtype), s) for A_t, B_t, s in members]
            height = min(height_of(*A_t.shape, B_t.shape[1], dtype, A_t.device, threads) for A_t, B_t, _ in wide)
            for rows, filled in layout.pieces[g]:
                sums = _sums(x.index_select(0, filled).to(dtype), wide, height)[: len(rows)]
                part.index_copy_(0, rows, (part.index_select(0, rows) + sums).to(y.dtype))


def _sums(x: Tensor, members: Sequence[Factors], height: int) -> Tensor:
    rows, K = x.shape
    if K % _WORDS:
        x = _aligned(rows, K, x).copy_(x)
    out = _aligned(rows, members[0][1].shape[1], x)
    for tile, result in zip(x.split(height), out.split(height), strict=True):
        for i, (A_t, B_t, scale) in enumerate(members):
            torch.addmm(result, torch.mm(tile, A_t), B_t, beta=int(i > 0), alpha=scale, out=result)
    return out


def _aligned(rows: int, columns: int, like: Tensor) -> Tensor:
    """An empty matrix whose rows start at multiples of 64 bytes."""
    return like.new_empty((rows, columns + -columns % _WORDS))[:, :columns]


@functools.lru_cache(maxsize=4096)
def height_of(K: int, r: int, N: int, dtype: torch.dtype, device: torch.device, threads: int) -> int:
    """LEAST, or 1 if a row's bits depend on its place in a tile, for x [rows, K] A^T B^T, A [r, K], B^T [r, N]."""
    generator = torch.Generator().manual_seed(0)
    shapes = (32 * LEAST, K), (r, K), (r, N)
    x, A, B_t = (torch.randn(shape, generator=generator, dtype=dtype, device="cpu").to(device) for shape in shapes)
    order = torch.randperm(len(x), generator=generator, device="cpu").to(device)
    with torch.no_grad():
        members = [(A.t(), B_t, 0.7)]  # not a power of two, whose place in the product would leave no trace
        alike = torch.equal(_sums(x[order], members, LEAST), _sums(x, members, LEAST)[order])
    return LEAST if alike else 1
