"""The two passes of the backward: against float64, every shape, mask, dtype and split, the same bits again."""

from dataclasses import replace

import pytest
import torch

from fused_lora.kernels.config import LaunchConfig
from fused_lora.kernels.lora_backward import lora_backward_g, lora_backward_x
from fused_lora.kernels.lora_expand import lora_expand
from fused_lora.kernels.lora_shrink import lora_shrink
from fused_lora.testing.interpreter import fixed_order_dot
from fused_lora.testing.layers import LayerCase
from fused_lora.testing.numeric import assert_close, assert_no_worse
from helpers.kernels import each_pair

TILES = {
    "planned": None,
    "whole": LaunchConfig("backward", 16, 64, 16, 32),
    "split": LaunchConfig("backward", 32, 32, 16, 32, SPLIT_K=3, num_stages=2),
}


def run(case: LayerCase, config=None) -> dict[str, torch.Tensor]:
    """S and dS from float64, so that the test is of these kernels alone; dx without g W, the library's part."""
    exact = case.exact()
    seeds = case.seeds
    dS, dB = lora_backward_g(case.g, exact["S"].float(), case.lora_B[0], case.scaling[0], config)
    dx, dA = lora_backward_x(case.x, exact["dS"].float(), case.lora_A[0], case.dropout[0], seeds, config)
    return dict(dS=dS, dB=dB, dx=dx, dA=dA)


def check(case: LayerCase, config=None) -> None:
    results = run(case, config)
    dx = results.pop("dx")
    case.check(results)
    case.weight = torch.zeros_like(case.weight)
    case.check(dict(dx=dx))


@pytest.mark.parametrize("config", TILES.values(), ids=TILES)
@pytest.mark.parametrize(
    "M, N, K, r, p",
    [(1, 65, 33, 1, 0.1), (17, 1, 129, 3, 0.5), (33, 100, 1, 16, 0.0), (100, 129, 65, 24, 0.9), (70, 17, 100, 32, 1.0)],
)
def test_shapes_ranks_and_dropout(M, N, K, r, p, config, device, kernel_memory):
    check(LayerCase.make(M, N, K, [r], [p], device=device), config)


@pytest.mark.parametrize("p", [0.0, 0.5])
@each_pair
def test_dtypes(dtype, adapter_dtype, p, device, kernel_memory):
    check(LayerCase.make(65, 33, 100, [24], [p], dtype, adapter_dtype, device=device), TILES["split"])


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fp32_adapters_that_are_rounded_get_gradients_that_are_not(dtype, p, device, kernel_memory):
    case = LayerCase.make(65, 33, 100, [24], [p], dtype, torch.float32, device=device)
    found, narrow = run(case, replace(TILES["split"], rounds="loaded")), case.rounded()
    dx = found.pop("dx")
    for name in ("dA", "dB"):
        assert found[name].dtype is torch.float32 and not torch.equal(found[name], found[name].to(dtype).float())
        assert_no_worse(found.pop(name).to(dtype), narrow.eager()[name], narrow.exact()[name], name=name)
    narrow.check(found)
    narrow.weight = torch.zeros_like(case.weight)
    narrow.check(dict(dx=dx))


def test_strided_matrices(device, kernel_memory):
    case = LayerCase.make(65, 40, 70, [8], [0.25], device=device)
    case.x, case.g = case.x.t().contiguous().t(), torch.cat([case.g, case.g], 1)[:, :40]
    case.lora_A, case.lora_B = [case.lora_A[0].t().contiguous().t()], [case.lora_B[0].t().contiguous().t()]
    check(case, TILES["split"])


def test_repeats_and_other_grids_are_bit_equal(device):
    """The order of the planes is fixed; the interpreter runs the programs in several orders."""
    case = LayerCase.make(100, 70, 90, [16], [0.1], device=device)
    with fixed_order_dot():
        first = run(case, TILES["split"])
        for _ in range(3):
            again = run(case, TILES["split"])
            assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("M, N, K", [(0, 5, 7), (5, 0, 7), (5, 7, 0)])
def test_empty(M, N, K, device):
    x, g = torch.randn(M, K, device=device), torch.randn(M, N, device=device)
    S, A, B = torch.randn(M, 3, device=device), torch.randn(3, K, device=device), torch.randn(N, 3, device=device)
    dS, dB = lora_backward_g(g, S, B, 2.0)
    dx, dA = lora_backward_x(x, S, A, 0.0, None)
    for found, true in ((dS, 2 * g @ B), (dB, 2 * g.t() @ S), (dx, S @ A), (dA, S.t() @ x)):
        assert_close(found, true, terms=100)


@pytest.mark.parametrize("config", TILES.values(), ids=TILES)
def test_masks_of_forward_and_backward_are_the_same_one(config, device):
    """With A, dS and x all ones the backward shows the mask itself, and the forward the mask of the columns it gets."""
    M, K, p = 70, 100, 0.5
    seeds = torch.tensor([77], device=device)
    A, dS = torch.ones(1, K, device=device), torch.ones(M, 1, device=device)
    dx, dA = lora_backward_x(torch.ones(M, K, device=device), dS, A, p, seeds, config)
    kept = dx != 0
    assert 0.4 < kept.float().mean() < 0.6
    assert torch.equal(dA[0], 2.0 * kept.sum(0))
    assert torch.equal(lora_expand(dS, [A], [2.0], [p], seeds, None, torch.float32), dx)
    for k in (0, 15, 40, 99):
        x = torch.zeros(M, K, device=device)
        x[:, k] = 1.0
        assert torch.equal(lora_shrink(x, [A], [2.0], [p], seeds), dx[:, k : k + 1])
