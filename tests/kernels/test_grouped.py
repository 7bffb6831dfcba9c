"""Grouped kernels: many adapters in one batch against float64, every access checked, and what a row's bits depend on.

The same tests run natively where there is a GPU; the interpreter adds the checks of accesses and races.
"""

import itertools
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from fused_lora.kernels.config import LaunchConfig
from fused_lora.kernels.grouped_expand import grouped_expand
from fused_lora.kernels.grouped_shrink import grouped_shrink
from fused_lora.kernels.grouped_tables import ExpandConfig, chunks, grouped_traffic, pick_expand, pick_shrink
from fused_lora.ops.grouped.metadata import GroupLayout, build_metadata
from fused_lora.testing.grouped import GroupedCase
from fused_lora.testing.guards import guarded_allocations
from fused_lora.testing.interpreter import checked, fixed_order_dot, interpreting
from fused_lora.testing.numeric import assert_no_worse
from helpers.seeds import shifted
from helpers.thorough import sampled

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# three adapters, base rows, one row with two weighted adapters, one with the same adapter twice
MIX = [2, -1, 0, 1, 1, -1, 3, 0, 1, 4, 1, -1, 3, 0]
GROUPS = [[(0, 1.0)], [(1, 1.0)], [(2, 1.0)], [(0, 0.75), (2, -0.5)], [(1, 0.3), (1, 0.2), (0, 1.0)]]
RANKS = [[8, 3], [20, 0], [1, 40]]
SHRINK = LaunchConfig("shrink", 16, 16, 128, 16)  # long steps, for few of them in the interpreter


def lora_grouped(x, outputs, tables, groups):
    """Both launches."""
    grouped_expand(grouped_shrink(x, tables, groups), outputs, tables, groups)


def same_bits(left, right):
    return all(
        torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
        for a, b in zip(left, right, strict=True)
    )


def run(case: GroupedCase, *configs, **launch) -> list[torch.Tensor]:
    with checked(extra=case.adapters), guarded_allocations():
        outputs, guards = case.run(*configs, **launch)
    guards.assert_intact()
    case.guards.assert_intact()
    return outputs


def check(case: GroupedCase, shrink=None, expand=None):
    """16-bit results by the error rule against eager, fp32 ones by what fp32 sums lose at most, base rows by bits."""
    ours, eager, exact, bounds = run(case, shrink, expand), case.eager(), case.exact(), case.fp32_bounds()
    for g, y in enumerate(ours):
        if y.dtype == FP32:
            assert ((y - exact[g]).abs() <= bounds[g]).all()
        else:
            assert_no_worse(y, eager[g], exact[g], name=f"y[{g}]")
        untouched = [i for i, group in enumerate(case.group_of_row) if group < 0]
        assert same_bits([y[untouched]], [case.base[g][untouched]])


SIZES = [([33, 17], 70), ([64, 128], 128), ([1, 200], 1), ([130, 5], 520)]
MIXED = [(*size, (BF16, FP32)[(i + j) % 2]) for i, size in enumerate(SIZES) for j in (0, 1)]


@pytest.mark.parametrize("N, K, dtype", sampled(MIXED, 2), ids=str)
def test_a_mix_of_adapters(N, K, dtype, device):
    check(GroupedCase.make(MIX, GROUPS, RANKS, N, K, dtype, device=device))


@pytest.mark.parametrize(
    "dtype, adapter_dtype",
    [(FP16, FP16), (BF16, FP32), (FP16, FP32), (FP32, BF16), (FP32, FP16), (BF16, FP16)],
    ids=str,
)
def test_dtypes(dtype, adapter_dtype, device):
    check(GroupedCase.make(MIX, GROUPS, RANKS, [70, 33], 100, dtype, adapter_dtype, device=device))


@pytest.mark.parametrize("r", [1, 2, 15, 16, 17, 33, 100, 512])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_any_rank(r, dtype, device):
    check(GroupedCase.make([0, 1, 0], [[(0, 1.0)], [(1, 1.0)]], [[r], [3]], [40], 50, dtype, device=device))


