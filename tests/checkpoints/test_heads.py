"""Heads of published bases: tied and stored, too; with a bias; not there."""

import json

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import save_file

from fused_lora.adapters import AdapterError
from fused_lora.checkpoints import convert_adapter, merge_checkpoint, shrink_adapter, unmerge_checkpoint
from fused_lora.testing.numeric import assert_close
from helpers.checkpoint_files import SINGLE, change, contents, read_all
from helpers.published import SIZES, TEXT, adapted, built
from helpers.seeds import shifted

BART = dict(vocab_size=90, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=48, decoder_ffn_dim=48)
BART |= dict(encoder_attention_heads=4, decoder_attention_heads=4)
TWICE = {  # what trains -> the config's tie afterwards
    "tokens": (dict(trainable_token_indices=[3, 7]), True),
    "a whole embedding": (dict(modules_to_save=["embed_tokens"]), False),
    "LoRA on an embedding": (dict(target_modules=["q_proj", "embed_tokens"]), False),
    "LoRA on a head": (dict(target_modules=["q_proj", "lm_head"]), False),
}


@pytest.mark.parametrize("name", TWICE)
def test_a_tied_head_that_is_stored_too(tmp_path, name):
    """A loader that ties by the config, as transformers 4 and vLLM do, and one that compares both give PEFT's model."""
    config, tied = TWICE[name]
    built(tf.LlamaForCausalLM, dict(TEXT, tie_word_embeddings=True), tmp_path / "base")
    weight = read_all(tmp_path / "base")["model.embed_tokens.weight"]
    change(tmp_path / "base" / SINGLE, **{"lm_head.weight": weight.clone()})
    model = tf.LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, **{"target_modules": ["q_proj"], **config}))
    draw = torch.Generator().manual_seed(shifted(3))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.1)
    wrapped.save_pretrained(tmp_path / "adapter")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", record=tmp_path / "record")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is tied
    held = read_all(tmp_path / "out")
    assert torch.equal(held["lm_head.weight"], held["model.embed_tokens.weight"]) is tied
    merged, ids = tf.LlamaForCausalLM.from_pretrained(tmp_path / "out").eval(), torch.arange(1, 9)[None]
    with torch.no_grad():
        assert_close(merged(ids).logits, wrapped.eval()(ids).logits, terms=1000)
    unmerge_checkpoint(tmp_path / "out", tmp_path / "record", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tmp_path / "base")


@pytest.mark.parametrize("twice", [False, True])
def test_tokens_of_an_embedding_that_an_encoder_and_a_decoder_share(tmp_path, twice):
    """Older files have the embedding three times. PEFT's tokens are those of all."""
    model = built(tf.BartForConditionalGeneration, BART, tmp_path / "base")
    if twice:
        weight = model.model.shared.weight.detach()
        copies = {f"model.{part}.embed_tokens.weight": weight.clone() for part in ("encoder", "decoder")}
        change(tmp_path / "base" / SINGLE, **copies)
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices={"shared": [3, 7]})
    )
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(shifted(2))))
    wrapped.save_pretrained(tmp_path / "adapter")
    report = merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert [c["kind"] for c in report.changes].count("rows") == (3 if twice else 1)
    merged, ids = tf.BartForConditionalGeneration.from_pretrained(tmp_path / "out").eval(), torch.arange(1, 9)[None]
    with torch.no_grad():
        found, wanted = (m(input_ids=ids, decoder_input_ids=ids).logits for m in (merged, wrapped.eval()))
    assert_close(found, wanted, terms=1000)


def test_tokens_of_a_tied_embedding_beside_lora_on_the_stored_head_are_refused(tmp_path):
    built(tf.LlamaForCausalLM, dict(TEXT, tie_word_embeddings=True), tmp_path / "base")
    weight = read_all(tmp_path / "base")["model.embed_tokens.weight"]
    change(tmp_path / "base" / SINGLE, **{"lm_head.weight": weight.clone()})
    model = tf.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    adapted(model, tmp_path / "tokens", target_modules=["q_proj"], trainable_token_indices=[3, 7])
    model = tf.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    adapted(model, tmp_path / "head", target_modules=["lm_head"])
    with pytest.raises(AdapterError, match="to which 'lm_head.weight' is tied"):
        merge_checkpoint(tmp_path / "base", [tmp_path / "tokens", tmp_path / "head"], tmp_path / "out")
    # a head with other bytes is not tied, as transformers loads it
    change(tmp_path / "base" / SINGLE, **{"lm_head.weight": weight + 1})
    model = tf.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    adapted(model, tmp_path / "another", target_modules=["lm_head"])
    merge_checkpoint(tmp_path / "base", [tmp_path / "tokens", tmp_path / "another"], tmp_path / "out")


@pytest.mark.parametrize("tie", [True, False])
def test_tokens_where_the_stored_head_is_another(tmp_path, tie):
    """PEFT goes by the config: tokens go into a head that it ties, though transformers has left that apart."""
    built(tf.LlamaForCausalLM, dict(TEXT, tie_word_embeddings=tie), tmp_path / "base")
    weight = read_all(tmp_path / "base")["model.embed_tokens.weight"]
    change(tmp_path / "base" / SINGLE, **{"lm_head.weight": weight + 1})
    model = tf.LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
    wrapped = adapted(model, tmp_path / "adapter", target_modules=["q_proj"], trainable_token_indices=[3, 7])
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged, theirs = read_all(tmp_path / "out"), wrapped.merge_and_unload().state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(merged[name], theirs[name])


