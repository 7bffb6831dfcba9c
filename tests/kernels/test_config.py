"""The plan of the kernels: what can be chosen, that the rules behind it hold, and what it costs."""

import functools
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compile_report import cases as aot
from compile_report import grouped_cases as grouped_aot
from compile_report.cases import compile_cases, dtypes_on
from compile_report.compiling import CHIPS, cases
from fused_lora.kernels.config import OPS, PASS_RANKS, SCALE_GROUP, candidates, pick, traffic
from fused_lora.kernels.grouped_tables import pick_expand, pick_shrink
from fused_lora.ops.linear import plan

CAPABILITIES = [0, 75, 80, 86, 90, 100, 103, 120, 999]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WITHOUT_MASK = ("linear", "linear_4bit", "backward_g")
BF16_PAIR, UPCAST_PAIR = (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)
SIZE = st.one_of(st.integers(1, 700), st.sampled_from([1024, 4096, 14336, 2**20]))


@given(
    st.sampled_from(OPS), SIZE, SIZE, SIZE, st.integers(1, 512), st.sampled_from(DTYPES), st.booleans(), st.booleans(),
    st.sampled_from(CAPABILITIES), st.data(),
)  # fmt: skip
def test_all_that_pick_answers_is_listed(op, M, N, K, r, dtype, dropout, upcast, capability, data):
    """The compile report goes through the list, so whatever runs has been compiled for every chip."""
    variant = data.draw(st.sampled_from([None, "split"])) if op.startswith("linear") else None
    if op.startswith("backward"):
        r = 1 + r % PASS_RANKS
    if op == "backward_g":
        dropout = False
    if op == "linear_4bit":
        M = 1 + M % 64  # more rows never come
    config = pick(op, M, N, K, r, dtype, dropout, capability, upcast, 1, variant)
    assert variant in (None, config.variant)
    masked = dropout and op not in WITHOUT_MASK
    listed = {c for c, d, u in candidates(op, dtype, capability) if d == masked and u == upcast}
    assert replace(config, SPLIT_K=min(config.SPLIT_K, 2)) in listed


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_rules_that_correctness_rests_on(op, dtype, capability):
    for config, _, upcast in candidates(op, dtype, capability):
        # a mask is drawn 16 columns at a time: of x, of the x of a weight gradient, of dx; y is finished by halves
        assert config.BLOCK_K % 16 == config.BLOCK_M % 16 == config.BLOCK_N % 16 == 0
        assert config.BLOCK_N % 32 == 0 or not op.startswith("linear")
        assert config.BLOCK_K % SCALE_GROUP == 0 or op != "linear_4bit"  # whole groups with one scale
        # a left operand that is converted in registers in a pipelined loop: no wgmma, which has 64 rows
        if upcast or op == "weight_grad" or op.startswith("backward"):
            assert config.BLOCK_R < 64
        if op == "backward_x":
            assert config.BLOCK_M < 64
        assert not config.tma or (capability >= 90 and dtype != torch.float32)


@given(SIZE, st.integers(1, 512), st.booleans(), st.integers(1, 4))
def test_recompute_takes_one_adapter_of_one_rank_block_without_a_mask(M, r, dropout, adapters):
    config = pick("linear", M, 4096, 4096, r, torch.bfloat16, dropout, 90, adapters=adapters)
    assert config.variant == "split" or (adapters == 1 and r <= config.BLOCK_R and not dropout)


@pytest.mark.parametrize("M", [1, 40, 300, 600])
def test_a_forced_recompute_holds_all_ranks(M):
    for r in (1, 17, 64, 100, 512):
        config = pick("linear", M, 4096, 4096, r, torch.bfloat16, False, 90, variant="recompute")
        assert config.BLOCK_R >= r and config.BLOCK_R & (config.BLOCK_R - 1) == 0


def test_there_are_few_configurations():
    """Each is a compilation in somebody's first step, and all of them together one in CI."""
    for capability in CAPABILITIES:
        for op in OPS:
            both = [list(candidates(op, dtype, capability)) for dtype in (torch.bfloat16, torch.float16)]
            assert both[0] == both[1]
        assert len(list(compile_cases(capability, (torch.bfloat16,)))) <= 130
    # each costs some 0.7 seconds of a core
    assert sum(len(cases(chip.capability)) for chip in CHIPS.values()) <= 1534


@pytest.mark.parametrize("capability", [0, 80, 90, 100, 120])
def test_compile_cases_are_distinct_and_complete(capability):
    every = list(compile_cases(capability))
    assert len({case.label for case in every}) == len(every)
    for case in every:
        names = case.kernel.arg_names
        assert list(case.signature) == names
        fixed = {names[path[0]] for path in case.constexprs}
        assert fixed == {name for name, kind in case.signature.items() if kind == "constexpr"}, case.label


