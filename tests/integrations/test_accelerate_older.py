"""Accelerated layers of older releases of PEFT: what those lack is taken away from the installed one."""

import peft
import torch
from peft.tuners.lora import dora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

import fused_lora
from fused_lora.integrations import peft as integration
from fused_lora.integrations.peft_linear import AcceleratedLinear
from helpers.accelerated import ROWS, TOKENS, Net, layers, pair, wrap
from helpers.experts import BOTH, Block
from helpers.versions import since


class Embeds(nn.Module):
    def __init__(self, emb):
        super().__init__()
        self.emb = emb

    def forward(self, ids):
        return self.emb(ids)


def reason(model):
    [row] = integration.layer_report(model)
    return row.why_not


def test_embeddings_without_tensor_parallelism_and_scales(monkeypatch):
    model, ids = wrap(Embeds(nn.Embedding(TOKENS, 8)), target_modules=["emb"]), torch.arange(4)
    before = model(ids)
    vars(model.base_model.model.emb).pop("tp_layer", None)
    assert reason(fused_lora.accelerate(model)) is None and torch.equal(model(ids), before)
    scaled = Gemma3TextScaledWordEmbedding(TOKENS, 8, 0, embed_scale=2.5)
    model = fused_lora.accelerate(wrap(Embeds(scaled), target_modules=["emb"]))
    monkeypatch.delattr(BaseTunerLayer, "_get_embed_scale", raising=False)
    assert reason(model) == "PEFT before 0.18 does not scale the adapter with the embedding"


def test_dora_without_a_cache_of_norms(monkeypatch):
    layer, x = layers(pair(adapters={"v": {"use_dora": True}}))[0].eval(), torch.randn(4, 24)
    before = layer(x)
    monkeypatch.delattr(dora, "ENABLE_DORA_CACHING", raising=False)
    assert torch.equal(layer(x), before)


@since("transformers", "5")
def test_experts_whose_sides_are_never_exchanged():
    """Right for gpt-oss, whose stacks are [experts, in, out]. On others PEFT's forward runs."""
    for name, why in (("gpt_oss", None), ("qwen3_moe", "the adapter's orientation is not that of the experts")):
        model, ids = fused_lora.accelerate(wrap(Block(name), **BOTH)), torch.arange(ROWS)
        before = model(ids)
        for module in model.modules():
            vars(module).pop("_did_swap_in_out_features", None)
        assert {row.why_not for row in integration.layer_report(model)} == {why}
        assert why or torch.equal(model(ids), before)


def test_adapters_are_chosen_without_inference_mode(monkeypatch):
    model = fused_lora.accelerate(wrap(Net(), {"a": {}, "b": {}}))
    own = peft.PeftModel.set_adapter
    monkeypatch.setattr(peft.PeftModel, "set_adapter", lambda self, adapter_name: own(self, adapter_name))
    fused_lora.set_adapter(model, "b")
    assert model.active_adapters == ["b"]


def test_a_registered_class_is_built_without_the_config():
    config = fused_lora.integrations.peft.register(peft.LoraConfig(target_modules=["lin"]))
    settings = dict(r=2, lora_alpha=4, lora_dropout=0.0, init_lora_weights=True, use_rslora=False, fan_in_fan_out=False)
    layer = config._custom_modules[nn.Linear](nn.Linear(4, 6), "default", **settings)
    assert isinstance(layer, AcceleratedLinear) and layer.r == {"default": 2}
