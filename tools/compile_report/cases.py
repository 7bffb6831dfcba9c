"""Every kernel in every configuration that can run, described for a compiler without a GPU.

    for case in compile_cases(90):
        source = ASTSource(case.kernel, case.signature, case.constexprs, case.attrs)
        triton.compile(source, target=GPUTarget("cuda", 90, 32), options=case.options)

A case stands for a launch over contiguous, 16-byte aligned tensors whose sizes are multiples of 16, one adapter.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from fused_lora.kernels.config import OPS, LaunchConfig, candidates
from fused_lora.kernels.dropout import _dropout_mask_kernel
from fused_lora.kernels.dropped import BLOCK_K, BLOCK_M, _dropped_kernel
from fused_lora.kernels.lora_backward import _lora_backward_kernel
from fused_lora.kernels.lora_expand import _lora_expand_kernel
from fused_lora.kernels.lora_grad import _lora_weight_grad_kernel
from fused_lora.kernels.lora_linear import _lora_linear_kernel, launch_options
from fused_lora.kernels.lora_shrink import _lora_shrink_kernel

_ANY_NUMBER = "bounds", "bound", "shift", "shift8"  # no multiples of 16
_TRITON_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def _adapter(config: LaunchConfig, dtype: torch.dtype, upcast: bool) -> str:
    """The pointer type of the adapters and of their gradients."""
    return "*fp32" if upcast or config.rounds else f"*{_TRITON_NAMES[dtype]}"


@dataclass(frozen=True)
class CompileCase:
    """One compilation: what ``triton.compiler.ASTSource`` and ``triton.compile`` take, and where it comes from."""

    label: str
    op: str
    config: LaunchConfig | None
    dtype: torch.dtype
    kernel: Any
    signature: dict[str, Any]
    constexprs: dict[tuple[int, ...], Any]
    attrs: dict[tuple[int, ...], list]
    options: dict[str, int]


def make_case(
    label, op, config, dtype, kernel, types: dict[str, Any], values: dict[str, Any], options, any_number=_ANY_NUMBER
) -> CompileCase:
    """types: the run-time arguments, a tuple for one value per adapter; values: the arguments fixed at compile time."""
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    attrs = {}
    for i, name in enumerate(names):
        # the triton launcher specialises pointers and integers that are multiples of 16
        kinds = signature[name]
        paths = [((i, j), kind) for j, kind in enumerate(kinds)] if isinstance(kinds, tuple) else [((i,), kinds)]
        for path, kind in paths:
            if (kind.startswith("*") or kind == "i32") and name not in any_number:
                attrs[path] = [["tt.divisibility", 16]]
    constexprs = {(names.index(name),): value for name, value in values.items()}
    return CompileCase(label, op, config, dtype, kernel, signature, constexprs, attrs, options)


def _linear_case(config: LaunchConfig, dtype: torch.dtype, dropout: bool, upcast: bool, precision: str, four_bit=()):
    """four_bit: the types of a 4-bit weight's pointers, six if it is double quantised."""
    x, adapter = f"*{_TRITON_NAMES[dtype]}", _adapter(config, dtype, upcast)
    split = config.SPLIT_K > 1
    types = {
        **dict(x_ptr=x, w_ptr=four_bit or x, bias_ptr=x, a_ptr=adapter, b_ptr=adapter, s_ptr="*fp32", y_ptr=x),
        **dict(rank_ends=("i32",), scales=("fp32",), M="i32", N="i32", K="i32", R="i32", shift="i32", shift8="i32"),
        **dict(stride_xm="i32", stride_wn="i32", stride_ar="i32", stride_bn="i32"),
    }
    values = dict(
        FOUR_BIT=bool(four_bit), NESTED=len(four_bit) > 3, LATE=config.late, stride_xk=1, stride_wk=1,
        stride_ak=1, stride_br=1, NUM_ADAPTERS=1, VARIANT=config.variant, HAS_BIAS=True,
        UPCAST=upcast, PRECISION=precision, TMA=config.tma, W_IS_NK=True, SPLIT=split, BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N, BLOCK_K=config.BLOCK_K, BLOCK_R=config.BLOCK_R, GROUP_M=config.GROUP_M,
    )  # fmt: skip
    for name, kind, without in (("planes_ptr", "*fp32", None), ("sync_ptr", "*i32", None), ("stride_plane", "i32", 0)):
        (types if split else values)[name] = kind if split else without
    return _lora_linear_kernel, types, values


