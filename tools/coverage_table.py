"""What each kind of layer and variant of LoRA gets here, found by building every case: the table of docs/coverage.md.

    python tools/coverage_table.py            writes the table between its markers
    python tools/coverage_table.py --check    exit status 1 if the page shows another one

For each case a small model is wrapped by PEFT and accelerated, and a plain one is injected. "fused" and the reasons are
those of ``fused_lora.integrations.peft.layer_report``, which ``explain`` prints. Merges: whether the bits come back.
"""

from __future__ import annotations

import argparse
import copy
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

import fused_lora
from fused_lora.integrations.peft import layer_report
from fused_lora.reference import bits

PAGE = Path(__file__).resolve().parents[1] / "docs" / "coverage.md"
BEGIN, END = "<!-- coverage: written by tools/coverage_table.py -->", "<!-- end of coverage -->"
COLUMNS = ("layer", "variant", "accelerate", "merge, unmerge", "inject", "files", "serve")
K = 16


class Net(nn.Module):
    """One layer ``x``, over rows of numbers."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.x = layer


def _conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(K, K)


def _linear4bit() -> nn.Module:
    import bitsandbytes

    layer = bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32)
    return layer.to("cpu")


def _experts() -> nn.Module:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(hidden_size=K, moe_intermediate_size=K, num_experts=4)
    config._experts_implementation = "grouped_mm"
    module = Qwen3MoeExperts(config)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def _llama4_experts() -> nn.Module:
    from transformers import Llama4TextConfig
    from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

    module = Llama4TextExperts(Llama4TextConfig(hidden_size=K, intermediate_size=K, num_local_experts=4))
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def _router() -> nn.Module:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    module = Qwen3MoeTopKRouter(Qwen3MoeConfig(hidden_size=K, num_experts=4, num_experts_per_tok=2))
    nn.init.normal_(module.weight)
    return module


_X = {"target_modules": ["x"]}
_STACK = {"target_modules": [], "target_parameters": ["x.gate_up_proj", "x.down_proj"]}
VARIANTS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "dropout": {"lora_dropout": 0.1},
    "lora_bias": {"lora_bias": True},
    "DoRA": {"use_dora": True},
    "aLoRA": {"alora_invocation_tokens": [1]},
    "MiCA": {"init_lora_weights": "mica"},
}
LAYERS: dict[str, tuple[Callable[[], nn.Module], dict, tuple[str, ...]]] = {
    "nn.Linear": (lambda: nn.Linear(K, K), _X, tuple(VARIANTS)),
    "Conv1D of transformers": (_conv1d, _X, ("LoRA", "DoRA")),
    "Linear4bit of bitsandbytes": (_linear4bit, _X, ("LoRA", "DoRA")),
    "stacked experts": (_experts, _STACK, ("LoRA", "rsLoRA", "dropout")),
    "experts of Llama-4": (_llama4_experts, _STACK, ("LoRA", "dropout")),
    "routers": (_router, {"target_modules": [], "target_parameters": ["x.weight"]}, ("LoRA",)),
    "nn.Embedding": (lambda: nn.Embedding(K, K), _X, ("LoRA", "DoRA")),
    "nn.Conv2d": (lambda: nn.Conv2d(2, 2, 3), _X, ("LoRA", "DoRA")),
    "nn.MultiheadAttention": (lambda: nn.MultiheadAttention(K, 2), _X, ("LoRA",)),
}


def refused(error: Exception) -> str:
    """A refusal, without what it says; anything else is a fault."""
    if isinstance(error, (ValueError, RuntimeError, NotImplementedError)):
        return "refused"
    raise error


def how(model: nn.Module) -> str:
    """How its layers run, by the report."""
    return "; ".join(sorted({str(found).removeprefix("no: ") for found in layer_report(model)}))


def row(layer: str, variant: str) -> tuple[str, ...]:
    """One line of the table."""
    make, targets, _ = LAYERS[layer]
    config = peft.LoraConfig(r=2, **targets, **{"init_lora_weights": False} | VARIANTS[variant])
    try:
        model = fused_lora.accelerate(peft.get_peft_model(Net(make()), config).train())
        runs = how(model)
    except ValueError as error:  # PEFT has no such layer; merges are those of ours
        model, runs = fused_lora.inject(Net(make()), config), f"{refused(error)} by PEFT"
    injected, files, serves = _injected(make, config)
    return layer, variant, runs, _merges(model.eval()), injected, files, serves


def _merges(model: nn.Module) -> str:
    # of a quantised layer the parameter is replaced, and put back
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" not in name}
    try:
        fused_lora.merge(model)
        ours = all(getattr(m, "merge_state", None) for m in model.modules() if getattr(m, "merged_adapters", []))
        fused_lora.unmerge(model)
    except Exception as error:  # noqa: BLE001 - what it is is the result
        return refused(error)
    same = all(torch.equal(bits(p), bits(before[n])) for n, p in model.named_parameters() if n in before)
    return "exact" if ours and same else "PEFT's"


def _injected(make: Callable[[], nn.Module], config: peft.LoraConfig) -> tuple[str, str, str]:
    """(inject, files of save_adapter and load_adapter, AdapterStore)."""
    base = Net(make())
    try:
        model = fused_lora.inject(copy.deepcopy(base), config)
    except Exception as error:  # noqa: BLE001 - what it is is the result
        return refused(error), "PEFT's", "refused"
    runs = how(model)
    with tempfile.TemporaryDirectory() as folder:
        fused_lora.save_adapter(model, f"{folder}/a")
        fused_lora.load_adapter(copy.deepcopy(base), f"{folder}/a")
        peft.PeftModel.from_pretrained(copy.deepcopy(base), f"{folder}/a")
        try:
            fused_lora.AdapterStore(base.eval(), capacity_bytes=1 << 20).load("a", f"{folder}/a")
            serves = "yes"
        except Exception as error:  # noqa: BLE001 - what it is is the result
            serves = refused(error)
    return runs, "both ways", serves


def table() -> str:
    """Markdown."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("fused_lora").setLevel(logging.ERROR)
        for layer, (_, _, names) in LAYERS.items():
            for variant in names:
                torch.manual_seed(0)
                lines.append("| " + " | ".join(row(layer, variant)) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if the page differs")
    arguments = parser.parse_args(argv)
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    wanted = f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}"
    if not arguments.check:
        PAGE.write_text(wanted, encoding="utf-8")
    elif wanted != text:
        print(f"{PAGE.name} is not what the code does: run python tools/coverage_table.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
