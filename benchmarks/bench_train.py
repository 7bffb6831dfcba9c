"""Training steps of a Llama with LoRA on all linear layers: PEFT, the same model accelerated, and the base alone.

    python benchmarks/bench_train.py [--model 8b|1b|tiny] [--batch B] [--tokens T] [--layers L]

A step is forward, loss, backward and AdamW of the adapters (rank 16, dropout 0.1) on random tokens; the weights are
random, too. Its time is that of several steps between two waits for the device, so it is the longer of host and device.

base           the frozen model alone, without an optimiser: its backward stops at the embeddings
PEFT           adapters of the base's dtype
PEFT default   over a 16-bit base: fp32 adapters under torch.autocast
fused_lora     the PEFT model of the line above after fused_lora.accelerate

PEFT and ours take turns over one model. Losses and gradients are compared in eval(), where no mask is drawn, before a
time counts. `peak` is the most that the process had allocated on the GPU in a step, weights included.
"""

from __future__ import annotations

import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import LoraConfig, get_peft_model
from report import Report, Table, parser, run, spread, summary
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import fused_lora

SIZES = {
    "8b": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
               num_key_value_heads=8, vocab_size=128256),
    "1b": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
               num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=True),
    "tiny": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, vocab_size=97),
}  # fmt: skip
STEPS = 3  # between two waits for the device
COLUMNS = [("model", 40), ("provider", 20), ("ms a step", 24), ("tokens/s", 9), ("xbase", 6), ("speed/PEFT", 10)]
COLUMNS += [("peak GiB", 9)]


@dataclass(frozen=True)
class Point:
    """One model: ``batch`` sequences of ``tokens`` tokens, adapters of ``adapter_dtype`` or the base's dtype."""

    model: str
    layers: int
    batch: int
    tokens: int
    dtype: str
    default: bool  # fp32 adapters under autocast

    def __str__(self) -> str:
        kind = "fp32 adapters, autocast" if self.default else self.dtype
        return f"Llama {self.model}, {self.layers} layers, {self.batch}x{self.tokens}, {kind}"


def build(point: Point, device: torch.device) -> LlamaForCausalLM:
    """The frozen base with random weights."""
    sizes = SIZES[point.model] | dict(num_hidden_layers=point.layers)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, point.dtype))
    try:
        with device:
            model = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=max(64, point.tokens)))
    finally:
        torch.set_default_dtype(before)
    model.config.use_cache = False
    return model.requires_grad_(False)


def adapt(model: nn.Module, default: bool) -> nn.Module:
    """PEFT's model, whose adapters are not zero."""
    config = LoraConfig(r=16, lora_alpha=16, lora_dropout=0.1, target_modules="all-linear", init_lora_weights=False)
    found = get_peft_model(model, config, autocast_adapter_dtype=default)
    for name, parameter in found.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(0.05)
    return found


def stepper(model: nn.Module, tokens: torch.Tensor, autocast: torch.dtype | None) -> Callable[[], torch.Tensor]:
    """A training step; without adapters a forward and a backward."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=tokens.is_cuda) if trained else None

    def step() -> torch.Tensor:
        with torch.autocast(tokens.device.type, autocast or torch.bfloat16, enabled=autocast is not None):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        if optimizer:
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()

    return step


def gradients(model: nn.Module, tokens: torch.Tensor, autocast: torch.dtype | None) -> list[torch.Tensor]:
    """[loss, all gradients in one vector] in eval()."""
    model.eval()
    with torch.autocast(tokens.device.type, autocast or torch.bfloat16, enabled=autocast is not None):
        loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    found = torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    model.train()
    return [loss.detach().float(), found]


def wrong(ours: list[torch.Tensor], theirs: list[torch.Tensor], dtype: torch.dtype) -> str | None:
    """None, or what differs by more than the rounding of many layers explains; a wrong factor or mask differs more."""
    off = abs(ours[0] - theirs[0]).item() / abs(theirs[0]).item()
    if not off <= 8 * torch.finfo(dtype).eps:
        return f"loss differs by {off:.2e}"
    off = ((ours[1] - theirs[1]).norm() / theirs[1].norm()).item()
    return None if off <= (0.2 if dtype.itemsize == 2 else 1e-3) else f"gradients differ by {off:.2e}"


def timed(step: Callable, device: torch.device) -> tuple[float, float]:
    """(ms a step, peak GiB)."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    wait()
    start = time.perf_counter()
    for _ in range(STEPS):
        step()
    wait()
    ms = (time.perf_counter() - start) * 1e3 / STEPS
    return ms, torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0


