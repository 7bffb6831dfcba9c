"""Triton's interpreter with correct bf16 and checked memory accesses, so that a CPU can test a kernel.

    install_shim()            bf16 dots, casts and arithmetic as the hardware rounds them; one launch at a time;
                              what multiple_of says of a number, and max_contiguous of a block, has to be so;
                              tl.reduce of several flattened blocks
    fixed_order_dot()         tl.dot as a plain loop over k: a row's bits cannot depend on its neighbours
    checked()                 every active lane of every access inside its own argument, no two programs in conflict

Why. The interpreter keeps bf16 as bare uint16: tl.dot and arithmetic multiply bit patterns, and casts truncate. It
reads and writes out of bounds without an error. It keeps the grid position in globals, so threads disturb each other.
All of this is so in triton 3.4 to 3.9. If the internals that are replaced here are missing, ``install_shim`` and
``checked`` raise RuntimeError.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from .bounds import AccessChecker, AccessReport

_LAUNCH_LOCK = threading.RLock()
_REPLACED = {
    "InterpreterBuilder": (
        "cast_impl create_fp_to_fp binary_op unary_op create_dot create_fma create_clampf create_select "
        "create_masked_load create_masked_store create_atomic_rmw create_atomic_cas create_barrier set_grid_idx"
    ),
    "GridExecutor": "__call__ _init_args_hst",
    "ReduceOps": "generic_reduce to_tensor",
}


class _State:
    installed = False
    fixed_order = False
    patched: frozenset[str] = frozenset()  # modules that the running launch has made ready


def interpreting() -> bool:
    """Whether kernels run in the interpreter: TRITON_INTERPRET as triton reads it."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


def _require_internals() -> None:
    for owner, names in _REPLACED.items():
        cls = getattr(interpreter, owner, None)
        missing = [n for n in names.split() if not hasattr(cls, n)]
        if missing:
            raise RuntimeError(
                f"triton {_triton_version()} has no triton.runtime.interpreter.{owner}.{missing[0]}: "
                "fused_lora.testing.interpreter knows triton 3.4 to 3.9 and has to be adapted"
            )
    for name in ("TensorHandle", "_implicit_cvt", *(function.__name__ for function in _FUNCTIONS)):
        if not hasattr(interpreter, name):
            raise RuntimeError(f"triton {_triton_version()} has no triton.runtime.interpreter.{name}")


def _triton_version() -> str:
    import triton

    return triton.__version__


def bf16_to_float32(bits: np.ndarray) -> np.ndarray:
    """bf16 bit patterns (uint16) as float32 values, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def float32_to_bf16(values: np.ndarray) -> np.ndarray:
    """float32 rounded to nearest-even bf16 bit patterns (uint16); NaN becomes 0x7FFF, PTX's canonical NaN."""
    bits = values.astype(np.float32, order="C", copy=False).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16
    return np.where((bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000), 0x7FFF, rounded).astype(np.uint16)


def _is_bf16(dtype) -> bool:
    return dtype.scalar == tl.bfloat16


def _as_float(handle) -> np.ndarray:
    return bf16_to_float32(handle.data) if _is_bf16(handle.dtype) else handle.data


def _cast_impl(builder, src, dst_type):
    if _is_bf16(src.dtype) and _is_bf16(dst_type):
        return interpreter.TensorHandle(src.data, tl.bfloat16)
    if _is_bf16(dst_type):
        return interpreter.TensorHandle(float32_to_bf16(_as_float(src)), tl.bfloat16)
    if _is_bf16(src.dtype):
        src = interpreter.TensorHandle(bf16_to_float32(src.data), tl.float32)
        if dst_type.scalar == tl.float32:
            return src
    return _ORIGINAL["cast_impl"](builder, src, dst_type)


def _create_fp_to_fp(builder, src, dst_type, rounding_mode):
    to_nearest = rounding_mode is None or rounding_mode == interpreter._ir.ROUNDING_MODE.RTNE
    if to_nearest and src.dtype.primitive_bitwidth >= 16 and dst_type.scalar.primitive_bitwidth >= 16:
        return builder.cast_impl(src, dst_type)
    return _ORIGINAL["create_fp_to_fp"](builder, src, dst_type, rounding_mode)


def _binary_op(builder, lhs, rhs, op):
    if not _is_bf16(lhs.dtype):
        return _ORIGINAL["binary_op"](builder, lhs, rhs, op)
    out = op(_as_float(lhs), _as_float(rhs))
    if out.dtype == np.bool_:
        return interpreter.TensorHandle(out, tl.int1)
    return interpreter.TensorHandle(float32_to_bf16(out), tl.bfloat16)


def _unary_op(builder, arg, op):
    if not _is_bf16(arg.dtype):
        return _ORIGINAL["unary_op"](builder, arg, op)
    return interpreter.TensorHandle(float32_to_bf16(op(bf16_to_float32(arg.data))), tl.bfloat16)


