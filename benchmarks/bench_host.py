"""Host time of one adapted layer and of a small model: what Python takes where the maths takes almost nothing.

    python benchmarks/bench_host.py           on this machine's GPU, or the eager path of a CPU
    python benchmarks/bench_host.py --stub    the kernel route without a GPU: Triton's own launch path, a libcuda that
                                              does nothing

bare          the frozen nn.Linear
PEFT          lora.Linear, eager
accelerated   the same layer under fused_lora.accelerate
fused_lora    LoraLinear

Microseconds of the calling thread, the least of many samples, providers taking turns: eval is a forward without
gradients, mixed batch one whose rows name their adapters, train a forward and torch.autograd.grad of x, A and B,
autocast the same over a bf16 layer with fp32 adapters, as trainers run it. x is [1, rows, features], of a mixed batch
[rows, 1, features]. A sample is so many forwards and then as many backwards, as a model's layers call them.

On a CPU two more rows a provider are a whole model, a random Llama of 4 layers of 256 features with adapters of rank 8
on all linears: decode is one token after 16, train model forward and backward of 64 tokens.

With --stub PEFT computes 4 rows of 64 features in fp32, for real, and ours plans 136 rows of 16, which take the
launches of training; only its library products are real.
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
from report import ROOT, Report, Table, parser
from report import run as run_table
from torch import nn

import fused_lora

COLUMNS = [("step", 22), ("provider", 12), ("forward us", 11), ("xPEFT", 6), ("fwd+bwd us", 11), ("xPEFT", 6)]
OURS = ("accelerated", "fused_lora")
NAMES = ("default", "second", "third")


@dataclass(frozen=True)
class Step:
    """One row group; ``M`` rows of ``features`` in and out, ``dropout`` None for eval."""

    M: int
    features: int
    r: int
    dtype: str
    adapters: int
    dropout: float | None
    calls = 20  # in a sample
    mixed: bool = False  # each row under the next adapter, the last under none
    autocast: bool = False  # to bf16, of a bf16 layer with fp32 adapters

    def candidates(self, device: torch.device, stub: bool) -> dict[str, tuple]:
        """(layer, x, gradient of the output, leaves) of each provider."""
        given = {}
        for name, layer in layers(self, device).items():
            step = self
            if stub and name not in OURS:
                step = replace(self, M=4, features=64)
                layer = layers(step, device)[name]
            torch.manual_seed(2)
            dtype = getattr(torch, step.dtype)
            x, g = (torch.randn(1, step.M, step.features, device=device, dtype=dtype) for _ in range(2))
            x.requires_grad_(step.dropout is not None)
            leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
            if step.mixed and name != "bare":
                x, g = x.transpose(0, 1), g.transpose(0, 1)
                rows = [(*NAMES, "__base__")[i % 4] for i in range(step.M)]
                layer = functools.partial(layer, adapter_names=rows)
            given[name] = layer, x, g, leaves
        return given

    def __str__(self) -> str:
        mode = "mixed batch" if self.mixed else "eval" if self.dropout is None else f"train p={self.dropout:g}"
        mode = f"autocast p={self.dropout:g}" if self.autocast else mode
        return f"{mode}, {self.adapters} adapter{'s' if self.adapters > 1 else ''}"


@dataclass(frozen=True)
class ModelStep:
    """A whole small model: a decode step of ``M`` sequences, or with a ``dropout`` a training step of M * 16 tokens."""

    M: int
    dropout: float | None = None
    features: int = 256
    r: int = 8
    dtype: str = "float32"
    adapters: int = 1
    mixed: bool = False
    autocast = False
    calls = 1

    def candidates(self, device: torch.device, stub: bool) -> dict[str, tuple]:
        """(a step, its input, gradient of its output, leaves) of each provider."""
        return {name: self._candidate(model.to(device), device) for name, model in self._models().items()}

    def _models(self) -> dict[str, nn.Module]:
        from transformers import LlamaConfig, LlamaForCausalLM

        def base() -> nn.Module:
            torch.manual_seed(0)
            sizes = dict(hidden_size=self.features, intermediate_size=2 * self.features, num_attention_heads=4)
            return LlamaForCausalLM(LlamaConfig(vocab_size=512, num_hidden_layers=4, **sizes)).requires_grad_(False)

        fields = dict(r=self.r, lora_alpha=2 * self.r, lora_dropout=self.dropout or 0.0, target_modules="all-linear")
        found = {"PEFT": get_peft_model(base(), LoraConfig(**fields))}
        found["accelerated"] = fused_lora.accelerate(get_peft_model(base(), LoraConfig(**fields)))
        found["fused_lora"] = fused_lora.inject(base(), fused_lora.LoraConfig(**fields))
        for model in found.values():
            torch.manual_seed(1)
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    nn.init.normal_(parameter, std=0.05)
            model.train(self.dropout is not None)
        return found

    def _candidate(self, model: nn.Module, device: torch.device) -> tuple:
        torch.manual_seed(2)
        tokens = torch.randint(0, 512, (self.M, 17), device=device)
        leaves = [p for p in model.parameters() if p.requires_grad]
        if self.dropout is not None:
            return lambda x: model(input_ids=x, labels=x).loss, tokens[:, :16], None, leaves
        with torch.no_grad():
            cache = model(input_ids=tokens[:, :16]).past_key_values

        def decode(x: torch.Tensor) -> torch.Tensor:
            logits = model(input_ids=x, past_key_values=cache).logits
            cache.crop(-1)
            return logits

        return decode, tokens[:, 16:], None, leaves

    def __str__(self) -> str:
        return f"decode, batch {self.M}" if self.dropout is None else f"train model p={self.dropout:g}"


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
        model = get_peft_model(holder, config, autocast_adapter_dtype=step.autocast)
        for name in names[1:]:
            model.add_adapter(name, config, autocast_adapter_dtype=step.autocast)
        model.base_model.set_adapter(list(names))
        return model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a model without a config: it has none
        eager, accelerated = peft(), peft()
        fused_lora.accelerate(accelerated)
    options = dict(r=r, lora_alpha=2 * r, lora_dropout=dropout, autocast_adapter_dtype=step.autocast)
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


def sample(layer: Callable, x: torch.Tensor, g: torch.Tensor | None, leaves: list, backward: bool, clock, step) -> list:
    """[us of a forward, us of a backward], the mean of a step's calls: all forwards, then all backwards."""
    calls = step.calls
    for _ in range(min(calls, 3)):  # the caches hold another provider's code
        with torch.autocast(x.device.type, torch.bfloat16, enabled=step.autocast):
            y = layer(x)
        if backward:
            torch.autograd.grad(y, leaves, g)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=step.autocast):
        t0, outputs = clock(), []
        for _ in range(calls):
            outputs.append(layer(x))
            if step.autocast:
                torch.clear_autocast_cache()  # each layer of a model casts adapters of its own
        t1 = clock()
    for y in outputs if backward else ():
        torch.autograd.grad(y, leaves, g)
    return [t / calls * 1e6 for t in (t1 - t0, clock() - t1)]


