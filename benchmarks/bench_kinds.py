"""DoRA layers and mixtures of experts beside LoRA: a training step of ours, PEFT's, and what it cannot go below.

    python benchmarks/bench_kinds.py

dora     a linear layer, 512 x 2048 x 2048, r=16, fp32, forward and backward, without and with dropout, against our LoRA
experts  a Qwen3-MoE of 2 layers and 64 experts, 256 tokens, r=8: ours against the frozen model with grouped_mm

On a GPU the layer is 8192 x 4096 x 4096, the mixture has 4096 tokens and two layers of Qwen3-30B-A3B's sizes, and all
is bf16. Outputs are compared with PEFT's first: the RMS difference may be 1e-5 of the output, in bf16 2 %. All take
turns in one run. The result goes to benchmarks/results/<machine>-kinds.json, with bars over the shortest times.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable

import peft
import torch
from report import Clock, Report, Table, begin, parser, spread, times_of
from torch import nn

import fused_lora

COLUMNS = [("case", 24), ("provider", 12), ("ms", 26), ("over floor", 10), ("over PEFT", 10)]
FLOORS = {"dora": "our LoRA", "experts": "frozen"}
BARS = {"dora, p=0.0": (1.25, 1.5), "experts": (1.4, 1.8)}  # times the floor's time at most, PEFT's speed at least
DORA = {"cpu": (2048, 512), "cuda": (4096, 8192)}  # features and rows
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
OFF = {"cpu": 1e-5, "cuda": 0.02}
MOE = dict(
    vocab_size=256, hidden_size=512, intermediate_size=512, moe_intermediate_size=256, num_hidden_layers=2,
    num_attention_heads=8, num_key_value_heads=4, head_dim=64, num_experts=64, num_experts_per_tok=4,
    decoder_sparse_step=1,
)  # fmt: skip
LARGE = dict(
    hidden_size=2048,
    intermediate_size=6144,
    moe_intermediate_size=768,
    num_attention_heads=32,
    num_key_value_heads=4,
    head_dim=128,
    num_experts=128,
    num_experts_per_tok=8,
)
TOKENS = {"cpu": 256, "cuda": 4096}  # of a step of the mixture


def dora(p: float, device: torch.device) -> dict[str, Callable[[], torch.Tensor]]:
    """{provider: one forward and backward}, p the dropout."""

    (K, M), like = DORA[device.type], dict(device=device, dtype=DTYPE[device.type])

    def layer(ours: bool, use_dora: bool) -> nn.Module:
        torch.manual_seed(0)
        config = peft.LoraConfig(r=16, target_modules=["0"], init_lora_weights=False, use_dora=use_dora, lora_dropout=p)
        model = peft.get_peft_model(nn.Sequential(nn.Linear(K, K)), config).to(**like)
        return fused_lora.accelerate(model) if ours else model

    x, g = torch.randn(M, K, requires_grad=True, **like), torch.randn(M, K, **like)
    models = {"our LoRA": layer(True, False), "fused_lora": layer(True, True), "PEFT": layer(False, True)}

    def step(model: nn.Module) -> torch.Tensor:
        y = model(x)
        y.backward(g)
        x.grad = None
        model.zero_grad()
        return y

    return {name: lambda model=model: step(model) for name, model in models.items()}


def experts(device: torch.device) -> dict[str, Callable[[], torch.Tensor]]:
    """The same of a small mixture of experts."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    sizes, kind = MOE | (LARGE if device.type == "cuda" else {}), device.type
    with device:
        frozen = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes)).requires_grad_(False).to(DTYPE[kind])
    frozen.enable_input_require_grads()
    frozen.config._experts_implementation = "grouped_mm"
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    lora = peft.LoraConfig(r=8, target_modules=[], target_parameters=targets, init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(frozen), lora, autocast_adapter_dtype=kind == "cpu")
    models = {"frozen": frozen, "fused_lora": fused_lora.accelerate(copy.deepcopy(theirs)), "PEFT": theirs}
    ids = torch.randint(0, MOE["vocab_size"], (1, TOKENS[kind]), device=device)

    def step(model: nn.Module) -> torch.Tensor:
        logits = model(input_ids=ids).logits
        logits.square().mean().backward()
        model.zero_grad()
        return logits

    return {name: lambda model=model: step(model) for name, model in models.items()}


def measure(case: str, floor: str, steps: dict[str, Callable], report: Report, table: Table, arguments) -> None:
    """Check, time and add the rows of one case."""
    ours, theirs = steps["fused_lora"]().detach(), steps["PEFT"]().detach()
    off = ((ours - theirs).norm() / theirs.norm()).item()
    if not (off < OFF[arguments.device.type] or "p=0.1" in case):  # masks are drawn by other generators
        raise RuntimeError(f"{case}: the output differs from PEFT's by {off:.1e}")
    ms = times_of(steps, Clock(arguments.device), arguments)
    for name, found in ms.items():
        over = {other: round(found["median"] / ms[other]["median"], 4) for other in (floor, "PEFT")}
        report.rows.append(
            dict(benchmark="kinds", case=case, provider=name, ms=found, to_floor=over[floor], to_peft=over["PEFT"])
        )
        table.row(case, name, spread(found), f"{over[floor]:.2f}", f"{over['PEFT']:.2f}")
    if case in BARS:
        least = {name: found["min"] for name, found in ms.items()}
        report.bar(
            f"{case}: times the time of {floor}, minima", least["fused_lora"] / least[floor], BARS[case][0], False
        )
        report.bar(f"{case}: times PEFT's speed, minima", least["PEFT"] / least["fused_lora"], BARS[case][1], True)


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__).parse_args(argv)
    report, table = begin("kinds", arguments), Table(COLUMNS)
    for p in (0.0, 0.1):
        measure(f"dora, p={p}", FLOORS["dora"], dora(p, arguments.device), report, table, arguments)
    measure("experts", FLOORS["experts"], experts(arguments.device), report, table, arguments)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
