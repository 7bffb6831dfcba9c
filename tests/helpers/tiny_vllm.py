"""A tiny Llama, adapters of mixed ranks for it, and the tokens that it gives with an adapter merged in fp32."""

import functools
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from helpers.seeds import shifted

LAYERS, HIDDEN, WIDE, VOCAB, MAX_RANK = 2, 128, 96, 160, 16
SIZES = {  # of each module: in, out
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN // 2),
    "self_attn.v_proj": (HIDDEN, HIDDEN // 2),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (HIDDEN, WIDE),
    "mlp.up_proj": (HIDDEN, WIDE),
    "mlp.down_proj": (WIDE, HIDDEN),
}
ALL = tuple(SIZES)
KINDS = {  # name: rank and targets
    "all_16": (16, ALL),
    "all_8": (8, ALL),
    "all_3": (3, ALL),
    "all_1": (1, ALL),
    "query": (16, ("self_attn.q_proj",)),
    "keys": (5, ("self_attn.k_proj", "self_attn.v_proj")),
    "mlp": (12, ("mlp.gate_proj", "mlp.down_proj")),
    "head": (8, ("lm_head", "self_attn.o_proj")),
}

SHARED = [(7 * j) % 150 + 1 for j in range(40)]  # the start of all prompts: prefixes are cached, and differ by adapter
ENGINE = dict(  # four slots for eight adapters; prompts longer than a step: prefills are cut and mixed with decodes
    dtype="float32",
    enforce_eager=True,
    max_model_len=128,
    max_num_seqs=8,
    max_num_batched_tokens=48,
    enable_chunked_prefill=True,
    enable_prefix_caching=True,
    enable_lora=True,
    max_loras=4,
    max_cpu_loras=8,
    max_lora_rank=MAX_RANK,
)


def write_model(folder: Path) -> Path:
    """A Llama of two layers in fp32, with a tokenizer that knows every byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(shifted(0))
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=WIDE,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=HIDDEN // 4,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:VOCAB]
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


def write_adapter(folder: Path, seed: int, r: int, targets: tuple[str, ...], sizes=SIZES, **changes) -> Path:
    """A PEFT checkpoint with lora_alpha = 2 r. sizes: (in, out) of the targets. changes: of its config."""
    generator, tensors = torch.Generator().manual_seed(shifted(seed)), {}
    for target in targets:
        K, N = sizes.get(target, (HIDDEN, VOCAB))
        paths = [target] if target == "lm_head" else [f"model.layers.{i}.{target}" for i in range(LAYERS)]
        for path in paths:
            A, B = torch.randn(r, K, generator=generator), torch.randn(N, r, generator=generator)
            tensors[f"base_model.model.{path}.lora_A.weight"] = A * K**-0.5
            tensors[f"base_model.model.{path}.lora_B.weight"] = B * 0.3 * r**-0.5
    config = dict(
        peft_type="LORA",
        task_type="CAUSAL_LM",
        base_model_name_or_path="tiny",
        r=r,
        lora_alpha=2 * r,
        target_modules=sorted({target.split(".")[-1] for target in targets}),
        bias="none",
    )
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    return folder


@functools.lru_cache(maxsize=64)
def merged(model: Path, adapter: Path | None, version: int = 0) -> torch.nn.Module:
    """The model with the adapter merged in fp32. version: of the adapter's files, which may have been written anew."""
    from transformers import LlamaForCausalLM

    found = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    if adapter is not None:
        tensors = load_file(adapter / "adapter_model.safetensors")
        for key in [key for key in tensors if key.endswith("lora_A.weight")]:
            weight = found.get_submodule(key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")).weight
            weight.data += 2 * tensors[key.replace("lora_A", "lora_B")] @ tensors[key]
    return found


@torch.no_grad()
def differs(tokens: list[int], prompt: list[int], model: torch.nn.Module) -> str | None:
    """None if these are the greedy tokens after ``prompt``, else where they part.

    Two tokens may be closer than the rounding of fp32 sums: from there on nothing is compared.
    """
    logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    for i, (token, row) in enumerate(zip(tokens, logits, strict=True)):
        if row.max() - row[token] > 1e-4:
            return f"token {i}: {token} for {row.argmax().item()}, which is ahead by {row.max() - row[token]:.2g}"
    return None
