"""Stochastic rounding of a merge: unbiased, reproducible, the same bits in C, torch and any pieces, and undone."""

import pytest
import torch

from fused_lora.ops import native
from fused_lora.ops.merge import blocks
from fused_lora.ops.merge.op import add_rows_, delta_factors, merge_, unmerge_
from fused_lora.reference import bits
from helpers.seeds import shifted

DTYPES = [torch.bfloat16, torch.float16]
# of a normal distribution: a right rounding fails one comparison in 10^9
DEVIATIONS = 6.1


def weight(rows, columns, dtype, seed=0):
    draw = torch.Generator().manual_seed(shifted(seed))
    W = (torch.randn(rows, columns, generator=draw) * 0.02).to(dtype)
    W.view(-1)[::97] = float("inf")
    W.view(-1)[1::97] = torch.finfo(dtype).smallest_normal / 4
    A, B = torch.randn(3, columns, generator=draw), torch.randn(rows, 3, generator=draw) * 0.001
    return W, [A], [B], [1.5]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("exponent", [0, -20, 7])  # of fp16 numbers 2^-20 is subnormal
@pytest.mark.parametrize("share", [0.1, 0.25, 0.7, 1 / 256])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_sum_goes_up_as_often_as_it_must(dtype, exponent, share, sign):
    """The counts of 2^16 draws are binomial with the place of the sum between its neighbours for a probability."""
    low = torch.tensor(sign * 1.25 * 2.0**exponent).to(dtype)
    step = torch.nextafter(low, torch.tensor(sign * torch.inf, dtype=dtype)).double() - low.double()
    W = low.expand(256, 256).clone()
    delta = torch.full((256, 1), (step * share).float().item())
    merge_(W, [torch.ones(1, 256)], [delta], [1.0], seed=shifted(11))
    exact = W.numel() * (delta[0, 0].double() / step).item()
    up = int((W != low).sum())
    assert set(W.double().unique().tolist()) <= {low.item(), (low.double() + step).item()}
    assert abs(up - exact) < DEVIATIONS * (exact * (1 - exact / W.numel())) ** 0.5


def test_the_mean_of_many_merges_is_the_sum():
    """Of a delta of a hundredth of a last place rounding to the nearest leaves nothing. The mean of all errors over its
    standard deviation is normal."""
    W = torch.full((128, 512), 1.0, dtype=torch.bfloat16)
    delta, errors = torch.full((128, 1), 2.0**-7 / 100), []
    for seed in range(4):
        merged = W.clone()
        merge_(merged, [torch.ones(1, 512)], [delta], [1.0], seed=shifted(seed))
        errors.append(merged.double() - 1 - delta[0, 0].double())
    error, share = torch.stack(errors), 0.01
    deviation = 2.0**-7 * (share * (1 - share)) ** 0.5
    assert abs(error.mean().item()) < DEVIATIONS * deviation / error.numel() ** 0.5
    nearest = W.clone()
    merge_(nearest, [torch.ones(1, 512)], [delta], [1.0])
    assert torch.equal(nearest, W)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_bits_come_back_and_are_reproducible(dtype, transposed, scaled):
    W, *adapters = weight(75, 333, dtype)
    rows = torch.rand(75) + 0.5 if scaled else None
    original, merged = W.clone(), []
    for seed in (5, 5, 2**63 + 5, 6):
        held = W.clone().t().contiguous().t() if transposed else W.clone()
        record = merge_(held, *adapters, rows, seed)
        merged.append(held.contiguous().clone())
        unmerge_(held, record)
        assert torch.equal(bits(held.contiguous()), bits(original))
    assert torch.equal(bits(merged[0]), bits(merged[1]))
    assert all(not torch.equal(bits(merged[0]), bits(other)) for other in merged[2:])
    nearest = W.clone()
    merge_(nearest, *adapters, rows)
    apart = (merged[0].double() - nearest.double())[W.isfinite()]
    ulp = 2.0 ** (torch.frexp(nearest.double()[W.isfinite()])[1] - (8 if dtype is torch.bfloat16 else 11)).double()
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert (apart.abs() <= torch.clamp(ulp, min=smallest)).all() and (apart != 0).double().mean() > 0.1


@pytest.mark.skipif(not native.usable(), reason="needs the C loops")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2])
def test_c_torch_and_pieces_give_the_same_bits(dtype, threads):
    W, A, B, s = weight(300, 200, dtype)
    factors = delta_factors(dtype, W.device, A, B, s)._replace(dither=blocks.Dither(-9, 0))
    in_c, in_torch, in_pieces = W.clone(), W.clone(), W.clone()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        blocks.merge(in_c, factors, blocks._InC)
    finally:
        torch.set_num_threads(before)
    blocks.merge(in_torch, factors, blocks._InTorch)
    for first in range(0, 300, 70):
        part = factors._replace(left=factors.left[first : first + 70], dither=blocks.Dither(-9, first))
        add_rows_(in_pieces[first : first + 70], part)
    assert torch.equal(bits(in_c), bits(in_torch)) and torch.equal(bits(in_c), bits(in_pieces))


def test_what_is_refused():
    W, *adapters = weight(8, 16, torch.bfloat16)
    for dtype in (torch.float32, torch.float64):
        wide = W.to(dtype)
        with pytest.raises(ValueError, match="seed: expected None for a weight of"):
            merge_(wide, *adapters, seed=1)
        assert torch.equal(bits(wide), bits(W.to(dtype)))
    for seed in (True, 1.0, "1"):
        with pytest.raises(TypeError, match="seed: expected an int or None"):
            merge_(W, *adapters, seed=seed)
    largest = torch.full((8, 16), torch.finfo(torch.bfloat16).max, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="NaNs or infinities"):
        merge_(largest, [torch.ones(1, 16)], [torch.full((8, 1), 1e38)], [1.0], seed=1)
    assert (largest == torch.finfo(torch.bfloat16).max).all()
