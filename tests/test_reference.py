"""The specification itself: against PEFT, against autograd, and the mask against an independent Philox."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from fused_lora import reference
from fused_lora.testing.numeric import assert_close
from helpers.seeds import shifted

pytestmark = pytest.mark.numeric

LOW32 = 2**32 - 1


def philox4x32(counter, key):
    """Philox4x32-10 in Python integers, from the paper's definition (Salmon et al. 2011)."""
    c, k = list(counter), list(key)
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(product1 >> 32) ^ c[1] ^ k[0], product1 & LOW32, (product0 >> 32) ^ c[3] ^ k[1], product0 & LOW32]
        k = [(k[0] + 0x9E3779B9) & LOW32, (k[1] + 0xBB67AE85) & LOW32]
    return c


def test_philox_gives_the_published_numbers():
    """The known answers of Random123, kat_vectors."""
    ones, pi = [LOW32] * 4, [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    assert philox4x32([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox4x32(ones, [LOW32] * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    assert philox4x32(pi, [0xA4093822, 0x299F31D0]) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


@pytest.mark.parametrize("seed", [0, 1, -5, 2**63 - 1, 123456789012345])
@pytest.mark.parametrize("K", [1, 7, 8, 9, 40])
def test_mask_is_the_documented_philox(seed, K):
    p, rows = 0.3, 5
    threshold = reference.dropout_threshold(p)
    mask = reference.dropout_mask(seed, (rows, K), p)
    for row in range(rows):
        for k in range(K):
            words = philox4x32((k // 8, row, 0, 0), (seed & LOW32, seed >> 32 & LOW32))
            lane = k % 8
            value = words[lane // 2] >> (16 * (lane % 2)) & 0xFFFF
            signed = value - 65536 if value >= 32768 else value
            assert bool(mask[row, k]) == (signed >= threshold - 32768)


def test_a_seed_may_be_a_tensor_or_unsigned():
    expected = reference.dropout_lanes(-3, 0, 37, 100)
    for given in (torch.tensor([-3]), 2**64 - 3, np.int64(-3)):
        assert torch.equal(reference.dropout_lanes(given, 0, 37, 100), expected)
    assert reference.dropout_lanes(5, 0, 0, 100).shape == (0, 104)


def test_a_row_of_the_mask_depends_on_seed_and_row_only():
    whole = reference.dropout_lanes(7, 0, 50, 100)
    for row, rows in ((0, 1), (3, 7), (49, 1)):
        assert torch.equal(reference.dropout_lanes(7, row, rows, 100), whole[row : row + rows])


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_keep_rate_and_scale(p):
    mask = reference.dropout_mask(3, (1000, 1000), p)
    exact = 1 - reference.dropout_threshold(p) / 65536
    assert abs(mask.double().mean().item() - exact) < 5 * (p * (1 - p) / 1e6) ** 0.5
    assert abs(exact - (1 - p)) <= 2**-17
    assert reference.keep_scale(p) * exact == pytest.approx(1, abs=1e-15)
    for means, n in ((mask.double().mean(0), 1000), (mask.double().mean(1), 1000)):
        assert (means - exact).abs().max() < 6 * (p * (1 - p) / n) ** 0.5


def test_mask_edges():
    assert reference.dropout_mask(1, (4, 4), 0.0).all()
    assert not reference.dropout_mask(1, (4, 4), 1.0).any()
    assert reference.keep_scale(1.0) == 0.0 and reference.keep_scale(0.0) == 1.0
    assert reference.dropout_threshold(1e-9) == 1 and reference.dropout_threshold(1 - 1e-9) == 65535
    assert reference.dropout_mask(1, (2, 3, 5), 0.5).shape == (2, 3, 5)
    assert reference.dropout_mask(torch.tensor([9]), (0, 5), 0.5).shape == (0, 5)
    for p in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="dropout"):
            reference.dropout_mask(1, (2, 2), p)
    for shape in ((), (-2, 3), (2, -3)):
        with pytest.raises(ValueError, match="shape: expected"):
            reference.dropout_mask(1, shape, 0.5)


def adapters(K, N, ranks, dtype=torch.float64):
    return [torch.randn(r, K, dtype=dtype) for r in ranks], [torch.randn(N, r, dtype=dtype) for r in ranks]


@pytest.mark.parametrize("dropout", [[0.0, 0.0], [0.3, 0.0], [0.5, 0.9], [1.0, 0.1]])
def test_gradients_are_those_of_autograd(dropout):
    K, N, scaling, seeds = 13, 7, [0.5, -2.0], torch.tensor([4, 5])
    x, W = torch.randn(2, 3, K, dtype=torch.float64), torch.randn(N, K, dtype=torch.float64)
    b = torch.randn(N, dtype=torch.float64)
    A, B = adapters(K, N, (2, 3))
    leaves = [t.requires_grad_() for t in (x, W, b, *A, *B)]
    y, S = reference.lora_linear(x, W, b, A, B, scaling, dropout, seeds)
    g = torch.randn_like(y)
    expected = torch.autograd.grad(y, leaves, g)
    with torch.no_grad():
        dx, dA, dB, dW, db = reference.lora_linear_backward(g, x, W, A, B, scaling, dropout, seeds)
    for got, want in zip((dx, dW, db, *dA, *dB), expected, strict=True):
        assert_close(got, want, terms=100)
    assert S.shape == (6, 5)


def test_forward_and_merge_are_those_of_peft():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(shifted(0))
    base = nn.Sequential(nn.Linear(10, 6)).double()
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(copy.deepcopy(base), config).double().eval()
    layer = model.base_model.model[0]
    A, B, s = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
    x = torch.randn(4, 10, dtype=torch.float64)
    with torch.no_grad():
        y, _ = reference.lora_linear(x, layer.base_layer.weight, layer.base_layer.bias, [A], [B], [s], [0.0])
        assert_close(y, model(x), terms=100)
        delta = reference.delta_weight([A], [B], [s])
        assert_close(delta, layer.get_delta_weight("default"), terms=100)
        merged = reference.merge(layer.base_layer.weight, delta)
        model.merge_adapter()
    assert_close(merged, layer.base_layer.weight.data, terms=100)


def test_correction_marks_what_subtraction_does_not_restore():
    W = torch.randn(200, 200).bfloat16()
    delta = torch.randn(200, 200) * 0.1
    merged = reference.merge(W, delta)
    wrong = reference.unmerge_correction(W, merged, delta)
    restored = (merged.float() - delta).to(W.dtype)
    assert wrong.any()
    assert torch.equal(reference.bits(restored)[~wrong], reference.bits(W)[~wrong])
    assert (reference.bits(restored)[wrong] != reference.bits(W)[wrong]).all()


@pytest.mark.parametrize(
    "arguments, named",
    [
        ((1, 5, 0.5), "shape"),
        ((1, "ab", 0.5), "shape"),
        ((1, torch.ones(2, 3), 0.5), "shape"),
        ((1, (2.5, 3), 0.5), "shape"),
        ((1, (True, 3), 0.5), "shape"),
        ((1.5, (2, 3), 0.5), "seed"),
        ((None, (2, 3), 0.5), "seed"),
        (("7", (2, 3), 0.5), "seed"),
        ((torch.tensor([1, 2]), (2, 3), 0.5), "seed"),
        ((torch.tensor(1.5), (2, 3), 0.5), "seed"),
        ((torch.tensor(1j), (2, 3), 0.5), "seed"),
        ((torch.tensor(True), (2, 3), 0.5), "seed"),
        ((torch.tensor(1, device="meta"), (2, 3), 0.5), "seed"),
        ((1, (2, 3), None), "p"),
        ((1, (2, 3), "half"), "p"),
    ],
    ids=str,
)
def test_a_mask_is_asked_for_in_numbers(arguments, named):
    with pytest.raises(TypeError, match=f"^{named}: expected"):
        reference.dropout_mask(*arguments)


def test_a_dropout_without_seeds_is_refused():
    x, W, A, B = torch.randn(3, 8), torch.randn(4, 8), torch.randn(2, 8), torch.randn(4, 2)
    with pytest.raises(ValueError, match=r"seeds: expected int64 seeds, because dropout\[0\] is 0.5, got None"):
        reference.lora_linear(x, W, None, [A], [B], [1.0], [0.5])
