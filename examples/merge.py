"""Merge an adapter, look at what rounding lost, and get every bit of the base back.

python examples/merge.py [MODEL] [ADAPTER]
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fused_lora


def main(name: str = "HuggingFaceTB/SmolLM2-135M-Instruct", adapter: str = "adapters/sql") -> bool:
    """Whether all weights have their original bits after merge and unmerge."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name).eval()
    fused_lora.load_adapter(model, adapter, "sql")  # a PEFT checkpoint, checked before the model changes
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}

    batch = tokenizer(["SELECT name FROM users"], return_tensors="pt")
    print(fused_lora.verify(model, batch))
    fused_lora.merge(model)
    lost = fused_lora.delta_fidelity(model)
    print(f"share of the delta that rounding lost: at most {max(lost.values()):.2%}")
    fused_lora.unmerge(model)
    return all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


if __name__ == "__main__":
    print("every bit is back:", main(*sys.argv[1:]))
