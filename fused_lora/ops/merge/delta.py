"""D = left @ right by plain torch operations, with the bits of the C loops.

In fp32 the sum of an element is a chain of fused multiply-adds in the order of k. torch has none, so fp64 stands in: a
product of two fp32 numbers is exact there, the sum is rounded to fp64 and then to fp32. The second rounding goes wrong
only where the first has hit the middle between two fp32 numbers, about once in 2^29 sums, and may where the result is
subnormal: those sums are rounded to odd first. In fp64 products and sums are rounded one by one.
"""

from __future__ import annotations

import torch

_LOW, _MIDDLE = (1 << 29) - 1, 1 << 28  # the bits of an fp64 mantissa that fp32 lacks, and the middle among them
_SMALL = 2.0**-125  # below, a sum may be subnormal in fp32, which has fewer bits then


def chain(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left [rows, R] times right [R, columns], both fp32 or both fp64; the result has their dtype."""
    total = torch.zeros((left.shape[0], right.shape[1]), dtype=torch.float64, device=right.device)
    for k in range(right.shape[0]):
        column, row = left[:, k : k + 1].double(), right[k].double()
        if right.dtype == torch.float64:
            total += column * row
            continue
        exact = torch.addcmul(total, column, row)
        doubtful = (exact.view(torch.int64) & _LOW == _MIDDLE) | (exact.abs() < _SMALL) & (exact != 0)
        if doubtful.any():
            i, j = doubtful.nonzero(as_tuple=True)
            exact[i, j] = _sum_to_odd(column[i, 0] * row[j], total[i, j])
        total = exact.float().double()
    return total.to(right.dtype)


def _sum_to_odd(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a + b in fp64, an inexact sum rounded to the neighbour whose last bit is 1: rounding on to fp32 is then right.

    Boldo, Melquiond: Emulation of a FMA and correctly rounded sums: proved algorithms using rounding to odd (2008).
    """
    total = a + b
    part = total - a
    error = (a - (total - part)) + (b - part)
    even = (total.view(torch.int64) & 1) == 0
    neighbour = torch.nextafter(total, torch.where(error > 0, torch.inf, -torch.inf).to(total.dtype))
    return torch.where((error != 0) & even, neighbour, total)