@settings(max_examples=400)  # the first call lists all cases
@given(
    st.sampled_from(["linear", "linear_4bit", "backward"]), SIZE, SIZE, SIZE, st.integers(1, 512),
    st.sampled_from(DTYPES), st.booleans(), st.sampled_from(["plain", "upcast", "rounded"]), st.integers(1, 3),
    st.sampled_from([80, 90, 100, 120]), st.booleans(),
)  # fmt: skip
def test_all_that_a_plan_launches_is_compiled(op, M, N, K, r, dtype, dropout, kind, adapters, capability, whole):
    """fp32 adapters stand for the 16-bit ones of an fp32 layer."""
    if op == "linear_4bit":
        M = 1 + M % 64  # more rows never come
    upcast, rounds = kind == "upcast", kind == "rounded" and dtype != torch.float32
    chosen = plan.plan(op, M, N, K, r, dtype, dropout, upcast, adapters, capability, whole, rounds)
    masked = ("shrink",) if op != "backward" else ("expand", "backward_x", "weight_grad")
    launched = [config for config in (chosen.product, chosen.shrink, chosen.weight_grad) if config is not None]
    for config in launched:
        assert bool(config.rounds) == rounds
        config = replace(config, rounds="" if config.rounds == "copied" else config.rounds)  # copies are 16-bit ones
        name = config.variant if config.variant in OPS else op
        # the passes always add planes, one or several: the same code
        config = replace(config, SPLIT_K=1 if name.startswith("backward") else min(config.SPLIT_K, 2))
        case = name, dtype, config, dropout and name in masked, upcast and dtype != torch.float32
        assert case in _compiled(capability)
    of_library = 2 if op == "linear" else 3
    assert len(launched) == dict(recompute=1, split=2, passes=2, library=of_library)[chosen.variant]


@functools.cache
def _compiled(capability):
    """(operation, dtype of x, configuration, whether it draws a mask, whether fp32 adapters) of what is compiled."""
    every = [(case, case.label.split()) for case in compile_cases(capability, aot.DTYPES)]
    return {(c.op, c.dtype, c.config, "mask" in words, "fp32-adapter" in words) for c, words in every}


@given(
    st.integers(1, 5000), st.sampled_from([16, 32]), SIZE, st.lists(SIZE, min_size=1, max_size=3), st.integers(1, 512),
    st.integers(1, 3), st.sampled_from([BF16_PAIR, (torch.float16,) * 2, (torch.float32,) * 2, UPCAST_PAIR]),
    st.sampled_from([0, 80, 90, 100, 120]),
)  # fmt: skip
def test_all_that_a_mixed_batch_launches_is_compiled(tiles, rows, K, N, max_rank, group_size, dtypes, capability):
    """But for what is no part of the code: SPLIT_K and STEPS."""
    listed = {(c.kernel.__name__, replace(c.config, variant="")) for c in grouped_aot.compile_cases(capability)}
    shrink = pick_shrink(tiles, rows, K, max_rank, *dtypes, capability)
    assert ("_grouped_shrink_kernel", replace(shrink, variant="", SPLIT_K=1)) in listed
    expand = pick_expand(tiles, rows, N, max_rank, group_size, dtypes[0], capability)
    assert ("_grouped_expand_kernel", replace(expand, variant="", STEPS=4)) in listed


def test_which_dtypes_are_compiled():
    both = {torch.bfloat16, torch.float32}
    assert set(dtypes_on(90)) == {*both, torch.float16}
    assert all(set(dtypes_on(capability)) == both for capability in CAPABILITIES if capability != 90)


@pytest.mark.thorough
def test_an_fp16_kernel_is_the_bf16_kernel_under_another_name():
    """In Triton's IR, from which every chip's binary is made, for every case of every chip but merges and masks."""
    code = """
import inspect, torch
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from compile_report import cases as aot

def text(case, target):
    context, source = ir.context(), ASTSource(case.kernel, case.signature, case.constexprs, case.attrs)
    backend = make_backend(target)
    options = backend.parse_options(dict(case.options))
    ir.load_dialects(context)
    backend.load_dialects(context)
    parts = [target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context]
    known = inspect.signature(source.make_ir).parameters  # without the target before triton 3.5
    return str(source.make_ir(*parts[-len(known) :])).replace("bf16", "f16").replace("fp16", "f16")

done = set()
for capability in (90, 80, 100, 120, 0):
    target = GPUTarget("cuda", 90, 32) if capability else GPUTarget("hip", "gfx942", 64)
    bf16 = {case.label: case for case in aot.compile_cases(capability, (torch.bfloat16,))}
    fp16 = list(aot.compile_cases(capability, (torch.float16,)))
    assert len(fp16) == len(bf16)
    for case in fp16:
        if case.op != "mask" and (case.label, capability > 0) not in done:
            done.add((case.label, capability > 0))
            assert text(case, target) == text(bf16[case.label.replace("fp16", "bf16")], target), case.label
print(len(done))
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 100


def test_a_mask_is_drawn_once_an_element_and_launch():
    M, N, K = 8192, 4096, 14336

    def drawn(dropout):
        rest = 16, torch.bfloat16, dropout, 90
        launches = ("linear", N, K), ("shrink", 0, K), ("expand", K, 0), ("backward_x", K, 0), ("weight_grad", N, K)
        return [traffic(op, M, n, k, *rest)["mask_elements"] for op, n, k in launches]

    assert drawn(True) == [M * K] * 5 and drawn(False) == [0] * 5


def test_decode_moves_little_more_than_the_weight():
    cost = traffic("linear", 1, 4096, 4096, 16, torch.bfloat16, False, 90)
    assert cost["bytes"] <= 1.03 * 2 * 4096 * 4096
    assert cost["bytes"] >= cost["floor_bytes"] >= 2 * 4096 * 4096