@pytest.mark.parametrize("N", [[48], [64, 16, 16], [100, 100], [7, 70, 7, 130]])
def test_outputs_of_any_width_share_a_launch(N, device):
    ranks = [[4 + s + g for g in range(len(N))] for s in range(3)]
    check(GroupedCase.make(MIX, GROUPS, ranks, N, 60, BF16, device=device))


@pytest.mark.parametrize("rows", [1, 16, 17, 70, 129])
def test_tiles_of_one_adapter(rows, device):
    """Down to one row and past several tiles, of 16 rows or of 32."""
    case = GroupedCase.make([0] * rows + [-1] + [1] * 3, [[(0, 1.0)], [(1, 1.0)]], [[4], [4]], [33], 40, device=device)
    assert case.layout.block_m == (32 if rows >= 60 else 16)
    check(case)


def test_every_row_its_own_adapter(device):
    case = GroupedCase.make(
        range(40), [[(s, 1.0)] for s in range(40)], [[1 + s % 5] for s in range(40)], [33], 40, BF16, device=device
    )
    check(case)


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R", [(16, 32, 32, 16), (32, 64, 64, 32)])
def test_configurations(split, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, device):
    """Also tiles that are larger than those of the metadata, and two chunks of K."""
    shrink = LaunchConfig("shrink", BLOCK_M, 16, BLOCK_K, BLOCK_R, SPLIT_K=split)
    expand = ExpandConfig("expand", BLOCK_M, BLOCK_N, 16, 16, STEPS=split)
    check(GroupedCase.make(MIX[:7], GROUPS, RANKS, [33, 65], 520, BF16, device=device), shrink, expand)


def test_strided_x_and_outputs(device):
    case = GroupedCase.make(MIX, GROUPS, RANKS, [33, 17], 70, FP16, device=device)
    T = len(MIX)
    wide = torch.randn(T, 3, 200, device=device).half()
    case.x = case.guards.copy(wide[:, 1, 3:143:2], "x").copy_(case.x)
    case.base[0] = wide[:, 0, :33].copy_(case.base[0])
    case.base[1] = torch.empty(40, T, dtype=FP16, device=device).t()[:, :34:2].copy_(case.base[1])
    check(case)


def test_outputs_that_are_slices_of_one_tensor(device):
    """q, k and v in one buffer: in place, each in its columns."""
    case = GroupedCase.make(MIX, GROUPS, RANKS, [33, 17], 70, device=device)
    joint = torch.cat(case.base, dim=1)
    outputs = [joint[:, :33], joint[:, 33:]]
    lora_grouped(case.x, outputs, case.tables(), case.row_groups())
    assert same_bits(outputs, run(case))


def test_offsets_past_32_bits(device):
    """Rows 2^30 elements apart; the memory between them is never touched."""
    case = GroupedCase.make([-1, -1, 0], [[(0, 1.0)]], [[3]], [20], 40, FP16, device=device)
    far = torch.empty(2 * 2**30 + 40, dtype=FP16, device=device)
    x, y = far.as_strided((3, 40), (2**30, 1)).copy_(case.x), torch.empty_like(far).as_strided((3, 20), (2**30, 1))
    y.copy_(case.base[0])
    lora_grouped(x, [y], case.tables(), case.row_groups())
    assert same_bits([y], run(case))


@pytest.mark.parametrize("T, N, K", [(0, 5, 7), (3, 0, 7), (3, 5, 0)])
def test_empty(T, N, K, device):
    check(GroupedCase.make([0] * T, [[(0, 1.0)]], [[3]], [N], K, device=device))


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_rows_without_an_adapter_keep_every_bit(dtype, device):
    """Negative zeros, payloads of NaN, subnormals: also where the row's adapter has rank 0 for the output."""
    groups = [[(0, 1.0)], [(1, 1.0)]]
    case = GroupedCase.make([-1, 0, 1, -1], groups, [[4, 0], [0, 4]], [16, 16], 32, dtype, device=device)
    integer = torch.int32 if dtype == FP32 else torch.int16
    for y, touched in zip(case.base, (1, 2), strict=True):
        bits = torch.arange(y.numel(), dtype=torch.int64) * 0x10410421 & (0xFFFFFFFF if dtype == FP32 else 0xFFFF)
        y.copy_(bits.to(integer).view(dtype).view(y.shape))
        y[touched] = 0  # so that no term can be lost in rounding
    for y, base, touched in zip(run(case), case.base, (1, 2), strict=True):
        untouched = [m for m in range(4) if m != touched]
        assert same_bits([y[untouched]], [base[untouched]])
        assert not same_bits([y[touched]], [base[touched]])


