"""The kernel of 4-bit weights in every form that is launched, for a compiler without a GPU (see cases.py)."""

from collections.abc import Iterator
from typing import Any

import torch

from compile_report.cases import _TRITON_NAMES, CompileCase, dtypes_on, make_case
from fused_lora.kernels.dequant_4bit import BYTES, _dequant_4bit_kernel, launch_options


def compile_cases(capability: int, dtypes: tuple[torch.dtype, ...] = ()) -> Iterator[CompileCase]:
    """All compilations for a chip: scales in fp32 and double quantised, whole programs and others.

    dtypes: of the dense weight, by default those of :func:`~.cases.dtypes_on`.
    """
    for dtype in dtypes or dtypes_on(capability):
        for nested in (False, True):
            for even in (True, False):
                yield _case(dtype, nested, even, capability)


def _case(dtype: torch.dtype, nested: bool, even: bool, capability: int) -> CompileCase:
    short = _TRITON_NAMES[dtype]
    types = dict(packed_ptr="*u8", code_ptr="*fp32", absmax_ptr="*u8" if nested else "*fp32", out_ptr=f"*{short}")
    types |= dict(nbytes="i32", numel="i32", shift="i32", shift8="i32")
    values: dict[str, Any] = dict(NESTED=nested, EVEN=even, BYTES=BYTES)
    for name in ("code8_ptr", "absmax8_ptr", "offset_ptr"):
        (types if nested else values)[name] = "*fp32" if nested else None
    label = f"dequant_4bit {short}{' nested' * nested}{'' if even else ' masked'}"
    options = launch_options(capability > 0)
    return make_case(label, "dequant_4bit", None, dtype, _dequant_4bit_kernel, types, values, options)
