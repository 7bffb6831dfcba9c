"""Generate for several prompts at once, each with its own adapter.

python examples/serve.py [MODEL] [ADAPTER ...]
"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import fused_lora


def main(name: str = "HuggingFaceTB/SmolLM2-135M-Instruct", *adapters: str) -> list[str]:
    """One continuation of the same prompt per adapter, and one of the base model."""
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    base = AutoModelForCausalLM.from_pretrained(name).eval()
    store = fused_lora.AdapterStore(base, capacity_bytes=2 << 30)
    names = [Path(folder).name for folder in adapters or ("adapters/sql", "adapters/poet")]
    for adapter, folder in zip(names, adapters or ("adapters/sql", "adapters/poet"), strict=True):
        store.register(adapter, folder)  # read when it is first used

    entries = [*names, None]  # None is the base model
    prompts = tokenizer(["SELECT name"] * len(entries), return_tensors="pt", padding=True)
    with store.batch(entries):
        tokens = base.generate(**prompts, max_new_tokens=8, do_sample=False)
    return tokenizer.batch_decode(tokens, skip_special_tokens=True)


if __name__ == "__main__":
    for text in main(*sys.argv[1:]):
        print(repr(text))