def test_a_poisoned_adapter_stays_with_its_rows(device):
    """NaN and infinity in one adapter, in x of its rows: rows of the others, in neighbouring tiles, have sound bits."""
    case = GroupedCase.make([0, 1, 1, 0, -1, 2], GROUPS[:3], [[4], [20], [3]], [40], 60, BF16, device=device)
    sound = run(case)[0]
    case.lora_A[1][0].fill_(float("nan"))
    case.lora_B[1][0].fill_(float("inf"))
    case.x[1] = float("inf")
    assert same_bits([run(case)[0][[0, 3, 4, 5]]], [sound[[0, 3, 4, 5]]])


def test_one_rounding_however_many_adapters(device):
    """Terms that cancel leave the base row as it was; added one after the other in bf16 they would round four times."""
    groups = [[(0, 1.0), (1, 1.0), (0, -1.0), (1, -1.0)]]
    case = GroupedCase.make([0] * 5, groups, [[4], [7]], [50], 60, BF16, device=device)
    case.scaling.fill_(100.0)
    exact = case.exact()[0]
    assert (run(case)[0].double() - exact).abs().max() <= 2.0**-8 * case.base[0].abs().max()


def test_repeats_are_bit_equal(device):
    case = GroupedCase.make(MIX[:7], GROUPS, RANKS, [70, 33], 520, BF16, device=device)
    assert same_bits(run(case), run(case))


@pytest.mark.parametrize("dtype, adapter_dtype", sampled([(FP32, FP32), (BF16, BF16), (BF16, FP32)], 2), ids=str)
def test_a_row_has_the_same_bits_alone_and_in_any_batch(dtype, adapter_dtype, device):
    rows = [2, -1, 0, 1, 1, 3, 4]
    case = GroupedCase.make(rows, GROUPS, RANKS, [40, 9], 520, dtype, adapter_dtype, device=device)
    order = [3, 6, 0, 5, 1, 4, 2]
    with fixed_order_dot():
        batch, permuted = run(case, SHRINK), run(case.rows(order), SHRINK)
        assert same_bits(permuted, [y[order] for y in batch])
        for row in (0, 5):
            assert same_bits(run(case.rows([row]), SHRINK), [y[[row]] for y in batch]), row
        crowd = case.rows([5] * 34 + [4, 2])
        crowd.layout = GroupLayout(1000, 5, 3)
        assert crowd.layout.block_m == 32
        crowded = run(crowd, replace(SHRINK, BLOCK_M=32, SPLIT_K=2))
    assert same_bits([y[[0, 33, 34, 35]] for y in crowded], [y[[5, 5, 4, 2]] for y in batch])


