"""Folders of published bases: pipelines, variants, several checkpoints, weights that are quantised in other ways."""

import json
import shutil

import pytest
import torch
import transformers as tf
from safetensors import safe_open
from safetensors.torch import save_file

from fused_lora.adapters import AdapterError
from fused_lora.checkpoints import merge_checkpoint, unmerge_checkpoint
from helpers.checkpoint_files import SINGLE, change, read_all, write_adapter, write_base
from helpers.published import TEXT, adapted, built

EXPERTS = dict(target_parameters=["experts.gate_up_proj", "experts.down_proj"], target_modules=[])
LAYER = {"model.layers.0.mlp.down_proj": (32, 24)}


def test_folders_that_hold_no_checkpoint_or_several(tmp_path):
    weight, name = torch.ones(24, 32), "model.layers.0.mlp.down_proj.weight"
    adapter = write_adapter(tmp_path / "adapter", LAYER)
    part = write_base(tmp_path / "pipeline" / "transformer", {name: weight})
    plain, other = part / "diffusion_pytorch_model.safetensors", part / "diffusion_pytorch_model.fp16.safetensors"
    (part / SINGLE).rename(plain)
    with pytest.raises(AdapterError, match="no file of weights; there are some in 'transformer': name that folder"):
        merge_checkpoint(tmp_path / "pipeline", adapter, tmp_path / "out")
    shutil.copy(plain, other)  # a variant, which from_pretrained does not take
    report = merge_checkpoint(part, adapter, tmp_path / "out")
    assert report.left_out == [other.name] and (tmp_path / "out" / plain.name).exists()
    with pytest.raises(AdapterError, match="found an adapter's alone"):
        merge_checkpoint(tmp_path / "adapter", adapter, tmp_path / "out2")
    with pytest.raises(AdapterError, match=r"no such folder; of a hub, pass what .*snapshot_download\('owner/model'\)"):
        merge_checkpoint("owner/model", adapter, tmp_path / "out2")
    both = write_base(tmp_path / "both", {name: weight, "b": torch.ones(2)}, shards=2)
    save_file({name: weight}, both / SINGLE)
    with pytest.raises(AdapterError, match="from_pretrained takes the one file: name it, or move it away"):
        merge_checkpoint(both, adapter, tmp_path / "out2")


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({"weight": torch.zeros(24, 4).view(torch.uint32), "scales": torch.ones(24, 1)}, "uint32 .*be dequantised"),
        (
            {"weight": torch.zeros(24, 16, dtype=torch.uint8), "weight_scale": torch.ones(24, 2)},
            "uint8 .*be dequantised",
        ),
        ({"codes": torch.zeros(24, 4, 1, dtype=torch.int16)}, "down_proj.codes, of AQLM: these cannot be dequantised"),
    ],
    ids=["MLX", "ModelOpt's NVFP4", "AQLM"],
)
def test_quantised_weights_of_other_shapes_are_named_as_such(tmp_path, tensors, message):
    base = write_base(tmp_path / "base", {f"model.layers.0.mlp.down_proj.{end}": t for end, t in tensors.items()})
    with pytest.raises(AdapterError, match=message):
        merge_checkpoint(base, write_adapter(tmp_path / "adapter", LAYER), tmp_path / "out")


def test_experts_in_mxfp4_are_named_as_such(tmp_path):
    sizes = dict(TEXT, head_dim=8, num_local_experts=2)
    adapted(built(tf.GptOssForCausalLM, sizes, tmp_path / "base"), tmp_path / "adapter", **EXPERTS)
    for key, tensor in read_all(tmp_path / "base").items():
        if key.endswith(("experts.gate_up_proj", "experts.down_proj")):
            blocks = torch.zeros(2, tensor.shape[2], 1, 16, dtype=torch.uint8)
            change(tmp_path / "base" / SINGLE, **{key: None, f"{key}_blocks": blocks})
    with pytest.raises(AdapterError, match="_blocks is of MXFP4, which cannot be dequantised here"):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


@pytest.mark.parametrize("metadata", [None, {"format": "mlx"}, {"of": "a quantiser"}])
def test_loaders_take_a_merged_file_whose_base_had_no_metadata(tmp_path, metadata):
    """accelerate, and transformers 4, refuse metadata without a format."""
    accelerate = pytest.importorskip("accelerate")
    base = write_base(tmp_path / "base", {})
    weights = {"model.layers.0.mlp.down_proj.weight": torch.ones(24, 32)}
    save_file(weights, base / SINGLE, metadata)
    before = (base / SINGLE).read_bytes()
    adapter = write_adapter(tmp_path / "adapter", LAYER)
    merge_checkpoint(base, adapter, tmp_path / "out", record=tmp_path / "record")
    with safe_open(tmp_path / "out" / SINGLE, "pt") as file:
        assert file.metadata()["format"] == ("mlx" if metadata == {"format": "mlx"} else "pt")
    if metadata != {"format": "mlx"}:
        assert accelerate.utils.load_state_dict(str(tmp_path / "out" / SINGLE)).keys() == weights.keys()
    unmerge_checkpoint(tmp_path / "out", tmp_path / "record", tmp_path / "back")
    assert (tmp_path / "back" / SINGLE).read_bytes() == before


def test_the_index_has_the_sums_of_the_output(tmp_path):
    """As transformers writes them, with a head that was tied."""
    sizes = dict(TEXT, tie_word_embeddings=True)
    model = built(tf.LlamaForCausalLM, sizes, tmp_path / "plain")
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    wrapped = adapted(model, tmp_path / "adapter", target_modules=["lm_head"])
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", dtype=torch.bfloat16)
    untied = wrapped.unload().to(torch.bfloat16)
    untied.config.tie_word_embeddings = False
    untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight.detach().clone())
    untied.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    name = f"{SINGLE}.index.json"
    ours, theirs = (json.loads((tmp_path / folder / name).read_text())["metadata"] for folder in ("out", "theirs"))
    assert ours == theirs
    change(tmp_path / "base" / name, metadata={"dtype": "float32"})
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "again", dtype=torch.bfloat16)
    assert json.loads((tmp_path / "again" / name).read_text())["metadata"] == {"dtype": "bfloat16"}
