"""Merging files: the bits of a merge in the model, memory of a few pieces, an interrupt at any moment, bad input."""

import copy
import errno
import json
import os
import random
import shutil
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import peft
import pytest
import torch
import transformers as tf

import fused_lora
from fused_lora.adapters import AdapterError
from fused_lora.checkpoints import changes, merge_checkpoint, stream, unmerge_checkpoint
from fused_lora.checkpoints.adapter_file import open_adapters
from fused_lora.cli import main
from fused_lora.testing.numeric import assert_close, assert_no_worse
from helpers import checkpoint_files
from helpers.alone import alone, run_killed
from helpers.checkpoint_files import (
    SINGLE,
    VOCABULARY,
    K,
    N,
    change,
    contents,
    decoder,
    read_all,
    write_adapter,
    write_base,
)
from helpers.seeds import shifted

QKV = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qkv"]
SHAPES = {path: (K, N if path.endswith("q_proj") else 16) for path in QKV}
DOWN = {"model.layers.0.mlp.down_proj": (N, K)}
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SMALL = dict(vocab_size=90, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
TEXT = dict(**SMALL, num_key_value_heads=2)
VISION = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=28)
LLAVA = dict(text_config=dict(model_type="llama", **TEXT))
LLAVA["vision_config"] = dict(model_type="clip_vision_model", patch_size=14, **VISION)
GPT2 = dict(vocab_size=90, n_embd=32, n_layer=2, n_head=4, n_positions=32)
FOR_TOKENS = dict(target_modules=["q_proj", "v_proj"], lora_bias=True, trainable_token_indices=[3, 7])
FOR_CLASSES = dict(target_modules=["query"], bias="lora_only", task_type="SEQ_CLS")
ALL = dict(target_modules="all-linear")
MODELS = {  # class, its config, dtype, LoRA
    "llama": (tf.LlamaForCausalLM, TEXT, BF16, ALL),
    "gpt2": (tf.GPT2LMHeadModel, GPT2, F32, dict(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    "phi3": (tf.Phi3ForCausalLM, dict(TEXT, pad_token_id=0), F16, dict(ALL, use_rslora=True)),
    "qwen2": (tf.Qwen2ForCausalLM, dict(TEXT, tie_word_embeddings=True), BF16, FOR_TOKENS),
    "dora": (tf.LlamaForCausalLM, TEXT, BF16, dict(ALL, use_dora=True)),
    "bert": (tf.BertForSequenceClassification, SMALL, F32, FOR_CLASSES),
    "llava": (tf.LlavaForConditionalGeneration, LLAVA, BF16, ALL),
}


def trained(model, folder, **config):
    """A PEFT model with an adapter that does something, saved."""
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, **config))
    draw = torch.Generator().manual_seed(shifted(5))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name or "trainable_tokens" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.1)
    wrapped.save_pretrained(folder, save_embedding_layers=False)
    return wrapped


def sameness(found, wanted):
    return {
        n: torch.equal(t.contiguous().view(-1).view(torch.uint8), wanted[n].contiguous().view(-1).view(torch.uint8))
        for n, t in found.items()
    }


@pytest.mark.parametrize("name", MODELS)
def test_the_bits_are_those_of_a_merge_in_the_model(tmp_path, name):
    torch.manual_seed(shifted(0))
    kind, sizes, dtype, config = MODELS[name]
    model = kind(kind.config_class(**sizes)).to(dtype).eval()
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    wrapped = trained(model, tmp_path / "adapter", **config)
    report = merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", verify=True)
    assert report.checked["worst_ulps"] < 2 and report.checked["rows"] > 0 and report.written
    found = kind.from_pretrained(tmp_path / "out").state_dict()

    ours = kind.from_pretrained(tmp_path / "base")
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    fused_lora.load_adapter(ours, tmp_path / "adapter")
    fused_lora.unload(ours, merge_adapters=True)
    same = sameness(found, ours.state_dict())
    if name == "dora":  # sums of norms over other numbers of rows may have another order
        for key, tensor in ours.state_dict().items():
            assert_close(found[key], tensor, terms=32)
    else:
        assert all(same.values()), same
    assert not all(sameness(found, before).values())

    theirs = wrapped.merge_and_unload().state_dict()
    for name, tensor in found.items():
        if tensor.is_floating_point():
            assert_close(tensor, theirs[name], terms=1000)


def test_errors_are_those_of_one_rounding(tmp_path, monkeypatch):
    """Against float64, beside an eager sum that rounds once. In pieces of several sizes."""
    checkpoint_files.pieces_of(monkeypatch, 300)
    tensors = decoder()
    base = write_base(tmp_path / "base", tensors)
    adapter = write_adapter(tmp_path / "adapter", SHAPES, r=8)
    merge_checkpoint(base, adapter, tmp_path / "out")
    held, merged = read_all(adapter), read_all(tmp_path / "out")
    for path in QKV:
        A, B = (held[f"base_model.model.{path}.lora_{x}.weight"] for x in "AB")
        W = tensors[f"{path}.weight"]
        exact = W.double() + 2 * B.double() @ A.double()
        assert_no_worse(merged[f"{path}.weight"], (W.float() + 2 * B @ A).to(W.dtype), exact)


def test_rounding_at_random(tmp_path, monkeypatch):
    """The bits of ``merge(stochastic=...)`` in the model, in any pieces; all bytes come back; another seed is another
    call."""
    torch.manual_seed(shifted(0))
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT)).to(torch.bfloat16).eval()
    model.save_pretrained(tmp_path / "base")
    trained(model, tmp_path / "adapter", target_modules="all-linear")
    options = dict(record=tmp_path / "record", stochastic=shifted(7), verify=True)
    with monkeypatch.context() as patch:
        checkpoint_files.pieces_of(patch, 300)
        report = merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", **options)
    assert report.provenance["stochastic"] == shifted(7) and report.checked["worst_ulps"] > 0.6
    ours = tf.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    fused_lora.load_adapter(ours, tmp_path / "adapter")
    fused_lora.merge(ours, stochastic=shifted(7))
    same = sameness(
        tf.LlamaForCausalLM.from_pretrained(tmp_path / "out").state_dict(), fused_lora.unload(ours).state_dict()
    )
    assert all(same.values()), same
    with pytest.raises(FileExistsError, match="holds something"):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", stochastic=shifted(8))
    unmerge_checkpoint(tmp_path / "out", tmp_path / "record", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tmp_path / "base")


@pytest.mark.parametrize(
    "dtype, options, kind, message",
    [
        (torch.float32, {}, ValueError, "_proj.weight has torch.float32"),
        (torch.bfloat16, {"dtype": torch.float16}, ValueError, "none with a dtype"),
        (torch.bfloat16, {"stochastic": 1.5}, TypeError, "an int or None"),
    ],
)
def test_rounding_at_random_that_is_refused(tmp_path, dtype, options, kind, message):
    base, adapter = write_base(tmp_path / "base", decoder(dtype=dtype)), write_adapter(tmp_path / "adapter", SHAPES)
    with pytest.raises(kind, match=f"stochastic: expected .*{message}"):
        merge_checkpoint(base, adapter, tmp_path / "out", **{"stochastic": 1, **options})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("record", [False, True])