def test_neighbours_in_the_tables_do_not_change_the_bits(device):
    """A larger max_rank, another slot, more slots, other groups beside: the same bits."""
    case = GroupedCase.make([0, 1], [[(0, 1.0)], [(1, 1.0)]], [[5], [9]], [40], 520, BF16, device=device)
    with fixed_order_dot():
        before = run(case)
        other = GroupedCase.make([0], [[(0, 1.0)]], [[100]], [40], 520, BF16, device=device)
        moved = replace(
            case,
            lora_A=[*other.lora_A, *case.lora_A],
            lora_B=[*other.lora_B, *case.lora_B],
            scaling=torch.cat((other.scaling, case.scaling), dim=1),
            groups=[[(1, 1.0)], [(2, 1.0)], [(0, 1.0), (2, 3.0)]],
            layout=GroupLayout(64, 7, 2),
        )
        assert same_bits(run(moved), before)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_tiles_and_splits_do_not_change_the_bits(dtype, device):
    """Tiles, and whether programs share K or take several blocks of columns, decide who sums, not in what order."""
    case = GroupedCase.make([0, 1, -1, 3, 1], GROUPS[:4], RANKS, [70, 33], 1030, dtype, device=device)
    assert chunks(1030)[0] == 3
    results = []
    with fixed_order_dot():
        for block_m, block_n, block_k, block_r, split, steps in (
            (16, 32, 128, 16, 3, 1), (32, 64, 64, 32, 1, 1), (16, 16, 128, 32, 1, 3),
        ):  # fmt: skip
            shrink = LaunchConfig("shrink", block_m, 16, block_k, block_r, SPLIT_K=split)
            results.append(run(case, shrink, ExpandConfig("expand", block_m, block_n, 16, 16, STEPS=steps)))
    assert all(same_bits(results[0], other) for other in results[1:])


@pytest.mark.parametrize("dtype, adapter_dtype", [(FP32, FP32), (BF16, BF16)], ids=str)
@pytest.mark.parametrize(
    "ranks, forms, K, splits",
    [
        ([1, 9, 16, 0], (0, 1, 4), 520, (1, 2)),
        ([5, 17, 0, 32], (0, 2, 4), 40, (1,)),
        ([33, 2, 64, 50], (0, 4), 40, (1,)),
    ],
)
def test_every_form_of_the_loop_over_ranks_gives_the_same_bits(ranks, forms, K, splits, dtype, adapter_dtype, device):
    """Groups of one adapter, each form that can hold them, with and without a split of K."""
    groups = [[(s, 0.7)] for s in range(4)]
    case = GroupedCase.make(
        [0, 1, -1, 2, 3], groups, [[r] for r in ranks], [70], K, dtype, adapter_dtype, device=device
    )
    results = []
    with fixed_order_dot():
        for split, form in itertools.product(splits, forms):
            expand = ExpandConfig("expand", 16, 64, 16, 16, STEPS=2, RANK_BLOCKS=form)
            results.append(run(case, replace(SHRINK, SPLIT_K=split), expand))
    assert all(same_bits(results[0], other) for other in results[1:])
    assert same_bits([results[0][0][2]], [case.base[0][2]])


def test_replay_follows_the_metadata(device):
    """The same launch arguments over changed device contents: fewer groups, more, none, another adapter in a slot."""
    full = GroupedCase.make(
        [0] * 20 + [1] * 20, [[(0, 1.0)], [(1, 1.0)]], [[8, 8], [3, 5], [30, 16]], [33, 20], 64, device=device
    )
    full.layout = GroupLayout(64, 6, 2, slots=3)
    tables, groups = full.tables(), full.row_groups()
    random = np.random.default_rng(shifted(5))
    T = len(full.group_of_row)
    mixes = [
        ([-1] * T, []),
        ([0] * T, [[(2, 1.0)]]),
        (
            np.arange(T) % 6,
            [[(0, 1.0)], [(1, 2.0)], [(2, 1.0)], [(0, 1.0), (1, 1.0)], [(2, 0.5)], [(1, 1.0), (2, -1.0)]],
        ),
        ([0] + [-1] * (T - 1), [[(1, 1.0)], [(0, 1.0)]]),
        (random.integers(-1, 2, T), [[(1, 1.0)], [(2, 1.0)]]),
    ]
    for round, (group_of_row, lists) in enumerate(mixes):
        host = build_metadata(full.layout, group_of_row, lists)
        buffer = torch.from_numpy(np.where(np.arange(len(host)) >= 0, host, 0)).to(device)
        for name, where in full.layout.sections.items():
            target = getattr(groups, name)
            target.view(torch.int32).view(-1).copy_(buffer[where])
        if round == 3:  # the adapter of slot 1 makes room for that of slot 2
            for table in (tables.A_ptr, tables.B_ptr, tables.rank, tables.scaling):
                table[:, 1] = table[:, 2]
            full.lora_A[1], full.lora_B[1] = full.lora_A[2], full.lora_B[2]
            full.scaling[:, 1] = full.scaling[:, 2]
        now = replace(full, group_of_row=list(group_of_row), groups=lists)
        assert same_bits(run(now, tables=tables, groups=groups), run(now)), round
        check(now)


