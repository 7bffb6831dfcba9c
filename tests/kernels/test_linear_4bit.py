"""The forward out of a 4-bit weight: every form of it against float64 of its values, every access inside its tensor."""

import pytest
import torch

from fused_lora.kernels import config as rules
from fused_lora.kernels.config import LaunchConfig, pick
from fused_lora.kernels.dequant_4bit import held, traffic
from fused_lora.kernels.lora_linear import lora_linear_forward
from fused_lora.ops.dequant import FourBit, by_torch
from fused_lora.testing.interpreter import fixed_order_dot
from fused_lora.testing.layers import LayerCase
from helpers.kernels import PAIRS
from helpers.quantised import dequant_case

FP32, BF16 = torch.float32, torch.bfloat16
TILES = {variant: LaunchConfig(variant, 16, 32, 64, 32) for variant in ("split", "recompute")}


def make(M, N, K, *rest, blocksize=64, nested=True, device="cpu", **more) -> tuple[LayerCase, FourBit]:
    """A layer, and its weight as 4 bits; the dense one has their values."""
    case = LayerCase.make(M, N, K, *rest, device=device, **more)
    packed, code, absmax, inner, *kind = dequant_case(N, K, blocksize, nested, device)
    weight = FourBit(packed, code / 8, absmax, inner, *kind, case.x.dtype)
    case.weight = by_torch(weight)
    return case, weight


def check(case: LayerCase, weight: FourBit, config: LaunchConfig | None = None) -> dict[str, torch.Tensor]:
    y, S = lora_linear_forward(case.x, weight, case.bias, *case.adapters, config=config)
    case.check(dict(y=y, S=S))
    return dict(y=y, S=S)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    "M, N, K, blocksize, variant, r, p",
    [
        (1, 65, 64, 64, "split", 1, 0.1),
        (17, 1, 192, 64, "recompute", 3, 0.0),
        (5, 40, 320, 128, "split", 40, 0.5),  # scales that begin in the middle of a row
        (16, 33, 128, 4096, "recompute", 32, 0.0),
        (33, 31, 448, 512, "split", 5, 0.0),
    ],
)
def test_shapes_blocksizes_and_dropout(M, N, K, blocksize, variant, r, p, nested, device, kernel_memory):
    check(*make(M, N, K, [r], [p], blocksize=blocksize, nested=nested, bias=N % 2 == 1, device=device), TILES[variant])


@pytest.mark.parametrize("dtype, adapter_dtype", [*PAIRS, (FP32, BF16)], ids=str)
@pytest.mark.parametrize("variant", TILES)
def test_dtypes(variant, dtype, adapter_dtype, device, kernel_memory):
    check(*make(9, 65, 192, [24], [0.0], dtype, adapter_dtype, device=device), TILES[variant])


@pytest.mark.parametrize("dtype", [FP32, torch.float16], ids=str)
def test_several_adapters_with_masks_of_their_own(dtype, device, kernel_memory):
    check(*make(20, 65, 128, [3, 24], [0.1, 0.5], dtype, device=device), TILES["split"])


@pytest.mark.parametrize("variant, ranks", [("recompute", [3]), ("split", [3, 17])])
@pytest.mark.parametrize("splits", [2, 3, 8])
def test_split_k(splits, variant, ranks, device, kernel_memory):
    """Also with more programs than there are tiles of K; the LoRA term is added once."""
    config = LaunchConfig(variant, 16, 32, 64, 16, SPLIT_K=splits)
    check(*make(5, 33, 320, ranks, [0.0] * len(ranks), device=device), config)


@pytest.mark.parametrize("BLOCK_K", [64, 128, 256])
def test_several_scales_in_a_tile(BLOCK_K, device, kernel_memory):
    """A last tile in part, too."""
    check(*make(3, 33, 448, [4], nested=False, device=device), LaunchConfig("recompute", 16, 32, BLOCK_K, 16))


