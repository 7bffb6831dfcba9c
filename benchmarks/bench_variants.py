"""Compare the variants of one adapted layer: each kernel variant, the eager path, and the bare base GEMM.

    python benchmarks/bench_variants.py

Forward (y and S) and backward (dx, dA, dB) apart, below autograd; `chosen` marks what the plan takes at this shape.
Checked against float64 with one mask (RMS error at most 1.1 times PEFT's plus an ulp); a wrong one gets no time. Where
no kernel can run only the eager path is measured.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import bench_linear
import torch
from layers import SCALING, Point, Weights, no_worse
from report import Clock, Report, Table, parser, run, spread, times_of

import fused_lora
from fused_lora.ops import guard
from fused_lora.ops.linear import eager as cpu
from fused_lora.ops.linear import launch as kernel
from fused_lora.ops.linear import plan, tuned
from fused_lora.reference import keep_scale

COLUMNS = [("layer", 44), ("op", 8), ("variant", 10), ("ms", 26), ("xbare", 7), ("chosen", 7)]
OPS = {"forward": "linear", "backward": "backward"}
_RESULTS = {"forward": ("y",), "backward": ("dx", "dA", "dB")}


def variants(op: str, point: Point, device: torch.device) -> tuple[list[str], str]:
    """The variants that can run here, and the one that the plan chooses."""
    if not guard.usable(device):
        return ["eager"], "eager"
    from fused_lora.kernels.config import capability

    dtype, masked, upcast = getattr(torch, point.dtype), point.dropout > 0, point.adapter_dtype != point.dtype
    others = point.r, dtype, masked, upcast, 1, capability(device)
    size = (point.outputs, point.inputs) if op == "linear" else (point.inputs, point.outputs)
    chosen = plan.plan(op, point.M, *size, *others, table=tuned.table(device)).variant
    return [*plan.candidates(op, point.M, *others)], chosen


def runs(op: str, names: list[str], weights: Weights, x, g, dropout: float, seeds) -> dict[str, Callable]:
    """{variant: call that returns the results in the order of _RESULTS}."""
    W, A, B, s, p = weights.weight, [weights.lora_A], [weights.lora_B], [SCALING], [dropout]
    if op == "linear":
        arguments = x, W, weights.bias, A, B, s, p, seeds

        def forward(run: Callable) -> Callable:
            return lambda: [run(*arguments)[0]]

        return {n: forward(_prepared(kernel.lora_linear, cpu.lora_linear, n, arguments)) for n in names}
    S = cpu.lora_linear(x, W, weights.bias, A, B, s, p, seeds)[1]

    arguments = g, x, W, A, B, S, s, p, seeds, True, [True], [True], False, False

    def backward(run: Callable) -> Callable:
        def call() -> list[torch.Tensor]:
            dx, dA, dB, _, _ = run(*arguments)
            return [dx, *dA, *dB]

        return call

    pair = kernel.lora_linear_backward, cpu.lora_linear_backward
    return {n: backward(_prepared(*pair, n, arguments)) for n in names}


def _prepared(prepare: Callable, eager: Callable, variant: str, arguments: tuple) -> Callable:
    return eager if variant == "eager" else prepare(plan.Plan(variant), *arguments)


def _wrong(call: Callable, names: tuple[str, ...], peft: dict, exact: dict) -> str | None:
    try:
        found = dict(zip(names, call(), strict=True))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a variant that cannot run here is a result, too
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return next((t for t in (no_worse(found[n], peft[n], exact[n], n) for n in names) if t is not None), None)


@torch.no_grad()
def check(point: Point, weights: Weights, x: torch.Tensor, g: torch.Tensor) -> dict[str, tuple[dict, dict, str]]:
    """{"forward" and "backward": ({variant: call}, {variant: None or what is wrong}, the plan's variant)}."""
    device, seeds, mask = x.device, None, None
    if point.dropout:
        seeds = torch.tensor([1], device=device)
        mask = fused_lora.dropout_mask(1, x.shape, point.dropout, device) * keep_scale(point.dropout)
    with torch.enable_grad():
        exact = bench_linear.exact_results(weights, x, g, mask, bare=False)
        peft = bench_linear.results(bench_linear.providers(weights, point.dropout, mask)["PEFT"], x, g)
    found = {}
    for title, op in OPS.items():
        names, chosen = variants(op, point, device)
        calls = runs(op, names, weights, x, g, point.dropout, seeds)
        wrong = {name: _wrong(call, _RESULTS[title], peft, exact) for name, call in calls.items()}
        found[title] = calls, wrong, chosen
    return found


@torch.no_grad()
def measure(point: Point, report: Report, table: Table, arguments) -> None:
    """Check, time and add the rows of one layer."""
    device = arguments.device
    weights = Weights.draw(point, device)
    x, g = bench_linear.draw_inputs(point, weights)
    bare = {
        "forward": lambda: torch.nn.functional.linear(x, weights.weight, weights.bias),
        "backward": lambda: g @ weights.weight,
    }
    for title, (calls, wrong, chosen) in check(point, weights, x, g).items():
        right = {"bare": bare[title]} | {name: call for name, call in calls.items() if wrong[name] is None}
        ms = times_of(right, Clock(device), arguments)
        _add_rows(point, title, chosen, report, table, {"bare": None, **wrong}, ms)


def _add_rows(point, title, chosen, report, table, wrong, ms) -> None:
    label = point.label
    base = ms["bare"]["median"]
    for name, message in wrong.items():
        row = vars(point) | dict(benchmark="variants", op=title, provider=name, correct=True, chosen=name == chosen)
        mark = "*" if row["chosen"] else ""
        if message is not None:
            report.add_wrong(table, row, message, label, title, name)
            continue
        found = ms[name]
        report.rows.append(row | dict(ms=found, to_bare=round(found["median"] / base, 4)))
        table.row(label, title, name, spread(found), f"{found['median'] / base:.3f}", mark)


def add_bars(report: Report) -> None:
    """The plan's choice is within 3 % of the fastest variant, at every layer and in both directions."""
    rows = [row for row in report.rows if row["benchmark"] == "variants" and row["correct"]]
    worst = 0.0
    for row in rows:
        if row["chosen"]:
            keys = ("inputs", "outputs", "r", "dtype", "adapter_dtype", "dropout", "M", "op")
            same = [r for r in rows if r["provider"] != "bare" and all(r[k] == row[k] for k in keys)]
            worst = max(worst, row["ms"]["median"] / min(r["ms"]["median"] for r in same))
    if worst:
        report.bar("variants: time of the chosen one over the fastest, most over the layers", worst, 1.03, False)


def points(arguments) -> list[Point]:
    """Decode, prefill and training rows; shapes as in bench_linear."""
    on_cpu = arguments.device.type == "cpu"
    dtype = "float32" if on_cpu else "bfloat16"
    shapes = arguments.shapes or (bench_linear.SHAPES[:2] if on_cpu else bench_linear.LLAMA_3_8B)
    rows = [16, 512] if on_cpu else [8192, 16, 512, 1, 2048, 64, 128]
    rows = [arguments.rows] if getattr(arguments, "rows", None) else rows
    return [
        Point(*shape, dtype=dtype, adapter_dtype=dtype, dropout=p, M=M, relative=0.5)
        for M in rows
        for p in (0.1, 0.0)
        if p == 0.0 or M >= 512  # few rows draw no mask
        for shape in shapes
    ]


def main(argv: list[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument("--rows", type=int, help="rows of x (M)")
    arguments = options.parse_args(argv)
    return run("variants", arguments, COLUMNS, points, measure, add_bars)


if __name__ == "__main__":
    sys.exit(main())