@pytest.mark.skipif(not interpreting(), reason="counts what the interpreter loads")
def test_small_ranks_cost_their_own_rank(device):
    """Rank 8 beside one of 64: it loads what it loads in a store of rank 8 alone, a few table entries apart."""

    def loaded(ranks, rows):
        case = GroupedCase.make(rows, [[(s, 1.0)] for s in range(len(ranks))], [[r] for r in ranks], [64], 256, BF16)
        with checked(extra=case.adapters) as report:
            lora_grouped(case.x, [case.base[0]], case.tables(), case.row_groups())
        return report.loaded, report.programs

    eight, _ = loaded([8, 8, 8], [0, 1, 2, -1])
    mixed, programs = loaded([8, 8, 8, 64], [0, 1, 2, -1])
    used, _ = loaded([8, 8, 8, 64], [0, 1, 2, 3])
    assert mixed - eight <= 12 * programs
    assert used - mixed >= 64 * (256 + 64)


@pytest.mark.parametrize("block_m", [16, 32])
def test_no_tile_reaches_the_rows_of_another_instruction(block_m):
    """Below 64 rows every product is the same instruction, so that tiles do not decide how a row is rounded."""
    for capability in (0, 80, 90, 100, 120):
        for dtype in (FP32, BF16, FP16):
            for adapter_dtype in (dtype, FP32):
                for max_rank in (1, 16, 17, 512):
                    for tiles in (1, 100, 10**6):
                        shrink = pick_shrink(tiles, block_m, 4096, max_rank, dtype, adapter_dtype, capability)
                        expand = pick_expand(tiles, block_m, [4096], max_rank, 1, dtype, capability)
                        assert max(shrink.BLOCK_R, shrink.BLOCK_M, expand.BLOCK_M) <= 32
                        assert 128 % shrink.BLOCK_K == 0
                        assert expand.RANK_BLOCKS == (1 if max_rank <= 16 else 2 if max_rank == 17 else 0)


@pytest.mark.parametrize("K", [0, 1, 127, 128, 512, 513, 4096, 11008, 14336, 10**6])
def test_chunks_cover_K(K):
    number, length = chunks(K)
    assert length % 128 == 0 and 1 <= number <= 16 and (number - 1) * length < max(K, 1) <= number * length


def test_traffic_against_the_floor():
    """A decode step of one row, 32 adapters, and a prefill, in bf16 at K = N = 4096."""
    one = grouped_traffic([1], [16], [4096], 4096, BF16)
    assert one["floor_bytes"] == 2 * 16 * 8192 and one["launches"] == 2
    assert one["bytes"] / one["floor_bytes"] < 1.13
    many = grouped_traffic([1] * 32, [8] * 31 + [64], [4096], 4096, BF16)
    assert many["floor_bytes"] == 2 * (31 * 8 + 64) * 8192
    assert many["bytes"] / many["floor_bytes"] < 1.25
    assert many["flops"] == many["floor_flops"]
    prefill = grouped_traffic([8192], [16], [4096], 4096, BF16)
    assert prefill["bytes"] < 2 * 8192 * 4096 * 3 * 1.02


