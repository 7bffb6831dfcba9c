"""One adapted layer over each kind of quantised weight: training, decoding, merge and unmerge.

    python benchmarks/bench_quantised.py [--bases "nf4,torchao fp8"]

bare         the quantised layer itself: the floor
dense        nn.Linear over the dequantised weight
PEFT         PEFT's layer over the bare one
dequantised  NF4 and FP4: the weight dequantised whole, then the dense layer's kernels; what runs for more rows
fused_lora   LoraLinear

``layers.QUANTISED`` has the kinds. Training is what ``bench_linear.py`` measures: forward and backward with dropout,
and the bytes kept between them. Decoding is in eval() without gradients, issued one by one ("eager") and in a CUDA
graph ("graph"); ``of packed`` is the time over that of reading the packed weight once, at the speed of a device copy.
``not back`` is the share of the packed bytes that merge and unmerge have changed.

All providers take turns in one run. Outputs are checked against float64 of the dequantised weight first: where a call
rounds nothing but its sums, the RMS error may be 1.1 times that of ``dequantised`` (else PEFT) plus an ulp; libraries'
own calls must be plausible. A call that quantises its input is compared with PEFT's. A wrong one gets no time.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable

import bench_linear
import torch
from bench_linear import LLAMA_3_8B
from layers import QUANTISED, SCALING, Point, Weights, no_worse, plausible
from report import Candidate, Clock, Report, Table, begin, parser, replayed, run_points, spread, summaries, times_of
from torch import nn

from fused_lora.bases.bitsandbytes_4bit import Weight
from fused_lora.bases.torchao import parts
from fused_lora.functional import lora_linear

ROWS = (1, 4, 16, 32, 64, 128)
ROUNDS_INPUT = ("int8", "fp8 blocks")  # in eval(): their error against float64 is that of the input
COLUMNS = [("layer", 48), ("provider", 12), ("mode", 8), ("ms", 26), ("xbare", 6), ("xPEFT", 6), ("of packed", 9)]
MERGE_COLUMNS = [("layer", 48), ("provider", 12), ("merge ms", 26), ("unmerge ms", 26), ("not back", 9)]


def providers(weights: Weights) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """All over one weight, in eval()."""
    base, dtype = weights.base_layer(copy=False), weights.weight.dtype
    layers: dict[str, nn.Module] = {"bare": base, "dense": weights.dense()}
    layers |= {"PEFT": weights.peft(base, 0.0), "fused_lora": weights.ours(base, 0.0)}
    calls: dict[str, Callable] = {name: layer.eval() for name, layer in layers.items()}
    if weights.base in ("nf4", "fp4"):
        base.support_avx512bf16_for_cpu = False  # or a first call rounds the scales, on some CPUs
        packed, A, B = Weight(base, dtype), weights.lora_A, weights.lora_B

        def dequantised(x: torch.Tensor) -> torch.Tensor:
            return lora_linear(x, packed.to(dtype), base.bias, [A], [B], [SCALING])

        calls["dequantised"] = dequantised
    return calls


def check(weights: Weights, calls: dict[str, Callable], x: torch.Tensor) -> dict[str, str | None]:
    """{provider: None or what is wrong}."""
    exact = {"bare": nn.functional.linear(x.double(), weights.weight.double(), weights.bias.double())}
    adapted = exact["bare"] + SCALING * (x.double() @ weights.lora_A.double().T) @ weights.lora_B.double().T
    exact["dense"], found = exact["bare"], {name: call(x) for name, call in calls.items()}
    if weights.base in ROUNDS_INPUT:
        far = {name: (y.double() - exact.get(name, adapted)).norm() / adapted.norm() for name, y in found.items()}
        limit = max(0.05, 1.1 * far["PEFT"])
        return {name: None if error <= limit else f"y: relative error {error:.2g}" for name, error in far.items()}
    wrong = {name: plausible(y, exact.get(name, adapted), x.shape[1], "y") for name, y in found.items()}
    wrong["fused_lora"] = no_worse(found["fused_lora"], found.get("dequantised", found["PEFT"]), adapted, "y")
    return wrong


@torch.no_grad()
def measure_decoding(point: Point, report: Report, table: Table, arguments) -> None:
    """Check, time and add the rows of one layer."""
    device = arguments.device
    weights = Weights.draw(point, device)
    generator = torch.Generator(device).manual_seed(2)
    x = torch.randn(point.M, point.inputs, generator=generator, device=device).to(weights.weight.dtype)
    calls = providers(weights)
    wrong = check(weights, calls, x)
    runs = {(name, "eager"): lambda call=call: call(x) for name, call in calls.items() if wrong[name] is None}
    packed = list(parts(weights.quantised.weight.data).values())
    with contextlib.ExitStack() as stack:
        if device.type == "cuda":
            runs |= {(name, "graph"): replayed(run, stack) for (name, _), run in runs.items()}
        targets = [torch.empty_like(part) for part in packed]
        runs["copy", "eager"] = lambda: [to.copy_(part) for to, part in zip(targets, packed, strict=True)]
        ms = times_of(runs, Clock(device), arguments)
    floor = ms.pop(("copy", "eager"))["median"] / 2  # a copy reads and writes
    _add_wrong(point, report, table, "decode_quantised", wrong)
    for (name, mode), found in ms.items():
        over = {other: ms.get((other, mode)) for other in ("bare", "PEFT")}
        over = {other: time and round(found["median"] / time["median"], 4) for other, time in over.items()}
        row = vars(point) | dict(benchmark="decode_quantised", provider=name, mode=mode, correct=True, ms=found)
        row |= dict(to_bare=over["bare"], to_peft=over["PEFT"], of_packed=round(found["median"] / floor, 2))
        report.rows.append(row)
        numbers = [value and f"{value:.2f}" for value in over.values()]
        table.row(str(point), name, mode, spread(found), *numbers, f"{row['of_packed']:.1f}")


def _add_wrong(point, report, table, benchmark: str, wrong: dict[str, str | None]) -> None:
    for name, message in wrong.items():
        if message is not None:
            report.add_wrong(table, vars(point) | dict(benchmark=benchmark, provider=name), message, point, name)


def measure_merge(point: Point, report: Report, table: Table, arguments) -> None:
    """Merge and unmerge of PEFT's layer and ours, each over a copy; what neither does is listed as not run."""
    weights, candidates, changed = Weights.draw(point, arguments.device), [], {}
    for name, make in (("PEFT", weights.peft), ("fused_lora", weights.ours)):
        layer = make(weights.base_layer(copy=True), 0.0).eval()
        before = _packed_bytes(layer)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what so few bits lose
                layer.merge()
                layer.unmerge()
        except (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError) as error:
            report.skipped.append(f"{point}, merge by {name}: {type(error).__name__}: {error}".splitlines()[0])
            continue
        after = _packed_bytes(layer)
        changed[name] = (before != after).double().mean().item() if before.shape == after.shape else 1.0
        candidates.append(Candidate(name, [layer.merge, layer.unmerge]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = summaries(candidates, Clock(arguments.device), arguments)
    if changed.get("fused_lora"):
        _add_wrong(point, report, table, "merge_quantised", {"fused_lora": "bytes that did not come back"})
        del found["fused_lora"]
    for name, (merge, unmerge) in found.items():
        row = vars(point) | dict(benchmark="merge_quantised", provider=name, correct=True, changed=changed[name])
        report.rows.append(row | dict(merge_ms=merge, unmerge_ms=unmerge))
        table.row(str(point), name, spread(merge), spread(unmerge), f"{changed[name]:.2%}")


def _packed_bytes(layer: nn.Module) -> torch.Tensor:
    weight = layer.base_layer.weight.data
    return torch.cat([part.contiguous().view(torch.uint8).view(-1) for part in parts(weight).values()])


def points(arguments) -> tuple[list[Point], list[Point], list[Point]]:
    """Of training, decoding and merging: NF4 in all shapes, the other kinds in the first; 16 bits on a GPU."""
    on_cpu = arguments.device.type == "cpu"
    dtype = "float32" if on_cpu else "bfloat16"
    common = dict(dtype=dtype, adapter_dtype=dtype, relative=0.5)
    shapes = arguments.shapes or ([(2048, 2048), (4096, 4096)] if on_cpu else LLAMA_3_8B)
    layers = [(shape, base) for base in arguments.bases for shape in (shapes if base == "nf4" else shapes[:1])]
    called = [(shape, base) for shape, base in layers if not (on_cpu and base == "fp8 blocks")]
    training = [arguments.rows] if arguments.rows else [512] if on_cpu else [64, 512, 2048, 8192]
    decoding = [arguments.rows] if arguments.rows else ROWS[:5:2] if on_cpu else ROWS
    return (
        [Point(*shape, M=M, dropout=0.1, base=base, **common) for shape, base in called for M in training],
        [Point(*shape, M=M, base=base, **common) for shape, base in called for M in decoding],
        [Point(*shape, base=base, **common) for shape, base in layers],
    )


def add_bars(report: Report) -> None:
    """The goals of training over NF4 on a CPU."""
    rows = [row for row in report.rows if row["benchmark"] == "linear" and row["provider"] == "fused_lora"]
    for row in rows:
        if row["correct"] and row["base"] == "nf4" and report.device.type == "cpu":
            name = f"nf4 {row['inputs']}x{row['outputs']} fwd+bwd"
            report.bar(f"{name}: times PEFT's speed", row["both_speedup"], 1.15, True)
            report.bar(f"{name}: times the bare layer's time", row["both_to_bare"], 1.10, False)


def _names(text: str) -> list[str]:
    names = text.split(",")
    if not set(names) <= set(QUANTISED):
        raise ValueError(f"expected some of {', '.join(QUANTISED)}, got {text!r}")
    return names


def main(argv: list[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument("--rows", type=int, help="rows of x (M)")
    options.add_argument("--bases", type=_names, default=list(QUANTISED), help=f"some of {', '.join(QUANTISED)}")
    arguments = options.parse_args(argv)
    report = begin("quantised", arguments)
    training, decoding, merging = points(arguments)
    if "fp8 blocks" in arguments.bases and arguments.device.type == "cpu":
        report.skipped.append("fp8 blocks, training and decoding: the layer's call needs a GPU")

    def run(found: list[Point], columns, measure) -> None:
        table = Table(columns)
        run_points(found, report, arguments.deadline, lambda point: measure(point, report, table, arguments))

    run(training, bench_linear.COLUMNS, bench_linear.measure)
    run(decoding, COLUMNS, measure_decoding)
    run(merging, MERGE_COLUMNS, measure_merge)
    add_bars(report)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
