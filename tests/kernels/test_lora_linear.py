"""The forward: every variant against float64, no worse than eager, every access inside its tensor."""

from dataclasses import replace

import pytest
import torch

from fused_lora.kernels.config import LaunchConfig
from fused_lora.kernels.lora_linear import lora_linear_forward
from fused_lora.kernels.lora_shrink import lora_shrink
from fused_lora.testing.interpreter import fixed_order_dot
from fused_lora.testing.layers import LayerCase
from fused_lora.testing.numeric import assert_close
from helpers.kernels import PAIRS, several_adapters
from helpers.versions import since

SPLIT = LaunchConfig("split", 64, 64, 64, 16)
RECOMPUTE = LaunchConfig("recompute", 64, 64, 64, 32)
VARIANTS = {"split": SPLIT, "recompute": RECOMPUTE}


def takes(variant, p: float) -> float:
    """The dropout of a test of this variant: "recompute" draws no mask."""
    return 0.0 if variant == "recompute" else p


def run(case: LayerCase, config=None, variant=None) -> dict[str, torch.Tensor]:
    y, S = lora_linear_forward(case.x, case.weight, case.bias, *case.adapters, config=config, variant=variant)
    return dict(y=y, S=S)


def check(case: LayerCase, config=None, variant=None):
    case.check(run(case, config, variant))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "M, N, K, r, p",
    [
        (1, 65, 33, 1, 0.1),
        (17, 1, 129, 3, 0.5),
        (33, 100, 1, 16, 0.0),
        (65, 129, 100, 24, 0.9),
        (129, 17, 65, 32, 1.0),
        (64, 128, 64, 16, 0.1),
    ],
)
def test_shapes_ranks_and_dropout(variant, M, N, K, r, p, device, kernel_memory):
    check(LayerCase.make(M, N, K, [r], [takes(variant, p)], bias=K % 2 == 1, device=device), VARIANTS[variant])


@pytest.mark.parametrize("variant, p", [("split", 0.0), ("split", 0.5), ("recompute", 0.0)])
@pytest.mark.parametrize("dtype, adapter_dtype", [*PAIRS, (torch.float32, torch.bfloat16)], ids=str)
def test_dtypes(variant, dtype, adapter_dtype, p, device, kernel_memory):
    check(LayerCase.make(33, 65, 100, [24], [p], dtype, adapter_dtype, device=device), VARIANTS[variant])