def decode_graph(case, tables, groups):
    """A captured launch over the case's x and outputs of its own, restored from the base at each replay."""
    outputs = [y.clone() for y in case.base]
    lora_grouped(case.x, [y.clone() for y in case.base], tables, groups)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for y, base in zip(outputs, case.base, strict=True):
            y.copy_(base)
        lora_grouped(case.x, outputs, tables, groups)
    return graph, outputs


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_a_captured_graph_replays_any_mix(dtype, device):
    ranks = [[8, 8], [3, 5], [30, 16], [64, 1]]
    case = GroupedCase.make([0] * 64, [[(0, 1.0)]], ranks, [512, 128], 1024, dtype, device=device)
    case.layout = GroupLayout(64, 64, 2, slots=4)
    buffer = torch.from_numpy(build_metadata(case.layout, case.group_of_row, case.groups)).to(device)
    tables, groups = case.tables(), case.layout.views(buffer)
    graph, outputs = decode_graph(case, tables, groups)
    random = np.random.default_rng(shifted(0))
    for step in range(20):
        number = 0 if step == 0 else random.integers(1, 65)
        lists = [[(int(s), 1.0) for s in random.integers(0, 4, random.integers(1, 3))] for _ in range(number)]
        group_of_row = random.integers(-1, number, 64) if number else np.full(64, -1)
        buffer.copy_(torch.from_numpy(build_metadata(case.layout, group_of_row, lists)))
        graph.replay()
        now = replace(case, group_of_row=group_of_row.tolist(), groups=lists)
        assert same_bits(outputs, run(now)), step


@pytest.mark.gpu
def test_the_shrink_runs_beside_the_base_product(device):
    case = GroupedCase.make([0, 1, -1] * 8, [[(0, 1.0)], [(1, 1.0)]], [[8], [3]], [512], 1024, BF16, device=device)
    tables, groups, y, side = case.tables(), case.row_groups(), case.base[0].clone(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        S = grouped_shrink(case.x, tables, groups)
    torch.cuda.current_stream().wait_stream(side)
    grouped_expand(S, [y], tables, groups)
    assert same_bits([y], run(case))


@pytest.mark.gpu
def test_nothing_waits_for_the_device(device):
    case = GroupedCase.make(MIX, GROUPS, RANKS, [512, 128], 1024, BF16, device=device)
    tables, groups = case.tables(), case.row_groups()
    torch.cuda.set_sync_debug_mode("error")
    try:
        lora_grouped(case.x, case.base, tables, groups)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, adapter_dtype", [(FP32, FP32), (BF16, BF16), (FP16, FP16), (BF16, FP32)], ids=str)
def test_real_sizes_keep_the_bits_of_a_row(dtype, adapter_dtype, device):
    """One row decoded alone, and the same row in a prefill of 4,096, through other tiles and another split of K."""
    ranks = [[64, 64], [16, 16], [8, 0]]
    group_of_row = torch.randint(-1, 3, (4096,)).tolist()
    case = GroupedCase.make(group_of_row, GROUPS[:3], ranks, [4096, 1024], 4096, dtype, adapter_dtype, device=device)
    batch = run(case)
    for row in (0, 1000, 2047, 4095):
        assert same_bits(run(case.rows([row])), [y[[row]] for y in batch])


@pytest.mark.slow
@pytest.mark.parametrize("chip, capability", sampled([("cuda", 90), ("cuda", 100), ("gfx942", 0)], 3))
def test_all_tiles_use_one_product_instruction(chip, capability):
    """Compiled: tiles of 16 and of 32 rows, ranks to 16 and beyond, differ in no matrix instruction on any chip."""
    code = f"""
import re, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from compile_report.grouped_cases import compile_cases
target = GPUTarget("cuda", {capability}, 32) if {capability} else GPUTarget("hip", "{chip}", 64)
found = {{}}
for case in compile_cases({capability}):
    kind = case.label.split(",")[0]
    if "bf16 with" in kind and "1 outputs" in case.label and re.search("ranks to (512|any|16, )", case.label):
        compiled = triton.compile(
            ASTSource(case.kernel, case.signature, case.constexprs, case.attrs), target=target, options=case.options
        )
        text = compiled.asm["ptx" if {capability} else "amdgcn"]
        found.setdefault(kind, set()).update(re.findall(r"wgmma\\S+|tcgen05\\S*mma\\S*|mma.sync\\S+|v_mfma\\w+", text))
for kind, instructions in found.items():
    print(kind, *sorted(instructions), sep="|")
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    lines = [line.split("|") for line in done.stdout.splitlines()]
    assert len(lines) == 4
    for kind, *instructions in lines:
        assert len(instructions) == 1, (kind, instructions)
        assert capability == 0 or instructions[0].startswith("mma.sync"), (kind, instructions)
