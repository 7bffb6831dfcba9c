"""Merging into quantised checkpoints: the output is dense, and no less exact than merging the loaded model."""

import json
import sys

import pytest
import torch
import transformers as tf

import fused_lora
from fused_lora.adapters import AdapterError
from fused_lora.checkpoints import merge_checkpoint
from fused_lora.testing.numeric import assert_no_worse
from helpers.checkpoint_files import SINGLE, change, contents, pieces_of, read_all, write_adapter, write_base
from helpers.quantised import linear4bit, values_of, values_of_8bit
from helpers.seeds import shifted

SMALL = dict(vocab_size=90, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
CONFIGS = {
    "nf4": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "fp4": dict(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_quant_storage=torch.bfloat16),
    "int8": dict(load_in_8bit=True),
}
QUERIES = {f"model.layers.{i}.self_attn.q_proj": (64, 64) for i in range(2)}
FP8 = torch.float8_e4m3fn


def quantised(folder, kind, dtype=torch.bfloat16):
    """A model as transformers saves it quantised, in two shards; the loaded model."""
    torch.manual_seed(shifted(0))
    tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL)).to(dtype).save_pretrained(folder / "whole")
    config = tf.BitsAndBytesConfig(**CONFIGS[kind])
    model = tf.LlamaForCausalLM.from_pretrained(folder / "whole", quantization_config=config, dtype=dtype)
    model.save_pretrained(folder / "base", max_shard_size="100KB")
    return tf.LlamaForCausalLM.from_pretrained(folder / "base")


