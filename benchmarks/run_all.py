"""Everything, in order of importance, for the minutes that a machine is at hand: smoke, layers, merges, variants.

    python benchmarks/run_all.py --budget 20

The smoke checks results only: ragged layers, every dtype, dropout or not, any rank. It runs to its end whatever the
budget; bench_linear gets half of what is left after it, bench_merge half of the rest, bench_variants what then remains.
One results file holds all rows and is written after every point, so a run that is cut off keeps what it has.
"""

from __future__ import annotations

import sys
import time

import bench_linear
import bench_merge
import bench_variants
from layers import Point, Weights
from report import Report, Table, parser, run_points, settings

SMOKE_SHAPES = [(129, 64), (17, 33), (256, 256), (1000, 777)]
SMOKE_DTYPES = [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16"), ("float16", "float32")]
SMOKE_RANKS = [1, 16, 24, 100]
COLUMNS = [("smoke", 44), ("of", 7), ("result", 8)]


def smoke(report: Report, table: Table, arguments) -> None:
    """Rows with ``correct`` alone: every provider and every kernel variant on small, awkward layers."""
    device = arguments.device
    for number, shape in enumerate(arguments.shapes or SMOKE_SHAPES):
        for dtype, adapter_dtype in SMOKE_DTYPES:
            r = SMOKE_RANKS[number % len(SMOKE_RANKS)]
            for dropout in (0.0, 0.1):
                point = Point(*shape, r, dtype, adapter_dtype, dropout, M=129, relative=0.5)
                weights = Weights.draw(point, device)
                x, g = bench_linear.draw_inputs(point, weights)
                _add(report, table, "linear", point, bench_linear.check(point, weights, x, g))
                for title, (_, wrong, _) in bench_variants.check(point, weights, x, g).items():
                    _add(report, table, title, point, wrong)
            point = Point(*shape, r, dtype, adapter_dtype)
            found = bench_merge.check(Weights.draw(point, device))
            _add(report, table, "merge", point, {name: entry["wrong"] for name, entry in found.items()})
    report.write()


def _add(report: Report, table: Table, of: str, point: Point, wrong: dict[str, str | None]) -> None:
    for name, message in wrong.items():
        row = vars(point) | dict(benchmark="smoke", of=of, provider=name, correct=message is None)
        report.rows.append(row if message is None else row | dict(wrong=message))
    failed = {name: message for name, message in wrong.items() if message is not None}
    table.row(point.label, of, "WRONG" if failed else "ok")
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
    with report.noting_warnings():
        smoke(report, Table(COLUMNS), arguments)
    end = arguments.deadline
    for bench, share in ((bench_linear, 0.5), (bench_merge, 0.5), (bench_variants, 1.0)):
        table, now = Table(bench.COLUMNS), time.monotonic()
        arguments.deadline = now + (end - now) * share

        def measure(point: Point, bench=bench, table=table) -> None:
            bench.measure(point, report, table, arguments)

        run_points(bench.points(arguments), report, arguments.deadline, measure)
        bench.add_bars(report)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
