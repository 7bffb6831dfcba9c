"""Products whose rows do not depend on their neighbours.

A BLAS picks its code by the height of a product, and another code may sum in another order: the bits of a row would
depend on who shares the batch with it. Here every product is cut into tiles of ``LEAST`` rows, filled up with copies of
a row, through calls of one shape. Other shapes are used only where they have given the same bits on this machine, with
this number of threads: both functions try on random numbers, once a process for each shape. A BLAS may also look at how
an operand is aligned, so every tile starts at a multiple of 64 bytes (:func:`aligned`), and A and B^T have to as well.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

LEAST = 4  # rows of the smallest tile: fewer take other code in a BLAS, more are waste in a decode step
SIZES = (128, 16, LEAST)  # heights of tiles, each a multiple of the next


@functools.lru_cache(maxsize=4096)
def row_tiles(K: int, r: int, N: int, dtype: torch.dtype, device: torch.device, threads: int) -> tuple[int, ...]:
    """Heights of tiles in which a row has the same bits, descending, for x [rows, K] A^T B^T, A [r, K], B^T [r, N].

    (1,) if a row's place in its tile makes a difference; a product of one row has no places.
    """
    x, A, B_t = _draw(1, SIZES[0], K, r, N, dtype, device)
    x, A, B_t = x[0], A[0], B_t[0]
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1)).to(device)
    least = _in_tiles(x, A, B_t, LEAST)
    shuffled = aligned(*x.shape, dtype=dtype, device=device).copy_(x[order])
    if not torch.equal(_in_tiles(shuffled, A, B_t, LEAST), least[order]):
        return (1,)
    return tuple(h for h in SIZES if h == LEAST or torch.equal(_in_tiles(x, A, B_t, h), least))


@functools.lru_cache(maxsize=4096)
def stacks(
    n: int,
    height: int,
    K: int,
    r: int,
    N: int,
    dtype: torch.dtype,
    device: torch.device,
    threads: int,
    same: str = "",
) -> bool:
    """Whether ``n`` tiles of ``height`` rows in one batched product have the bits that each has for itself.

    same: "input" for one tile under n adapters, "factors" for n tiles under one, instead of a tile for each adapter.
    """
    x, A, B_t = _draw(n, height, K, r, N, dtype, device)
    if same == "input":
        x = x[0].expand_as(x)
    elif same == "factors":
        A, B_t = A[0].expand_as(A), B_t[0].expand_as(B_t)
    alone = [_in_tiles(*factors, height) for factors in zip(x, A, B_t, strict=True)]
    S = torch.bmm(x, A.transpose(1, 2))
    out = aligned(n, height, N, dtype=dtype, device=device)
    return torch.equal(torch.baddbmm(out, S, B_t, beta=0, alpha=_ALPHA, out=out), torch.stack(alone))


def aligned(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An empty tensor [..., columns] whose rows start at multiples of 64 bytes."""
    *leading, columns = shape
    return torch.empty((*leading, -(-columns // 16) * 16), dtype=dtype, device=device)[..., :columns]


_ALPHA = 0.7  # not a power of two, whose place in the product would leave no trace


def _draw(n: int, rows: int, K: int, r: int, N: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for columns, wide in ((K, rows), (r * K, None), (r * N, None)):
        shape = (n, columns) if wide is None else (n, wide, columns)
        numbers = torch.randn(shape, generator=generator, dtype=dtype)
        found.append(aligned(*shape, dtype=dtype, device=device).copy_(numbers))
    x, A, B_t = found
    return [x, A.unflatten(1, (r, K)), B_t.unflatten(1, (r, N))]


def _in_tiles(x: Tensor, A: Tensor, B_t: Tensor, height: int) -> Tensor:
    with torch.no_grad():
        out = aligned(len(x), B_t.shape[1], dtype=x.dtype, device=x.device)
        for tile, result in zip(x.split(height), out.split(height), strict=True):
            torch.addmm(result, torch.mm(tile, A.t()), B_t, beta=0, alpha=_ALPHA, out=result)
        return out
