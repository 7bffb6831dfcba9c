"""The grouped kernels in every form that their launchers choose, for a compiler without a GPU (see cases.py)."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from compile_report.cases import _TRITON_NAMES, CompileCase, make_case
from fused_lora.kernels.config import LaunchConfig
from fused_lora.kernels.grouped_expand import _grouped_expand_kernel
from fused_lora.kernels.grouped_shrink import TL_DTYPES, _grouped_shrink_kernel
from fused_lora.kernels.grouped_tables import COLUMNS, chunks, launch_options, pick_expand, pick_shrink

# dtype of x and y, dtype of the adapters; 16-bit ones of an fp32 layer have the same tiles as its own
_DTYPES = (
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.float32),
)
_TABLES = dict(num_tiles_ptr="*i32", tiles_ptr="*i32", order_ptr="*i32", member_slot_ptr="*i32", rank_ptr="*i32")
_STRIDES_OF_S = dict(stride_plane="i32", stride_output="i32", stride_sm="i32")
_ANY_NUMBER = "num_slots", "num_ranges", "num_outputs", "num_rank_programs"  # no multiples of 16
_MANY = 1 << 20  # more tiles than any rule asks about


def compile_cases(capability: int) -> Iterator[CompileCase]:
    """All compilations for a chip (0: not NVIDIA): unit column strides, sizes and row strides multiples of 16.

    For one output, which is what the store launches, with as many parts of a split as there can be. A split needs no
    code of its own in the shrink; the expand unrolls it. In bf16 for three outputs, too, as vLLM's q, k and v, and with
    any ranks without a split.
    """
    most = chunks(10**6)[0]
    for dtype, adapter_dtype in _DTYPES:
        kind = dtype, adapter_dtype, capability
        for block_m in (16, 32):
            for max_rank in (COLUMNS, 512):
                config = pick_shrink(_MANY, block_m, 4096, max_rank, *kind)
                yield _shrink_case(config, *kind, 1, max_rank)
            for max_rank, group_size in ((16, 1), (32, 1), (64, 1), (64, 2)):
                more = [(1, 1)] * (group_size > 1) + [(3, most)] if adapter_dtype == torch.bfloat16 else []
                for outputs, planes in [(1, most), *more]:
                    config = pick_expand(_MANY, block_m, [1024] * outputs, max_rank, group_size, dtype, capability)
                    yield _expand_case(config, *kind, outputs, planes)


def _precision(dtype: torch.dtype, capability: int) -> str:
    return "ieee" if dtype == torch.float32 or capability == 0 else "tf32x3"


def _shrink_case(config, dtype, adapter_dtype, capability, outputs, max_rank) -> CompileCase:
    programs = -(-max_rank // config.BLOCK_R)
    types = dict(_TABLES, x_ptr=f"*{_TRITON_NAMES[dtype]}", s_ptr="*fp32", a_table="*i64", stride_xm="i32")
    types |= dict(_STRIDES_OF_S, K="i32", chunk="i32", span="i32", num_slots="i32")
    values: dict[str, Any] = dict(stride_xk=1, UPCAST=adapter_dtype != dtype)
    values |= dict(BLOCK_K=config.BLOCK_K, BLOCK_R=config.BLOCK_R)
    for name, number in (("num_outputs", outputs), ("num_rank_programs", programs)):
        (values if number == 1 else types)[name] = 1 if number == 1 else "i32"
    form = f"{outputs} outputs, ranks to {max_rank}"
    return _case(_grouped_shrink_kernel, form, config, dtype, adapter_dtype, capability, types, values)


def _expand_case(config, dtype, adapter_dtype, capability, outputs, planes) -> CompileCase:
    y = f"*{_TRITON_NAMES[dtype]}"
    types = dict(_TABLES, y_ptrs=(y,) * outputs, s_ptr="*fp32", b_table="*i64", scaling_ptr="*fp32")
    types |= dict(_STRIDES_OF_S, member_weight_ptr="*fp32", Ns=("i32",) * outputs, strides_ym=("i32",) * outputs)
    types |= dict(strides_yn=("constexpr",) * outputs, num_slots="i32", num_ranges="i32", span="i32")
    values: dict[str, Any] = dict(NUM_OUTPUTS=outputs, NUM_PLANES=planes, RANK_BLOCKS=config.RANK_BLOCKS)
    values["BLOCK_N"] = config.BLOCK_N
    form = f"{outputs} outputs, {planes} planes, ranks to {config.RANK_BLOCKS * COLUMNS or 'any'}"
    return _case(_grouped_expand_kernel, form, config, dtype, adapter_dtype, capability, types, values)


def _case(kernel, form, config: LaunchConfig, dtype, adapter_dtype, capability, types, values) -> CompileCase:
    op = f"grouped {config.variant}"
    values |= dict(DTYPE=TL_DTYPES[adapter_dtype], PRECISION=_precision(dtype, capability), COLUMNS=COLUMNS)
    values["BLOCK_M"] = config.BLOCK_M
    tiles = f"{config.BLOCK_M}x{config.BLOCK_N}x{config.BLOCK_K} r{config.BLOCK_R} w{config.num_warps}"
    label = f"{op} {_TRITON_NAMES[dtype]} with {_TRITON_NAMES[adapter_dtype]} adapters, {form}, {tiles}"
    options, config = launch_options(config, nvidia=capability > 0), replace(config, variant=op)
    case = make_case(label, op, config, dtype, kernel, types, values, options, any_number=_ANY_NUMBER)
    if "strides_yn" in types:
        place = kernel.arg_names.index("strides_yn")
        case.constexprs.update({(place, i): 1 for i in range(len(types["strides_yn"]))})
    return case
