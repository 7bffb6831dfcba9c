"""The mask that the kernels draw is the specification's, bit for bit, whatever the tiles."""

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st

from fused_lora import reference
from fused_lora.kernels import dropout
from fused_lora.kernels.lora_expand import lora_expand


@pytest.mark.parametrize("p", [0.0, 2.0**-17, 0.1, 0.5, 0.9, 1 - 2.0**-17, 1.0])
@pytest.mark.parametrize("M, K", [(1, 1), (1, 16), (17, 33), (65, 100), (33, 129)])
def test_mask_is_the_specification(M, K, p, device, kernel_memory):
    for seed in (0, -1, 2**63 - 1, 123456789):
        ours = dropout.dropout_mask(torch.tensor([seed], device=device), M, K, p)
        assert torch.equal(ours.cpu(), reference.dropout_mask(seed, (M, K), p)), seed


@pytest.mark.parametrize("BLOCK_M, BLOCK_K", [(1, 16), (16, 64), (64, 32), (32, 256)])
def test_mask_does_not_depend_on_tiles(BLOCK_M, BLOCK_K, device):
    seed = torch.tensor([42], device=device)
    mask = dropout.dropout_mask(seed, 37, 77, 0.3, BLOCK_M=BLOCK_M, BLOCK_K=BLOCK_K)
    assert torch.equal(mask.cpu(), reference.dropout_mask(42, (37, 77), 0.3))


def test_mask_of_a_row_does_not_depend_on_the_number_of_rows(device):
    seed = torch.tensor([7], device=device)
    assert torch.equal(dropout.dropout_mask(seed, 40, 50, 0.5)[:3], dropout.dropout_mask(seed, 3, 50, 0.5))


def test_a_bound_of_1_which_triton_compiles_as_a_constant(device):
    p, seed = 32769 / 65536, torch.tensor([42], device=device)
    mask = reference.dropout_mask(42, (17, 40), p, device)
    assert torch.equal(dropout.dropout_mask(seed, 17, 40, p), mask)
    S, A = torch.ones(17, 1, device=device), torch.ones(1, 40, device=device)
    assert torch.equal(lora_expand(S, [A], [1.0], [p], seed, None, torch.float32) != 0, mask)  # a bound among several


@pytest.mark.parametrize("M, K", [(0, 5), (5, 0), (0, 0)])
def test_empty_mask(M, K, device):
    assert dropout.dropout_mask(torch.tensor([1], device=device), M, K, 0.5).shape == (M, K)


@triton.jit
def _mask_at_kernel(out_ptr, seed_ptr, row0_ptr, bound, col0, ROWS: tl.constexpr, COLS: tl.constexpr):
    keep = dropout.keep_mask(tl.load(seed_ptr), bound, tl.load(row0_ptr), col0, ROWS, COLS)
    offs = tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    tl.store(out_ptr + offs, keep.to(tl.uint8))


@pytest.mark.parametrize("row0", [2**31 - 8, 2**32 - 8, 2**33 + 3])
def test_rows_are_counted_modulo_2_32(row0, device):
    ROWS, COLS, col0 = 16, 64, 14272
    out = torch.empty((ROWS, COLS), dtype=torch.uint8, device=device)
    seed, row = torch.tensor([-5], device=device), torch.tensor([row0], device=device)
    _mask_at_kernel[(1,)](out, seed, row, dropout.threshold(0.4) - 32768, col0, ROWS=ROWS, COLS=COLS)
    lanes = reference.dropout_lanes(-5, row0, ROWS, col0 + COLS)[:, col0:]
    assert torch.equal(out.cpu().bool(), lanes >= reference.dropout_threshold(0.4) - 32768)


@given(st.floats(0.0, 1.0))
def test_threshold_and_scale_are_the_specification(p):
    assert dropout.threshold(p) == reference.dropout_threshold(p)
    assert dropout.keep_scale(p) == reference.keep_scale(p)