def rounds(candidates: dict[str, tuple[Callable, Callable]], arguments) -> dict[str, tuple[list[float], float]]:
    """{name: ([ms of each round], peak)}: (before, step) of each in turns, after an untimed round."""
    found: dict[str, tuple[list[float], float]] = {name: ([], 0.0) for name in candidates}
    for i in range(arguments.rounds + 1):
        if i > 2 and time.monotonic() >= arguments.deadline:
            break
        for name, (before, step) in candidates.items():
            before()
            step()  # what changed hands learns its first call anew
            ms, peak = timed(step, arguments.device)
            if i:
                times, most = found[name]
                times.append(ms)
                found[name] = times, max(most, peak)
    return found


def measure(point: Point, report: Report, table: Table, arguments) -> None:
    """The base alone, then PEFT and ours in turns."""
    device, dtype = arguments.device, getattr(torch, point.dtype)
    model = build(point, device)
    tokens = torch.randint(0, model.config.vocab_size, (point.batch, point.tokens), device=device)
    autocast = dtype if point.default else None
    handle = model.get_input_embeddings().register_forward_hook(lambda _, __, y: y.requires_grad_())
    found = rounds({"base": (lambda: None, stepper(model, tokens, autocast))}, arguments)
    handle.remove()
    peft_model = adapt(model, point.default).train()
    theirs = gradients(peft_model, tokens, autocast)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*is dropped.*")
        fused_lora.accelerate(peft_model)
        message = wrong(gradients(peft_model, tokens, autocast), theirs, dtype)
    step, suffix = stepper(peft_model, tokens, autocast), " default" if point.default else ""
    candidates = {
        f"PEFT{suffix}": (lambda: fused_lora.restore(peft_model), step),
        f"fused_lora{suffix}": (lambda: fused_lora.accelerate(peft_model), step),
    }
    if message:
        del candidates[f"fused_lora{suffix}"]
        report.rows.append(vars(point) | dict(benchmark="train", provider="fused_lora", correct=False, wrong=message))
        print(f"  WRONG: {message}")
    found |= rounds(candidates, arguments)
    base_ms, peft_ms = (statistics.median(found[name][0]) for name in ("base", f"PEFT{suffix}"))
    for name, (times, peak) in found.items():
        ms = summary(times)
        row = vars(point) | dict(benchmark="train", provider=name, correct=True, ms=ms, peak_GiB=round(peak, 2))
        row["tokens_per_second"] = round(point.batch * point.tokens / ms["median"] * 1e3)
        row |= dict(to_base=round(ms["median"] / base_ms, 4), speedup=round(peft_ms / ms["median"], 4))
        report.rows.append(row)
        numbers = f"{row['to_base']:.2f}", f"{row['speedup']:.2f}", f"{peak:.2f}" if peak else None
        table.row(str(point), name, spread(ms), f"{row['tokens_per_second']:,}", *numbers)


def points(arguments) -> list[Point]:
    """Adapters of the base's dtype, then PEFT's default over a 16-bit base."""
    on_cpu = arguments.device.type == "cpu"
    size = arguments.model or ("tiny" if on_cpu else "8b")
    layers = arguments.layers or SIZES[size]["num_hidden_layers"]
    batch, tokens = arguments.batch or 2, arguments.tokens or (16 if on_cpu else 2048)
    common = size, layers, batch, tokens, "float32" if on_cpu else "bfloat16"
    return [Point(*common, default) for default in ((False,) if on_cpu else (False, True))]


def main(argv: list[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument("--model", choices=SIZES, help="sizes of the model (default: 8b, on a CPU tiny)")
    options.add_argument("--layers", type=int, help="fewer decoder layers than the model has")
    options.add_argument("--batch", type=int, help="sequences in a step (default: 2)")
    options.add_argument("--tokens", type=int, help="tokens of a sequence (default: 2048, on a CPU 16)")
    arguments = options.parse_args(argv)
    return run("train", arguments, COLUMNS, points, measure)


if __name__ == "__main__":
    sys.exit(main())
