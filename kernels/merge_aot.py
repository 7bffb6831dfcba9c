"""The merge kernel in every form that merge.py launches, for a compiler without a GPU (see aot.py)."""

from collections.abc import Iterator

import torch
import triton.language as tl

from .aot import CompileCase, dtypes_on
from .merge import _merge_kernel, default_tile, launch_options

# what is launched: name, UNMERGE, SCAN, CORRECT
_PASSES = (
    ("merge scan", False, True, False),
    ("merge apply bare", False, False, False),
    ("merge apply", False, False, True),
    ("unmerge scan", True, True, True),
    ("unmerge apply bare", True, False, False),
    ("unmerge apply", True, False, True),
)


def compile_cases(capability: int, dtypes: tuple[torch.dtype, ...] = ()) -> Iterator[CompileCase]:
    """All compilations for a chip (0: not NVIDIA): W with contiguous rows, A contiguous, B row- or column-major.

    dtypes: of W, by default those of :func:`~.aot.dtypes_on`.
    """
    for dtype in dtypes or dtypes_on(capability):
        for name, UNMERGE, SCAN, CORRECT in _PASSES:
            tile = default_tile(dtype, counting=SCAN or (CORRECT and not UNMERGE))
            for unit in ("stride_br", "stride_bn"):
                options = launch_options(tile, nvidia=capability > 0)
                yield _case(name, dtype, UNMERGE, SCAN, CORRECT, tile, unit, options)


def _case(name, dtype, UNMERGE, SCAN, CORRECT, tile, unit, options) -> CompileCase:
    short, wide = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype], dtype == torch.float32
    types = dict(w_ptr=f"*{short}", a_ptr="*fp32", b_ptr="*fp32", N="i32", K="i32", R="i32", stride_wn="i32")
    types |= {name: "i32" for name in ("stride_ar", "stride_bn", "stride_br") if name != unit}
    if SCAN:
        types["fingerprint_ptr"] = "*i64" if wide else "*i32"
    if SCAN and not UNMERGE:
        types |= dict(counts_ptr="*i16", totals_ptr="*i64")
    if CORRECT:
        types |= dict(ends_ptr="*i64", cols_ptr="*u8", values_ptr=f"*{short}")
    values = dict.fromkeys(n for n in _merge_kernel.arg_names if n.endswith("_ptr") and n not in types)
    values |= {"stride_wk": 1, "stride_ak": 1, unit: 1}
    values |= dict(UNMERGE=UNMERGE, SCAN=SCAN, CORRECT=CORRECT, INT=tl.int64 if wide else tl.int32)
    values |= dict(BLOCK_N=tile.BLOCK_N, BLOCK_K=tile.BLOCK_K)
    names = _merge_kernel.arg_names
    multiples_of_16 = [n for n in types if n.endswith("_ptr") or n in ("K", "stride_wn", "stride_ar")]
    return CompileCase(
        label=f"{name} {short} {tile.BLOCK_N}x{tile.BLOCK_K} B {'row' if unit == 'stride_br' else 'column'}-major",
        op=name,
        config=None,
        dtype=dtype,
        kernel=_merge_kernel,
        signature={n: types.get(n, "constexpr") for n in names},
        constexprs={(names.index(n),): value for n, value in values.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in multiples_of_16},
        options=options,
    )
