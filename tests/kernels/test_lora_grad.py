"""Weight gradients: against float64, no worse than eager, deterministic, with the forward's mask drawn again."""

from dataclasses import replace

import pytest
import torch

from fused_lora.kernels.config import LaunchConfig
from fused_lora.kernels.lora_grad import lora_linear_weight_grad
from fused_lora.testing.interpreter import fixed_order_dot
from fused_lora.testing.layers import LayerCase
from fused_lora.testing.numeric import assert_close, assert_no_worse
from helpers.kernels import each_pair, several_adapters

WHOLE = LaunchConfig("weight_grad", 64, 16, 64, 16)
SPLIT = LaunchConfig("weight_grad", 64, 16, 32, 16, SPLIT_K=3)


def run(case: LayerCase, config=None) -> dict[str, torch.Tensor]:
    """S and dS from float64, so that the test is of this kernel alone."""
    exact = case.exact()
    S, dS = exact["S"].float(), exact["dS"].float()
    dA, dB = lora_linear_weight_grad(
        case.g, case.x, S, dS, case.scaling, case.dropout, case.seeds, case.ranks, case.lora_A[0].dtype, config
    )
    assert [t.shape for t in dA] == [A.shape for A in case.lora_A]
    assert [t.shape for t in dB] == [B.shape for B in case.lora_B]
    return dict(dA=torch.cat(dA), dB=torch.cat(dB, 1))


def check(case: LayerCase, config=None):
    case.check(run(case, config))


@pytest.mark.parametrize("config", [WHOLE, SPLIT], ids=["whole", "split"])
@pytest.mark.parametrize(
    "M, N, K, r, p",
    [
        (1, 65, 33, 1, 0.1),
        (17, 1, 129, 3, 0.5),
        (33, 100, 1, 16, 0.0),
        (100, 129, 65, 24, 0.9),
        (129, 17, 100, 100, 1.0),
        (64, 64, 128, 16, 0.1),
    ],
)
def test_shapes_ranks_and_dropout(config, M, N, K, r, p, device, kernel_memory):
    check(LayerCase.make(M, N, K, [r], [p], device=device), config)


@pytest.mark.parametrize("p", [0.0, 0.5])
@each_pair
def test_dtypes(dtype, adapter_dtype, p, device, kernel_memory):
    """fp32 adapters over a 16-bit base get fp32 gradients: their products may not be rounded to 16 bits on the way."""
    check(LayerCase.make(65, 33, 100, [24], [p], dtype, adapter_dtype, device=device), SPLIT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_fp32_adapters_that_are_rounded_are_not(dtype, device, kernel_memory):
    case = LayerCase.make(65, 33, 100, [24], [0.5], dtype, torch.float32, device=device)
    narrow = case.rounded()
    for name, ours in run(case, replace(SPLIT, rounds="loaded")).items():
        assert ours.dtype is torch.float32 and not torch.equal(ours, ours.to(dtype).float())
        assert_no_worse(ours.to(dtype), narrow.eager()[name], narrow.exact()[name], name=name)


@several_adapters
def test_several_adapters_with_masks_of_their_own(ranks, dropout, device, kernel_memory):
    check(LayerCase.make(65, 33, 100, ranks, dropout, device=device), SPLIT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("M", [3, 300])
def test_the_configuration_that_pick_chooses(M, dtype, device, kernel_memory):
    check(LayerCase.make(M, 33, 70, [8], [0.1], dtype, device=device))


def test_strided_inputs(device, kernel_memory, guards):
    case = LayerCase.make(33, 40, 50, [5], [0.1], device=device)
    wide = torch.zeros(33, 103, device=device)
    wide[:, 1:101:2] = case.x
    case.x = guards.copy(wide[:, 1:101:2], "x")
    case.g = case.g.t().contiguous().t()
    check(case, SPLIT)


@pytest.mark.parametrize("M, N, K", [(0, 5, 7), (5, 0, 7), (5, 7, 0), (5, 0, 0)])
@pytest.mark.parametrize("config", [WHOLE, SPLIT, None], ids=["whole", "split", "picked"])
def test_empty(M, N, K, config, device, kernel_memory):
    """No rows: gradients of zero. No columns on one side: the other gradient is still formed."""
    x, g = torch.randn(M, K, device=device), torch.randn(M, N, device=device)
    S, dS = torch.randn(M, 3, device=device), torch.randn(M, 3, device=device)
    (dA,), (dB,) = lora_linear_weight_grad(g, x, S, dS, [2.0], [0.0], None, [3], config=config)
    assert_close(dA, dS.t() @ x, terms=100)
    assert_close(dB, 2.0 * g.t() @ S, terms=100)


def test_repeats_are_bit_equal(device):
    case = LayerCase.make(100, 40, 70, [5], [0.1], torch.bfloat16, device=device)
    first, second = run(case, SPLIT), run(case, SPLIT)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_column_tiles_do_not_change_the_bits(device):
    case = LayerCase.make(50, 40, 70, [5], [0.3], device=device)
    with fixed_order_dot():
        narrow = run(case, LaunchConfig("weight_grad", 16, 16, 16, 16, SPLIT_K=2))
        wide = run(case, LaunchConfig("weight_grad", 128, 16, 16, 32, SPLIT_K=2))
    assert all(torch.equal(narrow[name], wide[name]) for name in narrow)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_whole_training_step(dtype, device, kernel_memory):
    """Forward and all gradients chained as autograd chains them, two adapters, one mask each."""
    case = LayerCase.make(40, 33, 50, [4, 20], [0.1, 0.5], dtype, device=device)
    y, S = case.by("split")
    dx, dA, dB, _, _ = case.by("library", S)
    case.check(dict(y=y, dx=dx, dA=torch.cat(dA), dB=torch.cat(dB, 1)))