def delta_of(adapter, path, weight=1.0):
    held = read_all(adapter)
    A, B = (held[f"base_model.model.{path}.lora_{x}.weight"].double() for x in "AB")
    return 2 * weight * B @ A


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_bitsandbytes_becomes_dense(tmp_path, monkeypatch, kind, dtype):
    """Layers without an adapter have the bits of ``unload(dtype=...)``; those with one the error of one rounding."""
    pieces_of(monkeypatch, 1500)  # a few rows
    model = quantised(tmp_path, kind)
    values = {n: (values_of_8bit if kind == "int8" else values_of)(model.get_submodule(n)) for n in QUERIES}
    adapter = write_adapter(tmp_path / "adapter", QUERIES, target_modules=["q_proj"])
    report = merge_checkpoint(tmp_path / "base", (adapter, 0.5), tmp_path / "out", dtype=dtype, verify=True)
    assert report.checked["worst_ulps"] < (4 if dtype else 2) and report.checked["rows"] == 32
    assert not any(tmp_path.glob("out/*quant*")) and report.nbytes == sum(
        t.numel() * t.element_size() for t in read_all(tmp_path / "out").values()
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config

    found = tf.LlamaForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    fused_lora.load_adapter(model, adapter)
    dense = fused_lora.unload(model, merge_adapters=True, dtype=dtype or torch.bfloat16).state_dict()
    assert found.keys() == dense.keys()
    for name, tensor in found.items():
        path = name.removesuffix(".weight")
        if path in QUERIES:
            exact = values[path].double() + delta_of(adapter, path, 0.5)
            eager = (values[path].float() + delta_of(adapter, path, 0.5).float()).to(tensor.dtype)
            assert_no_worse(tensor, eager, exact, name=name)
        else:
            assert torch.equal(tensor, dense[name].to(tensor.dtype)), name


def fp8_base(folder, shapes, block=(16, 24), **config):
    """Weights in fp8 with scales by blocks, the last ones cut off; and their values in fp64."""
    draw, tensors, values = torch.Generator().manual_seed(shifted(3)), {}, {}
    rows, columns = block
    for path, (K, N) in shapes.items():
        codes = torch.randn(N, K, generator=draw).to(FP8)
        scales = torch.rand(-(-N // rows), -(-K // columns), generator=draw) + 0.5
        tensors |= {f"{path}.weight": codes, f"{path}.weight_scale_inv": scales}
        wide = scales.repeat_interleave(rows, 0)[:N].repeat_interleave(columns, 1)[:, :K]
        values[path] = codes.double() * wide.double()
    tensors["model.norm.weight"] = torch.ones(8, dtype=torch.bfloat16)
    entry = {"quant_method": "fp8", "weight_block_size": list(block)}
    return write_base(folder, tensors, 2, {"quantization_config": entry, "dtype": "bfloat16", **config}), values


def test_fp8_and_experts_and_dora(tmp_path, monkeypatch):
    """In pieces that begin inside a block of scales."""
    pieces_of(monkeypatch, 900)
    experts = "model.layers.0.mlp.experts"
    shapes = {f"{experts}.{e}.{p}_proj": s for e in range(2) for p, s in (("gate", (40, 50)), ("up", (40, 50)))}
    base, values = fp8_base(tmp_path / "base", {**shapes, "model.q_proj": (40, 50), "model.k_proj": (40, 50)})
    stacked = write_adapter(tmp_path / "stacked", {experts: (40, 100)}, r=8, target_parameters=["experts.gate_up_proj"])
    change(stacked / "adapter_config.json", r=4)
    plain = write_adapter(tmp_path / "plain", {"model.q_proj": (40, 50)}, use_dora=True)
    key = "base_model.model.model.q_proj.lora_magnitude_vector"
    change(plain / "adapter_model.safetensors", **{key: torch.rand(50) + 1})
    merge_checkpoint(base, [stacked, plain], tmp_path / "out", verify=True)
    found = read_all(tmp_path / "out")
    assert {t.dtype for t in found.values()} == {torch.bfloat16} and len(found) == 7

    held = read_all(stacked)
    A, B = (held[f"base_model.model.{experts}.lora_{x}.weight"].double() for x in "AB")
    delta = 4 * torch.einsum("ore,eri->eoi", B.view(100, 4, 2), A.view(2, 4, 40))
    exact = {path: W.clone() for path, W in values.items()}
    for path in shapes:
        skip = 50 * path.endswith("up_proj")
        exact[path] += delta[int(path.split(".")[-2]), skip : skip + 50]
    sums = exact["model.q_proj"] + delta_of(plain, "model.q_proj")
    exact["model.q_proj"] = read_all(plain)[key].double()[:, None] * sums / sums.norm(dim=1, keepdim=True)
    for path, wanted in exact.items():
        assert_no_worse(found[f"{path}.weight"], wanted.float().bfloat16(), wanted, name=path)


def test_layers_that_are_not_quantised_leave_the_checkpoint_as_it_is(tmp_path):
    base, _ = fp8_base(tmp_path / "base", {"model.q_proj": (40, 50)})
    tensors = read_all(base)
    tensors["model.o_proj.weight"] = torch.ones(8, 8)
    mixed = write_base(tmp_path / "mixed", tensors, config=json.loads((base / "config.json").read_text()))
    merge_checkpoint(mixed, write_adapter(tmp_path / "adapter", {"model.o_proj": (8, 8)}), tmp_path / "out")
    found = read_all(tmp_path / "out")
    assert found["model.q_proj.weight"].dtype is FP8 and found.keys() == tensors.keys()
    assert "quantization_config" in json.loads((tmp_path / "out" / "config.json").read_text())


def test_no_dtype_for_quantised_weights_that_stay(tmp_path):
    """Without a config, too: the codes of 4 bits in bf16 storage are no numbers to cast."""
    layer = linear4bit(64, 64, storage=torch.bfloat16, bias=False)
    tensors = {f"model.q_proj.{key}": tensor for key, tensor in layer.state_dict().items()}
    base = write_base(tmp_path / "base", {**tensors, "model.o_proj.weight": torch.ones(8, 8)})
    adapter = write_adapter(tmp_path / "adapter", {"model.o_proj": (8, 8)})
    with pytest.raises(ValueError, match="dtype: expected none over .* quantised weights"):
        merge_checkpoint(base, adapter, tmp_path / "out", dtype=torch.float32)
    merge_checkpoint(base, adapter, tmp_path / "out")
    assert all(torch.equal(read_all(tmp_path / "out")[name], tensor) for name, tensor in tensors.items())


def test_without_bitsandbytes(tmp_path, monkeypatch):
    quantised(tmp_path, "int8")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(AdapterError, match="expected bitsandbytes to dequantise it with"):
        merge_checkpoint(tmp_path / "base", write_adapter(tmp_path / "adapter", QUERIES), tmp_path / "out")


def entry(**settings):
    return lambda base: change(base / "config.json", quantization_config=settings)


def tensors(**held):
    return lambda base: change(base / SINGLE, **{name.replace("__", "."): t for name, t in held.items()})


@pytest.mark.parametrize(
    "damage, options, message",
    [
        (entry(quant_method="gptq", weight_block_size=[16, 24]), {}, "quant_method bitsandbytes or fp8, found gptq"),
        (entry(quant_method="fp8"), {}, "weight_block_size"),
        (entry(quant_method="fp8", weight_block_size=[16, 0]), {}, "weight_block_size"),
        (entry(quant_method="fp8", weight_block_size=[16, 16]), {}, "weight_scale_inv: expected \\[4, 3\\]"),
        (tensors(model__q_proj__weight_scale_inv=None), {}, "float8_e4m3fn in 'model.q_proj.weight'"),
        (tensors(model__other=torch.ones(2, 2, dtype=torch.int8)), {}, "model.other: expected a tensor that is not"),
        (tensors(model__q_proj__weight=None, model__q_proj__qweight=torch.ones(2, 2).int()), {}, "of GPTQ or AWQ"),
        (tensors(model__q_proj__weight=None, model__q_proj___weight_qdata=torch.ones(2, 2).char()), {}, "of torchao"),
        (lambda base: change(base / "config.json", dtype=None), {}, "dtype: expected one of"),
        (lambda base: None, {"record": "record"}, "record: expected none over quantised"),
    ],
)
def test_what_is_refused(tmp_path, damage, options, message):
    base, _ = fp8_base(tmp_path / "parts", {"model.q_proj": (40, 50)})
    config = json.loads((base / "config.json").read_text())
    base = write_base(tmp_path / "base", read_all(base), config=config)
    adapter = write_adapter(tmp_path / "adapter", {"model.q_proj": (40, 50)})
    damage(base)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=message):
        merge_checkpoint(base, adapter, tmp_path / "out", **{n: tmp_path / value for n, value in options.items()})
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "part, value, message",
    [
        ("weight.absmax", torch.ones(3), "absmax: expected \\[64\\] of torch.uint8"),
        ("weight.nested_absmax", torch.ones(2), "nested_absmax: expected \\[1\\]"),
        ("weight.nested_quant_map", None, "nested_quant_map: expected a tensor \\[256\\]"),
        ("weight", torch.ones(100, 1, dtype=torch.uint8), "100 bytes for"),
        ("weight.quant_state.bitsandbytes__nf4", torch.ones(4, dtype=torch.uint8), "the state of a 4-bit weight"),
    ],
)
def test_damaged_parts_of_4_bits(tmp_path, part, value, message):
    quantised(tmp_path, "nf4")
    held, layer = read_all(tmp_path / "base"), next(iter(QUERIES))
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    held[f"{layer}.{part}"] = value
    held = {name: tensor for name, tensor in held.items() if tensor is not None}
    base = write_base(tmp_path / "damaged", held, config=config)
    with pytest.raises(AdapterError, match=message):
        merge_checkpoint(base, write_adapter(tmp_path / "adapter", QUERIES), tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
