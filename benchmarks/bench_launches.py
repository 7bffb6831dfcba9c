"""Each launch of an adapted layer alone, in several configurations, beside the library's GEMM: what to tune first.

    python benchmarks/bench_launches.py

Times are medians of CUDA events after an L2 flush. `GB/s` counts every operand once; `off` is the largest difference
from the configuration that the plan takes, relative to the largest result. A configuration that fails has its error.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from layers import Point, Weights
from report import Candidate, Clock, Report, Table, interleaved, parser, run_points, settings, spread, summary

from fused_lora.kernels import config
from fused_lora.kernels.config import LaunchConfig, pick
from fused_lora.kernels.lora_expand import lora_expand
from fused_lora.kernels.lora_grad import lora_linear_weight_grad
from fused_lora.kernels.lora_linear import lora_linear_forward, lora_linear_input_grad
from fused_lora.kernels.lora_shrink import lora_shrink

COLUMNS = [("launch", 34), ("configuration", 40), ("us", 26), ("GB/s", 7), ("TFLOP/s", 8), ("off", 9), ("plan", 4)]


def alternatives(op: str, chosen: LaunchConfig) -> list[LaunchConfig]:
    """The configurations worth measuring beside the chosen one, which comes first."""
    found = [chosen]
    if op == "shrink":
        tiles = [(16, 128, 4, 3), (32, 128, 4, 3), (64, 128, 4, 3), (64, 128, 8, 3), (128, 128, 8, 3)]
        tiles += [(16, 128, 4, 5), (16, 256, 4, 3), (32, 64, 4, 5), (32, 128, 8, 4), (16, 64, 2, 4)]
        found += [replace(chosen, BLOCK_M=m, BLOCK_K=k, num_warps=w, num_stages=s) for m, k, w, s in tiles]
    elif op == "expand":
        tiles = [(64, 64, 4), (32, 128, 4), (128, 128, 8), (32, 256, 4), (64, 256, 8), (16, 256, 4)]
        found += [replace(chosen, BLOCK_M=m, BLOCK_N=n, num_warps=w) for m, n, w in tiles]
    elif op == "weight_grad":
        tiles = [(64, 64, 4, 3), (64, 32, 4, 5), (128, 32, 4, 3), (128, 64, 8, 3), (64, 64, 4, 4), (128, 64, 4, 4)]
        for m, k, w, s in tiles:
            for split in (chosen.SPLIT_K, chosen.SPLIT_K * 2, max(chosen.SPLIT_K // 2, 1)):
                found.append(replace(chosen, BLOCK_M=m, BLOCK_K=k, num_warps=w, num_stages=s, SPLIT_K=split))
    elif chosen.variant == "split":
        tiles = [(128, 256, 64, 8, 4, 8), (128, 256, 64, 8, 3, 16), (128, 128, 64, 8, 3, 8), (128, 128, 64, 8, 4, 8)]
        tiles += [(128, 128, 64, 4, 4, 8), (256, 128, 64, 8, 3, 8), (128, 256, 32, 8, 5, 8), (128, 256, 64, 8, 3, 4)]
        for m, n, k, w, s, g in tiles:
            found.append(
                replace(chosen, BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, num_warps=w, num_stages=s, GROUP_M=g, tma=True)
            )
    else:
        found += [replace(chosen, num_stages=4), replace(chosen, BLOCK_M=64), replace(chosen, GROUP_M=16)]
    return list(dict.fromkeys(found))


def launches(point: Point, device: torch.device) -> Iterator[tuple[str, LaunchConfig | None, Callable, int, int]]:
    """(name, configuration, call that returns its results, bytes, flops) of everything to time at this layer."""
    dtype, masked = getattr(torch, point.dtype), point.dropout > 0
    weights = Weights.draw(point, device)
    M, K, N, r = point.M, point.inputs, point.outputs, point.r
    x, g = (torch.randn(M, n, device=device, dtype=dtype) for n in (K, N))
    W, A, B, p = weights.weight, [weights.lora_A], [weights.lora_B], [point.dropout]
    seeds = torch.tensor([1], device=device) if masked else None
    e, rest = dtype.itemsize, (dtype, masked, config.capability(device), weights.lora_A.dtype != dtype)
    S, dS = (torch.randn(M, r, device=device) for _ in range(2))
    y, dx = torch.empty_like(g), torch.empty_like(x)
    gemm = e * (M * K + N * K + M * N), 2 * M * N * K
    # the floors: the library's GEMM alone, and accumulating
    yield "library x W^T", None, lambda: (torch.mm(x, W.t(), out=y),), *gemm
    yield "library y += x W^T", None, lambda: (y.addmm_(x, W.t()),), gemm[0] + e * M * N, gemm[1]
    yield "library g W", None, lambda: (torch.mm(g, W, out=dx),), *gemm
    yield "library dx += g W", None, lambda: (dx.addmm_(g, W),), gemm[0] + e * M * K, gemm[1]
    yield "copy of x", None, lambda: (dx.copy_(x),), 2 * e * M * K, 0
    if masked:
        yield "library dropout of x", None, lambda: (torch.nn.functional.dropout(x, 0.1),), 2 * e * M * K, 0

    def each(name, op, chosen, call, moved, flops):
        for c in alternatives(op, chosen):
            yield name, c, lambda c=c: call(c), moved, flops

    chosen = pick("shrink", M, 0, K, r, *rest)
    yield from each("shrink of x", "shrink", chosen, lambda c: (lora_shrink(x, A, [1.0], p, seeds, c),), e * M * K, 2 * M * K * r)
    if masked:
        chosen = pick("shrink", M, 0, N, r, dtype, False, *rest[2:])
        B_t = [B[0].t()]
        yield from each("shrink of g, no mask", "shrink", chosen, lambda c: (lora_shrink(g, B_t, [1.0], [0.0], None, c),), e * M * N, 2 * M * N * r)
    chosen = pick("expand", M, K, 0, r, *rest)
    yield from each("expand to dx", "expand", chosen, lambda c: (lora_expand(dS, A, [1.0], p, seeds, None, dtype, c),), e * M * K, 2 * M * K * r)
    if masked:
        B_t = [B[0].t()]
        yield from each("expand to y, no mask", "expand", chosen, lambda c: (lora_expand(S, B_t, [1.0], p, None, weights.bias, dtype, c),), e * M * N, 2 * M * N * r)
    chosen = pick("weight_grad", M, N, K, r, *rest)

    def weight_grad(c):
        dA, dB = lora_linear_weight_grad(g, x, S, dS, [1.0], p, seeds, [r], weights.lora_A.dtype, c)
        return *dA, *dB

    yield from each("weight gradients", "weight_grad", chosen, weight_grad, e * M * (K + N), 2 * M * r * (K + N))
    shrink = pick("shrink", M, 0, K, r, *rest)
    chosen = pick("linear", M, N, K, r, *rest, 1, "split")
    yield from each("split forward, with shrink", "linear", chosen, lambda c: (lora_linear_forward(x, W, weights.bias, A, B, [1.0], p, seeds, c, None, shrink)[0],), *gemm)
    for variant in ("split", "publish"):
        chosen = pick("input_grad", M, K, N, r, *rest, 1, variant)
        yield from each(f"{variant} input gradient", "input_grad", chosen, lambda c: (lora_linear_input_grad(g, W, A, B, [1.0], p, seeds, c)[0],), *gemm)


def _off(found, expected) -> float:
    return max(((a.float() - b.float()).abs().max() / b.float().abs().max()).item() for a, b in zip(found, expected, strict=True))


@torch.no_grad()
def measure(point: Point, report: Report, table: Table, arguments) -> None:
    """Time every launch of a layer; those of one name take turns."""
    clock, groups = Clock(arguments.device), {}
    for name, c, call, moved, flops in launches(point, arguments.device):
        groups.setdefault(name, []).append((c, call, moved, flops))
    print(point)
    for name, members in groups.items():
        expected, candidates, kept = None, [], {}
        for i, (c, call, moved, flops) in enumerate(members):
            row = vars(point) | dict(benchmark="launches", provider=name, config=None if c is None else vars(c))
            row["chosen"] = i == 0
            try:
                found = [t.clone() for t in call()]
                expected = expected or found
                row["off"] = _off(found, expected)
                row["correct"] = row["off"] < 0.02
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # a configuration that cannot run here is a result, too
                row |= dict(correct=False, wrong=f"{type(error).__name__}: {str(error)[:200]}")
            kept[str(i)] = row, c, moved, flops
            if row["correct"]:
                candidates.append(Candidate(str(i), [call]))
        times = interleaved(candidates, clock, arguments.seconds, arguments.rounds, arguments.deadline)
        for i, (row, c, moved, flops) in kept.items():
            text = "" if c is None else f"{c.BLOCK_M}x{c.BLOCK_N}x{c.BLOCK_K} r{c.BLOCK_R} w{c.num_warps} s{c.num_stages} split{c.SPLIT_K} g{c.GROUP_M}{' tma' * c.tma}"
            mark = "*" if row["chosen"] else ""
            if i in times:
                found = summary([t[0] * 1e3 for t in times[i]])
                row["us"] = found
                rates = f"{moved / found['median'] / 1e3:.0f}", f"{flops / found['median'] / 1e6:.0f}"
                table.row(name, text, spread(found), *rates, f"{row['off']:.1e}", mark)
            else:
                table.row(name, text, "WRONG " + row.get("wrong", f"off by {row.get('off')}")[:60], None, None, None, mark)
            report.rows.append(row)


def points(arguments) -> list[Point]:
    shapes = arguments.shapes or [(4096, 4096)]
    return [Point(*shape, 16, "bfloat16", "bfloat16", p, M=arguments.rows or 8192, relative=0.5) for p in (0.1, 0.0) for shape in shapes]


def main(argv: list[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument("--rows", type=int, help="rows of x (M)")
    arguments = options.parse_args(argv)
    recorded = settings(arguments)
    report = Report("launches", arguments.device, arguments.out, recorded, arguments.commit)
    report.heading()
    table = Table(COLUMNS)
    run_points(points(arguments), report, arguments.deadline, lambda point: measure(point, report, table, arguments))
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