@pytest.mark.parametrize("apart", [False, True])
def test_a_stored_head_of_an_encoder_decoder_whose_config_does_not_say_that_it_ties(tmp_path, apart):
    """As of BART's first files. Untied, the encoder and the decoder need embeddings of their own in the file."""
    built(tf.BartForConditionalGeneration, BART, tmp_path / "base")
    embedding, config = read_all(tmp_path / "base")["model.shared.weight"], tmp_path / "base" / "config.json"
    parts = ("lm_head", *(["model.encoder.embed_tokens", "model.decoder.embed_tokens"] if apart else []))
    change(tmp_path / "base" / SINGLE, **{f"{part}.weight": embedding.clone() for part in parts})
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if "tie_word" not in k}))
    model = tf.BartForConditionalGeneration.from_pretrained(tmp_path / "base").eval()
    wrapped = adapted(model, tmp_path / "adapter", target_modules=["lm_head"])
    if not apart:
        with pytest.raises(AdapterError, match="a head that is all that is tied to the embedding"):
            merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
        return
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged, ids = tf.BartForConditionalGeneration.from_pretrained(tmp_path / "out").eval(), torch.arange(1, 9)[None]
    with torch.no_grad():
        found, wanted = (m(input_ids=ids, decoder_input_ids=ids).logits for m in (merged, wrapped.eval()))
    assert_close(found, wanted, terms=1000)


def test_a_head_with_a_bias(tmp_path):
    """As of Phi-2: PEFT saves the base's weight and bias beside the head's LoRA. They must be the base's."""
    model = built(tf.PhiForCausalLM, TEXT, tmp_path / "base")
    wrapped = adapted(model, tmp_path / "adapter", target_modules=["q_proj", "lm_head"])
    bias = "base_model.model.lm_head.base_layer.bias"
    assert bias in read_all(tmp_path / "adapter")
    convert_adapter(tmp_path / "adapter", tmp_path / "again")
    shrink_adapter(tmp_path / "again", tmp_path / "small", rank=4)
    for name in ("adapter", "again", "small"):
        held = read_all(tmp_path / name)
        assert torch.equal(held[bias], read_all(tmp_path / "base")["lm_head.bias"])
        merge_checkpoint(tmp_path / "base", tmp_path / name, tmp_path / f"out {name}")
        merged = read_all(tmp_path / f"out {name}")
        assert torch.equal(merged["lm_head.bias"], held[bias])
        delta = wrapped.get_submodule("base_model.model.lm_head").get_delta_weight("default").detach()
        exact = read_all(tmp_path / "base")["lm_head.weight"] + delta
        assert_close(merged["lm_head.weight"], exact, terms=10_000)
    held[bias][5] += 1
    save_file(held, tmp_path / "small" / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(AdapterError, match="lm_head.bias, bit for bit.* 1 of 90 elements differ"):
        merge_checkpoint(tmp_path / "base", tmp_path / "small", tmp_path / "out")
    with pytest.raises(AdapterError, match=r"a base's bias \[90\]"):
        save_file({**held, bias: held[bias][1:]}, tmp_path / "small" / "adapter_model.safetensors")
        convert_adapter(tmp_path / "small", tmp_path / "out")
    change(tmp_path / "base" / SINGLE, **{"lm_head.bias": None})
    with pytest.raises(AdapterError, match="a tensor 'lm_head.bias' in .*, found no such name"):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


def test_a_head_that_the_base_has_not_is_refused_with_what_to_do(tmp_path):
    built(tf.BertForMaskedLM, dict(SIZES, vocab_size=90), tmp_path / "base")
    model = tf.BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    adapted(model, tmp_path / "adapter", target_modules=["query"], task_type="SEQ_CLS")
    with pytest.raises(AdapterError, match="classifier.* found no such name .a head of the task. load the base as the"):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    model = tf.BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    model.save_pretrained(tmp_path / "with head")  # which the message says
    merge_checkpoint(tmp_path / "with head", tmp_path / "adapter", tmp_path / "out")
    saved = read_all(tmp_path / "adapter")["base_model.model.classifier.weight"]
    assert torch.equal(read_all(tmp_path / "out")["classifier.weight"], saved)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_lora_on_a_resized_vocabulary_is_refused_with_what_to_do(tmp_path, target):
    model = built(tf.LlamaForCausalLM, dict(TEXT, tie_word_embeddings=False), tmp_path / "base")
    model.resize_token_embeddings(96)
    model.save_pretrained(tmp_path / "resized")
    adapted(model, tmp_path / "adapter", target_modules=[target])
    with pytest.raises(AdapterError, match=r"\[90, 32\] in .*resize the base's, save it, and merge into that"):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merge_checkpoint(tmp_path / "resized", tmp_path / "adapter", tmp_path / "out")


def test_a_tokenizer_of_the_adapters_own_is_named(tmp_path):
    adapted(built(tf.LlamaForCausalLM, TEXT, tmp_path / "base"), tmp_path / "adapter", target_modules=["q_proj"])
    for folder, files in (("base", ["merges.txt", "vocab.txt"]), ("adapter", ["added_tokens.json", "merges.txt"])):
        for name in files:
            (tmp_path / folder / name).write_text("the same")
    (tmp_path / "adapter" / "vocab.txt").write_text("another")
    (tmp_path / "adapter" / "tokenizer.json").mkdir()
    report = merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert report.left_out == [str(tmp_path / "adapter" / name) for name in ("added_tokens.json", "vocab.txt")]
    assert (tmp_path / "out" / "vocab.txt").read_text() == "the same"
    report = merge_checkpoint(tmp_path / "base" / SINGLE, tmp_path / "adapter", tmp_path / "weights alone")
    assert report.left_out == []
