"""Make a PEFT model fast, take one training step, and save PEFT's files.

python examples/accelerate_peft.py [MODEL] [FOLDER]
"""

import sys

import peft
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fused_lora


def main(name: str = "HuggingFaceTB/SmolLM2-135M-Instruct", folder: str = "adapters/poet") -> float:
    """The loss of the step."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    config = peft.LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(name), config)
    fused_lora.accelerate(model)  # in place; restore(model) undoes it
    print(fused_lora.explain(model))

    batch = tokenizer(["Roses are red, violets are blue"], return_tensors="pt")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    loss = model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    optimizer.step()
    model.save_pretrained(folder)
    return loss.item()


if __name__ == "__main__":
    print("loss", main(*sys.argv[1:]))