def _refuse_bf16(name):
    def method(builder, *handles):
        if any(_is_bf16(h.dtype) for h in handles if isinstance(h, interpreter.TensorHandle)):
            raise NotImplementedError(f"{name} on bf16 in the interpreter: cast to float32 first")
        return _ORIGINAL[name](builder, *handles)

    return method


def _create_fma(builder, x, y, z):
    if z.data.dtype == np.float32 and not hasattr(interpreter._interpreter, "fma_fp32"):
        return interpreter.TensorHandle(_fma_float32(x.data, y.data, z.data), tl.float32)
    return _refuse_bf16("create_fma")(builder, x, y, z)


def _fma_float32(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """x * y + z with one rounding; triton 3.4 and 3.6 round twice.

    float64 holds the product exactly. Its sum with z is rounded to odd (Boldo and Melquiond 2008, "Emulation of a FMA
    and correctly rounded sums"), after which the rounding to float32 is the only one that counts.
    """
    product, addend = x.astype(np.float64) * y.astype(np.float64), z.astype(np.float64)
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)
    bits = total.view(np.int64)
    even = np.isfinite(total) & (error != 0) & ((bits & 1) == 0)
    step = np.where((error > 0) == (total > 0), 1, -1)
    return np.where(even, bits + step, bits).view(np.float64).astype(np.float32)


def _create_dot(builder, a, b, d, input_precision, max_num_imprecise_acc):
    if a.dtype.primitive_bitwidth == 8 or b.dtype.primitive_bitwidth == 8 or a.dtype.scalar.is_int():
        return _ORIGINAL["create_dot"](builder, a, b, d, input_precision, max_num_imprecise_acc)
    wide = np.promote_types(d.data.dtype, np.float32)
    left, right = _as_float(a).astype(wide, copy=False), _as_float(b).astype(wide, copy=False)
    if _State.fixed_order:
        acc = d.data.astype(wide)
        for k in range(left.shape[-1]):
            acc += left[..., :, k : k + 1] * right[..., k : k + 1, :]
    else:
        acc = np.matmul(left, right) + d.data
    return interpreter.TensorHandle(acc.astype(d.data.dtype, copy=False), d.dtype.scalar)


def _set_attr(handle, name, values):
    """A hint of a kernel, which the interpreter ignores and a compiler believes: triton 3.9 takes the addresses of
    neighbours from the first one's, also where a mask splits their access."""
    data = np.asarray(handle.data)
    if name == "tt.divisibility" and data.size == 1 and data.item() % values[0]:
        raise ValueError(f"multiple_of: {data.item()} is no multiple of {values[0]}")
    if name == "tt.contiguity" and data.ndim == len(values):
        scalar = handle.dtype.scalar
        step = scalar.element_ty.primitive_bitwidth // 8 if isinstance(scalar, tl.pointer_type) else 1
        for axis, run in enumerate(values):
            steps = np.diff(data.astype(np.int64), axis=axis)
            within = np.arange(1, data.shape[axis]) % run != 0
            if (steps.compress(within, axis) != step).any():
                raise ValueError(f"max_contiguous: dimension {axis} has no runs of {run} neighbours")
    _ORIGINAL["set_attr"](handle, name, values)


def _reduce(ops, blocks):
    """Of several blocks to be flattened Triton's own flattens only the first. This one calls a function, which must not
    branch, for halves of the blocks, as a GPU does: a call for each element takes a hundred times as long."""
    if len(blocks) == 1 or ops.axis is not None:
        return _ORIGINAL["generic_reduce"](ops, blocks)
    types, parts = [block.dtype for block in blocks], [block.handle.data.ravel() for block in blocks]
    while len(parts[0]) > 1:
        halves = [np.split(part, 2) for part in parts]
        pairs = [ops.to_tensor(pair[i], dtype) for i in (0, 1) for pair, dtype in zip(halves, types, strict=True)]
        parts = [each.handle.data for each in ops.combine_fn.fn(*pairs)]
    shape = [1] * blocks[0].handle.data.ndim if ops.keep_dims else []
    return [ops.to_tensor(part.reshape(shape), dtype) for part, dtype in zip(parts, types, strict=True)]


def _locked_call(executor, *args, **kwargs):
    # no GPU warns of an overflow or of an invalid operation
    with _LAUNCH_LOCK, np.errstate(all="ignore"):
        _State.patched = frozenset()
        return _ORIGINAL["__call__"](executor, *args, **kwargs)


def _patch_lang(fn):
    """Triton's own does it anew for every call of a helper, which was a fifth of the time of a test."""
    modules = frozenset(module.__name__ for module in fn.__globals__.values() if module is tl or module is tl.core)
    if modules and modules <= _State.patched:
        return _NOTHING
    _State.patched |= modules
    return _ORIGINAL["_patch_lang"](fn)