def test_embeddings_and_heads_with_their_copies(tmp_path, monkeypatch, dtype, record):
    """PEFT's files of LoRA on an embedding and a head hold the base's weights, too. Against PEFT's own merge, fp64."""
    checkpoint_files.pieces_of(monkeypatch, 300)
    torch.manual_seed(shifted(4))
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT)).to(dtype)
    model.save_pretrained(tmp_path / "base")
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["embed_tokens", "lm_head", "q_proj"], init_lora_weights=False)
    )
    wrapped.save_pretrained(tmp_path / "adapter")
    assert any("base_layer" in key for key in read_all(tmp_path / "adapter"))
    exact = {name: t.double() for name, t in read_all(tmp_path / "base").items()}
    for path in ("model.embed_tokens", "lm_head"):
        layer = wrapped.get_submodule(f"base_model.model.{path}")
        parts = (layer.lora_embedding_A, layer.lora_embedding_B) if "embed" in path else (layer.lora_A, layer.lora_B)
        A, B = (getattr(p["default"], "weight", p["default"]).detach().double() for p in parts)
        exact[f"{path}.weight"] += (B @ A).t() * 2 if "embed" in path else B @ A * 2
    options = dict(record=tmp_path / "record") if record else dict(verify=True)
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", **options)
    theirs, merged = wrapped.merge_and_unload().state_dict(), read_all(tmp_path / "out")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert_no_worse(merged[name], theirs[name], exact[name])
    if record:
        unmerge_checkpoint(tmp_path / "out", tmp_path / "record", tmp_path / "back")
        assert contents(tmp_path / "back")["model.safetensors"] == contents(tmp_path / "base")["model.safetensors"]


def test_copies_of_another_base_and_unknown_tied_heads_are_refused(tmp_path):
    torch.manual_seed(shifted(4))
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT, tie_word_embeddings=True))
    model.save_pretrained(tmp_path / "base")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["embed_tokens"]))
    wrapped.save_pretrained(tmp_path / "adapter")
    kind = json.loads((tmp_path / "base" / "config.json").read_text())["architectures"]
    change(tmp_path / "base" / "config.json", architectures=["LlavaForConditionalGeneration"])
    with pytest.raises(AdapterError, match="to which the head is tied"):  # of which the name is not known
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    change(tmp_path / "base" / "config.json", architectures=kind)
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    held = read_all(tmp_path / "adapter")[key]
    held[3, 5] += 1
    change(tmp_path / "adapter" / "adapter_model.safetensors", **{key: held})
    with pytest.raises(AdapterError, match="1 of 2880 elements differ"):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    change(tmp_path / "adapter" / "adapter_model.safetensors", **{key: held[1:]})
    with pytest.raises(AdapterError, match="a resized vocabulary. resize the base's"):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


BART = dict(vocab_size=56, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2)
BART |= dict(decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=40)
IDS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
MAMBA = dict(vocab_size=56, hidden_size=16, num_hidden_layers=1, state_size=4, **IDS)
PALIGEMMA = dict(text_config=dict(TEXT, model_type="gemma"), vision_config=dict(VISION, patch_size=14))
WHISPER = dict(BART, num_mel_bins=4, max_source_positions=8, max_target_positions=40, decoder_start_token_id=1, **IDS)
CTRL = dict(vocab_size=56, n_embd=16, dff=24, n_layer=1, n_head=2, n_positions=40)
WITH_TIES = {  # class, its config, LoRA, what the head gets in the files; None: it is refused
    "mamba": (tf.MambaForCausalLM, MAMBA, ["embeddings"], ["lm_head.weight"]),
    "mamba's head": (tf.MambaForCausalLM, MAMBA, ["lm_head"], ["lm_head.weight"]),
    "ctrl": (tf.CTRLLMHeadModel, CTRL, ["w"], ["lm_head.weight"]),
    "biogpt": (tf.BioGptForCausalLM, dict(SMALL, max_position_embeddings=40, **IDS), ["embed_tokens"], None),
    "paligemma's head": (tf.PaliGemmaForConditionalGeneration, PALIGEMMA, ["lm_head"], ["lm_head.weight"]),
    "whisper's head": (tf.WhisperForConditionalGeneration, WHISPER, ["proj_out"], ["proj_out.weight"]),
    "bart's head": (tf.BartForConditionalGeneration, BART, ["lm_head"], None),
    "a classifier": (tf.BertForSequenceClassification, SMALL, ["word_embeddings"], []),
}


@pytest.mark.parametrize("name", WITH_TIES)
def test_ties_of_other_models(tmp_path, name):
    """Where the files would load with other ties, as those of an encoder, nothing is written."""
    kind, sizes, targets, added = WITH_TIES[name]
    torch.manual_seed(shifted(0))
    model = kind(kind.config_class(**sizes, tie_word_embeddings=True)).eval()
    model.save_pretrained(tmp_path / "base")
    wrapped = fused_lora.inject(model, fused_lora.LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    fused_lora.save_adapter(wrapped.eval(), tmp_path / "adapter")
    if added is None:
        with pytest.raises(AdapterError, match="a head that is all that is tied|to which the head is"):
            merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
        return
    report = merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", verify=True)
    assert [c["tensor"] for c in report.changes if c["added"]] == added
    tokens = torch.arange(1, 30)[None]
    inputs = dict(input_features=torch.ones(1, 4, 16), decoder_input_ids=tokens)
    inputs = inputs if sizes is WHISPER else dict(input_ids=tokens)
    merged = kind.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert_close(merged(**inputs).logits, wrapped(**inputs).logits, terms=2000)


def test_the_models_kind_says_which_weights_are_transposed(tmp_path):
    """An adapter's fan_in_fan_out need not: save_adapter leaves it as it was given, and PEFT has one for all layers."""
    torch.manual_seed(shifted(0))
    model = tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False))
    model.eval().save_pretrained(tmp_path / "base")
    targets = ["attn.c_proj", "c_attn", "lm_head"]  # the first is square: its shape tells nothing
    for fan_in_fan_out in (False, True):
        config = dict(target_modules=targets, init_lora_weights=False, fan_in_fan_out=fan_in_fan_out)
        adapted = fused_lora.inject(copy.deepcopy(model), fused_lora.LoraConfig(r=4, **config)).eval()
        name = f"adapter {fan_in_fan_out}"
        fused_lora.save_adapter(adapted, tmp_path / name)
        merge_checkpoint(tmp_path / "base", tmp_path / name, tmp_path / f"out {name}", verify=True)
        merged, tokens = tf.GPT2LMHeadModel.from_pretrained(tmp_path / f"out {name}").eval(), torch.arange(1, 30)[None]
        with torch.no_grad():
            assert_close(merged(tokens).logits, adapted(tokens).logits, terms=2000)


@pytest.mark.parametrize("code", [False, True])
def test_fan_in_fan_out_counts_where_the_model_has_code_of_its_own(tmp_path, code):
    """Llama's square weights are no Conv1D's, whatever the adapter says; another author's may be."""
    tensors = {"q.weight": torch.randn(K, K, generator=torch.Generator().manual_seed(shifted(0)))}
    base = write_base(tmp_path / "base", tensors, config={"auto_map": {}} if code else {})
    adapter = write_adapter(tmp_path / "adapter", {"q": (K, K)}, fan_in_fan_out=True)
    merge_checkpoint(base, adapter, tmp_path / "out", verify=True)
    held, config = read_all(adapter), json.loads((adapter / "adapter_config.json").read_text())
    A, B = (held[f"base_model.model.q.lora_{part}.weight"] for part in "AB")
    delta = config["lora_alpha"] / config["r"] * B @ A
    assert_close(read_all(tmp_path / "out")["q.weight"], tensors["q.weight"] + (delta.t() if code else delta), terms=8)