def _backward_case(config: LaunchConfig, dtype: torch.dtype, dropout: bool, upcast: bool, precision: str):
    z, adapter = f"*{_TRITON_NAMES[dtype]}", _adapter(config, dtype, upcast)
    expand = config.variant == "backward_x"
    types = dict(
        z_ptr=z, t_ptr="*fp32", q_ptr=adapter, out_ptr=z if expand else "*fp32", grad_ptr=adapter,
        grad_planes_ptr="*fp32", sync_ptr="*i32", bound="i32", out_scale="fp32", grad_scale="fp32",
        M="i32", C="i32", R="i32", stride_zm="i32",
    )  # fmt: skip
    values = dict(
        stride_zc=1, EXPAND=expand, DROP=dropout, UPCAST=upcast, PRECISION=precision,
        BLOCK_M=config.BLOCK_M, BLOCK_C=config.BLOCK_N, BLOCK_R=config.BLOCK_R,
    )  # fmt: skip
    (types if dropout else values)["seeds_ptr"] = "*i64" if dropout else None
    # lora_A and dA by rows, lora_B and dB transposed
    for unit, long in (("qc", "qr"), ("gc", "gr")) if expand else (("qr", "qc"), ("gr", "gc")):
        values[f"stride_{unit}"], types[f"stride_{long}"] = 1, "i32"
    return _lora_backward_kernel, types, values


def _shrink_case(config: LaunchConfig, dtype: torch.dtype, dropout: bool, upcast: bool, precision: str):
    x, adapter = f"*{_TRITON_NAMES[dtype]}", _adapter(config, dtype, upcast)
    types = dict(
        x_ptr=x, p_ptr=adapter, s_ptr="*fp32", rank_ends=("i32",), bounds=("i32",), scales=("fp32",),
        M="i32", K="i32", R="i32", stride_xm="i32", stride_pr="i32",
    )  # fmt: skip
    values = dict(
        num_rank_blocks=1, stride_xk=1, stride_pk=1, NUM_ADAPTERS=1, DROP=dropout, UPCAST=upcast, PRECISION=precision,
        BLOCK_M=config.BLOCK_M, BLOCK_K=config.BLOCK_K, BLOCK_R=config.BLOCK_R,
    )  # fmt: skip
    split = config.SPLIT_K > 1
    values["SPLIT"] = split
    optional = dict(seeds_ptr=("*i64", dropout), planes_ptr=("*fp32", split), sync_ptr=("*i32", split))
    for name, (kind, used) in optional.items():
        (types if used else values)[name] = kind if used else None
    return _lora_shrink_kernel, types, values


def _expand_case(
    config: LaunchConfig, dtype: torch.dtype, dropout: bool, upcast: bool, precision: str, base: bool = False
):
    """With a mask as the input gradient launches it, without as the forward does; with ``base`` as lora_term does, and
    the forward of a layer with a bias."""
    y, adapter = f"*{_TRITON_NAMES[dtype]}", _adapter(config, dtype, upcast)
    types = dict(
        s_ptr="*fp32", q_ptr=adapter, y_ptr=y, rank_ends=("i32",), bounds=("i32",), scales=("fp32",),
        M="i32", N="i32", R="i32",
    )  # fmt: skip
    values = dict(
        NUM_ADAPTERS=1, DROP=dropout, HAS_BASE=base, HAS_BIAS=base, UPCAST=upcast, PRECISION=precision,
        BLOCK_M=config.BLOCK_M, BLOCK_N=config.BLOCK_N, BLOCK_R=config.BLOCK_R, GROUP_M=config.GROUP_M,
    )  # fmt: skip
    for name, kind, used in (("base_ptr", y, base), ("bias_ptr", y, base), ("seeds_ptr", "*i64", dropout)):
        (types if used else values)[name] = kind if used else None
    values["stride_bn"] = int(base)
    (types if base else values)["stride_bm"] = "i32" if base else 0
    unit, long = ("stride_qn", "stride_qr") if dropout else ("stride_qr", "stride_qn")
    values[unit], types[long] = 1, "i32"
    return _lora_expand_kernel, types, values