def measure(step: Step | ModelStep, report: Report, table: Table, arguments) -> None:
    """Check that the outputs agree, time all providers and add their rows."""
    device, stub = arguments.device, arguments.stub
    given = step.candidates(device, stub)
    clock = time.perf_counter if device.type == "cuda" else time.thread_time
    backward, outputs = step.dropout is not None, {}
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=step.autocast)
    with torch.set_grad_enabled(backward), autocast:
        for name, (layer, x, *_) in given.items():
            outputs[name] = layer(x).detach()
    exact = outputs["PEFT"].double()
    best: dict[str, list[float]] = {name: [float("inf")] * 2 for name in given}
    start, rounds = time.monotonic(), -3  # the first warm up
    with torch.set_grad_enabled(backward):
        while rounds < arguments.rounds or (time.monotonic() - start < arguments.seconds):
            for name, candidate in given.items():
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                times = sample(*candidate, backward, clock, step)
                if rounds >= 0:
                    best[name] = [min(pair) for pair in zip(best[name], times, strict=True)]
            rounds += 1
    for name, (forward, back) in best.items():
        both, peft = forward + back, best["PEFT"]
        ratios = [round(forward / peft[0], 4), round(both / sum(peft), 4) if backward else None]
        # a mask is drawn anew in every call, and the stub computes nothing
        drawn = stub or (step.dropout and name != "bare")
        same = drawn or name == "bare" or (outputs[name].double() - exact).norm() <= 2**-6 * exact.norm()
        row = vars(step) | dict(
            benchmark="host", autocast=step.autocast, step=str(step), provider=name, correct=bool(same), stub=stub
        )
        row |= dict(forward_us=round(forward, 2), both_us=round(both, 2) if backward else None)
        report.rows.append(row | dict(forward_to_peft=ratios[0], both_to_peft=ratios[1]))
        shown = [None if value is None else f"{value:.2f}" for value in ratios]
        table.row(str(step), name, f"{forward:.1f}", shown[0], f"{both:.1f}" if backward else None, shown[1])


