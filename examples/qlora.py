"""Train an adapter over a model in 4 bits, save and reload it, and export both as a dense bf16 model.

python examples/qlora.py [MODEL] [ADAPTER] [MERGED]
"""

import importlib.util
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import fused_lora


def main(name: str = "HuggingFaceTB/SmolLM2-135M-Instruct", adapter: str = "qlora", merged: str = "merged") -> list:
    """The losses of thirty steps on one sentence."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise SystemExit('examples/qlora.py needs bitsandbytes: pip install ".[bitsandbytes]"')
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = {"quantization_config": four_bits, "dtype": torch.bfloat16, "device_map": device}
    model = AutoModelForCausalLM.from_pretrained(name, **options).train()
    config = fused_lora.LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear")
    fused_lora.inject(model, config, "sql")
    print(fused_lora.explain(model))

    batch = AutoTokenizer.from_pretrained(name)(["SELECT name FROM users"], return_tensors="pt").to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(30):
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    fused_lora.save_adapter(model, adapter, "sql")

    again = AutoModelForCausalLM.from_pretrained(name, **options)
    fused_lora.load_adapter(again, adapter, "sql")
    print(fused_lora.verify(again, batch, reference=model))  # the same predictions, layer by layer
    fused_lora.unload(again, merge_adapters=True, dtype=torch.bfloat16)  # dequantised, merged, rounded once
    again.save_pretrained(merged)  # a plain model
    return losses


if __name__ == "__main__":
    print("losses", main(*sys.argv[1:]))
