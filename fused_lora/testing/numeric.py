"""Is a result as exact as the reference path's? Both are compared with float64. No tolerance is chosen by hand."""

from __future__ import annotations

import math
import statistics

import torch


def ulp(value: float, dtype: torch.dtype) -> float:
    """Spacing of ``dtype``'s numbers at ``value``."""
    if value == 0.0 or not math.isfinite(value):
        return torch.finfo(dtype).tiny
    return torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(abs(value)))


def errors(tensor: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """(largest, root mean square) absolute error against float64; infinite where the tensor is not finite."""
    difference = (tensor.detach().double() - exact.detach().double()).abs()
    if not difference.numel():
        return 0.0, 0.0
    if not torch.isfinite(difference).all():
        return math.inf, math.inf
    return difference.max().item(), difference.square().mean().sqrt().item()


def typical_errors(result: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """(largest, RMS) error of a draw, geometric means over the first dimension; an exact draw counts as 1e-30."""
    found = [errors(r, e) for r, e in zip(result, exact, strict=True)]
    worst, rms = (statistics.geometric_mean(max(error, 1e-30) for error in part) for part in zip(*found, strict=True))
    return worst, rms


def assert_no_worse(
    ours: torch.Tensor,
    theirs: torch.Tensor,
    exact: torch.Tensor,
    factor: float = 1.1,
    name: str = "result",
    draws: bool = False,
) -> None:
    """Fail unless our error against float64 is at most ``factor`` times theirs plus one ulp, in maximum and in RMS.

    Args:
        ours, theirs: the two results, same shape; the ulp is that of ours' dtype, at the largest exact value for the
            maximum and at the RMS of the exact values for the RMS error.
        exact: the float64 result.
        draws: the first dimension counts independent draws; maximum and RMS are then geometric means over the draws,
            so that one badly conditioned draw, whose errors are a hundred times the others', does not decide alone.
    """
    assert ours.shape == exact.shape == theirs.shape, (
        f"{name}: shapes {tuple(ours.shape)}, {tuple(theirs.shape)} and {tuple(exact.shape)}"
    )
    if not exact.numel():
        return
    (worst, rms), (their_worst, their_rms) = (
        typical_errors(t, exact) if draws else errors(t, exact) for t in (ours, theirs)
    )
    size, typical = exact.abs().max().item(), exact.double().square().mean().sqrt().item()
    assert worst <= factor * their_worst + ulp(size, ours.dtype) and rms <= factor * their_rms + ulp(
        typical, ours.dtype
    ), f"{name}: error max {worst:.3e} rms {rms:.3e}, reference path max {their_worst:.3e} rms {their_rms:.3e}"