def test_a_saved_module_may_hold_a_scalar_beside_a_tied_head(tmp_path):
    config = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    base = write_base(tmp_path / "base", {**decoder(), "scale.logit": torch.tensor(1.0)}, config=config)
    adapter = write_adapter(tmp_path / "adapter", SHAPES, modules_to_save=["scale"])
    change(adapter / "adapter_model.safetensors", **{"base_model.model.scale.logit": torch.tensor(2.0)})
    merge_checkpoint(base, adapter, tmp_path / "out", verify=True)
    assert read_all(tmp_path / "out")["scale.logit"] == 2


@pytest.mark.parametrize("entry", [True, None])
def test_a_head_is_tied_where_no_config_says_so(tmp_path, entry):
    """Before transformers 5 an entry of True was not written. GPT-2's head is known, others are refused."""
    torch.manual_seed(shifted(0))
    sizes = dict(n_layer=1, n_embd=16, n_head=2, vocab_size=56, n_positions=40, bos_token_id=0, eos_token_id=0)
    model = tf.GPT2LMHeadModel(tf.GPT2Config(**sizes)).eval()
    model.save_pretrained(tmp_path / "base")
    change(tmp_path / "base" / "config.json", tie_word_embeddings=entry)
    wrapped = trained(model, tmp_path / "adapter", target_modules=["wte"], init_lora_weights=False)
    report = merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", verify=True)
    assert [c["tensor"] for c in report.changes if c["added"]] == ["lm_head.weight"]
    tokens = torch.arange(1, 30)[None]
    merged = tf.GPT2LMHeadModel.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert_close(merged(tokens).logits, wrapped(tokens).logits, terms=1000)
    for name in ("Gemma3ForConditionalGeneration", "BertForMaskedLM", "XLNetLMHeadModel"):
        change(tmp_path / "base" / "config.json", architectures=[name])
        with pytest.raises(AdapterError, match="wte.weight', to which the head is tied"):
            merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out2")
    change(tmp_path / "base" / "config.json", architectures=["RobertaForCausalLM"])
    change(tmp_path / "base" / SINGLE, **{"lm_head.dense.weight": torch.ones(16, 16)})
    with pytest.raises(AdapterError, match="wte.weight', to which the head is tied"):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out2")
    change(tmp_path / "base" / "config.json", architectures=["GPT2Model"], tie_word_embeddings=None)
    report = merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out3")  # it has no head
    assert not any(c["added"] for c in report.changes)


def test_a_linear_layer_with_an_embeddings_name_is_merged_beside_tied_ones(tmp_path):
    path, draw = "model.layers.0.mlp.shared", torch.Generator().manual_seed(shifted(6))
    tensors = {"model.embed_tokens.weight": torch.randn(56, K, generator=draw)}
    tensors[f"{path}.weight"] = torch.randn(N, K, generator=draw)
    config = dict(architectures=["LlamaForCausalLM"], tie_word_embeddings=True)
    base = write_base(tmp_path / "base", tensors, config=config)
    report = merge_checkpoint(base, write_adapter(tmp_path / "adapter", {path: (K, N)}), tmp_path / "out", verify=True)
    assert [change["tensor"] for change in report.changes] == [f"{path}.weight"]


def dora_adapter(folder, shapes, **options):
    """An adapter of write_adapter with magnitudes."""
    adapter = write_adapter(folder, shapes, use_dora=True, **options)
    draw = torch.Generator().manual_seed(shifted(9))
    change(
        adapter / "adapter_model.safetensors",
        **{
            f"base_model.model.{path}.lora_magnitude_vector": 3 + torch.rand(n, generator=draw)
            for path, (_, n) in shapes.items()
        },
    )
    return adapter


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dora_beside_lora_and_back(tmp_path, monkeypatch, dtype):
    """Errors of one rounding, in pieces of a few rows; a record gives every byte back."""
    checkpoint_files.pieces_of(monkeypatch, 300)
    base = write_base(tmp_path / "base", decoder(dtype=dtype), shards=2)
    one, other = write_adapter(tmp_path / "lora", SHAPES), dora_adapter(tmp_path / "dora", SHAPES, r=3, seed=2)
    report = merge_checkpoint(base, [(one, 0.5), other], tmp_path / "out", record=tmp_path / "record", verify=True)
    assert report.checked["worst_ulps"] < (4 if dtype is torch.float32 else 2)  # there the scale's roundings count
    tensors, merged, lora, dora = (read_all(folder) for folder in (base, tmp_path / "out", one, other))
    for path in QKV:
        W, parts = tensors[f"{path}.weight"], []
        for held in (lora, dora):
            A, B = (held[f"base_model.model.{path}.lora_{x}.weight"] for x in "AB")
            parts.append((A, B))
        m = dora[f"base_model.model.{path}.lora_magnitude_vector"]

        def by(wide, W=W, parts=parts, m=m):
            first, second = (2 * B.to(wide) @ A.to(wide) for A, B in parts)
            scale = m.to(wide) / (W.to(wide) + second).norm(dim=1)
            return scale[:, None] * (W.to(wide) + 0.5 * first + second)

        assert_no_worse(merged[f"{path}.weight"], by(torch.float32).to(dtype), by(torch.float64))
    unmerge_checkpoint(tmp_path / "out", tmp_path / "record", tmp_path / "back")
    before = contents(base)
    assert {name: raw for name, raw in contents(tmp_path / "back").items() if name in before} == before


def test_dora_of_parts_in_a_fused_weight(tmp_path):
    """Rows of a fused weight get what the parts would get alone."""
    tensors, shapes = decoder(layers=1), {path: SHAPES[path] for path in QKV[:3]}
    fused = {name: t for name, t in tensors.items() if ".self_attn." not in name}
    fused["model.layers.0.self_attn.qkv_proj.weight"] = torch.cat([tensors[f"{path}.weight"] for path in shapes])
    adapter = dora_adapter(tmp_path / "adapter", shapes)
    merge_checkpoint(write_base(tmp_path / "apart", tensors), adapter, tmp_path / "a")
    merge_checkpoint(write_base(tmp_path / "base", fused), adapter, tmp_path / "b", verify=True)
    a, b = read_all(tmp_path / "a"), read_all(tmp_path / "b")
    whole = torch.cat([a[f"{path}.weight"] for path in shapes])
    assert_close(b["model.layers.0.self_attn.qkv_proj.weight"], whole, terms=32)


