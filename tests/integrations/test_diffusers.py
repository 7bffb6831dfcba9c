"""A model of diffusers, which injects PEFT's layers without a PeftModel: accelerated next to stock."""

import numpy as np
import peft
import pytest
import torch

import fused_lora
from fused_lora.testing.numeric import assert_close
from helpers.seeds import shifted

pytest.importorskip("diffusers")
TERMS = 4096  # of all sums on the way through the model
LINEAR = ["to_q", "to_k", "to_v", "to_out.0"]


def flux():
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(shifted(0))
    sizes = dict(in_channels=8, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=16)
    model = FluxTransformer2DModel(
        patch_size=1, num_layers=1, num_single_layers=1, pooled_projection_dim=16, axes_dims_rope=(2, 2, 4), **sizes
    )
    return model.double().eval()


def add(model, name, targets=LINEAR, **fields):
    model.add_adapter(peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, **fields), name)
    generator = torch.Generator().manual_seed(shifted(len(name)))
    for key, parameter in model.named_parameters():
        if f".{name}." in key:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.25)


def outputs(model, **kwargs):
    generator = torch.Generator().manual_seed(shifted(1))
    hidden, text, pooled = (
        torch.randn(1, *shape, generator=generator, dtype=torch.float64) for shape in ((6, 8), (5, 16), (16,))
    )
    return model(
        hidden_states=hidden,
        encoder_hidden_states=text,
        pooled_projections=pooled,
        timestep=torch.tensor([0.3], dtype=torch.float64),
        img_ids=torch.arange(18.0, dtype=torch.float64).view(6, 3),
        txt_ids=torch.zeros(5, 3, dtype=torch.float64),
        **kwargs,
    ).sample


@torch.no_grad()
def life(model, accelerate):
    """What a pipeline does to its model: outputs after each step."""
    add(model, "a")
    accelerate(model)
    yield outputs(model)
    yield outputs(model, joint_attention_kwargs={"scale": 0.5})
    yield outputs(model)
    add(model, "bb", ["to_q", "proj_mlp"])
    accelerate(model)
    for weights in ([0.7, -0.3], [np.float32(0.5), 1]):
        model.set_adapters(["a", "bb"], weights)
        yield outputs(model)
    model.disable_lora()
    yield outputs(model)
    model.enable_lora()
    model.fuse_lora(lora_scale=0.5, adapter_names=["bb"])
    yield outputs(model)
    model.unfuse_lora()
    model.delete_adapters("bb")
    model.set_adapter("a")
    yield outputs(model)
    model.unload_lora()
    yield outputs(model)


@pytest.mark.numeric
def test_like_stock(report):
    theirs = list(life(flux(), lambda model: None))
    ours = list(life(flux(), fused_lora.accelerate))
    for mine, other in zip(ours, theirs, strict=True):
        assert_close(mine, other, terms=TERMS)
    said = report()
    assert said["fused"] and said["fallback"].keys() <= {
        "adapters are disabled", "merged: the base layer alone", "no active adapter in this layer"
    }  # fmt: skip


def test_a_pipeline_is_refused_with_the_names_of_its_models():
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    parts = dict.fromkeys(["vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"])
    pipe = FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=flux(), **parts)
    with pytest.raises(TypeError, match="got FluxPipeline; call this for its models, one by one: transformer$"):
        fused_lora.accelerate(pipe)


@torch.no_grad()
@pytest.mark.numeric
def test_layerwise_casting(report):
    """Its hooks on PEFT's layers keep the forward that they find."""
    model = flux()
    add(model, "a")
    model.enable_layerwise_casting(storage_dtype=torch.float32, compute_dtype=torch.float64)
    y = outputs(model)
    for count in (1, 2):
        fused_lora.accelerate(model)
        assert_close(outputs(model), y, terms=TERMS)
        assert sum(report()["around"].values()) == 7 * count
        fused_lora.restore(model)
        assert torch.equal(outputs(model), y)


def test_a_file_of_diffusers_converts_with_its_scaling(tmp_path):
    model, plain = flux(), flux()
    add(model, "a", use_rslora=True, alpha_pattern={"transformer_blocks.0.attn.to_q": 3})
    model.save_lora_adapter(tmp_path / "saved", "a")
    from fused_lora.checkpoints import convert_adapter

    assert not convert_adapter(tmp_path / "saved" / "pytorch_lora_weights.safetensors", tmp_path / "out").assumed
    fused_lora.load_adapter(plain, tmp_path / "out", "a")
    assert_close(outputs(plain), outputs(model), terms=TERMS)
