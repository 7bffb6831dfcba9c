"""Host time of one adapted layer: the time that Python takes, at sizes where the maths takes almost nothing.

    python benchmarks/bench_host.py           on this machine's GPU, or the eager path of a CPU
    python benchmarks/bench_host.py --stub    the kernel route without a GPU: Triton's own launch path, a libcuda that
                                              does nothing

bare          the frozen nn.Linear
PEFT          lora.Linear, eager
accelerated   the same layer under fused_lora.accelerate
fused_lora    LoraLinear

Microseconds of the calling thread, the least of many samples, providers taking turns: eval is a forward without
gradients, mixed batch one whose rows name their adapters, train a forward and torch.autograd.grad of x, A and B. With
--stub PEFT computes 4 rows of 64 features in fp32, for real, and ours plans 136 rows of 16, which take the launches of
training; only its library products are real.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from report import ROOT, Report, Table, parser, run_points, settings
from torch import nn

import fused_lora

COLUMNS = [("step", 22), ("provider", 12), ("forward us", 11), ("xPEFT", 6), ("fwd+bwd us", 11), ("xPEFT", 6)]
OURS = ("accelerated", "fused_lora")
NAMES = ("default", "second", "third")
CALLS = 20  # in a sample


@dataclass(frozen=True)
class Step:
    """One row group; ``M`` rows of ``features`` in and out, ``dropout`` None for eval."""

    M: int
    features: int
    r: int
    dtype: str
    adapters: int
    dropout: float | None
    mixed: bool = False  # each row under the next adapter, the last under none

    def __str__(self) -> str:
        mode = "mixed batch" if self.mixed else "eval" if self.dropout is None else f"train p={self.dropout:g}"
        return f"{mode}, {self.adapters} adapter{'s' if self.adapters > 1 else ''}"


def layers(step: Step, device: torch.device) -> dict[str, nn.Module]:
    """A layer of each provider, with its adapters active."""
    r, dropout, dtype = step.r, step.dropout or 0.0, getattr(torch, step.dtype)
    names = NAMES[: step.adapters]

    def base() -> nn.Linear:
        torch.manual_seed(0)
        return nn.Linear(step.features, step.features, device=device, dtype=dtype).requires_grad_(False)

    def peft() -> nn.Module:
        holder = nn.Module()
        holder.layer = base()
        config = LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=dropout, target_modules=["layer"])
        model = get_peft_model(holder, config, autocast_adapter_dtype=False)
        for name in names[1:]:
            model.add_adapter(name, config, autocast_adapter_dtype=False)
        model.base_model.set_adapter(list(names))
        return model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a model without a config: it has none
        eager, accelerated = peft(), peft()
        fused_lora.accelerate(accelerated)
    options = dict(r=r, lora_alpha=2 * r, lora_dropout=dropout, autocast_adapter_dtype=False)
    ours = fused_lora.LoraLinear(base(), **options)
    for name in names[1:]:
        ours.add_adapter(name, **options)
    ours.set_adapter(names)
    found = {"bare": base(), "PEFT": eager.base_model.model.layer, "accelerated": accelerated.base_model.model.layer}
    found["fused_lora"] = ours
    source = found["PEFT"]
    for layer in found.values():
        layer.train(step.dropout is not None)
        for part in ("lora_A", "lora_B") if hasattr(layer, "lora_A") else ():
            for name in names:
                torch.manual_seed(1)
                with torch.no_grad():
                    getattr(source, part)[name].weight.normal_()
                    getattr(layer, part)[name].weight.copy_(getattr(source, part)[name].weight)
    return found


def sample(layer: Callable, x: torch.Tensor, g: torch.Tensor, leaves: list, backward: bool, clock: Callable) -> list:
    """[us of a forward, us of a backward], the mean of CALLS."""
    forward_time = backward_time = 0.0
    for _ in range(CALLS):
        t0 = clock()
        y = layer(x)
        t1 = clock()
        if backward:
            torch.autograd.grad(y, leaves, g)
        t2 = clock()
        forward_time += t1 - t0
        backward_time += t2 - t1
    return [t / CALLS * 1e6 for t in (forward_time, backward_time)]


def measure(step: Step, report: Report, table: Table, arguments) -> None:
    """Check that the outputs agree, time all providers and add their rows."""
    device, stub = arguments.device, arguments.stub
    found = layers(step, device)
    clock = time.perf_counter if device.type == "cuda" else time.thread_time
    backward, given, outputs = step.dropout is not None, {}, {}
    for name, layer in found.items():
        small = stub and name not in OURS
        M, features = (4, 64) if small else (step.M, step.features)
        if small:
            layer = found[name] = layers(replace(step, M=M, features=features), device)[name]
        torch.manual_seed(2)
        x, g = (torch.randn(M, features, device=device, dtype=getattr(torch, step.dtype)) for _ in range(2))
        x.requires_grad_(backward)
        leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
        given[name] = x, g, leaves
        if step.mixed and name != "bare":
            rows = [(*NAMES, "__base__")[i % 4] for i in range(M)]
            layer = found[name] = functools.partial(layer, adapter_names=rows)
        with torch.set_grad_enabled(backward):
            outputs[name] = layer(x).detach()
    exact = outputs["PEFT"].double()
    best: dict[str, list[float]] = {name: [float("inf")] * 2 for name in found}
    start, rounds = time.monotonic(), -3  # the first warm up
    with torch.set_grad_enabled(backward):
        while rounds < arguments.rounds or (time.monotonic() - start < arguments.seconds):
            for name, layer in found.items():
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                times = sample(layer, *given[name], backward, clock)
                if rounds >= 0:
                    best[name] = [min(pair) for pair in zip(best[name], times, strict=True)]
            rounds += 1
    for name, (forward, back) in best.items():
        both, peft = forward + back, best["PEFT"]
        ratios = [round(forward / peft[0], 4), round(both / sum(peft), 4) if backward else None]
        # a mask is drawn anew in every call, and the stub computes nothing
        drawn = stub or (step.dropout and name != "bare")
        same = drawn or name == "bare" or (outputs[name].double() - exact).norm() <= 2**-6 * exact.norm()
        row = vars(step) | dict(benchmark="host", provider=name, correct=bool(same), stub=stub)
        row |= dict(forward_us=round(forward, 2), both_us=round(both, 2) if backward else None)
        report.rows.append(row | dict(forward_to_peft=ratios[0], both_to_peft=ratios[1]))
        shown = [None if value is None else f"{value:.2f}" for value in ratios]
        table.row(str(step), name, f"{forward:.1f}", shown[0], f"{both:.1f}" if backward else None, shown[1])


def add_bars(report: Report, stub: bool) -> None:
    """Kernel route: forward at most 0.6, forward+backward at most 0.8 of PEFT's host time; CPU: 1.0 and 1.2."""
    kernels = stub or report.device.type == "cuda"
    for row in report.rows:
        if row["provider"] != "fused_lora" or row["adapters"] > 1 or (kernels and row["dropout"] is None):
            continue
        where = "eval" if row["dropout"] is None else f"train p={row['dropout']:g}"
        if kernels:
            report.bar(f"host time, {where}, forward: times PEFT's", row["forward_to_peft"], 0.6, False)
            report.bar(f"host time, {where}, forward+backward: times PEFT's", row["both_to_peft"], 0.8, False)
        elif row["dropout"] is None:
            report.bar(f"host time, {where}: times PEFT's", row["forward_to_peft"], 1.0, False)
        else:
            report.bar(f"host time, {where}, forward+backward: times PEFT's", row["both_to_peft"], 1.2, False)