@pytest.mark.parametrize("dtype", [FP32, BF16, torch.float16], ids=str)
@pytest.mark.parametrize("nested", [False, True])
def test_the_values_are_those_of_the_dequantised_weight(nested, dtype, device):
    """Each row of x is a row of the identity, and so each product one value of the weight."""
    for blocksize in (64, 256):
        case, weight = make(64, 40, 64, [1], dtype=dtype, blocksize=blocksize, nested=nested, bias=False, device=device)
        case.x, case.lora_A = torch.eye(64, device=device).to(dtype), [torch.zeros_like(case.lora_A[0])]
        y, _ = lora_linear_forward(case.x, weight, None, *case.adapters, config=TILES["recompute"])
        assert torch.equal(y, by_torch(weight).t())


@pytest.mark.parametrize(
    "M, ranks, p, dtype",
    [(1, [8], 0.0, FP32), (16, [8, 3], 0.1, FP32), (1, [40], 0.0, BF16), (16, [8], 0.0, BF16), (64, [8], 0.0, BF16)],
)
def test_the_configuration_that_pick_chooses(M, ranks, p, dtype, device, kernel_memory):
    check(*make(M, 33, 512, ranks, [p] * len(ranks), dtype, device=device))


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_the_bits_of_the_dense_kernel(dtype, device):
    """The sums are those of the dense weight with the same tiles, in the same order."""
    for variant, config in TILES.items():
        case, weight = make(7, 40, 192, [5], dtype=dtype, device=device)
        with fixed_order_dot():
            found = [
                lora_linear_forward(case.x, W, case.bias, *case.adapters, config=config) for W in (weight, case.weight)
            ]
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)), variant


def test_rows_of_any_strides(device, kernel_memory, guards):
    case, weight = make(9, 33, 128, [5], device=device)
    wide = torch.randn(9, 259, device=device)
    wide[:, 1:257:2].copy_(case.x)
    case.x = guards.copy(wide[:, 1:257:2], "x")
    check(case, weight, TILES["recompute"])


@pytest.mark.parametrize("M, N", [(0, 5), (5, 0)])
def test_empty(M, N, device):
    case, weight = make(M, N, 64, [3], device=device)
    y, S = lora_linear_forward(case.x, weight, case.bias, *case.adapters)
    assert y.shape == (M, N) and S.shape == (M, 3)


@pytest.mark.parametrize("K, blocksize", [(96, 64), (128, 32)])
def test_a_weight_that_the_tiles_do_not_fit_is_refused(K, blocksize, device):
    case, weight = make(3, 8, K, [2], blocksize=blocksize, device=device)
    with pytest.raises(ValueError, match="weight: expected rows and blocks of a multiple of 64 values, got"):
        lora_linear_forward(case.x, weight, case.bias, *case.adapters)


@pytest.mark.parametrize("M, dtype", [(1, FP32), (16, FP32), (1, BF16), (16, BF16), (64, BF16)], ids=str)
def test_bytes(M, dtype):
    """What is read of the weight is what is held of it, and far less than a dequantisation and a dense product move."""
    N, K = 4096, 4096
    shape = M, N, K, 16, dtype, False, 90
    ours = rules.traffic("linear_4bit", *shape, weight=held(N, K, 64, 256))
    dense = rules.traffic("linear", *shape)
    moved = dense["bytes"] + traffic(N, K, 64, dtype, 256)["bytes"]
    config = pick("linear_4bit", *shape)
    planes = 8 * config.SPLIT_K * M * (N + 16) if config.SPLIT_K > 1 else 0
    again = M * K * dtype.itemsize + 4 * M * 16 if config.variant == "split" else 0  # the shrink's x, and S
    assert ours["bytes"] == ours["floor_bytes"] + planes + again
    assert ours["floor_bytes"] == dense["floor_bytes"] - dtype.itemsize * N * K + held(N, K, 64, 256)
    assert held(N, K, 64, 256) < 0.52 * N * K and ours["bytes"] < moved - 2 * dtype.itemsize * N * K + planes + again
