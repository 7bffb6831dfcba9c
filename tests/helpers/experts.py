"""Experts of transformers in a small model, and its LoRA here and in PEFT."""

from __future__ import annotations

import importlib

import torch
import transformers
from torch import Tensor, nn

from helpers.accelerated import TOKENS

HIDDEN, INTER, EXPERTS, TOP_K = 16, 24, 6, 2
# architecture -> the class of its experts, the class of its config, and how the config calls the numbers
ARCHITECTURES = {
    "qwen3_moe": ("Qwen3Moe", dict(num_experts=EXPERTS)),
    "mixtral": ("Mixtral", dict(num_local_experts=EXPERTS)),
    "olmoe": ("Olmoe", dict(num_experts=EXPERTS)),
    "gpt_oss": ("GptOss", dict(num_local_experts=EXPERTS)),
    "deepseek_v3": ("DeepseekV3", dict(n_routed_experts=EXPERTS)),
    "glm4_moe": ("Glm4Moe", dict(n_routed_experts=EXPERTS)),
    "llama4": ("Llama4Text", dict(num_local_experts=EXPERTS)),
}
BOTH = dict(target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"], lora_alpha=6)


class Block(nn.Module):
    """Embeddings through experts, whose routing follows the token alone."""

    def __init__(self, name: str = "qwen3_moe", dtype: torch.dtype = torch.float32, implementation: str = "eager"):
        super().__init__()
        prefix, numbers = ARCHITECTURES[name]
        config = getattr(transformers, f"{prefix}Config")(
            hidden_size=HIDDEN, intermediate_size=INTER, moe_intermediate_size=INTER, **numbers
        )
        config._experts_implementation = implementation
        module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
        self.even = name == "llama4"
        self.emb = nn.Embedding(TOKENS, HIDDEN)
        self.experts = getattr(module, f"{prefix}Experts")(config)
        for parameter in self.experts.parameters():
            nn.init.normal_(parameter, std=0.2)
        self.to(dtype)

    def forward(self, ids: Tensor) -> Tensor:
        ids = ids.reshape(-1)
        index = torch.stack([ids % EXPERTS, (ids // 3 + ids + 1) % (EXPERTS - 1)], 1)
        weights = torch.softmax(torch.stack([ids, ids * 0], 1).to(self.emb.weight.dtype) / TOKENS, 1)
        if self.even:  # as Llama4TextMoe: every token to every expert, those that were not chosen times 0
            scores = torch.zeros(len(ids), EXPERTS, dtype=weights.dtype).scatter(1, index, weights)
            x = self.emb(ids).repeat(EXPERTS, 1) * scores.t().reshape(-1, 1)
            return self.experts(x).view(EXPERTS, -1, HIDDEN).sum(0)
        return self.experts(self.emb(ids), index, weights)


def llama4() -> nn.Module:
    """A language model of two layers, whose experts get the rows of all tokens."""
    config = transformers.Llama4TextConfig(
        vocab_size=TOKENS, hidden_size=HIDDEN, intermediate_size=INTER, intermediate_size_mlp=INTER, pad_token_id=0,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=8, num_local_experts=4,
        num_experts_per_tok=2,
    )  # fmt: skip
    model = transformers.Llama4ForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if ".experts." in name:  # transformers starts some of them at 0
            nn.init.normal_(parameter, std=0.2)
    return model


def moe() -> nn.Module:
    """A language model of two layers with 4 experts each."""
    config = transformers.Qwen3MoeConfig(
        vocab_size=TOKENS, hidden_size=HIDDEN, intermediate_size=24, moe_intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    return transformers.Qwen3MoeForCausalLM(config).eval()
