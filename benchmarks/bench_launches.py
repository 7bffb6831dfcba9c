"""Time each launch of an adapted layer in several configurations, and the library's GEMM: what to tune first.

    python benchmarks/bench_launches.py

Times are medians of CUDA events after an L2 flush. `GB/s` counts every operand once; `off` is the largest difference
from the configuration that the plan takes, relative to the largest result. A configuration that fails has its error.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from layers import Point
from report import Candidate, Clock, Report, Table, interleaved, parser, run, spread, summary

from fused_lora.kernels import config
from fused_lora.kernels.config import LaunchConfig, pick
from fused_lora.kernels.lora_backward import lora_backward_g, lora_backward_x
from fused_lora.kernels.lora_expand import lora_expand
from fused_lora.kernels.lora_grad import lora_linear_weight_grad
from fused_lora.kernels.lora_linear import lora_linear_forward
from fused_lora.kernels.lora_shrink import lora_shrink

COLUMNS = [("launch", 34), ("configuration", 40), ("us", 26), ("GB/s", 7), ("TFLOP/s", 8), ("off", 9), ("plan", 4)]


def alternatives(op: str, chosen: LaunchConfig) -> list[LaunchConfig]:
    """The configurations worth measuring beside the chosen one, which comes first."""
    if op == "linear":
        tiles = [(128, 256, 64, 8, 4, 8), (128, 256, 64, 8, 4, 16), (256, 128, 64, 8, 4, 8)]
        late = [replace(chosen, BLOCK_R=r, num_stages=s, late=True) for r, s in ((32, 4), (16, 4), (16, 3))]
        return list(dict.fromkeys([chosen] + [
            replace(chosen, BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, num_warps=w, num_stages=s, GROUP_M=g, tma=True)
            for m, n, k, w, s, g in tiles
        ] + late))  # fmt: skip
    names = "BLOCK_M", "BLOCK_K" if op == "shrink" else "BLOCK_N", "num_warps", "num_stages", "SPLIT_K"
    tiles = {
        "shrink": [
            (16, 128, 4, 3, 1), (32, 128, 4, 3, 1), (64, 128, 4, 3, 1), (16, 256, 4, 3, 1), (32, 128, 8, 4, 1),
            (16, 256, 4, 5, 1), (32, 256, 8, 4, 1), (64, 64, 4, 5, 1), (32, 64, 2, 5, 1),
        ],
        "expand": [(64, 128, 4, 3, 1), (64, 64, 4, 3, 1), (32, 128, 4, 3, 1), (32, 64, 2, 3, 1)],
        "backward_g": [
            (m, n, w, s, split)
            for m, n, w, s in (
                (32, 128, 4, 4), (32, 256, 8, 4), (32, 256, 4, 4), (32, 512, 8, 3), (64, 256, 8, 4), (16, 256, 4, 5)
            )
            for split in (4, 8, 16)
        ],
        "backward_x": [
            (m, n, w, s, split)
            for m, n, w, s in (
                (32, 128, 4, 4), (32, 64, 4, 4), (16, 128, 4, 4), (32, 128, 8, 4), (32, 64, 2, 4), (32, 64, 4, 3)
            )
            for split in (4, 8, 16)
        ],
    }  # fmt: skip
    if op == "weight_grad":
        names = "BLOCK_M", "BLOCK_K", "num_warps", "num_stages", "SPLIT_K"
        tiles[op] = [(64, 64, 4, 4, 4), (128, 32, 4, 3, 4), (128, 64, 4, 4, 2), (128, 64, 4, 4, 4), (128, 32, 4, 3, 8)]
    return list(dict.fromkeys([chosen] + [replace(chosen, **dict(zip(names, t, strict=True))) for t in tiles[op]]))


def launches(point: Point, device: torch.device) -> Iterator[tuple[str, LaunchConfig | None, Callable, int, int]]:
    """(name, configuration, call that returns its results, bytes, flops) of everything to time at this layer."""
    dtype, masked = getattr(torch, point.dtype), point.dropout > 0
    M, K, N, r = point.M, point.inputs, point.outputs, point.r

    def draw(*shape, dtype=dtype):
        return torch.randn(shape, device=device, dtype=dtype)

    adapter_dtype = getattr(torch, point.adapter_dtype)
    x, g, W, bias, p = draw(M, K), draw(M, N), draw(N, K), draw(N), [point.dropout]
    A, B = [draw(r, K, dtype=adapter_dtype)], [draw(N, r, dtype=adapter_dtype)]
    seeds = torch.ones(1, dtype=torch.int64, device=device) if masked else None
    e, rest = dtype.itemsize, (config.capability(device), adapter_dtype != dtype)
    S, dS = (draw(M, r, dtype=torch.float32) for _ in range(2))
    y, dx = torch.zeros_like(g), torch.zeros_like(x)
    gemm = e * (M * K + N * K + M * N), 2 * M * N * K
    B_t = [B[0].t()]
    yield "library x W^T", None, lambda: (torch.mm(x, W.t(), out=y),), *gemm
    yield "library y += x W^T", None, lambda: (y.addmm_(x, W.t()),), gemm[0] + e * M * N, gemm[1]
    yield "library dx += g W", None, lambda: (dx.addmm_(g, W),), gemm[0] + e * M * K, gemm[1]
    yield "copy of x", None, lambda: (dx.copy_(x),), 2 * e * M * K, 0

    def weight_grad(c):
        dA, dB = lora_linear_weight_grad(g, x, S, dS, [1.0], p, seeds, [r], adapter_dtype, c)
        return *dA, *dB

    shrink = pick("shrink", M, 0, K, r, dtype, masked, *rest)
    split = pick("linear", M, N, K, r, dtype, False, *rest, 1, "split")
    parts = [
        ("shrink of x", "shrink", shrink, lambda c: (lora_shrink(x, A, [1.0], p, seeds, c),), e * M * K, 2 * M * K * r),
        (
            "expand to dx", "expand", pick("expand", M, K, 0, r, dtype, masked, *rest),
            lambda c: (lora_expand(dS, A, [1.0], p, seeds, None, dtype, c),), e * M * K, 2 * M * K * r,
        ),
        (
            "weight gradients", "weight_grad", pick("weight_grad", M, N, K, r, dtype, masked, *rest), weight_grad,
            e * M * (K + N), 2 * M * r * (K + N),
        ),
        (
            "split forward with shrink", "linear", split,
            lambda c: (lora_linear_forward(x, W, bias, A, B, [1.0], p, seeds, c, None, shrink)[0],), *gemm,
        ),
    ]  # fmt: skip
    if masked:
        parts += [
            (
                "shrink of g", "shrink", pick("shrink", M, 0, N, r, dtype, False, *rest),
                lambda c: (lora_shrink(g, B_t, [1.0], [0.0], None, c),), e * M * N, 2 * M * N * r,
            ),
            (
                "expand to y", "expand", pick("expand", M, N, 0, r, dtype, False, *rest),
                lambda c: (lora_expand(S, B_t, [1.0], p, None, bias, dtype, c),), e * M * N, 2 * M * N * r,
            ),
        ]  # fmt: skip
    if r <= config.PASS_RANKS:
        chosen = pick("backward_x", M, K, 0, r, dtype, masked, *rest)
        call = lambda c: lora_backward_x(x, dS, A[0], p[0], seeds, c)  # noqa: E731
        parts.append(("backward over x", "backward_x", chosen, call, 2 * e * M * K, 4 * M * K * r))
        chosen = pick("backward_g", M, N, 0, r, dtype, False, *rest)
        call = lambda c: lora_backward_g(g, S, B[0], 1.0, c)  # noqa: E731
        parts.append(("backward over g", "backward_g", chosen, call, e * M * N, 4 * M * N * r))
    for name, op, chosen, call, moved, flops in parts:
        for c in alternatives(op, chosen):
            yield name, c, lambda c=c, call=call: call(c), moved, flops


@torch.no_grad()
def measure(point: Point, report: Report, table: Table, arguments) -> None:
    """Time every launch of a layer; those of one name take turns."""
    clock, groups = Clock(arguments.device), {}
    for name, c, *rest in launches(point, arguments.device):
        groups.setdefault(name, []).append((c, *rest))
    print(point)
    for name, members in groups.items():
        expected, rows, candidates = None, {}, []
        for i, (c, call, moved, flops) in enumerate(members):
            row = vars(point) | dict(benchmark="launches", provider=name, config=None if c is None else vars(c))
            try:
                found = [t.clone() for t in call()]
                expected = expected or found
                off = max(map(_off, found, expected))
                row |= dict(off=off, correct=off < 0.02, bytes=moved, flops=flops, chosen=i == 0)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # a configuration that cannot run here is a result, too
                row |= dict(correct=False, wrong=f"{type(error).__name__}: {str(error)[:200]}", chosen=i == 0)
            rows[str(i)] = row
            if row["correct"]:
                candidates.append(Candidate(str(i), [call]))
        times = interleaved(candidates, clock, arguments.seconds, arguments.rounds, arguments.deadline)
        for i, row in rows.items():
            _add(row, times.get(i), report, table)


def _off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.float() - expected.float()).abs().max() / expected.float().abs().max()).item()


def _add(row: dict, times: list | None, report: Report, table: Table) -> None:
    c = row["config"] and LaunchConfig(**row["config"])
    tile = "" if c is None else f"{c.BLOCK_M}x{c.BLOCK_N}x{c.BLOCK_K} r{c.BLOCK_R} w{c.num_warps} s{c.num_stages}"
    tile += "" if c is None else f" split {c.SPLIT_K} group {c.GROUP_M}" + " tma" * c.tma + " late" * c.late
    mark = "*" if row["chosen"] else ""
    if times is None:
        table.row(row["provider"], tile, "WRONG", None, None, None, mark)
        print("  " + row.get("wrong", f"off by {row.get('off')}"))
    else:
        row["us"] = summary([t[0] * 1e3 for t in times])
        us = row["us"]["median"]
        rates = f"{row['bytes'] / us / 1e3:.0f}", f"{row['flops'] / us / 1e6:.0f}"
        table.row(row["provider"], tile, spread(row["us"]), *rates, f"{row['off']:.1e}", mark)
    report.rows.append(row)


def points(arguments) -> list[Point]:
    """bf16 layers with dropout and without."""
    shapes, M = arguments.shapes or [(4096, 4096)], arguments.rows or 8192
    return [Point(*shape, 16, "bfloat16", "bfloat16", p, M=M, relative=0.5) for p in (0.1, 0.0) for shape in shapes]


def main(argv: list[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument("--rows", type=int, help="rows of x (M)")
    arguments = options.parse_args(argv)
    return run("launches", arguments, COLUMNS, points, measure)


if __name__ == "__main__":
    sys.exit(main())