def _weight_grad_case(config: LaunchConfig, dtype: torch.dtype, dropout: bool, upcast: bool, precision: str):
    x, split, out = f"*{_TRITON_NAMES[dtype]}", config.SPLIT_K > 1, _adapter(config, dtype, upcast)
    types = dict(
        dA_ptr=out, dB_ptr=out, x_ptr=x, g_ptr=x, s_ptr="*fp32", ds_ptr="*fp32",
        rank_ends=("i32",), bounds=("i32",), scales_A=("fp32",), scales_B=("fp32",),
        M="i32", N="i32", K="i32", R="i32", stride_xm="i32", stride_gm="i32",
    )  # fmt: skip
    values = dict(
        num_rank_blocks=1, stride_xk=1, stride_gn=1, NUM_ADAPTERS=1, DROP=dropout, UPCAST=upcast, PRECISION=precision,
        SPLIT=split, BLOCK_M=config.BLOCK_M, BLOCK_K=config.BLOCK_K, BLOCK_R=config.BLOCK_R,
    )  # fmt: skip
    (types if dropout else values)["seeds_ptr"] = "*i64" if dropout else None
    for name, kind, without in (("planes_ptr", "*fp32", None), ("sync_ptr", "*i32", None), ("stride_plane", "i32", 0)):
        (types if split else values)[name] = kind if split else without
    return _lora_weight_grad_kernel, types, values


# the weight's pointers: packed, code, absmax, and double quantised code8, absmax8, offset
_FOUR_BIT = {"": ("*u8", "*fp32", "*fp32"), "nested": ("*u8", "*fp32", "*u8", "*fp32", "*fp32", "*fp32")}
DTYPES = torch.bfloat16, torch.float16, torch.float32


def dtypes_on(capability: int) -> tuple[torch.dtype, ...]:
    """The dtypes of x to compile whenever a kernel changes: fp16 on sm_90 alone, on the other chips by request.

    In Triton's IR, from which every chip's binary is made, an fp16 kernel of this file is the bf16 kernel with another
    type name. Merges are not: each takes the elements of a word apart in its own way.
    """
    return DTYPES if capability == 90 else (torch.bfloat16, torch.float32)


def compile_cases(capability: int, dtypes: tuple[torch.dtype, ...] = ()) -> Iterator[CompileCase]:
    """All compilations for a chip: ``capability`` as in config.py (80, 90, 100, 120; 0 for any other, AMD included).

    dtypes: of x, by default those of :func:`dtypes_on`.
    """
    builders = {
        "linear": _linear_case, "shrink": _shrink_case, "expand": _expand_case, "weight_grad": _weight_grad_case,
        "backward_g": _backward_case, "backward_x": _backward_case,
    }  # fmt: skip
    seen = set()
    for dtype in dtypes or dtypes_on(capability):
        precision = "ieee" if dtype == torch.float32 or capability == 0 else "tf32x3"
        for op in OPS:
            for config, dropout, upcast in candidates(op, dtype, capability):
                if upcast and dtype == torch.float32:
                    continue  # 16-bit adapters of an fp32 layer: the same tiles with half the bytes of A and B
                if op == "linear_4bit":
                    arguments = config, dtype, dropout, upcast, precision
                    built = [(kind, _linear_case(*arguments, pointers)) for kind, pointers in _FOUR_BIT.items()]
                else:
                    built = [("", builders[op](config, dtype, dropout, upcast, precision))]
                if op == "expand" and not dropout:
                    built.append(("onto-y", _expand_case(config, dtype, dropout, upcast, precision, base=True)))
                for kind, (fn, types, values) in built:
                    tags = [op, config.variant * (config.variant != op), kind, _TRITON_NAMES[dtype]]
                    tags += ["mask" * dropout, "fp32-adapter" * upcast, "rounded" * bool(config.rounds)]
                    tiles = f"{config.BLOCK_M}x{config.BLOCK_N}x{config.BLOCK_K} r{config.BLOCK_R}"
                    tiles += f" w{config.num_warps} s{config.num_stages}"
                    tags += [tiles, "tma" * config.tma, "split-k" * (config.SPLIT_K > 1)]
                    options = launch_options(config, kind == "nested")
                    case = make_case(" ".join(filter(None, tags)), op, config, dtype, fn, types, values, options)
                    key = repr((case.kernel.__name__, case.signature, case.constexprs, case.attrs, case.options))
                    if key not in seen:
                        seen.add(key)
                        yield case
    types = dict(out_ptr="*u8", seed_ptr="*i64", bound="i32", M="i32", K="i32")
    values = dict(BLOCK_M=32, BLOCK_K=128)
    yield make_case("dropout_mask", "mask", None, torch.uint8, _dropout_mask_kernel, types, values, {})
    values = dict(stride_xk=1, BLOCK_M=BLOCK_M, BLOCK_K=BLOCK_K)
    for dtype in dtypes or dtypes_on(capability):
        short = _TRITON_NAMES[dtype]
        types = dict(x_ptr=f"*{short}", out_ptr=f"*{short}", seed_ptr="*i64", scale="fp32")
        types |= {name: "i32" for name in ("bound", "M", "K", "stride_xm")}
        yield make_case(f"dropped {short}", "dropped", None, dtype, _dropped_kernel, types, values, dict(num_warps=4))