def add_bars(report: Report) -> None:
    """Kernel route: forward at most 0.6, forward+backward at most 0.8 of PEFT's host time; CPU: 1.0 and 1.2.

    Under autocast both at most 1.0 and 1.2 of it.
    """
    kernels = report.settings["stub"] or report.device.type == "cuda"
    for row in report.rows:
        if row["provider"] not in OURS or row["adapters"] > 1 or (kernels and row["dropout"] is None):
            continue
        where = f"host time, {row['provider']}, {row['step']}"
        if row["autocast"]:
            most = 1.0 if kernels else 1.2
            report.bar(f"{where}, forward+backward: times PEFT's", row["both_to_peft"], most, False)
        elif kernels:
            report.bar(f"{where}, forward: times PEFT's", row["forward_to_peft"], 0.6, False)
            report.bar(f"{where}, forward+backward: times PEFT's", row["both_to_peft"], 0.8, False)
        elif row["dropout"] is None:
            report.bar(f"{where}: times PEFT's", row["forward_to_peft"], 1.0, False)
        else:
            report.bar(f"{where}, forward+backward: times PEFT's", row["both_to_peft"], 1.2, False)


def steps(arguments) -> list[Step | ModelStep]:
    if arguments.stub:
        size = dict(M=136, features=16, r=8, dtype="float32")
    elif arguments.device.type == "cuda":
        size = dict(M=600, features=64, r=8, dtype="bfloat16")
    else:
        size = dict(M=4, features=64, r=8, dtype="float32")
    found = [Step(**size, adapters=n, dropout=p) for n in (1, 3) for p in (None, 0.0, 0.1)]
    sixteen = size | dict(dtype="bfloat16")
    found += [Step(**sixteen, adapters=1, dropout=p, autocast=True) for p in (0.0, 0.1)]
    # no kernel takes part in a mixed batch of a layer: the store's has a benchmark of its own
    if not arguments.stub:
        found.append(Step(**size, adapters=3, dropout=None, mixed=True))
    if arguments.device.type == "cpu" and not arguments.stub:
        found += [ModelStep(1), ModelStep(4), ModelStep(4, 0.0), ModelStep(4, 0.1)]
    return found


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


def run(name: str, argv: list[str] | None, script: str, description: str, columns, points, measure, add_bars) -> int:
    """A benchmark of host time; with --stub ``script`` runs in a process of its own, whose libcuda does nothing."""
    options = parser(description)
    options.add_argument("--stub", action="store_true", help="the kernel route without a GPU")
    arguments = options.parse_args(argv)
    sys.path.append(str(ROOT / "tools"))
    if arguments.stub and "FUSED_LORA_STUB" not in os.environ:
        from stub_driver import environment

        with tempfile.TemporaryDirectory() as folder:
            variables = environment(ROOT / "tests" / "kernels" / "stub_cuda.c", Path(folder))
            variables |= dict(FUSED_LORA_STUB="1", FUSED_LORA_CHECK="0")
            command = [sys.executable, script, *(sys.argv[1:] if argv is None else argv)]
            return subprocess.run(command, env=variables).returncode
    torch.set_num_threads(1)
    if arguments.stub:
        arguments.device = torch.device("cpu")
        use_stub()
    return run_table(f"{name}-stub" if arguments.stub else name, arguments, columns, points, measure, add_bars)


def main(argv: list[str] | None = None) -> int:
    return run("host", argv, __file__, __doc__, COLUMNS, steps, measure, add_bars)


if __name__ == "__main__":
    sys.exit(main())
