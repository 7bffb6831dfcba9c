"""Everything, in order of importance, for the minutes that a machine is at hand: smoke, bench_linear, bench_merge.

    python benchmarks/run_all.py --budget 20

The smoke checks results only: ragged layers, every dtype, dropout or not, any rank. It runs to its end whatever the
budget; the layers get two thirds of what is left after it, merging the rest. One results file holds all rows and is
written after every point, so a run that is cut off keeps what it has.
"""

from __future__ import annotations

import sys
import time

import bench_linear
import bench_merge
import torch
from layers import Point, Weights
from report import Report, Table, parser, run_points, settings

SMOKE_SHAPES = [(1, 17), (129, 64), (256, 256), (1000, 777)]
SMOKE_DTYPES = [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16"), ("float16", "float32")]
SMOKE_RANKS = [1, 16, 24, 100]
COLUMNS = [("smoke", 40), ("of", 7), ("result", 8)]


def smoke(report: Report, table: Table, arguments) -> None:
    """Rows with ``correct`` alone: every provider of both benchmarks on small, awkward layers."""
    device = arguments.device
    for number, shape in enumerate(arguments.shapes or SMOKE_SHAPES):
        for dtype, adapter_dtype in SMOKE_DTYPES:
            r = SMOKE_RANKS[number % len(SMOKE_RANKS)]
            for dropout in (0.0, 0.1):
                point = Point(*shape, r, dtype, adapter_dtype, dropout, M=129, relative=0.5)
                weights = Weights.draw(point, device)
                x = torch.randn(point.M, point.inputs, device=device).to(weights.weight.dtype)
                g = torch.randn(point.M, point.outputs, device=device).to(x.dtype)
                _add(report, table, "linear", point, bench_linear.check(point, weights, x, g))
            point = Point(*shape, r, dtype, adapter_dtype)
            found = bench_merge.check(Weights.draw(point, device))
            _add(report, table, "merge", point, {name: entry["wrong"] for name, entry in found.items()})
    report.write()


def _add(report: Report, table: Table, of: str, point: Point, wrong: dict[str, str | None]) -> None:
    for name, message in wrong.items():
        row = vars(point) | dict(benchmark="smoke", of=of, provider=name, correct=message is None)
        report.rows.append(row if message is None else row | dict(wrong=message))
    failed = {name: message for name, message in wrong.items() if message is not None}
    table.row(f"{point} +{point.adapter_dtype}", of, "WRONG" if failed else "ok")
    for name, message in failed.items():
        print(f"  {name}: {message}")


def main(argv: list[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument("--rows", type=int, help="rows of x (M) in the layers")
    arguments = options.parse_args(argv)
    if arguments.budget is None and arguments.device.type == "cpu":
        arguments.budget = 4.0
    recorded = settings(arguments)
    report = Report("all", arguments.device, arguments.out, recorded, arguments.commit)
    report.heading()
    torch.manual_seed(0)
    smoke(report, Table(COLUMNS), arguments)
    end, now = arguments.deadline, time.monotonic()
    for bench, arguments.deadline in ((bench_linear, now + (end - now) * 2 / 3), (bench_merge, end)):
        table = Table(bench.COLUMNS)

        def measure(point: Point, bench=bench, table=table) -> None:
            bench.measure(point, report, table, arguments)

        run_points(bench.points(arguments), report, arguments.deadline, measure)
        bench.add_bars(report)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