def steps(arguments) -> list[Step]:
    if arguments.stub:
        size = dict(M=136, features=16, r=8, dtype="float32")
    elif arguments.device.type == "cuda":
        size = dict(M=600, features=64, r=8, dtype="bfloat16")
    else:
        size = dict(M=4, features=64, r=8, dtype="float32")
    found = [Step(**size, adapters=n, dropout=p) for n in (1, 3) for p in (None, 0.0, 0.1)]
    # no kernel takes part in a mixed batch of a layer: the store's has a benchmark of its own
    return found if arguments.stub else [*found, Step(**size, adapters=3, dropout=None, mixed=True)]


def use_stub() -> None:
    """CPU tensors take the kernel route; a kernel that fails ends the benchmark."""
    from stub_driver import use_stub_driver

    use_stub_driver()
    from fused_lora.kernels import config, lora_backward, lora_grad, lora_linear, lora_shrink
    from fused_lora.ops import guard

    def failed(key: tuple, wrong: str) -> None:
        raise RuntimeError(f"{key}: {wrong}")

    config.processors = lambda device: 132
    zeros = torch.zeros(1024, dtype=torch.int32)  # as on a GPU, where the launches of a stream share theirs
    for module in (lora_backward, lora_grad, lora_linear, lora_shrink):
        module.counters = lambda count, device: zeros
    guard.DEVICE, guard._drop = "cpu", failed


def main(argv: list[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument("--stub", action="store_true", help="the kernel route without a GPU")
    arguments = options.parse_args(argv)
    sys.path.append(str(ROOT / "tools"))
    if arguments.stub and "FUSED_LORA_STUB" not in os.environ:
        from stub_driver import environment

        with tempfile.TemporaryDirectory() as folder:
            variables = environment(ROOT / "tests" / "kernels" / "stub_cuda.c", Path(folder))
            variables |= dict(FUSED_LORA_STUB="1", FUSED_LORA_CHECK="0")
            command = [sys.executable, __file__, *(sys.argv[1:] if argv is None else argv)]
            return subprocess.run(command, env=variables).returncode
    recorded = settings(arguments)
    torch.set_num_threads(1)
    if arguments.stub:
        arguments.device = torch.device("cpu")
        use_stub()
    name = "host-stub" if arguments.stub else "host"
    report = Report(name, arguments.device, arguments.out, recorded, arguments.commit)
    report.heading()
    table = Table(COLUMNS)
    run_points(steps(arguments), report, arguments.deadline, lambda step: measure(step, report, table, arguments))
    add_bars(report, arguments.stub)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
