"""The merge kernel in every form that merge.py launches, for a compiler without a GPU (see cases.py)."""

from collections.abc import Iterator

import torch

from compile_report.cases import CompileCase, dtypes_on, make_case
from fused_lora.kernels.grouped_shrink import TL_DTYPES
from fused_lora.kernels.merge import _merge_kernel, default_tile, launch_options

# what is launched: name, UNMERGE, RECORD, AGAIN, RANDOM, SWITCH
_PASSES = (
    ("merge", False, True, False, False, False),
    ("merge bare", False, False, False, False, False),
    ("merge again", False, False, True, False, False),
    ("unmerge", True, True, False, False, False),
    ("unmerge bare", True, False, False, False, False),
    ("merge at random", False, True, False, True, False),
    ("merge again at random", False, False, True, True, False),
    ("switch", False, True, False, False, True),
    ("switch at random", False, True, False, True, True),
)


_ANY_NUMBER = "N", "R", "stride_bn", "room", "OLD_R", "stride_old_bn", "num_weights"  # no multiples of 16
_GROUPED = ("merge", "unmerge", "merge at random", "switch", "switch at random")  # also of many weights at once


def compile_cases(capability: int, dtypes: tuple[torch.dtype, ...] = ()) -> Iterator[CompileCase]:
    """All compilations for a chip (0: not NVIDIA): contiguous W, A and B, sizes that the tile divides and others.

    dtypes: of W, by default those of :func:`~.cases.dtypes_on`.
    """
    for dtype in dtypes or dtypes_on(capability):
        for name, UNMERGE, RECORD, AGAIN, RANDOM, SWITCH in _PASSES:
            if RANDOM and dtype.itemsize > 2:
                continue
            tile = default_tile(dtype, RECORD or AGAIN, capability, RANDOM)
            for EVEN in (True, False):
                options = launch_options(tile, capability > 0, dtype, RECORD, SWITCH and not EVEN)
                for grouped in (False, True) if name in _GROUPED else (False,):
                    yield _case(name, dtype, UNMERGE, RECORD, AGAIN, RANDOM, SWITCH, EVEN, grouped, tile, options)


def _case(name, dtype, UNMERGE, RECORD, AGAIN, RANDOM, SWITCH, EVEN, grouped, tile, options) -> CompileCase:
    short = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    types = dict(w_ptr=f"*{short}", a_ptr="*fp32", b_ptr="*fp32", N="i32", K="i32", R="i32", stride_wn="i32")
    types |= dict(stride_ar="i32", stride_bn="i32")
    if RECORD or AGAIN:
        types["table_ptr"] = "*i64"
    if RECORD:
        types |= dict(places_ptr="*u16", values_ptr="*i32") | ({} if UNMERGE else dict(room="i32"))
    if RANDOM:
        types["seed_ptr"] = "*i64"
    if SWITCH:
        types |= dict(old_a_ptr="*fp32", old_b_ptr="*fp32", old_table_ptr="*i64", old_places_ptr="*u16")
        types |= dict(old_values_ptr="*i32", OLD_R="i32", stride_old_ar="i32", stride_old_bn="i32")
    if grouped:
        types = dict(group_ptr="*i64", num_weights="i32")
    values = dict.fromkeys(n for n in _merge_kernel.arg_names if n not in types)
    values |= {"stride_wk": 1, "stride_ak": 1, "stride_br": 1}
    values |= {"stride_old_ak": 1, "stride_old_br": 1} if SWITCH else {}
    values |= dict(UNMERGE=UNMERGE, RECORD=RECORD, AGAIN=AGAIN, RANDOM=RANDOM, SWITCH=SWITCH, EVEN=EVEN)
    values |= dict(GROUP=TL_DTYPES[dtype] if grouped else None, ROWS=tile.ROWS, COLS=tile.COLS)
    label = f"{name} {short} {tile.ROWS}x{tile.COLS}{'' if EVEN else ' masked'}{' group' * grouped}"
    op = f"{name}{', group' * grouped}"
    return make_case(label, op, None, dtype, _merge_kernel, types, values, options, any_number=_ANY_NUMBER)
