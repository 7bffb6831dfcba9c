"""The same products by torch, in tiles whose height does not show in a row's bits.

A BLAS picks its code by the height of a product, and another code may sum in another order: the bits of a row would
depend on who shares the batch with it. Here every product is cut into tiles of ``LEAST`` rows, filled up with copies of
a row. Higher tiles are used only where they have given the same bits on this machine, with this number of threads, on
random numbers: once a process for each shape. A BLAS may also look at how an operand is aligned, so every tile starts
at a multiple of 64 bytes, and A and B^T have to as well.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from fused_lora.ops.grouped.terms import LEAST, PIECE, Factors, RowLayout, Terms

SIZES = (PIECE, 16, LEAST)  # heights of tiles, each a multiple of the next
_WORDS = 16  # numbers in 64 bytes of fp32


def add_terms_(y: Tensor, x: Tensor, layout: RowLayout, terms: Terms) -> None:
    """y [rows, N of all outputs or more] += the terms of x [rows, K], rounded once; on any device."""
    dtype, threads = (
        torch.promote_types(torch.promote_types(x.dtype, terms.dtype), torch.float32),
        torch.get_num_threads(),
    )
    for part, output in zip(y[:, : terms.N].split(terms.columns, 1), terms.outputs, strict=True):
        for g, members in output.items():
            if g not in layout.groups:
                continue
            wide = [(A_t.to(dtype), B_t.to(dtype), scale) for A_t, B_t, scale in members]
            suit = [row_tiles(*A_t.shape, B_t.shape[1], dtype, A_t.device, threads) for A_t, B_t, _ in wide]
            heights = [h for h in suit[0] if all(h in other for other in suit)] or (1,)
            for rows, filled in layout.pieces[g]:
                sums = _sums(x.index_select(0, filled).to(dtype), wide, heights)[: len(rows)]
                part.index_copy_(0, rows, sums.add_(part.index_select(0, rows)).to(y.dtype))


def _sums(x: Tensor, members: Sequence[Factors], heights: Sequence[int]) -> Tensor:
    first, (rows, K) = 0, x.shape
    if K % _WORDS:
        x = _aligned(rows, K, x).copy_(x)
    out = _aligned(rows, members[0][1].shape[1], x)
    for h in heights:
        while rows - first >= h:
            tile, result = x[first : first + h], out[first : first + h]
            for i, (A_t, B_t, scale) in enumerate(members):
                torch.addmm(result, torch.mm(tile, A_t), B_t, beta=int(i > 0), alpha=scale, out=result)
            first += h
    return out


def _aligned(rows: int, columns: int, like: Tensor) -> Tensor:
    """An empty matrix whose rows start at multiples of 64 bytes."""
    return like.new_empty((rows, columns + -columns % _WORDS))[:, :columns]


@functools.lru_cache(maxsize=4096)
def row_tiles(K: int, r: int, N: int, dtype: torch.dtype, device: torch.device, threads: int) -> Sequence[int]:
    """Heights of tiles in which a row has the same bits, descending, for x [rows, K] A^T B^T, A [r, K], B^T [r, N].

    (1,) if a row's place in its tile makes a difference; a product of one row has no places.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = (PIECE, K), (r, K), (r, N)
    x, A, B_t = (torch.randn(shape, generator=generator, dtype=dtype, device="cpu").to(device) for shape in shapes)
    order = torch.randperm(len(x), generator=generator, device="cpu").to(device)
    with torch.no_grad():
        members = [(A.t(), B_t, 0.7)]  # not a power of two, whose place in the product would leave no trace
        least = _sums(x, members, (LEAST,))
        if not torch.equal(_sums(x[order], members, (LEAST,)), least[order]):
            return (1,)
        return tuple(h for h in SIZES if h == LEAST or torch.equal(_sums(x, members, (h,)), least))
