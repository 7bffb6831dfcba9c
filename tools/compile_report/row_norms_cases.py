"""The kernel of DoRA's row norms in every form that is launched, for a compiler without a GPU (see cases.py)."""

from collections.abc import Iterator
from typing import Any

import torch

from compile_report.cases import _TRITON_NAMES, CompileCase, dtypes_on, make_case
from fused_lora.kernels.row_norms import BLOCK_K, BLOCK_N, BLOCK_R, _row_norms_kernel


def compile_cases(capability: int, dtypes: tuple[torch.dtype, ...] = ()) -> Iterator[CompileCase]:
    """All compilations for a chip: adapters of the weight's dtype and in fp32.

    dtypes: of the weight, by default those of :func:`~.cases.dtypes_on`.
    """
    for dtype in dtypes or dtypes_on(capability):
        for adapter_dtype in dict.fromkeys((dtype, torch.float32)):
            yield _case(dtype, adapter_dtype)


def _case(dtype: torch.dtype, adapter_dtype: torch.dtype) -> CompileCase:
    short, adapters = _TRITON_NAMES[dtype], _TRITON_NAMES[adapter_dtype]
    upcast = adapter_dtype == torch.float32
    types = dict(w_ptr=f"*{short}", a_ptr=f"*{adapters}", b_ptr=f"*{adapters}", out_ptr="*fp32", scale="fp32")
    types |= {name: "i32" for name in ("N", "K", "R", "stride_wn", "stride_ar", "stride_bn")}
    values: dict[str, Any] = dict(UPCAST=upcast, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, BLOCK_R=BLOCK_R)
    values |= dict(stride_wk=1, stride_ak=1, stride_br=1)
    label = f"row_norms {short}{' fp32 adapters' * (upcast and dtype != torch.float32)}"
    options = dict(num_warps=4, num_stages=2)
    return make_case(label, "row_norms", None, dtype, _row_norms_kernel, types, values, options, any_number=("R",))