@pytest.mark.parametrize("dtype, wrong", [(torch.float32, 2e-5), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_verify_of_dora_finds_a_wrong_magnitude(tmp_path, monkeypatch, dtype, wrong):
    """By a few units in the last place of the weights, of rows of 1,024 numbers, whose sums have errors of their own. A
    row whose norm is known badly, as it is nearly cancelled, is no alarm."""
    shapes = {f"model.layers.0.self_attn.{p}_proj": (1024, 24) for p in "qk"}
    draw, [_, path] = torch.Generator().manual_seed(shifted(3)), shapes
    tensors = {f"{name}.weight": torch.randn(n, k, generator=draw) for name, (k, n) in shapes.items()}
    adapter = dora_adapter(tmp_path / "adapter", shapes)
    A, B = (read_all(adapter)[f"base_model.model.{path}.lora_{x}.weight"] for x in "AB")
    tensors[f"{path}.weight"][0] = -1.9999 * (B @ A)[0]
    base = write_base(tmp_path / "base", {name: t.to(dtype) for name, t in tensors.items()})
    report = merge_checkpoint(base, adapter, tmp_path / "out", verify=True)
    assert report.checked["rows"] == 48 and report.checked["lost_share"] < 0.01
    own = changes.Segment.rows

    def scaled(segment, term, name):
        return own(segment, term, name) * (1 + wrong * (name == "lora_magnitude"))

    with monkeypatch.context() as patch:
        patch.setattr(changes.Segment, "rows", scaled)
        with pytest.raises(
            AdapterError, match=r"k_proj.weight: expected W \+ s B A, scaled to the magnitude, in row [01] "
        ):
            merge_checkpoint(base, adapter, tmp_path / "again", verify=True)
    assert not (tmp_path / "again").exists()


def test_verify_of_dora_finds_a_changed_byte(tmp_path, capsys):
    """Of a merged weight and of one that had to stay, by the command line."""
    base, adapter = write_base(tmp_path / "base", decoder(dtype=torch.float16)), dora_adapter(tmp_path / "a", SHAPES)
    call = ["merge", "--base", str(base), "--adapter", str(adapter), "--out", str(tmp_path / "out"), "--verify"]
    assert main(call) == 0
    assert "6 tensors: merge" in (said := capsys.readouterr().out) and "verified 104 rows of merged weights" in said
    file = tmp_path / "out" / SINGLE
    whole = file.read_bytes()
    for name, text in ((f"{QKV[4]}.weight", "scaled to the magnitude, in row 2"), ("model.norm.weight", "the bytes")):
        raw = bytearray(whole)
        at = raw.index(read_all(tmp_path / "out")[name].view(torch.uint8).numpy().tobytes())
        row = 2 * K if "proj" in name else 0
        raw[at + 2 * row + 1] ^= 1  # of the exponent, or of a sign's neighbour
        file.write_bytes(raw)
        assert main(call) == 1
        assert f"{name}: expected" in (said := capsys.readouterr().err) and text in said
        file.write_bytes(whole)
    assert main(call) == 0


@pytest.mark.parametrize("config, weight, message", [({}, 0.5, "a weight of 1"), ({"fan_in_fan_out": True}, 1, "rows")])
def test_dora_that_is_refused(tmp_path, config, weight, message):
    base = write_base(tmp_path / "base", {f"{QKV[0]}.weight": torch.ones(K, K)}, config={"auto_map": {}})
    adapter = dora_adapter(tmp_path / "adapter", {QKV[0]: (K, K)}, **config)
    with pytest.raises(AdapterError, match=message):
        merge_checkpoint(base, (adapter, weight), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(AdapterError, match="use_dora"):  # its delta is not B A alone
        fused_lora.shrink_adapter(adapter, tmp_path / "small", 1)


def test_command_line_record_and_unmerge(tmp_path, capsys):
    """Two adapters by the command line, weighted; the record gives every file back byte for byte."""
    base = write_base(tmp_path / "base", decoder(dtype=torch.float16), shards=3)
    write_adapter(tmp_path / "a", SHAPES)
    write_adapter(tmp_path / "b:c", {**DOWN, QKV[0]: SHAPES[QKV[0]]}, r=3, seed=2)
    before, out, record = contents(base), str(tmp_path / "out"), str(tmp_path / "record")
    call = ["merge", "--base", str(base), "--adapter", f"{tmp_path / 'a'}:0.5", "--adapter", str(tmp_path / "b:c")]
    assert main([*call, "--out", out, "--dry-run", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert {c["tensor"]: c["rank"] for c in planned["changes"]}[f"{QKV[0]}.weight"] == 7
    assert len(planned["changes"]) == 7 and not os.path.exists(out) and not os.path.exists(f"{out}.partial")

    assert main([*call, "--out", out, "--record", record, "--verify"]) == 0
    said = capsys.readouterr().out
    assert "7 tensors: merge" in said and "MB/s" in said
    merged = read_all(tmp_path / "out")
    A, B = (read_all(tmp_path / "a")[f"base_model.model.{QKV[1]}.lora_{x}.weight"] for x in "AB")
    W = read_all(base)[f"{QKV[1]}.weight"]
    expected = W.clone()
    fused_lora.functional.merge_(expected, [A], [B], [2.0 * 0.5])
    assert torch.equal(merged[f"{QKV[1]}.weight"], expected) and not torch.equal(expected, W)
    about = json.loads((tmp_path / "out" / "fused_lora_merge.json").read_text())
    assert [(a["path"], a["weight"]) for a in about["adapters"]] == [
        (str(tmp_path / "a"), 0.5),
        (str(tmp_path / "b:c"), 1.0),
    ]

    assert main([*call, "--out", out, "--record", record]) == 0  # once more: it is there already
    assert "3 were there already" in capsys.readouterr().out
    assert main(["unmerge", "--merged", out, "--record", record, "--out", str(tmp_path / "back")]) == 0
    assert contents(tmp_path / "back") == before == contents(base)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b:c", "back", "base", "out", "record"]

    change(tmp_path / "out" / "model-00001-of-00003.safetensors", **{f"{QKV[0]}.weight": None})
    assert main(["unmerge", "--merged", out, "--record", record, "--out", str(tmp_path / "no")]) == 1
    assert "the record of another file" in capsys.readouterr().err


def test_unmerge_refuses_a_changed_weight(tmp_path):
    base, adapter = write_base(tmp_path / "base", decoder()), write_adapter(tmp_path / "adapter", SHAPES)
    merge_checkpoint(base, adapter, tmp_path / "out", record=tmp_path / "record")
    file = tmp_path / "out" / SINGLE
    raw = bytearray(file.read_bytes())
    at = raw.index(read_all(tmp_path / "out")[f"{QKV[0]}.weight"].view(torch.uint8).numpy().tobytes())
    raw[at + 100] ^= 1
    file.write_bytes(raw)
    with pytest.raises(RuntimeError, match=f"/out/{SINGLE}: {QKV[0]}.weight: it is not what the merge left"):
        unmerge_checkpoint(tmp_path / "out", tmp_path / "record", tmp_path / "back")
    assert not (tmp_path / "back").exists() and not (tmp_path / "back.partial").exists()


@pytest.mark.parametrize("files", [{"../evil.json": "{}"}, {"/tmp/evil.json": "{}"}, {"config.json": 3}, ["a"], None])
def test_unmerge_writes_no_other_files_of_a_record(tmp_path, files):
    base, adapter = write_base(tmp_path / "base", decoder()), write_adapter(tmp_path / "adapter", SHAPES)
    merge_checkpoint(base, adapter, tmp_path / "out", record=tmp_path / "record")
    change(tmp_path / "record" / "record.json", files=files)
    before = contents(tmp_path)
    with pytest.raises(AdapterError, match="record.json: files: expected texts of .json files in the folder"):
        unmerge_checkpoint(tmp_path / "out", tmp_path / "record", tmp_path / "back")
    assert contents(tmp_path) == before


def test_a_chain_of_merges_notes_all_of_them_in_linear_room(tmp_path):
    base, sizes = write_base(tmp_path / "base", decoder()), []
    for i in range(12):
        merge_checkpoint(base, write_adapter(tmp_path / f"a{i}", SHAPES, seed=i + 10), in_place=True)
        sizes.append(len(json.dumps(read_names(base / SINGLE)["__metadata__"])))
    about, found = json.loads((base / "fused_lora_merge.json").read_text()), []
    while about:
        found.append(os.path.basename(about["adapters"][0]["path"]))
        about = about.get("before")
    assert found == [f"a{i}" for i in reversed(range(12))]
    assert sizes[-1] - sizes[-2] < 2 * (sizes[2] - sizes[1])
    with pytest.raises(ValueError, match="'.*a3' are merged into"):
        merge_checkpoint(base, tmp_path / "a3", in_place=True)


def test_a_config_that_changed_meanwhile_is_another_merge(tmp_path, monkeypatch):
    """It says what quantised weights become, and whether a head is tied."""
    base, adapter = write_base(tmp_path / "base", decoder(), shards=3), write_adapter(tmp_path / "adapter", SHAPES)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        full_disk(patch)
        merge_checkpoint(base, adapter, tmp_path / "out")
    change(base / "config.json", dtype="float16")
    with pytest.raises(FileExistsError, match="what another call left unfinished"):
        merge_checkpoint(base, adapter, tmp_path / "out")


def test_a_tied_head_gets_a_weight_of_its_own(tmp_path):
    torch.manual_seed(shifted(0))
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT, tie_word_embeddings=True)).eval()
    model.save_pretrained(tmp_path / "base")
    wrapped = trained(model, tmp_path / "adapter", target_modules=["lm_head", "q_proj"])
    tokens = torch.arange(1, 30)[None]
    with torch.no_grad():
        wanted, base = wrapped(tokens).logits, model(tokens).logits
    report = merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", record=tmp_path / "record")
    assert [c["tensor"] for c in report.changes if c["added"]] == ["lm_head.weight"]
    merged = tf.LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert not merged.config.tie_word_embeddings
    with torch.no_grad():
        assert_close(merged(tokens).logits, wanted, terms=1000)
    assert torch.equal(base, wanted)  # of the model in place
    unmerge_checkpoint(tmp_path / "out", tmp_path / "record", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tmp_path / "base")


@pytest.mark.parametrize("order", [["lora", "saved"], ["saved", "lora"], ["saved", "saved2"]])
def test_a_tied_head_is_changed_by_one_of_two_kinds(tmp_path, order):
    """The second would take the place of what the first adds."""
    base = write_base(tmp_path / "base", decoder(), config={"architectures": ["LlamaForCausalLM"]})
    write_adapter(tmp_path / "lora", {"lm_head": (K, VOCABULARY)})
    for name in ("saved", "saved2"):
        write_adapter(tmp_path / name, {QKV[0]: SHAPES[QKV[0]]}, modules_to_save=["lm_head"])
        saved = {"base_model.model.lm_head.weight": torch.ones(VOCABULARY, K)}
        change(tmp_path / name / "adapter_model.safetensors", **saved)
    with pytest.raises(AdapterError, match="/(saved2?|lora)/.*: expected (one change of 'lm_head.weight'|no other te)"):
        merge_checkpoint(base, [tmp_path / name for name in order], tmp_path / "out")
    for name in ("lora", "saved"):
        merge_checkpoint(base, tmp_path / name, tmp_path / f"with {name}", verify=True)


@pytest.mark.parametrize("config", [{"target_modules": ["embed_tokens"]}, {"modules_to_save": ["embed_tokens"]}])
def test_an_embedding_alone_is_untied_from_its_head(tmp_path, config):
    """The merged files compute what the adapted model does. PEFT's merge would change the head, too."""
    torch.manual_seed(shifted(0))
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT, tie_word_embeddings=True)).eval()
    model.save_pretrained(tmp_path / "base")
    before = model.lm_head.weight.detach().clone()
    lora = peft.LoraConfig(**{"target_modules": ["q_proj"], **config}, r=4, init_lora_weights=False)
    wrapped = peft.get_peft_model(model, lora).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(1.5)
    wrapped.save_pretrained(tmp_path / "adapter")
    tokens = torch.arange(1, 30)[None]
    options = dict(record=tmp_path / "record", verify=True)
    report = merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", **options)
    assert [(c["tensor"], c["kind"]) for c in report.changes if c["added"]] == [("lm_head.weight", "copy")]
    merged = tf.LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert not merged.config.tie_word_embeddings and torch.equal(merged.lm_head.weight, before)
    with torch.no_grad():
        assert_close(merged(tokens).logits, wrapped(tokens).logits, terms=1000)
    unmerge_checkpoint(tmp_path / "out", tmp_path / "record", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tmp_path / "base")


def test_fused_and_apart(tmp_path):
    """Projections that only one of the two has in one matrix: the same bits as each in its own place."""
    tensors, plain = decoder(1), tmp_path / "plain"
    paths = {p: f"model.layers.0.self_attn.{p}_proj" for p in ("q", "k", "v", "qkv")}
    shapes = {paths["q"]: (K, N), paths["v"]: (K, 16)}
    write_base(plain, tensors)
    write_adapter(tmp_path / "apart", shapes)
    merge_checkpoint(plain, tmp_path / "apart", tmp_path / "out")
    wanted = read_all(tmp_path / "out")

    parts = [f"{paths[p]}.weight" for p in "qkv"]
    fused = {n: t for n, t in tensors.items() if n not in parts} | {
        f"{paths['qkv']}.weight": torch.cat([tensors[n] for n in parts])
    }
    write_base(tmp_path / "fused", fused)
    merge_checkpoint(tmp_path / "fused", tmp_path / "apart", tmp_path / "out2", verify=True)
    assert torch.equal(read_all(tmp_path / "out2")[f"{paths['qkv']}.weight"], torch.cat([wanted[n] for n in parts]))

    write_adapter(tmp_path / "together", {paths["qkv"]: (K, N + 32)})
    merge_checkpoint(tmp_path / "fused", tmp_path / "together", tmp_path / "out3")
    merge_checkpoint(plain, tmp_path / "together", tmp_path / "out4", verify=True)
    apart = read_all(tmp_path / "out4")
    assert torch.equal(read_all(tmp_path / "out3")[f"{paths['qkv']}.weight"], torch.cat([apart[n] for n in parts]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_another_dtype(tmp_path, dtype):
    tensors = decoder()
    base, adapter = (
        write_base(tmp_path / "base", tensors, config={"dtype": "bfloat16"}),
        write_adapter(tmp_path / "a", SHAPES),
    )
    merge_checkpoint(base, adapter, tmp_path / "out", dtype=dtype, verify=True)
    found = read_all(tmp_path / "out")
    assert {t.dtype for t in found.values()} == {dtype}
    assert torch.equal(found["model.norm.weight"], tensors["model.norm.weight"].to(dtype))
    wide = {name: tensor.float() for name, tensor in tensors.items()}
    merge_checkpoint(write_base(tmp_path / "wide", wide), adapter, tmp_path / "out2")
    assert torch.equal(found[f"{QKV[0]}.weight"], read_all(tmp_path / "out2")[f"{QKV[0]}.weight"].to(dtype))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(dtype)[6:]


def test_in_place(tmp_path):
    base, adapter = write_base(tmp_path / "base", decoder(), shards=2), write_adapter(tmp_path / "adapter", SHAPES)
    (base / "pytorch_model.bin").write_bytes(b"kept")
    merge_checkpoint(base, adapter, tmp_path / "out")
    report = merge_checkpoint(base, adapter, in_place=True)
    assert report.left_out == ["pytorch_model.bin"]
    same = sameness(read_all(base), read_all(tmp_path / "out"))
    assert all(same.values()) and (base / "pytorch_model.bin").read_bytes() == b"kept"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "out"]


def test_in_place_keeps_what_lies_in_folders(tmp_path):
    """Weights of other kinds, hidden files, an adapter and links beside what is carried along, as hubs have them."""
    base, adapter = write_base(tmp_path / "base", decoder()), write_adapter(tmp_path / "adapter", SHAPES)
    for folder in ("original/deep", "adapters"):
        (base / folder).mkdir(parents=True)
    for name in ("params.json", "consolidated.00.pth", ".hidden", "deep/tokenizer.model", "deep/more.bin"):
        (base / "original" / name).write_text(name)
    shutil.copytree(adapter, base / "adapters" / "poet")
    (base / "adapters" / "poet" / "README.md").write_text("hi")
    (base / "original" / "link").symlink_to(adapter)
    kept = {name: raw for name, raw in contents(base).items() if name != SINGLE}
    report = merge_checkpoint(base, adapter, in_place=True)
    assert "original/consolidated.00.pth" in report.left_out
    assert kept.items() <= contents(base).items() and (base / "original" / "link").is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


def test_in_place_needs_a_folder_that_it_can_empty(tmp_path, monkeypatch):
    base, adapter = write_base(tmp_path / "base", decoder()), write_adapter(tmp_path / "adapter", SHAPES)
    before = contents(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, _: path != str(base))
    with pytest.raises(PermissionError, match="in_place: no permission to write in '.*base'"):
        merge_checkpoint(base, adapter, in_place=True)
    assert contents(tmp_path) == before


def test_the_current_directory_is_not_replaced(tmp_path, monkeypatch):
    """Whoever calls from there would be left in a deleted one."""
    base, adapter = write_base(tmp_path / "base", decoder()), write_adapter(tmp_path / "adapter", SHAPES)
    (tmp_path / "out").mkdir()
    before = contents(tmp_path)
    monkeypatch.chdir(base)
    with pytest.raises(ValueError, match="in_place: expected a folder that is not the current directory or above it"):
        merge_checkpoint(".", adapter, in_place=True)
    monkeypatch.chdir(tmp_path / "out")
    with pytest.raises(ValueError, match="out: expected a folder that is not the current directory or above it"):
        merge_checkpoint(base, adapter, ".")
    assert contents(tmp_path) == before
    (tmp_path / "out").rmdir()  # a process may be left in a deleted one
    merge_checkpoint(base, adapter, tmp_path / "out", verify=True)


@needs_fork
@pytest.mark.experiment("C6", full=20, quick=4)
def test_killed_and_resumed(tmp_path, monkeypatch, count):
    """SIGKILL at a random moment of a merge of files, and of the call that goes on: no output is there, and the base is
    intact. The next call ends with the same bytes as one that was not killed, record included."""
    checkpoint_files.pieces_of(monkeypatch, 512)
    base, adapter = write_base(tmp_path / "base", decoder(4), shards=7), write_adapter(tmp_path / "adapter", SHAPES)
    before, done, draw, kept = contents(base), [], random.Random(shifted(3)), 0
    merge_checkpoint(
        base, adapter, tmp_path / "whole", record=tmp_path / "whole record", progress=lambda *x: done.append(x)
    )
    wanted = contents(tmp_path / "whole"), contents(tmp_path / "whole record")
    for kill in range(count):
        reading, writing = os.pipe()

        def work(writing=writing):
            tell = lambda done, total: os.write(writing, b"x")  # noqa: E731
            merge_checkpoint(base, adapter, tmp_path / "out", record=tmp_path / "record", progress=tell)

        # far enough for a finished shard, and then not to the end
        stop = draw.randint(len(done) // 4, len(done) // 3) if kill % 2 else draw.randint(len(done) // 2, len(done) - 8)

        def wait(reading=reading, writing=writing, stop=stop):
            os.close(writing)
            for _ in range(stop):
                assert os.read(reading, 1)  # nothing: the merge has ended

        run_killed(work, wait)
        os.close(reading)
        assert not (tmp_path / "out").exists() and contents(base) == before
        if kill % 2:  # killed twice
            report = merge_checkpoint(base, adapter, tmp_path / "out", record=tmp_path / "record")
            kept += len(report.kept)
            assert report.written and (contents(tmp_path / "out"), contents(tmp_path / "record")) == wanted
            shutil.rmtree(tmp_path / "out")
            shutil.rmtree(tmp_path / "record")
    assert kept


@needs_fork
def test_memory_holds_a_few_pieces(tmp_path, monkeypatch):
    """160 MB in two shards, the largest tensor 64 MB, with 64 MB of address space beyond what the process has."""
    checkpoint_files.pieces_of(monkeypatch, 1 << 20)
    sizes = {"model.embed_tokens": 64, "model.layers.0.mlp.down_proj": 64, "model.layers.0.self_attn.q_proj": 32}
    base = write_base(
        tmp_path / "base",
        {f"{p}.weight": torch.ones(mb << 10, 512, dtype=torch.bfloat16) for p, mb in sizes.items()},
        shards=2,
    )
    shapes = {path: (512, mb << 10) for path, mb in list(sizes.items())[1:]}
    adapter = write_adapter(tmp_path / "adapter", shapes, r=1)
    fused_lora.functional.merge_(torch.zeros(8, 8, dtype=torch.bfloat16), [torch.ones(1, 8)], [torch.ones(8, 1)], [1.0])

    @alone
    def merge():
        merge_checkpoint(base, adapter, tmp_path / "out")

    merge()
    assert len(read_all(tmp_path / "out")) == 3


def full_disk(monkeypatch):
    """Every write after the first few fails."""
    real, calls = os.pwrite, []

    def write(file, data, at):
        calls.append(len(data))
        if len(calls) > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(file, data, at)

    monkeypatch.setattr(stream.os, "pwrite", write)


@pytest.mark.parametrize("which", ["adapter", "base"])
def test_files_that_are_written_over_meanwhile(tmp_path, monkeypatch, which):
    """In place, as ``save_file`` does it: the open file has other numbers from then on. No shard of such is kept."""
    checkpoint_files.pieces_of(monkeypatch, 512)
    base, adapter = write_base(tmp_path / "base", decoder(), shards=3), write_adapter(tmp_path / "adapter", SHAPES)
    done = []
    for file in tmp_path.rglob("*.safetensors"):  # clocks of some file systems are coarse
        os.utime(file, (0, 0))

    def write_over(*_):
        done.append(1)
        if len(done) == 3:
            file = adapter / "adapter_model.safetensors" if which == "adapter" else first(base)
            file.write_bytes(file.read_bytes()[:-64] + b"\1" * 64)

    # a reader may also come between the end of the old content and the new one
    found = "(stays as it is, found another size|keeps its size, found an end)"
    with pytest.raises(AdapterError, match=f"/{which}/.*: expected a file that {found}"):
        merge_checkpoint(base, adapter, tmp_path / "out", progress=write_over)
    assert not (tmp_path / "out").exists()
    if (tmp_path / "out.partial").exists():  # shards of before
        with pytest.raises(FileExistsError, match="what another call left unfinished"):
            merge_checkpoint(base, adapter, tmp_path / "out")
        shutil.rmtree(tmp_path / "out.partial")
    merge_checkpoint(base, adapter, tmp_path / "out", verify=True)


@pytest.mark.parametrize("stochastic", [None, 7])
def test_a_full_disk(tmp_path, monkeypatch, stochastic):
    base, adapter = write_base(tmp_path / "base", decoder(), shards=3), write_adapter(tmp_path / "adapter", SHAPES)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        full_disk(patch)
        merge_checkpoint(base, adapter, tmp_path / "out", stochastic=stochastic)
    assert not (tmp_path / "out").exists()
    report = merge_checkpoint(base, adapter, tmp_path / "out", stochastic=stochastic)
    merge_checkpoint(base, adapter, tmp_path / "whole", stochastic=stochastic)
    assert report.kept and contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_warnings_of_a_second_merge_and_of_what_rounding_takes(tmp_path):
    base, adapter = write_base(tmp_path / "base", decoder()), write_adapter(tmp_path / "adapter", SHAPES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge_checkpoint(base, adapter, tmp_path / "out", verify=True)
    with pytest.warns(UserWarning, match="'.*adapter' are merged into it already"):
        merge_checkpoint(tmp_path / "out", adapter, tmp_path / "twice")
    with pytest.warns(UserWarning, match="'.*adapter' are merged into it already"):
        assert merge_checkpoint(tmp_path / "out", adapter, tmp_path / "twice").kept  # the same call, once more
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match="in_place: '.*adapter' are merged into .* already, so nothing was done"):
        merge_checkpoint(tmp_path / "out", adapter, in_place=True)
    assert contents(tmp_path / "out") == before
    with pytest.warns(UserWarning, match="rounding took"):
        merge_checkpoint(base, [(adapter, 1e-4)], tmp_path / "small", verify=True)


def test_a_second_call_looks_at_what_the_first_left(tmp_path, monkeypatch):
    """``record`` and ``verify`` hold for shards that are there already, too."""
    base, adapter = write_base(tmp_path / "base", decoder(), shards=3), write_adapter(tmp_path / "adapter", SHAPES)

    def again(**options):
        return merge_checkpoint(base, adapter, tmp_path / "out", **options)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        full_disk(patch)
        again(record=tmp_path / "record")
    first = again(record=tmp_path / "record", verify=True)
    assert first.kept and first.checked == again(record=tmp_path / "record", verify=True).checked

    shard = next(f for f in (tmp_path / "out").glob("*.safetensors") if f"{QKV[0]}.weight" in read_names(f))
    whole = shard.read_bytes()
    change(shard, **{f"{QKV[0]}.weight": read_all(tmp_path / "out")[f"{QKV[0]}.weight"] * 2})
    with pytest.raises(AdapterError, match="expected W \\+ s B A"):
        again(record=tmp_path / "record", verify=True)
    shard.write_bytes(whole[:-1])
    with pytest.raises(AdapterError, match="bytes of tensors"):
        again(record=tmp_path / "record")
    shard.write_bytes(whole)
    shutil.rmtree(tmp_path / "record")
    with pytest.raises(FileExistsError, match="record: .* without its record"):
        again(record=tmp_path / "record")


def test_a_cast_that_overflows_names_its_tensor(tmp_path):
    base = write_base(tmp_path / "base", {**decoder(), "model.norm.weight": torch.full((K,), 1e6)})
    adapter = write_adapter(tmp_path / "adapter", SHAPES)
    with pytest.raises(ValueError, match="model.norm.weight: expected values within the range of torch.float16"):
        merge_checkpoint(base, adapter, tmp_path / "out", dtype=torch.float16)


def test_verify_finds_a_wrong_sum(tmp_path, monkeypatch):
    base, adapter = write_base(tmp_path / "base", decoder()), write_adapter(tmp_path / "adapter", SHAPES)
    monkeypatch.setattr(changes, "add_rows_", lambda rows, factors, keep: rows.add_(0.25))
    with pytest.raises(AdapterError, match="expected W \\+ s B A"):
        merge_checkpoint(base, adapter, tmp_path / "out", verify=True)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


INDEX = "model.safetensors.index.json"


def first(base):
    return sorted(base.glob("*.safetensors"))[0]


def lose_entry(base, _):
    names = json.loads((base / INDEX).read_text())["weight_map"]
    change(base / INDEX, weight_map={name: file for name, file in names.items() if name != f"{QKV[0]}.weight"})


def weights(**tensors):
    return lambda base, adapter: change(adapter / "adapter_model.safetensors", **tensors)


def config(**entries):
    return lambda base, adapter: change(adapter / "adapter_config.json", **entries)


def in_base(**tensors):
    """Of the first shard, which has the embedding and the first queries' neighbours."""

    def put(base, adapter):
        for name, tensor in tensors.items():
            held = next(f for f in base.glob("*.safetensors") if name in read_names(f))
            change(held, **{name: tensor})

    return put


def read_names(file):
    raw = file.read_bytes()
    return json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])


WITHOUT_INDEX = "the index of its shards, found no such file"
A0, B0 = (f"base_model.model.{QKV[0]}.lora_{x}.weight" for x in "AB")
BAD = {
    "truncated shard": (lambda base, _: first(base).write_bytes(first(base).read_bytes()[:-10]), "bytes of tensors"),
    "missing index entry": (lose_entry, "an entry of weight_map"),
    "missing shard": (lambda base, _: first(base).unlink(), "a readable regular file"),
    "lone shard": (lambda base, _: ((base / INDEX).unlink(), first(base).unlink()), f"{INDEX}, {WITHOUT_INDEX}"),
    "lost index": (lambda base, _: (base / INDEX).unlink(), f"{INDEX}, {WITHOUT_INDEX}"),
    "shard outside": (lambda base, _: change(base / INDEX, weight_map={"a": "../model.safetensors"}), "in the same"),
    "two checkpoints": (lambda base, _: (base / SINGLE).write_bytes(first(base).read_bytes()), "one checkpoint"),
    "NaN": (weights(**{A0: torch.full((4, K), torch.nan)}), "NaN or Inf"),
    "rank": (weights(**{B0: torch.zeros(N, 5)}), "a shape \\[N, 4\\]"),
    "shape": (weights(**{A0: torch.zeros(4, K + 1)}), "a weight \\[40, 25\\]"),
    "another base": (
        weights(
            **{
                A0: None,
                B0: None,
                A0.replace("model.layers", "model.blocks"): torch.zeros(4, K),
                B0.replace("model.layers", "model.blocks"): torch.zeros(N, 4),
            }
        ),
        "1 of the adapter's 6 layers are not in the checkpoint.*likely rename",
    ),
    "unused tensor": (weights(extra=torch.zeros(1)), "not read"),
    "DoRA": (config(use_dora=True), "use_dora: expected a lora_magnitude_vector"),
    "experts": (config(target_parameters=["mlp.experts.gate_up_proj"]), "target_parameters: expected tensors for"),
    "embedding": (
        weights(**{"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(4, 56)}),
        "embed_tokens.lora_embedding_B: expected a tensor",
    ),
    "transposed": (
        lambda base, adapter: (change(base / "config.json", auto_map={}), config(fan_in_fan_out=True)(base, adapter)),
        "as fan_in_fan_out=True stores it",
    ),
    "quantised": (in_base(**{f"{QKV[0]}.weight": torch.zeros(N, K, dtype=torch.int8)}), "quantised"),
    "alpha 0": (config(lora_alpha=0), "without which the adapter has no effect, found none"),
    "untrained": (
        lambda base, adapter: change(
            adapter / "adapter_model.safetensors",
            **{n: torch.zeros_like(t) for n, t in read_all(adapter).items() if "lora_B" in n},
        ),
        "without which the adapter has no effect",
    ),
    "overflow": (weights(**{A0: torch.full((4, K), 3e38), B0: torch.ones(N, 4)}), "NaNs or infinities"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_leaves_nothing(tmp_path, name):
    base, adapter = write_base(tmp_path / "base", decoder(), shards=2), write_adapter(tmp_path / "adapter", SHAPES)
    damage, message = BAD[name]
    damage(base, adapter)
    before = contents(base)
    with pytest.raises(ValueError, match=message) as caught:
        merge_checkpoint(base, adapter, tmp_path / "out")
    assert isinstance(caught.value, AdapterError) or name == "overflow"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"] and contents(base) == before


def test_a_config_that_would_quantise_the_merged_weights_is_refused(tmp_path):
    """Over floating weights alone; beside quantised ones the entry says how those are read, and stays."""
    entry = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    adapter = write_adapter(tmp_path / "adapter", SHAPES)
    base = write_base(tmp_path / "base", {**decoder(), "steps": torch.zeros(2).long()}, shards=2, config=entry)
    before = contents(tmp_path)
    for dry_run in (False, True):
        with pytest.raises(AdapterError, match="config.json: quantization_config: expected no.*load_in_4bit"):
            merge_checkpoint(base, adapter, tmp_path / "out", dry_run=dry_run)
    assert contents(tmp_path) == before
    codes = {"model.other.weight": torch.zeros(8, 8, dtype=torch.float8_e4m3fn)}
    mixed = write_base(tmp_path / "mixed", {**decoder(), **codes}, config=entry)
    merge_checkpoint(mixed, adapter, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()).items() >= entry.items()


def test_where_the_output_may_be(tmp_path, capsys):
    base, adapter = write_base(tmp_path / "base", decoder()), write_adapter(tmp_path / "adapter", SHAPES)
    call = ["merge", "--base", str(base), "--adapter", str(adapter)]
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "file").write_text("mine")
    (tmp_path / "link").symlink_to(base)
    write_adapter(tmp_path / "other", DOWN)
    before = contents(tmp_path)
    for out, message in [
        (base, "expected a folder outside"),
        (tmp_path / "link", "expected a folder outside"),
        (base / "merged", "expected a folder outside"),
        (tmp_path / "held", "which holds something"),
        (tmp_path / "held" / "file" / "x", "is no folder"),
        (tmp_path / "record" / "x", "expected a folder outside"),
        (tmp_path / "record.partial", "expected a folder outside"),
    ]:
        assert main([*call, "--out", str(out), "--record", str(tmp_path / "record")]) == 1
        assert message in capsys.readouterr().err
    for place, message in (([], "--out --in-place is required"), (["--out", "x", "--in-place"], "not allowed with")):
        with pytest.raises(SystemExit, match="2"):
            main([*call, *place])
        assert message in capsys.readouterr().err
    new = str(tmp_path / "new")
    for options, message in [
        (["--in-place", "--record", new], "--record: expected none with another dtype, in place, or on a device"),
        (["--out", new, "--record", f"{new}.partial"], "error: --record: expected a folder outside"),
        (["--out", new, "--adapter", f"{adapter}:0.5"], "error: --adapter: expected each folder once"),
        (["--out", new, "--adapter", f"{tmp_path / 'other'}:0"], "error: --adapter: expected a weight other than 0"),
        (["--out", new, "--rename", "no=x"], "error: --rename: no path of the adapter begins with"),
        (["--out", str(tmp_path / "held")], f"error: --out: expected a new or empty folder, got '{tmp_path}"),
    ]:
        assert main([*call, *options]) == 1
        said = capsys.readouterr().err
        assert message in said and "Errno" not in said
    assert contents(tmp_path) == before
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "file").write_text("another's")
    with pytest.raises(FileExistsError, match="another call left unfinished"):
        merge_checkpoint(base, adapter, tmp_path / "out")
    for argument, value, kind in [
        ("dtype", "bf16", TypeError),
        ("dtype", torch.int8, ValueError),
        ("device", "nowhere", ValueError),
        ("device", "meta", ValueError),
        ("rename", ["x"], TypeError),
        ("rename", {"x": 1}, TypeError),
        ("rename", {"nowhere": "x"}, ValueError),
        ("verify", 1, TypeError),
    ]:
        with pytest.raises(kind, match=argument):
            merge_checkpoint(base, adapter, tmp_path / "new", **{argument: value})
    with pytest.raises(ValueError, match="expected a finite weight"):
        merge_checkpoint(base, [(adapter, float("nan"))], tmp_path / "other")
    with pytest.raises(TypeError, match="adapters: expected paths"):
        merge_checkpoint(base, None, tmp_path / "other")
    with pytest.raises(ValueError, match="out: expected a folder, got an empty path"):
        merge_checkpoint(base, adapter, "")


@pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes")
def test_names_of_folders_that_are_no_text(tmp_path):
    """They are noted in the files, which nobody could read with half a surrogate pair in them."""
    names = [os.fsdecode(os.fsencode(tmp_path) + name) for name in (b"/b\xe9se", b"/adapter\xff", b"/out\xff")]
    write_adapter(Path(names[1]), SHAPES)
    merge_checkpoint(write_base(Path(names[0]), decoder()), names[1], names[2], verify=True)
    assert merge_checkpoint(names[0], names[1], names[2]).kept
    os.rename(names[2], tmp_path / "out")  # safetensors reads no other
    assert read_all(tmp_path / "out").keys() == decoder().keys()
    about = json.loads((tmp_path / "out" / "fused_lora_merge.json").read_text())
    assert about["adapters"][0]["path"].endswith("/adapter\\xff") and about["base"]["path"].endswith("/b\\xe9se")


def test_an_adapter_is_read_by_several_threads(tmp_path):
    """As a merge reads its biases while it opens the next layer."""
    shapes = {f"m.{i}": (8, 8) for i in range(16)}
    with open_adapters(write_adapter(tmp_path / "adapter", shapes)) as [adapter], ThreadPoolExecutor(4) as threads:
        keys = list(adapter.plan.entries)
        exact, wanted = read_all(tmp_path / "adapter"), keys * 200
        assert all(torch.equal(t, exact[k]) for k, t in zip(wanted, threads.map(adapter.tensor, wanted), strict=True))


def test_the_same_call_with_another_rename_is_another_call(tmp_path):
    base = write_base(tmp_path / "base", {f"m.{i}.weight": torch.zeros(8, 8) for i in range(2)})
    adapter = write_adapter(tmp_path / "adapter", {"x": (8, 8), "y": (8, 8)})
    one, other = {"x": "m.0", "y": "m.1"}, {"x": "m.1", "y": "m.0"}
    merge_checkpoint(base, adapter, tmp_path / "out", rename=one)
    assert merge_checkpoint(base, adapter, tmp_path / "out", rename=one).kept
    with pytest.raises(FileExistsError, match="out: expected a new or empty folder"):
        merge_checkpoint(base, adapter, tmp_path / "out", rename=other)


def test_links_names_and_what_is_left_out(tmp_path):
    """A folder of links, as a hub's cache has it; a rename by hand; weights of other kinds stay behind."""
    blobs, base = write_base(tmp_path / "blobs", decoder()), tmp_path / "base"
    base.mkdir()
    for file in blobs.iterdir():
        (base / file.name).symlink_to(file)
    for name in ("pytorch_model.bin", "adapter_config.json"):
        (base / name).write_text("{}")
    (base / "templates").mkdir()
    (base / "templates" / "chat.jinja").write_text("hi")
    os.mkfifo(base / "pipe")
    adapter = write_adapter(
        tmp_path / "adapter",
        {path.replace("model.layers", "trunk.blocks"): s for path, s in SHAPES.items()},
        target_modules=["q_proj", "down_proj"],
    )
    with pytest.raises(AdapterError, match="trunk"):
        merge_checkpoint(base, adapter, tmp_path / "out")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = merge_checkpoint(base, adapter, tmp_path / "out", rename={"trunk.blocks": "model.layers"})
    assert "names 2 layers more" in str(caught[-1].message) and "down_proj" in str(caught[-1].message)
    assert sorted(report.left_out) == ["adapter_config.json", "pipe", "pytorch_model.bin"]
    assert (tmp_path / "out" / "templates" / "chat.jinja").read_text() == "hi"
    assert not any(p.is_symlink() for p in (tmp_path / "out").rglob("*"))
