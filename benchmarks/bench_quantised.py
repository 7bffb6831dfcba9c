"""Inference of few rows over a 4-bit layer with one adapter, as in decoding: who reads 4 bits, and what it is worth.

    python benchmarks/bench_quantised.py

bare         bitsandbytes' Linear4bit (NF4, double quantised): the floor
dense        nn.Linear over the dequantised weight
PEFT         lora.Linear4bit over the bare layer
dequantised  the weight dequantised whole, then the dense layer's kernels: what runs for more rows
fused_lora   LoraLinear, which reads the 4 bits inside its K loop on a GPU

All are in eval() without gradients and take turns in one run, issued one by one ("eager") and in a CUDA graph
("graph"). Outputs are checked against float64 of the dequantised weight first: the RMS error may be 1.1 times that of
``dequantised`` plus an ulp, and bitsandbytes' own kernels, which round otherwise, must be plausible. A wrong one gets
no time. `of 4 bits` is the time over that of reading the packed weight once at the bandwidth of a device copy.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from dataclasses import replace

import torch
from bench_linear import LLAMA_3_8B
from layers import SCALING, Point, Weights, no_worse, plausible
from report import Candidate, Clock, Report, Table, begin, interleaved, parser, run_points, spread, summary
from torch import nn

from fused_lora.bases.bitsandbytes_4bit import Weight
from fused_lora.functional import lora_linear
from fused_lora.testing.graphs import capture

ROWS = (1, 4, 16, 32, 64, 128)
COLUMNS = [("layer", 40), ("provider", 12), ("mode", 6), ("ms", 26), ("xbare", 6), ("xPEFT", 6), ("of 4 bits", 9)]


def providers(weights: Weights) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """All over one weight, in eval()."""
    base, dtype = weights.base_layer(copy=False), weights.weight.dtype
    base.support_avx512bf16_for_cpu = False  # or a first call rounds the scales, on some CPUs
    dense = replace(weights, quantised=None).base_layer(copy=False)
    packed = Weight(base, dtype)
    A, B = weights.lora_A, weights.lora_B

    def dequantised(x: torch.Tensor) -> torch.Tensor:
        return lora_linear(x, packed.to(dtype), base.bias, [A], [B], [SCALING])

    layers: dict[str, nn.Module] = {"bare": base, "dense": dense}
    layers |= {"PEFT": weights.peft(base, 0.0), "fused_lora": weights.ours(base, 0.0)}
    return {name: layer.eval() for name, layer in layers.items()} | {"dequantised": dequantised}


def check(weights: Weights, calls: dict[str, Callable], x: torch.Tensor) -> dict[str, str | None]:
    """{provider: None or what is wrong}."""
    exact = {"bare": nn.functional.linear(x.double(), weights.weight.double(), weights.bias.double())}
    adapted = exact["bare"] + SCALING * (x.double() @ weights.lora_A.double().T) @ weights.lora_B.double().T
    exact["dense"], found = exact["bare"], {name: call(x) for name, call in calls.items()}
    wrong = {name: plausible(y, exact.get(name, adapted), x.shape[1], "y") for name, y in found.items()}
    wrong["fused_lora"] = no_worse(found["fused_lora"], found["dequantised"], adapted, "y")
    return wrong


@torch.no_grad()
def measure(point: Point, report: Report, table: Table, arguments) -> None:
    """Check, time and add the rows of one layer."""
    device = arguments.device
    weights = Weights.draw(point, device)
    generator = torch.Generator(device).manual_seed(2)
    x = torch.randn(point.M, point.inputs, generator=generator, device=device).to(weights.weight.dtype)
    calls = providers(weights)
    wrong = check(weights, calls, x)
    runs = {(name, "eager"): lambda call=call: call(x) for name, call in calls.items() if wrong[name] is None}
    packed = weights.quantised.weight.data
    with contextlib.ExitStack() as stack:
        if device.type == "cuda":
            for name in [name for name, _ in runs]:
                graph, _ = capture(lambda call=calls[name]: call(x))
                stack.callback(graph.reset)
                runs[name, "graph"] = graph.replay
        target = torch.empty_like(packed)
        runs["copy", "eager"] = lambda: target.copy_(packed)
        candidates = [Candidate(key, [run]) for key, run in runs.items()]
        times = interleaved(candidates, Clock(device), arguments.seconds, arguments.rounds, arguments.deadline)
    ms = {key: summary([t[0] for t in rounds]) for key, rounds in times.items()}
    floor = ms.pop(("copy", "eager"))["median"] / 2  # a copy reads and writes
    for name, message in wrong.items():
        if message is not None:
            report.rows.append(vars(point) | dict(benchmark="decode_4bit", provider=name, correct=False, wrong=message))
            table.row(str(point), name, "", "WRONG", None, None, None)
            print(f"  {message}")
    for (name, mode), found in ms.items():
        over = {other: ms.get((other, mode)) for other in ("bare", "PEFT")}
        over = {other: time and round(found["median"] / time["median"], 4) for other, time in over.items()}
        row = vars(point) | dict(benchmark="decode_4bit", provider=name, mode=mode, correct=True, ms=found)
        row |= dict(to_bare=over["bare"], to_peft=over["PEFT"], of_4_bits=round(found["median"] / floor, 2))
        report.rows.append(row)
        numbers = [value and f"{value:.2f}" for value in over.values()]
        table.row(str(point), name, mode, spread(found), *numbers, f"{row['of_4_bits']:.1f}")


def points(arguments) -> list[Point]:
    """Every number of rows over the layers of Llama-3-8B, or the shapes and rows given; 16 bits on a GPU."""
    dtype = "float32" if arguments.device.type == "cpu" else "bfloat16"
    rows = [arguments.rows] if arguments.rows else ROWS
    common = dict(dtype=dtype, adapter_dtype=dtype, relative=0.5, base="nf4")
    return [Point(*shape, M=M, **common) for shape in arguments.shapes or LLAMA_3_8B for M in rows]


def main(argv: list[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument("--rows", type=int, help="rows of x (M)")
    arguments = options.parse_args(argv)
    report = begin("decode_4bit", arguments)
    table = Table(COLUMNS)
    run_points(points(arguments), report, arguments.deadline, lambda point: measure(point, report, table, arguments))
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
