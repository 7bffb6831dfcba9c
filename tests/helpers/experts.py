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


_SMALL = dict(
    vocab_size=TOKENS, hidden_size=HIDDEN, intermediate_size=INTER, moe_intermediate_size=INTER, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
_LATENT = dict(kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)
# model -> the path of a router in one of its layers, and further fields of its config
ROUTERS = {
    "qwen3_moe": ("mlp.gate", dict(num_experts=4, num_experts_per_tok=2, norm_topk_prob=True)),
    "mixtral": ("mlp.gate", dict(num_local_experts=4, num_experts_per_tok=2)),
    "olmoe": ("mlp.gate", dict(num_experts=4, num_experts_per_tok=2)),
    "gpt_oss": ("mlp.router", dict(num_local_experts=4, num_experts_per_tok=2)),  # with a bias
    "deepseek_v3": (  # with a bias that chooses
        "mlp.gate",
        dict(n_routed_experts=4, num_experts_per_tok=2, first_k_dense_replace=0, n_group=2, topk_group=1, **_LATENT),
    ),
    "glm4_moe": (
        "mlp.gate",
        dict(n_routed_experts=4, num_experts_per_tok=2, first_k_dense_replace=0, n_group=1, topk_group=1),
    ),
    "llama4_text": (  # a linear layer that returns a tuple
        "feed_forward.router",
        dict(num_local_experts=4, num_experts_per_tok=2, interleave_moe_layer_step=1, intermediate_size_mlp=INTER),
    ),
    "phimoe": ("mlp.router", dict(num_local_experts=4, num_experts_per_tok=2)),
    "granitemoe": ("block_sparse_moe.router", dict(num_local_experts=4, num_experts_per_tok=2)),
    "jamba": (
        "feed_forward.router",
        dict(num_experts=4, num_experts_per_tok=2, expert_layer_period=1, expert_layer_offset=0)
        | dict(attn_layer_period=1, attn_layer_offset=0, mamba_d_state=4, mamba_d_conv=2),
    ),
    "minimax_m2": ("mlp.gate", dict(num_local_experts=4, num_experts_per_tok=2)),  # gets a further tensor
    "afmoe": ("mlp.router.gate", dict(num_experts=4, num_experts_per_tok=2, num_dense_layers=0)),  # a plain linear
}


def routed(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A language model of two layers with experts, all of them with a router of :data:`ROUTERS`."""
    config = transformers.AutoConfig.for_model(name, **{**_SMALL, **ROUTERS[name][1]})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:  # so that experts differ
            nn.init.normal_(parameter, std=0.2)
    return model.to(dtype)


def router_config(name: str, **fields) -> dict:
    """Of LoRA on the routers alone."""
    return {**dict(r=3, lora_alpha=6, target_modules=[], target_parameters=[f"{ROUTERS[name][0]}.weight"]), **fields}
