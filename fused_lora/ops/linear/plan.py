"""Which implementation runs: the one place where a kernel takes over from the eager path.

``choose`` and ``plan`` are pure functions of shape, dtype and chip, and of what ``fused-lora tune`` has measured on it:
every run of a program makes the same choice. Where nothing was measured, rules choose: one launch for few rows; else a
shrink and the library's GEMM, which adds to the LoRA term, or on sm_90 a fused GEMM where that was measured to be
faster (docs/performance.md). The input gradient is the library's GEMM at every size. A 4-bit weight is read as it is
for few rows, and dequantised first for more.

``forward`` and ``backward`` find what a call runs under one key: shapes, strides, dtypes and devices of its tensors,
scaling and dropout. What depends on these alone is done when a key is new: checks of the arguments, the plan, the
arguments of each launch.

A plan that runs for the first time in a process is tried on a small layer: the same tiles, the same classes of sizes
and strides, and so the same binary. One that does not compile, fails or differs is dropped with one warning, and the
eager path does the work from then on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch

from fused_lora import reference
from fused_lora.ops import guard
from fused_lora.ops.alike import Alike
from fused_lora.ops.checks import check_linear
from fused_lora.ops.dequant import FourBit, by_torch
from fused_lora.ops.dequant import small_case as small_weight
from fused_lora.ops.linear import eager, tuned
from fused_lora.ops.linear import launch as kernel
from fused_lora.ops.linear.launch import Plan

if TYPE_CHECKING:
    from fused_lora.kernels.config import LaunchConfig
    from fused_lora.ops.linear.packed import Packed

_KEPT = 4096  # keys, the oldest of which is forgotten for a new one
kept: dict[tuple, Any] = {}  # functions, and a Forward for a whole call of the operator
_lock = threading.Lock()
Kept = TypeVar("Kept", bound=Callable)
# contraction up to which the fused GEMM loses less to the library's than a pass over y costs, and rows from which
_LONG, _FUSED_ROWS = 4096, 2048


class Case(NamedTuple):
    """Sizes, dtypes and strides of a layer: of a call, or of the small layer that its plan is tried on."""

    rows: int
    outputs: int
    inputs: int
    device: torch.device
    dtype: torch.dtype
    adapters: tuple[tuple[int, torch.dtype, torch.dtype], ...]  # (rank, dtype of A, dtype of B)
    dropout: tuple[float, ...]
    bias: torch.dtype | None
    x_by_rows: bool = True
    weight_by_rows: bool = True
    nested: bool | None = None  # of a 4-bit weight: whether its scales are quantised, too; None for a dense one
    rounded: torch.dtype | None = None  # to which the launches round the adapters, all of them fp32


def candidates(
    op: str,
    M: int,
    r: int,
    dtype: torch.dtype,
    dropout: bool,
    upcast: bool,
    adapters: int,
    capability: int,
    whole: bool = True,
) -> tuple[str, ...]:
    """The variants of ``op`` that can run there, "eager" last; :func:`choose`, with these arguments, takes one."""
    from fused_lora.kernels.config import PASS_RANKS, variants

    if capability < 80:
        return ("eager",)  # untried chips keep to the library
    if op == "term":
        return "library", "eager"
    if op == "backward":
        passes = whole and adapters == 1 and r <= PASS_RANKS
        return ("passes", "library", "eager") if passes else ("library", "eager")
    own = variants(M, r, dtype, dropout, upcast, adapters, op == "linear_4bit")
    return (*own, "eager") if op == "linear_4bit" else (*own, "library", "eager")


def choose(
    op: str,
    M: int,
    K: int,
    r: int,
    dtype: torch.dtype,
    dropout: bool,
    upcast: bool,
    adapters: int,
    capability: int,
    whole: bool = True,
) -> str:
    """The rules' variant of ``op`` ("linear", "linear_4bit", "term" or "backward") at M rows and a contraction of K.

    capability: 10 * major + minor of an NVIDIA chip, 0 for any other. upcast: adapters wider than x. whole: all
    gradients of x and of the adapters are wanted.

    Returns:
        "linear": "recompute" (one launch), "split" (shrink, then a GEMM with the expand in it), "library" (shrink,
        expand, then the library's GEMM adds to it; of a layer with a bias the GEMM, then the expand) or "eager".
        "linear_4bit", for the few rows of :func:`reads_4_bits`: "recompute", "split" or "eager".
        "term", onto a y that is there: "library" without the GEMM, or "eager".
        "backward": "passes" (one over g, one over x, then the library's GEMM), "library" (shrink, expand, the library's
        GEMM, weight gradients) or "eager".
    """
    able = candidates(op, M, r, dtype, dropout, upcast, adapters, capability, whole)
    if "recompute" in able:
        return "recompute"
    fused = capability == 90 and dtype.itemsize == 2 and not upcast and K <= _LONG and M >= _FUSED_ROWS
    return "library" if op == "linear" and "library" in able and not fused else able[0]


def plan(
    op: str,
    M: int,
    N: int,
    K: int,
    r: int,
    dtype: torch.dtype,
    dropout: bool,
    upcast: bool,
    adapters: int,
    capability: int,
    whole: bool = True,
    rounds: bool = False,
    table: tuned.Table | None = None,
    variant: str | None = None,
) -> Plan:
    """Variant and configurations of ``op`` at M rows, N results a row and a contraction of K.

    "backward" stands for all gradients; its N are a layer's in_features. rounds: fp32 adapters are rounded to dtype.
    table: measurements of this chip, before the rules. variant: that one, whatever they say.
    """
    if variant is None:
        others = r, dtype, dropout, upcast, adapters, capability, whole
        variant = choose(op, M, K, *others)
        if table is not None and whole and adapters == 1:
            found = table.variant(M, tuned.shape(op, N, K, r, dtype, dropout, upcast, rounds))
            variant = found if found in candidates(op, M, *others) else variant
    if variant == "eager":
        return Plan("eager")
    rest = capability, upcast
    if variant == "passes":
        return Plan(
            variant,
            _pick(rounds, "backward_x", M, N, 0, r, dtype, dropout, *rest),
            _pick(rounds, "backward_g", M, K, 0, r, dtype, False, *rest),
        )
    backward = op == "backward"
    if variant == "library":
        product = _pick(rounds, "expand", M, N, 0, r, dtype, dropout and backward, *rest)
    else:
        product = _pick(rounds, op, M, N, K, r, dtype, dropout, *rest, adapters, variant)
    shrink = weight_grad = None
    if variant != "recompute":
        shrink = _pick(rounds, "shrink", M, 0, K, r, dtype, dropout and not backward, *rest)
    if backward:
        weight_grad = _pick(rounds, "weight_grad", M, K, N, r, dtype, dropout, *rest)
    return Plan(variant, product, shrink, weight_grad)


@lru_cache(maxsize=4096)
def _pick(rounds: bool, op: str, M: int, *others) -> LaunchConfig:
    from fused_lora.kernels.config import pick, rounding

    config = pick(op, M, *others)
    return rounding(op, M, config) if rounds else config


def learns(tensor: torch.Tensor) -> bool:
    """Whether autograd wants its gradient: torch records nothing for a tensor made in inference mode."""
    return tensor.requires_grad and not tensor.is_inference()


def keeps_x(adapters: int, needs: Sequence[bool]) -> bool:
    """Whether a backward with these ``needs`` (:attr:`Forward.call`) reads x, for dA or dW."""
    return any(needs[1 : adapters + 1]) or needs[-2]


class Forward:
    """What the calls of one key share: a function of their tensors that returns (y, S), and what the backward needs.

    compute: the same of all arguments and seeds, as the eager path takes them.
    grad: one of the tensors wants a gradient; frozen: neither weight nor bias does. call: what the backward knows of a
    call besides its tensors; it ends with which of x, each lora_A, each lora_B, weight and bias want a gradient. dtype:
    x's, where that of a packed weight does not tell it. rounded: as of :func:`forward`.
    """

    __slots__ = (
        "alike", "call", "compute", "dtype", "frozen", "grad", "keeps_x", "masked", "rounded", "rows", "shape", "_run",
    )  # fmt: skip

    def __init__(self, x, weight, bias, lora_A, lora_B, scaling: Sequence[float], dropout: Sequence[float], rounded):
        leading, (N, K), packed = x.shape[:-1], weight.shape, not isinstance(weight, torch.Tensor)
        self.rows: Any = None if len(leading) == 1 else (leading.numel(), K)
        self.shape, self.masked, self.alike, self.rounded = (*leading, N), any(dropout), Alike(), rounded
        self.dtype = x.dtype if packed else None
        needs = tuple([t is not None and learns(t) for t in (x, *lora_A, *lora_B, weight, bias)])
        numbers = tuple(scaling), tuple(dropout)
        self.grad, self.frozen, self.keeps_x = any(needs), not any(needs[-2:]), keeps_x(len(lora_A), needs)
        self.call = len(lora_A), *numbers, None if bias is None else bias.dtype, needs
        rows = x if self.rows is None else x.reshape(self.rows)
        self._run = (_forward_packed if packed else _forward)(rows, weight, bias, lora_A, lora_B, *numbers, rounded)
        self.compute = self._run if self.rows is None else self._reshaped

    def __call__(self, x, weight, bias, lora_A, lora_B, seeds) -> tuple[torch.Tensor, torch.Tensor]:
        """y [..., N], no view, so that it may be changed in place, and S [M, sum r_i]."""
        return self.compute(x, weight, bias, lora_A, lora_B, self.call[1], self.call[2], seeds)

    def _reshaped(self, x, *others):
        y, S = self._run(x.reshape(*self.rows), *others)
        return y.resize_(*self.shape), S


def forward(
    x: torch.Tensor,
    weight: torch.Tensor | Packed,
    bias: torch.Tensor | None,
    lora_A: Sequence[torch.Tensor],
    lora_B: Sequence[torch.Tensor],
    scaling: Sequence[float],
    dropout: Sequence[float],
    seeds: torch.Tensor | None = None,
    rounded: torch.dtype | None = None,
) -> Forward:
    """What these arguments run. Seeds that are None are still to be drawn. Over a packed weight they have been checked.

    rounded: a 16-bit dtype, x's, to which fp32 adapters are rounded, and their gradients are not; None for none.

    Raises:
        ValueError, TypeError: the arguments do not fit.
    """
    if not isinstance(weight, torch.Tensor):
        return Forward(x, weight, bias, lora_A, lora_B, scaling, dropout, rounded)
    key = layout(x, weight, *lora_A, *lora_B), len(lora_A), bias is None or _kind(bias), rounded, *scaling, *dropout
    if seeds is not None:
        key += _kind(seeds)
    found = kept.get(key)
    if found is None:
        check_linear(x, weight, bias, lora_A, lora_B, scaling, dropout, seeds)
        found = keep(key, Forward(x, weight, bias, lora_A, lora_B, scaling, dropout, rounded))
    return found


def reads_4_bits(rows: int, K: int, blocksize: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a product over a 4-bit weight of rows of K values reads its codes; else the weight is dequantised first.

    Every block of rows reads and dequantises the weight anew: about N K / 2 bytes, where a dequantisation and a dense
    product move (1/2 + 2 e) N K. In bytes 4 bits would win up to 8 blocks in bf16. There is arithmetic for each value,
    too, so the limit is one block: 64 rows, 16 in fp32, whose products use no tensor cores.
    """
    if not rows or not guard.usable(device) or dtype not in guard.DTYPES:
        return False
    from fused_lora.kernels.config import DECODE_ROWS, SCALE_GROUP, SHORT_ROWS, capability

    few = rows <= (DECODE_ROWS if dtype == torch.float32 else SHORT_ROWS)
    return few and K % SCALE_GROUP == 0 and blocksize >= SCALE_GROUP and capability(device) >= 80


def _forward_packed(x, weight: Packed, bias, lora_A, lora_B, scaling, dropout, rounded) -> Callable:
    if x.device.type != guard.DEVICE:
        return eager.lora_linear
    own, dequantised = weight.four_bit, partial(_dequantised, rounded=rounded)
    if own is None or own.dtype is not x.dtype:
        return dequantised
    key = layout(x, own.packed, *lora_A, *lora_B), weight.kind, bias is None or _kind(bias), rounded, *scaling, *dropout
    found = kept.get(key)
    if found is None:
        few = reads_4_bits(len(x), own.shape[1], own.blocksize, x.dtype, x.device)
        found = _forward(x, own, bias, lora_A, lora_B, scaling, dropout, rounded) if few else dequantised
        keep(key, found)
    return found


def _dequantised(x, weight, bias, lora_A, lora_B, scaling, dropout, seeds, rounded=None):
    dense = weight.to(x.dtype)
    run = forward(x, dense, bias, lora_A, lora_B, scaling, dropout, seeds, rounded)
    return run(x, dense, bias, lora_A, lora_B, seeds)


def _prepare_4bit(chosen, x, weight, *others) -> Callable:
    run = kernel.lora_linear(chosen, x, weight.four_bit, *others)
    return lambda x, weight, *others: run(x, weight.four_bit, *others)


def backward(
    g: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    lora_A: Sequence[torch.Tensor],
    lora_B: Sequence[torch.Tensor],
    scaling: Sequence[float],
    dropout: Sequence[float],
    needs: tuple[bool, ...],
    alike: Alike | None = None,
    rounded: torch.dtype | None = None,
) -> Callable:
    """What computes (dx, dA, dB, dW, db), with the signature of ``eager.lora_linear_backward``.

    g [M, N], x [M, K]; needs: one flag for x, each lora_A, each lora_B, weight and bias. weight: None for the gradients
    of the LoRA term alone. alike: keeps what is found for tensors at multiples of 16 bytes. rounded: as of
    :func:`forward`.
    """
    if g.device.type != guard.DEVICE or (weight is None and x.dtype != g.dtype):
        return on_rounded(eager.lora_linear_backward, rounded)
    tensors = (g, x, *lora_A, *lora_B) if weight is None else (g, x, weight, *lora_A, *lora_B)
    key = layout(*tensors), needs, rounded, *scaling, *dropout
    found = kept.get(key)
    if found is None:
        found = keep(key, _backward(g, x, weight, lora_A, lora_B, dropout, needs, rounded))
    if alike is not None and key[0][0]:
        alike.keep(found, tensors)
    return found


def forget() -> None:
    """Plan all shapes anew, after a change of ``FUSED_LORA_PLAN`` or of tuned plans; what has failed stays dropped."""
    global kept
    kept = {}  # another one: whoever remembers what it found in this one sees that
    tuned.table.cache_clear()


def layout(*tensors: torch.Tensor) -> tuple:
    """All that a launch depends on, but for where the data is; of that, whether descriptors can address it."""
    aligned = (tensors[0].data_ptr() | tensors[1].data_ptr()) % 16 == 0
    # as learns, written out: an operator asks for it in every call
    return aligned, *[
        (t.requires_grad and not t.is_inference(), t.shape, t.stride(), t.dtype, t.device) for t in tensors
    ]


def _kind(tensor: torch.Tensor) -> tuple:
    return learns(tensor), tensor.shape, tensor.dtype, tensor.device


def keep(key: tuple, found: Kept) -> Kept:
    """``found`` in ``kept`` from now on."""
    with _lock:
        if len(kept) >= _KEPT:
            kept.pop(next(iter(kept)))
        kept[key] = found
    return found


def on_rounded(run: Callable, dtype: torch.dtype | None) -> Callable:
    """``run``, an eager forward or backward of a linear layer or a term, of adapters rounded to ``dtype``."""
    if dtype is None:
        return run
    return lambda *args: run(*args[:3], as_rounded(args[3], dtype), as_rounded(args[4], dtype), *args[5:])


def as_rounded(adapters: Sequence[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """lora_A or lora_B of each adapter in ``dtype``."""
    return [t.to(dtype) for t in adapters]


def case_of(
    rows: torch.Tensor,
    N: int,
    K: int,
    bias: torch.Tensor | None,
    lora_A: Sequence[torch.Tensor],
    lora_B: Sequence[torch.Tensor],
    dropout: Sequence[float],
    weight: torch.Tensor | FourBit | None = None,
    rounded: torch.dtype | None = None,
) -> Case:
    """All that a plan depends on; ``rows`` are x, or the gradient of y in the backward."""
    four_bit = isinstance(weight, FourBit)
    return Case(
        rows.shape[0],
        N,
        K,
        rows.device,
        rows.dtype,
        tuple([(A.shape[0], A.dtype, B.dtype) for A, B in zip(lora_A, lora_B, strict=True)]),
        tuple(dropout),
        None if bias is None else bias.dtype,
        rows.stride(1) == 1,
        weight is None or four_bit or weight.stride(1) == 1,
        weight.nested is not None if four_bit else None,
        rounded,
    )


def _forward(x, weight, bias, lora_A, lora_B, scaling, dropout, rounded) -> Callable:
    N, K = weight.shape
    call = case_of(x, N, K, bias, lora_A, lora_B, dropout, weight, rounded)
    op = "linear" if call.nested is None else "linear_4bit"
    return forward_by(planned(op, call, N, K), call)[1]


def forward_by(chosen: Plan, call: Case) -> tuple[tuple, Callable]:
    """(key of its first use, the function of the tensors) of a forward by this plan, once its check has passed."""
    op, prepare, rounded = "linear", kernel.lora_linear, call.rounded
    otherwise: Callable = on_rounded(eager.lora_linear, rounded)
    if call.nested is not None:
        op, prepare, otherwise = "linear_4bit", _prepare_4bit, partial(_dequantised, rounded=rounded)
    if chosen.variant == "eager":
        return (), otherwise
    case = small_case_of(chosen, call)

    def check() -> str | None:
        x, W, *others = args = small_case(case)
        ours = kernel.lora_linear(chosen, *args)(*args)
        exact = on_rounded(reference.lora_linear, rounded)(x, by_torch(W) if isinstance(W, FourBit) else W, *others)
        return guard.compare(ours, exact, case.dtype, chosen.variant in kernel.LIBRARY)

    key = op, chosen, case
    return key, prepared(key, prepare, otherwise, check)


def _backward(g, x, weight, lora_A, lora_B, dropout, needs, rounded) -> Callable:
    call = case_of(g, g.shape[1], x.shape[1], None, lora_A, lora_B, dropout, weight, rounded)
    return backward_by(planned("backward", call, call.inputs, call.outputs, all(needs[:-2])), call)[1]


def backward_by(chosen: Plan, call: Case) -> tuple[tuple, Callable]:
    """The same of a backward."""
    rounded = call.rounded
    otherwise: Callable = on_rounded(eager.lora_linear_backward, rounded)
    if chosen.variant == "eager":
        return (), otherwise
    case = small_case_of(chosen, call)

    def check() -> str | None:
        x, W, _, A, B, scaling, p, seeds = small_case(case)
        wide = A, B
        if rounded:
            A, B = as_rounded(A, rounded), as_rounded(B, rounded)
        y, S = reference.lora_linear(x, W, None, A, B, scaling, p, seeds)
        g, needed = y.to(x.dtype), [True] * len(A)
        # with W for a term, too: those of the small layer cancel, and dS rounded to 16 bits would be most of dx
        args = g, x, W, *wide, S.float(), scaling, p, seeds, True, needed, needed, False, False
        dx, dA, dB, _, _ = kernel.lora_linear_backward(chosen, *args)(*args)
        exact_dx, exact_dA, exact_dB, _, _ = reference.lora_linear_backward(g, x, W, A, B, scaling, p, seeds)
        exact = [exact_dx, *exact_dA, *exact_dB]
        return guard.compare([dx, *dA, *dB], exact, x.dtype, library=True)

    key = "backward", chosen, case
    return key, prepared(key, kernel.lora_linear_backward, otherwise, check)


def prepared(key: tuple, prepare: Callable, eager_run: Callable, check: Callable[[], str | None]) -> Callable:
    """What ``prepare`` makes of the plan ``key[1]`` and the first arguments, where it passes ``check``."""

    def first(*args):
        found.run = prepare(key[1], *args)
        return found.run(*args)

    found = guard.guarded(key, first, eager_run, check)
    return found.__call__  # past a detour of Python's through C


def planned(op: str, call: Case, N: int, K: int, whole: bool = True, variant: str | None = None) -> Plan:
    """The :func:`plan` of a call; "eager" where no kernel runs: its device, its dtypes, no rows, no ranks."""
    dtypes = {dtype for _, *both in call.adapters for dtype in both}
    empty = not call.rows or not all([r for r, *_ in call.adapters])
    if empty or not guard.usable(call.device) or not {call.dtype, *dtypes} <= guard.DTYPES:
        return Plan("eager")
    from fused_lora.kernels.config import capability

    r, upcast, chip = max(r for r, *_ in call.adapters), dtypes != {call.dtype}, capability(call.device)
    rounds = call.rounded is not None
    shape = call.rows, N, K, r, call.dtype, any(call.dropout), upcast and not rounds, len(call.adapters), chip
    return plan(op, *shape, whole, rounds, tuned.table(call.device) if variant is None else None, variant)


def small_case(case: Case) -> tuple:
    """Arguments of a forward of this size; the same numbers every time, and no generator is touched."""

    def numbers(*shape, dtype, scale=1.0):
        n = 1
        for size in shape:
            n *= size
        line = torch.arange(n, device=case.device, dtype=torch.float32)
        return (torch.sin(line * 12.9898 + len(shape)) * scale).reshape(shape).to(dtype)

    A = [numbers(r, case.inputs, dtype=dtype, scale=0.2) for r, dtype, _ in case.adapters]
    B = [numbers(case.outputs, r, dtype=dtype, scale=0.2) for r, _, dtype in case.adapters]
    bias = None if case.bias is None else numbers(case.outputs, dtype=case.bias)
    seeds = torch.arange(7, 7 + len(A), device=case.device) if any(case.dropout) else None
    x = numbers(case.rows, case.inputs, dtype=case.dtype)
    x = x if case.x_by_rows else x.t().contiguous().t()
    if case.nested is None:
        W = numbers(case.outputs, case.inputs, dtype=case.dtype, scale=0.2)
        W = W if case.weight_by_rows else W.t().contiguous().t()
    else:
        W = small_weight((case.outputs, case.inputs), case.nested, case.dtype, case.device)
    return x, W, bias, A, B, [0.5] * len(A), list(case.dropout), seeds


def small_case_of(chosen: Plan, call: Case) -> Case:
    """The smallest layer that crosses a border of every tile of the plan and compiles to the binaries of this call."""
    product, shrink, weight_grad = chosen.product, chosen.shrink, chosen.weight_grad
    if chosen.variant == "passes":
        rows, outputs, inputs = max(product.BLOCK_M, shrink.BLOCK_M), shrink.BLOCK_N, product.BLOCK_N
    else:
        tiles = [t for t in (product, shrink) if t is not None]
        rows, columns = max(t.BLOCK_M for t in tiles), max(64, *(t.BLOCK_N for t in tiles))
        contraction = max(t.BLOCK_K * t.SPLIT_K for t in tiles)
        outputs, inputs = columns, contraction
        if weight_grad is not None:
            rows = max(rows, weight_grad.BLOCK_K)
            outputs, inputs = max(contraction, weight_grad.BLOCK_M), max(columns, weight_grad.BLOCK_M)
    inputs = _small(call.inputs, inputs, (16, 8) if call.nested is None else (64,))  # of 4 bits a multiple of 64
    return call._replace(rows=_small(call.rows, rows), outputs=_small(call.outputs, outputs), inputs=inputs)


def _small(size: int, block: int, classes: tuple[int, ...] = (16, 8)) -> int:
    """Beyond one tile, and compiled as ``size`` is: Triton specialises 1 and multiples of 16, 16-bit rows of a multiple
    of 8 have descriptors."""
    return 1 if size == 1 else block + next((n for n in classes if size % n == 0), 13)
