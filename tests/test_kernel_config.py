"""The plan of the kernels: what can be chosen, that the rules behind it hold, and what it costs."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fused_lora.kernels.aot import compile_cases
from fused_lora.kernels.config import OPS, candidates, pick, traffic, variants

CAPABILITIES = [0, 75, 80, 86, 90, 100, 103, 120, 999]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZE = st.one_of(st.integers(1, 700), st.sampled_from([1024, 4096, 14336, 2**20]))


@given(
    st.sampled_from(OPS), SIZE, SIZE, SIZE, st.integers(1, 512), st.sampled_from(DTYPES), st.booleans(), st.booleans(),
    st.sampled_from(CAPABILITIES), st.data(),
)  # fmt: skip
def test_all_that_pick_answers_is_listed(op, M, N, K, r, dtype, dropout, upcast, capability, data):
    """The compile report goes through the list, so whatever runs has been compiled for every chip."""
    variant = None
    if op in ("linear", "input_grad"):
        variant = data.draw(st.sampled_from([None, *variants(op, M, r, dtype, dropout, upcast)]))
    config = pick(op, M, N, K, r, dtype, dropout, capability, upcast, 1, variant)
    assert variant in (None, config.variant)
    listed = {c for c, d, u in candidates(op, dtype, capability) if d == dropout and u == upcast}
    assert replace(config, SPLIT_K=min(config.SPLIT_K, 2)) in listed


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_rules_that_correctness_rests_on(op, dtype, capability):
    for config, _, upcast in candidates(op, dtype, capability):
        # a mask is drawn 16 columns at a time, of x, of the x of a weight gradient, of half a tile of Y
        assert config.BLOCK_K % 16 == 0 and config.BLOCK_M % 16 == 0
        assert config.BLOCK_N % 32 == 0 or op in ("shrink", "weight_grad")
        if upcast or op == "weight_grad":
            # the left operand of the pipelined LoRA product is converted in registers: no wgmma, which has 64 rows
            assert config.BLOCK_R < 64
        assert not config.tma or (capability >= 90 and dtype != torch.float32)


@given(SIZE, st.sampled_from(["linear", "input_grad"]), st.integers(1, 512), st.booleans(), st.integers(1, 4))
def test_recompute_and_publish_take_one_adapter_of_one_rank_block(M, op, r, dropout, adapters):
    config = pick(op, M, 4096, 4096, r, torch.bfloat16, dropout, 90, adapters=adapters)
    assert config.variant == "split" or (adapters == 1 and r <= config.BLOCK_R)


@pytest.mark.parametrize("variant", ["recompute", "publish"])
@pytest.mark.parametrize("M", [1, 40, 300, 600])
def test_a_forced_variant_holds_all_ranks(variant, M):
    for r in (1, 17, 64, 100, 512):
        config = pick("linear", M, 4096, 4096, r, torch.bfloat16, False, 90, variant=variant)
        assert config.BLOCK_R >= r and config.BLOCK_R & (config.BLOCK_R - 1) == 0


def test_the_list_stays_short():
    """Each is a compilation in somebody's first step, and all of them together one in CI."""
    for capability in CAPABILITIES:
        for op in OPS:
            both = [list(candidates(op, dtype, capability)) for dtype in (torch.bfloat16, torch.float16)]
            assert both[0] == both[1]
        assert sum(len(list(candidates(op, torch.bfloat16, capability))) for op in OPS) <= 72


@pytest.mark.parametrize("capability", [0, 80, 90, 100, 120])
def test_compile_cases_are_distinct_and_complete(capability):
    cases = list(compile_cases(capability))
    assert len({case.label for case in cases}) == len(cases)
    for case in cases:
        names = case.kernel.arg_names
        assert list(case.signature) == names
        fixed = {names[path[0]] for path in case.constexprs}
        assert fixed == {name for name, kind in case.signature.items() if kind == "constexpr"}, case.label


def _training_step(M, N, K, r, dropout, capability=90):
    forward = traffic("linear", M, N, K, r, torch.bfloat16, dropout, capability)
    input_grad = traffic("input_grad", M, K, N, r, torch.bfloat16, dropout, capability)
    return forward, input_grad, traffic("weight_grad", M, N, K, r, torch.bfloat16, dropout, capability)


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("N, K", [(4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096)])
def test_a_training_step_moves_2x_and_y_beyond_its_base_products(N, K, dropout):
    """r = 16, 8192 tokens: two passes over x and one over g; what has a rank for a side is counted apart."""
    M, r = 8192, 16
    X, Y, base = 2 * M * K, 2 * M * N, 2 * (M * K + K * N + M * N)
    steps = _training_step(M, N, K, r, dropout)
    narrow = 7 * 4 * M * r + (2 * 3 + 8 * 16) * r * (K + N)  # S and dS, A and B, planes
    assert sum(step["bytes"] for step in steps) - 2 * base <= 2 * X + Y + narrow
    assert narrow < 0.2 * (2 * X + Y)


def test_launches_of_a_training_step():
    """Forward 1, or 2 with a mask to draw; backward 2."""
    for dropout in (False, True):
        assert [cost["launches"] for cost in _training_step(8192, 4096, 4096, 16, dropout)] == [1 + dropout, 1, 1]


def test_a_mask_is_drawn_once_an_element_and_launch():
    M, N, K = 8192, 4096, 14336
    assert [step["mask_elements"] for step in _training_step(M, N, K, 16, True)] == [M * K] * 3
    assert [step["mask_elements"] for step in _training_step(M, N, K, 16, False)] == [0] * 3


def test_decode_moves_little_more_than_the_weight():
    cost = traffic("linear", 1, 4096, 4096, 16, torch.bfloat16, False, 90)
    assert cost["bytes"] <= 1.03 * 2 * 4096 * 4096
    assert cost["bytes"] >= cost["floor_bytes"] >= 2 * 4096 * 4096