@pytest.mark.parametrize("variant, p", [("split", 0.5), ("recompute", 0.0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rounds", ["loaded", "copied"])
def test_fp32_adapters_that_are_rounded(rounds, dtype, variant, p, device, kernel_memory):
    case = LayerCase.make(33, 65, 100, [24], [p], dtype, torch.float32, device=device)
    configs = (replace(c, rounds=rounds) for c in (VARIANTS[variant], LaunchConfig("shrink", 16, 16, 64, 32)))
    y, S = lora_linear_forward(
        case.x, case.weight, case.bias, *case.adapters, config=next(configs), shrink_config=next(configs)
    )
    case.rounded().check(dict(y=y, S=S))


@several_adapters
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_adapters_with_masks_of_their_own(ranks, dropout, dtype, device, kernel_memory):
    check(LayerCase.make(33, 65, 100, ranks, dropout, dtype, device=device), SPLIT)


@pytest.mark.parametrize("r", [100, 512])
def test_rank_beyond_one_block(r, device, kernel_memory):
    check(LayerCase.make(17, 33, 65, [r], [0.1], device=device), SPLIT)


@pytest.mark.parametrize("split_k", [2, 3, 8])
def test_split_k(split_k, device, kernel_memory):
    """Also with more programs than there are tiles of K."""
    config = LaunchConfig("recompute", 16, 32, 32, 16, SPLIT_K=split_k)
    check(LayerCase.make(5, 33, 150, [3], [0.0], device=device), config)


@pytest.mark.parametrize("M, p", [(1, 0.0), (40, 0.0), (40, 0.1), (100, 0.0), (520, 0.1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_configuration_that_pick_chooses(M, p, dtype, device, kernel_memory):
    check(LayerCase.make(M, 33, 40, [8], [p], dtype, device=device))


LATE = replace(SPLIT, late=True)


@pytest.mark.parametrize("split_k", [1, 3])
@pytest.mark.parametrize("dtype, adapter_dtype", [p for p in PAIRS if torch.float16 not in p], ids=str)
def test_term_after_the_loop(dtype, adapter_dtype, split_k, device, kernel_memory):
    case = LayerCase.make(65, 129, 100, [9], [0.1], dtype, adapter_dtype, device=device)
    check(case, replace(LATE, SPLIT_K=split_k))


@since("triton", "3.6")
def test_term_after_the_loop_of_descriptors(device, kernel_memory):
    check(LayerCase.make(100, 72, 136, [16], [0.1], torch.bfloat16, device=device), replace(LATE, tma=True))


@pytest.mark.parametrize(
    "ranks, dtype, variant",
    [([17], torch.float32, "split"), ([3, 3], torch.float32, "split"), ([3], torch.float16, "split"),
     ([3], torch.float32, "recompute")],
)  # fmt: skip
def test_a_term_that_does_not_fit_after_the_loop_is_refused(ranks, dtype, variant, device):
    case = LayerCase.make(5, 33, 65, ranks, [0.0] * len(ranks), dtype, device=device)
    with pytest.raises(ValueError, match="config: expected late for the variant 'split', one adapter of r <= 16"):
        check(case, replace(LATE, variant=variant))


def test_forced_variant(device):
    case = LayerCase.make(17, 33, 65, [3], [0.0], device=device)
    for variant in VARIANTS:
        check(case, variant=variant)


@since("triton", "3.6")  # before, the interpreter takes only strides of 16 elements
@pytest.mark.parametrize("W_is_transposed", [False, True])
def test_tensor_descriptors(W_is_transposed, device, kernel_memory):
    """Ragged in M and N; 16-byte rows are what a descriptor needs. The transposed weight is Conv1D's."""
    case = LayerCase.make(100, 72, 136, [3], [0.1], torch.float16, device=device)
    if W_is_transposed:
        case.weight = case.weight.t().contiguous().t()
    check(case, replace(SPLIT, tma=True))


def test_descriptors_that_cannot_be_made_fall_back_to_pointers(device, kernel_memory):
    check(LayerCase.make(33, 65, 101, [3], [0.1], torch.float16, device=device), replace(SPLIT, tma=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_strided_inputs(variant, device, kernel_memory, guards):
    case = LayerCase.make(33, 65, 70, [5], [takes(variant, 0.1)], device=device)

    def spread(t, name):
        wide = torch.randn(t.shape[0], 2 * t.shape[1] + 3, device=device)
        view = wide[:, 1 : 2 * t.shape[1] : 2]
        view.copy_(t)
        return guards.copy(view, name)

    case.x = spread(case.x, "x")
    case.weight = spread(case.weight, "weight")
    case.lora_A = [A.t().contiguous().t() for A in case.lora_A]
    case.lora_B = [spread(B, "lora_B") for B in case.lora_B]
    check(case, VARIANTS[variant])


def test_stride_too_wide_for_32_bit_offsets(device, kernel_memory):
    """A row stride of 2^23 elements: x is copied rather than addressed past 2^31."""
    case = LayerCase.make(3, 17, 16, [2], [0.0], torch.float16, device=device)
    wide = torch.empty(2 * 2**23 + 16, dtype=torch.float16, device=device).as_strided((3, 16), (2**23, 1))
    case.x = wide.copy_(case.x)
    check(case, SPLIT)


@pytest.mark.parametrize("M, N, K", [(0, 5, 7), (5, 0, 7), (5, 7, 0), (0, 0, 0)])
@pytest.mark.parametrize("variant", [*VARIANTS, None])
def test_empty(M, N, K, variant, device, kernel_memory):
    case = LayerCase.make(M, N, K, [3], [0.0], device=device)
    exact = dict(S=case.x @ case.lora_A[0].t())
    exact["y"] = case.x @ case.weight.t() + case.bias + case.scaling[0] * exact["S"] @ case.lora_B[0].t()
    for name, tensor in run(case, VARIANTS.get(variant)).items():
        assert tensor.shape == exact[name].shape
        assert_close(tensor, exact[name], terms=300, name=name)


@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bias_of_another_dtype(bias_dtype, device, kernel_memory):
    case = LayerCase.make(17, 33, 65, [3], dtype=torch.float16, device=device)
    case.bias = case.bias.to(bias_dtype)
    y, _ = lora_linear_forward(case.x, case.weight, case.bias, *case.adapters, config=RECOMPUTE)
    assert_close(y, case.exact()["y"], terms=300)


def test_S_is_unscaled_and_carries_the_dropout_scale(device):
    for variant, config in VARIANTS.items():
        case = LayerCase.make(9, 17, 33, [4], [takes(variant, 0.5)], device=device)
        doubled = LayerCase(**{**case.__dict__, "scaling": [2 * s for s in case.scaling]})
        assert torch.equal(run(case, config)["S"], run(doubled, config)["S"])
        assert_close(run(case, config)["S"], case.exact()["S"], terms=300)


def test_shrink_alone(device, kernel_memory):
    """The entry for a plan that leaves the base product to the vendor's GEMM."""
    case = LayerCase.make(33, 1, 100, [3, 24], [0.1, 0.5], torch.bfloat16, device=device)
    S = lora_shrink(case.x, case.lora_A, [65536 / (65536 - 6554), 2.0], case.dropout, case.seeds)
    assert ((S - case.exact()["S"]).abs() <= case.fp32_bounds()["S"]).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_repeats_are_bit_equal(variant, device):
    case = LayerCase.make(65, 40, 70, [5], [takes(variant, 0.1)], torch.bfloat16, device=device)
    first, second = run(case, VARIANTS[variant]), run(case, VARIANTS[variant])
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_has_the_same_bits_alone_and_in_any_batch(variant, dtype, device):
    config = replace(VARIANTS[variant], BLOCK_M=16, BLOCK_N=32, BLOCK_K=32)
    case = LayerCase.make(37, 40, 70, [5], dtype=dtype, device=device)
    order = torch.randperm(37, device=device)
    with fixed_order_dot():
        batch = run(case, config)
        alone, permuted = run(case.rows(slice(20, 21)), config), run(case.rows(order), config)
    for name in batch:
        assert torch.equal(alone[name][0], batch[name][20]), name
        assert torch.equal(permuted[name], batch[name][order]), name


def test_rows_and_columns_of_tiles_do_not_change_the_bits(device):
    """BLOCK_M, BLOCK_N and GROUP_M decide who computes an element, not how; the dropout mask included."""
    case = LayerCase.make(50, 70, 40, [5], [0.3], device=device)
    tiles = [(16, 32), (32, 64), (64, 32)]
    with fixed_order_dot():
        results = [run(case, LaunchConfig("split", m, n, 32, 16, GROUP_M=1 + i)) for i, (m, n) in enumerate(tiles)]
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


def test_a_mask_that_would_be_ignored_is_refused(device):
    case = LayerCase.make(5, 33, 65, [3], [0.5], device=device)
    with pytest.raises(ValueError, match="dropout: expected none with the variant 'recompute'"):
        lora_linear_forward(case.x, case.weight, case.bias, *case.adapters, variant="recompute")