def _get_np_dtype(dtype) -> np.dtype:
    """As the interpreter's, which makes its table anew at every call."""
    scalar = dtype.scalar
    if isinstance(scalar, tl.pointer_type):
        return _ORIGINAL["_get_np_dtype"](scalar)
    found = _NP_DTYPES.get(scalar.name)
    if found is None:
        found = _NP_DTYPES[scalar.name] = _ORIGINAL["_get_np_dtype"](scalar)
    return found


def _patch_lang_tensor(tensor, *scope):
    _ORIGINAL["_patch_lang_tensor"](tensor, *scope)
    # before triton 3.5: int() of an array of one element, which numpy 2.4 no longer takes
    tensor.__index__ = lambda self: int(self.handle.data.item())


_SHIM = {
    "cast_impl": _cast_impl,
    "create_fp_to_fp": _create_fp_to_fp,
    "binary_op": _binary_op,
    "unary_op": _unary_op,
    "create_fma": _create_fma,
    "create_clampf": _refuse_bf16("create_clampf"),
    "create_dot": _create_dot,
}
_FUNCTIONS = (_patch_lang, _patch_lang_tensor, _get_np_dtype)
_NOTHING = SimpleNamespace(restore=lambda: None)  # what is to be restored where nothing was replaced
_ORIGINAL: dict = {}
_NP_DTYPES: dict[str, np.dtype] = {}


def _replacements() -> list[tuple[Any, str, Any]]:
    """(owner, name, what takes its place) of all that the shim replaces."""
    found = [(interpreter.InterpreterBuilder, name, method) for name, method in _SHIM.items()]
    found += [(interpreter.GridExecutor, "__call__", _locked_call), (interpreter.TensorHandle, "set_attr", _set_attr)]
    found += [(interpreter.ReduceOps, "generic_reduce", _reduce)]
    return found + [(interpreter, function.__name__, function) for function in _FUNCTIONS]


def install_shim() -> None:
    """Make bf16 right in the interpreter for the rest of the process, and launches one at a time.

    Rounding is to nearest even, as the hardware's. A dot multiplies in fp32 and accumulates in fp32: by numpy's matmul,
    or in a fixed order within ``fixed_order_dot``. Arithmetic on bf16 blocks rounds after each operation; fma and clamp
    on bf16 blocks raise NotImplementedError. Calling it again changes nothing.

    Raises:
        RuntimeError: this triton's interpreter has not the internals that have to be replaced.
    """
    if _State.installed:
        return
    _require_internals()
    for owner, name, method in _replacements():
        _ORIGINAL[name] = getattr(owner, name)
        setattr(owner, name, method)
    _State.installed = True


def uninstall_shim() -> None:
    """Restore the interpreter's own methods (for the shim's self-test)."""
    if not _State.installed:
        return
    for owner, name, _ in _replacements():
        setattr(owner, name, _ORIGINAL[name])
    _State.installed = False


@contextlib.contextmanager
def fixed_order_dot() -> Iterator[None]:
    """Within it every tl.dot adds its products one k after the other, so that equal inputs give equal bits per row.

    About ten times slower than the default: for tests of batch invariance and of bit-equal tiles alone.
    """
    install_shim()
    before, _State.fixed_order = _State.fixed_order, True
    try:
        yield
    finally:
        _State.fixed_order = before


@contextlib.contextmanager
def checked(*, races: bool = True, extra: Sequence[torch.Tensor] = ()) -> Iterator[AccessReport]:
    """Check every active lane of every load, store and atomic of the kernels launched within, descriptors included.

    A lane must lie on an element of the tensor argument that its pointer came from: not in another argument, not in the
    gaps of a strided view. A pointer that lost its origin (read from memory, or chosen between two arguments) must lie
    in some argument, or in ``extra``. With ``races``, no two programs of a launch store the same element, no store
    has two lanes on one element, and no program loads what another one stores in the same launch, unless the two
    synchronise by atomics of sem="acq_rel" at one address: store, barrier, atomic; atomic, barrier, load.

    Args:
        races: check for conflicts between programs and between the lanes of a store.
        extra: tensors that kernels reach by addresses read from memory.

    Yields:
        the counts so far: launches, programs, and lanes loaded, stored and updated. On a GPU without the interpreter
        nothing is checked and ``active`` is False, so that the same test can run natively.

    Raises:
        AccessError: from the launch, naming the kernel's argument, the program and the first bad lane.
        RuntimeError: this triton's interpreter has not the internals that have to be replaced.
    """
    if not interpreting():
        yield AccessReport(active=False)
        return
    install_shim()
    checker = AccessChecker(races, extra)
    with checker.installed():
        yield checker.report
