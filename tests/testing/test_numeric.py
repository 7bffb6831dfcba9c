"""The error rule: what it refuses, what it lets pass, and how seldom it is wrong."""

import math

import pytest
import torch

from fused_lora.testing.numeric import DRAWS, FALSE_ALARM, allowed_worse, assert_close, assert_no_worse

pytestmark = pytest.mark.numeric


def results(ours, theirs, draws=DRAWS, size=(20, 32), values=1.0):
    """(ours, theirs, exact): normal errors of these relative sizes, in float64."""
    exact = torch.randn(draws, *size, dtype=torch.float64) * values
    return *(exact + error * torch.randn_like(exact) for error in (ours, theirs)), exact


@pytest.mark.parametrize("draws", [17, 24, DRAWS, 64, 200])
def test_as_many_draws_may_be_worse_as_chance_explains(draws):
    def chance(k):  # of more than k heads
        return sum(math.comb(draws, n) for n in range(k + 1, draws + 1)) / 2**draws

    k = allowed_worse(draws)
    assert chance(k) <= FALSE_ALARM < chance(k - 1) and draws / 2 < k < draws


def test_too_few_draws_for_a_test_that_can_fail():
    with pytest.raises(ValueError, match="16 draws are too few"):
        assert_no_worse(*results(1e-9, 1e-9, draws=16), draws=True)


def test_equal_errors_pass_and_larger_ones_do_not():
    for _ in range(50):
        assert_no_worse(*results(1e-9, 1e-9), draws=True)
    for _ in range(20):
        with pytest.raises(AssertionError, match="y: .* of 30 draws break the rule"):
            assert_no_worse(*results(1.3e-9, 1e-9), draws=True, name="y")
    assert_no_worse(*results(1.3e-9, 1e-9), draws=True, factor=1.8)


def test_an_ulp_is_allowed_and_counts_in_the_dtype_of_ours():
    exact = torch.full((DRAWS, 4), 1.0, dtype=torch.float64)
    eps = torch.finfo(torch.float32).eps
    assert_no_worse((exact + eps).float(), exact.float(), exact, draws=True)
    with pytest.raises(AssertionError):
        assert_no_worse((exact + 2 * eps).float(), exact.float(), exact, draws=True)
    assert_no_worse((exact + 2 * eps).float(), exact.float(), exact, draws=True, ulps=2)
    assert_no_worse((exact + eps).float(), exact.float(), exact)
    with pytest.raises(AssertionError):
        assert_no_worse((exact + 2 * eps).float(), exact.float(), exact)


def test_a_draw_in_which_the_reference_path_is_exact_by_luck_does_not_decide():
    ours, theirs, exact = results(1e-9, 1e-9)
    theirs[3] = exact[3]
    assert_no_worse(ours, theirs, exact, draws=True)


def test_one_badly_conditioned_draw_does_not_decide_and_one_wrong_number_does():
    ours, theirs, exact = results(1e-9, 1e-9)
    ours[3] += 4e-9 * torch.randn_like(ours[3])
    assert_no_worse(ours, theirs, exact, draws=True)
    for wrong in (1e-6, math.nan, math.inf):
        ours[3, 5, 7] += wrong
        with pytest.raises(AssertionError, match="in one draw the max error"):
            assert_no_worse(ours, theirs, exact, draws=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sums_in_another_order_are_close_and_wrong_ones_are_not(dtype):
    x, w = torch.randn(40, 300).to(dtype), torch.randn(300, 50).to(dtype)
    forward, backward = x @ w, x.flip(1) @ w.flip(0)
    assert_close(forward, backward, terms=300)
    backward[3, 4] += 0.05 * forward.abs().max()
    with pytest.raises(AssertionError, match="y: "):
        assert_close(forward, backward, terms=300, name="y")
    assert_close(forward, backward, terms=300, size=1e18)
    with pytest.raises(AssertionError, match="shapes"):
        assert_close(forward, backward[:3], terms=300)
    assert_close(torch.tensor([math.nan, math.inf]), torch.tensor([math.nan, math.inf]), terms=1)
