"""Train an adapter without PEFT and save it in PEFT's format.

python examples/train.py [MODEL] [FOLDER]
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fused_lora


def main(name: str = "HuggingFaceTB/SmolLM2-135M-Instruct", folder: str = "adapters/sql") -> list[float]:
    """The losses of five steps on one sentence."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name)
    config = fused_lora.LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear")
    fused_lora.inject(model, config, "sql")  # in place; everything but the adapter is frozen

    batch = tokenizer(["SELECT name FROM users"], return_tensors="pt")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(5):
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    fused_lora.save_adapter(model, folder, "sql")
    return losses


if __name__ == "__main__":
    print("losses", main(*sys.argv[1:]))
