"""The expand alone, before a GEMM that adds to it: against float64, every shape, mask and rank block."""

import pytest
import torch

from fused_lora import reference
from fused_lora.kernels.config import LaunchConfig
from fused_lora.kernels.lora_expand import lora_expand
from fused_lora.testing.layers import LayerCase
from fused_lora.testing.numeric import assert_no_worse
from helpers.kernels import each_pair, several_adapters

TILES = [None, LaunchConfig("expand", 32, 64, 16, 16), LaunchConfig("expand", 64, 256, 16, 32, num_warps=8)]


def run(case: LayerCase, config=None) -> torch.Tensor:
    """dx without g W, the library's part: S is the exact dS, so that the test is of this kernel alone."""
    scales = [reference.keep_scale(p) for p in case.dropout]
    dS, dtype = case.exact()["dS"].float(), case.x.dtype
    return lora_expand(dS, case.lora_A, scales, case.dropout, case.seeds, None, dtype, config)


def check(case: LayerCase, config=None) -> None:
    case.weight = torch.zeros_like(case.weight)
    case.check(dict(dx=run(case, config)))


@pytest.mark.parametrize("config", TILES, ids=str)
@pytest.mark.parametrize(
    "M, N, K, r, p",
    [
        (1, 33, 65, 1, 0.1),
        (17, 1, 129, 3, 0.5),
        (33, 100, 1, 16, 0.0),
        (100, 65, 129, 24, 0.9),
        (129, 17, 70, 100, 1.0),
    ],
)
def test_shapes_ranks_and_dropout(M, N, K, r, p, config, device, kernel_memory):
    check(LayerCase.make(M, N, K, [r], [p], device=device), config)


@pytest.mark.parametrize("p", [0.0, 0.5])
@each_pair
def test_dtypes(dtype, adapter_dtype, p, device, kernel_memory):
    check(LayerCase.make(65, 33, 100, [24], [p], dtype, adapter_dtype, device=device))


@several_adapters
def test_several_adapters_with_masks_of_their_own(ranks, dropout, device, kernel_memory):
    check(LayerCase.make(65, 33, 100, ranks, dropout, device=device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_bias_is_added_before_the_rounding(dtype, device, kernel_memory):
    case = LayerCase.make(70, 90, 40, [8], [0.0], dtype, device=device)
    case.weight = torch.zeros_like(case.weight)
    S, B_t = case.exact()["S"].float(), [B.t() for B in case.lora_B]
    y = lora_expand(S, B_t, case.scaling, case.dropout, None, case.bias, dtype)
    case.check({"y": y})


@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize(
    "dtype, adapter_dtype",
    [(torch.float32, None), (torch.bfloat16, None), (torch.float16, torch.float32), (torch.bfloat16, torch.float32)],
    ids=str,
)
@pytest.mark.parametrize("ranks", [[3], [16, 24]], ids=str)
def test_the_term_is_added_to_a_given_y_with_one_rounding(ranks, dtype, adapter_dtype, by_rows, device, kernel_memory):
    case = LayerCase.make(70, 90, 40, ranks, [0.0] * len(ranks), dtype, adapter_dtype, device=device)
    given = torch.nn.functional.linear(case.x, case.weight)
    base = given if by_rows else given.t().contiguous().t()
    S, B_t = case.exact()["S"].float(), [B.t() for B in case.lora_B]
    y = lora_expand(S, B_t, case.scaling, case.dropout, None, case.bias, dtype, base=base)
    exact, _ = reference.lora_term(given, case.x, *case.adapters, case.bias)
    assert torch.equal(given, base)  # only read
    if dtype == torch.float32:
        assert ((y - exact).abs() <= case.fp32_bounds()["y"]).all()
    else:
        eager = given
        for A, B, s in zip(case.lora_A, case.lora_B, case.scaling, strict=True):
            eager = eager + (case.x.to(A.dtype) @ A.t()) @ B.t() * s
        assert_no_worse(y, (eager + case.bias).to(dtype), exact, name="y")


def test_empty_results(device):
    for M, N in ((0, 8), (8, 0)):
        S, A = torch.empty(M, 4, device=device), torch.empty(4, N, device=device)
        assert lora_expand(S, [A], [1.0], [0.0], None, None, torch.float32).shape == (M, N)
