"""Host time of a decode step under many adapters, at sizes where the maths takes next to nothing.

    python benchmarks/bench_store_host.py           on this machine's GPU, or the eager path of a CPU
    python benchmarks/bench_store_host.py --stub    the kernel route without a GPU: Triton's own launch path, a libcuda
                                                    that does nothing

base          the model alone
PEFT          its mixed batch: ``adapter_names`` of a forward
fused_lora    ``AdapterStore.batch`` around the same forward, entered at every step as a server does

A step is a forward of decoder layers (q, k, v, o, gate, up and down of 64 features, no attention) on rows of one token,
row i under adapter i mod D, each on all linears. Microseconds of the calling thread, the least of many samples,
providers taking turns; "linear" is what a step takes beyond the base, and calls of Python functions likewise, a linear.
With --stub PEFT and the base model compute for real, and ours launches what computes nothing.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from bench_host import run
from peft import LoraConfig, get_peft_model
from report import Report, Table
from torch import nn

import fused_lora

NAMES = ("q", "k", "v", "o", "gate", "up", "down")
FEATURES, LAYERS, RANK = 64, 4, 8
COLUMNS = [("decode step", 20), ("provider", 12), ("us", 9), ("xPEFT", 6), ("us a linear", 11), ("calls a linear", 14)]
BAR = 0.5  # of PEFT's host time
CALLS = 3  # in a sample


@dataclass(frozen=True)
class Point:
    """M sequences of one token under D adapters."""

    M: int
    D: int

    def __str__(self) -> str:
        return f"M={self.M} D={self.D} r={RANK}"


class Layer(nn.Module):
    """The linears of a decoder layer, called as a decoder calls them."""

    def __init__(self):
        super().__init__()
        for name in NAMES:
            self.add_module(name, nn.Linear(FEATURES, FEATURES, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(x)
        x = x + self.o(self.q(h) * self.k(h) + self.v(h))
        h = torch.tanh(x)
        return x + self.down(self.gate(h) * self.up(h))


class Decoder(nn.Module):
    """Decoder layers one after the other."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def steps(point: Point, device: torch.device) -> dict[str, Callable[[], torch.Tensor]]:
    """A step by each provider, on the same weights, adapters and input."""

    def decoder() -> nn.Module:
        torch.manual_seed(0)
        return Decoder().to(device, torch.bfloat16 if device.type == "cuda" else torch.float32).eval()

    plain, served, x = decoder(), decoder(), torch.randn(point.M, 1, FEATURES)
    x = x.to(next(plain.parameters()))
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(NAMES))
    names = [f"a{i % point.D}" for i in range(point.M)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a model without a config, and of several adapters on it
        mixed = get_peft_model(decoder(), config, "a0", autocast_adapter_dtype=False)
        for i in range(1, point.D):
            mixed.add_adapter(f"a{i}", config, autocast_adapter_dtype=False)
    store = fused_lora.AdapterStore(served)
    for i in range(point.D):
        layers = {}
        for path, layer in mixed.base_model.model.named_modules():
            if hasattr(layer, "lora_A"):
                A, B = layer.lora_A[f"a{i}"].weight, layer.lora_B[f"a{i}"].weight
                nn.init.normal_(B, std=0.1)
                layers[path] = A, B, layer.scaling[f"a{i}"]
        store.load(f"a{i}", layers)
    mixed.eval()

    def ours() -> torch.Tensor:
        with store.batch(names):
            return served(x)

    return {"base": lambda: plain(x), "PEFT": lambda: mixed(x, adapter_names=names), "fused_lora": ours}


def calls_of(step: Callable[[], torch.Tensor]) -> int:
    """Calls of Python functions in a step."""
    count = 0

    def event(frame, kind: str, argument) -> None:
        nonlocal count
        count += kind == "call"

    sys.setprofile(event)
    try:
        step()
    finally:
        sys.setprofile(None)
    return count


@torch.no_grad()
def measure(point: Point, report: Report, table: Table, arguments) -> None:
    """Check that the outputs agree, time all providers and add their rows."""
    device, found = arguments.device, steps(point, arguments.device)
    clock = time.perf_counter if device.type == "cuda" else time.thread_time
    for step in found.values():  # the first ones learn which layers share an input, and compile
        step(), step(), step()
    outputs = {name: step().double() for name, step in found.items()}
    changed = (outputs["PEFT"] - outputs["base"]).norm()
    limit = 0.1 if device.type == "cuda" else 1e-4
    same = arguments.stub or bool((outputs["fused_lora"] - outputs["PEFT"]).norm() <= limit * changed)
    calls = {name: calls_of(step) for name, step in found.items()}
    best = dict.fromkeys(found, float("inf"))
    start, rounds = time.monotonic(), 0
    while rounds < arguments.rounds or time.monotonic() - start < arguments.seconds:
        for name, step in found.items():
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            before = clock()
            for _ in range(CALLS):
                step()
            best[name] = min(best[name], (clock() - before) / CALLS * 1e6)
        rounds += 1
    linears = LAYERS * len(NAMES)
    for name, us in best.items():
        row = vars(point) | dict(benchmark="store-host", provider=name, stub=arguments.stub, us=round(us, 2))
        row |= dict(correct=same or name != "fused_lora", to_peft=round(us / best["PEFT"], 4))
        row |= dict(us_a_linear=round((us - best["base"]) / linears, 2))
        row |= dict(calls_a_linear=round((calls[name] - calls["base"]) / linears, 1))
        report.rows.append(row)
        beyond = (None, None) if name == "base" else (row["us_a_linear"], row["calls_a_linear"])
        table.row(point, name, f"{us:.0f}", f"{row['to_peft']:.2f}", *beyond)


def add_bars(report: Report) -> None:
    """A step under 8 adapters takes at most half of PEFT's host time."""
    for row in report.rows:
        if row["provider"] == "fused_lora" and row["D"] == 8:
            report.bar(f"host time, M={row['M']} D=8: times PEFT's", row["to_peft"], BAR, False)


def main(argv: list[str] | None = None) -> int:
    def points(arguments) -> list[Point]:
        return [Point(M, D) for M, D in ((8, 8), (32, 8), (8, 1))]

    return run("store-host", argv, __file__, __doc__, COLUMNS, points, measure, add_bars)


if __name__ == "__main__":
    sys.exit(main())
