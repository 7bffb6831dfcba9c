"""Is a result as exact as the reference path's? Both are compared with float64. No tolerance is chosen by hand."""

from __future__ import annotations

import math
from functools import lru_cache

import torch

DRAWS = 30  # enough for a verdict: a path that is at the limit is refused with 27 draws of 30 worse than it
FALSE_ALARM = 1e-5  # chance that a path at the very limit of the error rule is refused; below 1e-9 for an equal path
GROSS = 32  # no draw may be this many times worse than the reference path's worst: a wrong number, not rounding


def ulp(value: float, dtype: torch.dtype) -> float:
    """Spacing of ``dtype``'s numbers at ``value``."""
    if value == 0.0 or not math.isfinite(value):
        return torch.finfo(dtype).tiny
    return torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(abs(value)))


def errors(tensor: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """(largest, root mean square) absolute error against float64; infinite where the tensor is not finite."""
    return largest_and_rms(tensor.detach().double() - exact.detach().double())


def largest_and_rms(tensor: torch.Tensor) -> tuple[float, float]:
    """The largest and the root mean square absolute value; infinite where a number is not finite, 0 of no numbers."""
    if not tensor.numel():
        return 0.0, 0.0
    largest = torch.linalg.vector_norm(tensor, math.inf).item()
    if not math.isfinite(largest):
        return math.inf, math.inf
    return largest, torch.linalg.vector_norm(tensor).item() / tensor.numel() ** 0.5


@lru_cache
def allowed_worse(draws: int) -> int:
    """How many of ``draws`` may be worse than the error rule allows: a sign test, which assumes only independent draws.

    Of a path whose typical (median) error keeps to the rule, a draw is worse with a chance of at most 1/2. More draws
    than this are worse with a chance of at most ``FALSE_ALARM``.
    """
    tail, allowed = 0.0, draws
    while tail + math.comb(draws, allowed) / 2.0**draws <= FALSE_ALARM:
        tail += math.comb(draws, allowed) / 2.0**draws
        allowed -= 1
    return allowed


def assert_no_worse(
    ours: torch.Tensor,
    theirs: torch.Tensor,
    exact: torch.Tensor,
    factor: float = 1.1,
    name: str = "result",
    draws: bool = False,
    ulps: float = 1.0,
) -> None:
    """Fail unless our error against float64 is at most ``factor`` times theirs plus one ulp, in maximum and in RMS.

    Args:
        ours, theirs: the two results, same shape; the ulp is that of ours' dtype, at the largest exact value for the
            maximum and at the RMS of the exact values for the RMS error.
        exact: the float64 result.
        draws: the first dimension counts independent draws, at least 17. The rule then holds for the typical draw: at
            most ``allowed_worse`` draws may break it. One draw without it says something only where theory bounds our
            error below the ulp, as for a result that is rounded once.
        ulps: how many in place of the one.
    """
    assert ours.shape == exact.shape == theirs.shape, (
        f"{name}: shapes {tuple(ours.shape)}, {tuple(theirs.shape)} and {tuple(exact.shape)}"
    )
    if not exact.numel():
        return
    count = len(exact) if draws else 1
    if draws and allowed_worse(count) == count:
        raise ValueError(f"{name}: {count} draws are too few for a test that can fail; draw {DRAWS}")
    allowed = allowed_worse(count) if draws else 0
    tensors = [t if draws else t[None] for t in (ours, theirs, exact)]
    mine, other = ([errors(t, right) for t, right in zip(found, tensors[2], strict=True)] for found in tensors[:2])
    sizes = [(right.abs().max().item(), right.double().square().mean().sqrt().item()) for right in tensors[2]]
    for i, kind in enumerate(("max", "rms")):
        error, their_error = [e[i] for e in mine], [e[i] for e in other]
        room = [ulps * ulp(size[i], ours.dtype) for size in sizes]
        bounds = [factor * e + more for e, more in zip(their_error, room, strict=True)]
        worse = [d for d in range(count) if not error[d] <= bounds[d]]
        assert len(worse) <= allowed, (
            f"{name}: {len(worse)} of {count} draws break the rule in {kind}, {allowed} may; in draw {worse[0]} the "
            f"error is {error[worse[0]]:.3e}, the reference path's {their_error[worse[0]]:.3e}, "
            f"an ulp {room[worse[0]]:.3e}"
        )
        # against the reference path's worst draw: in the same one it may be exact by luck
        assert not draws or max(error) <= GROSS * (max(their_error) + max(room)), (
            f"{name}: in one draw the {kind} error is {max(error):.3e}, the reference path's never above "
            f"{max(their_error):.3e}"
        )


def assert_close(
    ours: torch.Tensor, theirs: torch.Tensor, terms: int, name: str = "result", size: float | None = None
) -> None:
    """Fail unless two ways to form the same sums agree in every element.

    Args:
        ours, theirs: same shape; the dtypes may differ.
        terms: the lengths of all sums between the inputs and an element, added up. The bound is ``terms`` eps of
            ``size``. Each side's rounding error is about sqrt(terms) eps / 2 of a typical value, so the largest of a
            million elements stays below half the bound from 100 terms on. A missing or wrong term does not.
        size: the largest magnitude that takes part, where that is not the largest of ``theirs``.

    16-bit tensors hold sums that were formed in fp32 and rounded up to four times, as PEFT does.
    """
    assert ours.shape == theirs.shape, f"{name}: shapes {tuple(ours.shape)} and {tuple(theirs.shape)}"
    a, b = ours.detach().double(), theirs.detach().double()
    if size is None:
        size = b.nan_to_num(0.0, 0.0, 0.0).abs().max().item() if b.numel() else 0.0
    coarse = max(torch.finfo(t.dtype).eps for t in (ours, theirs))
    single = torch.finfo(torch.float32).eps
    bound = size * (terms * coarse if coarse <= single else terms * single + 4 * coarse)
    torch.testing.assert_close(a, b, rtol=0.0, atol=bound, equal_nan=True, msg=lambda text: f"{name}: {text}")
