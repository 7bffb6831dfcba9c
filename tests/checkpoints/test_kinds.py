"""Commands on adapters of all kinds that PEFT saves: DoRA, embeddings, heads, stacked experts, aLoRA."""

import copy
import json
from collections import OrderedDict

import peft
import pytest
import torch
import transformers as tf
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import fused_lora
from fused_lora import combine_adapters, convert_adapter, diff_adapters, inspect_adapter, shrink_adapter
from fused_lora.adapters import AdapterError
from fused_lora.checkpoints import changes
from fused_lora.cli import main
from fused_lora.testing.numeric import assert_close
from helpers.checkpoint_files import change, contents, save_trained
from helpers.seeds import shifted

SMALL = dict(vocab_size=90, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
KINDS = {
    "DoRA": dict(target_modules=["q_proj", "v_proj"], use_dora=True),
    "LoRA on an embedding": dict(target_modules=["embed_tokens", "lm_head"]),
    "LoRA on experts": dict(target_modules=["q_proj"], target_parameters=BOTH),
}
EMBEDDING, HEAD = (f"base_model.model.{path}.base_layer.weight" for path in ("model.embed_tokens", "lm_head"))


def model(kind):
    torch.manual_seed(shifted(0))
    if kind == "LoRA on experts":
        sizes = dict(moe_intermediate_size=48, num_experts=3, num_experts_per_tok=2, head_dim=8)
        return tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**SMALL, **sizes))
    return tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL, intermediate_size=48, tie_word_embeddings=False))


def trained(folder, kind, seed=1, of=None, **config):
    """A PEFT model whose adapter does something, saved as PEFT saves it."""
    config = {"r": 4, "lora_alpha": 6, **KINDS.get(kind, {}), **config}
    wrapped = peft.get_peft_model(of or model(kind), peft.LoraConfig(**config))
    save_trained(wrapped, folder, seed)
    return wrapped


def weight_of(layer):
    """The name of the tensor that a layer of a report changes."""
    return layer["parameter"] or f"{layer['path']}.weight"


@pytest.mark.parametrize("kind", KINDS)
def test_inspect_tells_what_peft_merges(tmp_path, monkeypatch, capsys, kind):
    """Norms and shapes are those of the weights' change in PEFT; a few rows are read at a time."""
    monkeypatch.setattr(changes, "PIECE_BYTES", 700)
    base = model(kind)
    base.save_pretrained(tmp_path / "base")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    wrapped = trained(tmp_path / "a", kind, of=base)
    report = inspect_adapter(tmp_path / "a", tmp_path / "base")
    after = wrapped.merge_and_unload().state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert report.fits and {weight_of(layer) for layer in report.layers} == moved
    for layer in report.layers:
        delta = after[weight_of(layer)].double() - before[weight_of(layer)].double()
        assert layer["norm"] == pytest.approx(delta.norm().item(), rel=1e-4) and layer["shape"] == list(delta.shape)
        S = torch.linalg.svdvals(delta)[..., :4]
        if layer["kind"] != "DoRA":  # whose change has no rank
            shares = S / S.sum(-1, keepdim=True)
            ranks = torch.exp(-(shares * shares.log()).sum(-1))
            assert layer["largest"] == pytest.approx(S.max().item(), rel=1e-4)
            assert layer["effective_rank"] == pytest.approx(ranks.mean().item(), rel=1e-4)
    assert kind in {layer["kind"] for layer in report.layers} and set(report.ranks) == {4} and not report.oddities
    assert report.copies == ([HEAD, EMBEDDING] if "embedding" in kind else []) and not report.beside

    assert main(["inspect", str(tmp_path / "a"), "--base", str(tmp_path / "base")]) == 0
    said = capsys.readouterr().out
    assert ("the norm is of c (W + s B A) - W" in said) == (kind == "DoRA") and "fits the base" in said
    assert (f"the base's own weight: {EMBEDDING}" in said) == ("embedding" in kind)
    assert main(["inspect", str(tmp_path / "a"), "--json"]) == 0  # without the base
    alone = {layer["path"]: layer for layer in json.loads(capsys.readouterr().out)["layers"]}
    for layer in report.layers:
        found = alone[layer["path"]]
        assert found["norm_of"] == "s B A" and found["parameter"] is None and found["shape"] == layer["shape"]
        assert (found["norm"] == pytest.approx(layer["norm"])) == (kind != "DoRA")
    assert main(["inspect", str(tmp_path / "a")]) == 0
    assert ("depends on W: --base" in capsys.readouterr().out) == (kind == "DoRA")


@pytest.mark.parametrize("kind", KINDS)
def test_diff_compares_what_peft_adds(tmp_path, capsys, kind):
    one, two = (trained(tmp_path / name, kind, seed) for name, seed in (("a", 1), ("b", 2)))
    report = diff_adapters(tmp_path / "a", tmp_path / "b")
    modules = [lora_layers(wrapped) for wrapped in (one, two)]
    for layer in report.layers:
        a, b = (held[layer["path"]].get_delta_weight("default").double() for held in modules)
        assert layer["norm_a"] == pytest.approx(a.norm().item(), rel=1e-4)
        assert layer["apart"] == pytest.approx((a - b).norm().item(), rel=1e-4)
        assert layer["cosine"] == pytest.approx(((a * b).sum() / a.norm() / b.norm()).item(), abs=1e-4)
        if kind == "DoRA":
            m, n = (held[layer["path"]].lora_magnitude_vector["default"].weight for held in modules)
            assert layer["magnitudes_apart"] == pytest.approx((m - n).norm().item(), rel=1e-4)
        else:
            assert layer["magnitudes_apart"] is None
    assert not report.same and not report.beside and {layer["path"] for layer in report.layers} == modules[0].keys()
    assert diff_adapters(tmp_path / "a", tmp_path / "a").same
    assert main(["diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    assert ("magnitudes apart" in capsys.readouterr().out) == (kind == "DoRA")


def lora_layers(wrapped):
    """{path: its LoRA layer}; of a parameter its own path."""
    found, parameter = wrapped.base_model.model.named_modules(), peft.tuners.lora.layer.ParamWrapper
    return {
        f"{path.replace('.base_layer', '')}.{layer.parameter_name}" if isinstance(layer, parameter) else path: layer
        for path, layer in found
        if isinstance(layer, peft.tuners.lora.layer.LoraLayer)
    }


def test_what_else_makes_adapters_differ(tmp_path, capsys):
    """A magnitude, one that the other lacks, a copy of another base, an embedding where the other has a linear layer,
    and the tokens that activate an aLoRA."""
    held = load_file(trained_files(tmp_path / "a", "DoRA"))
    key = next(key for key in held if key.endswith("magnitude_vector"))
    change(trained_files(tmp_path / "b", "DoRA"), **{key: held[key] * 1.001})
    assert not diff_adapters(tmp_path / "a", tmp_path / "b").same
    change(tmp_path / "b" / "adapter_model.safetensors", **{k: None for k in held if k.endswith("magnitude_vector")})
    change(tmp_path / "b" / "adapter_config.json", use_dora=False)
    report = diff_adapters(tmp_path / "a", tmp_path / "b")
    assert not report.same and max(layer["apart"] for layer in report.layers) < 1e-6
    assert report.layers[0]["magnitudes_apart"] == pytest.approx(held[key.replace("v_proj", "q_proj")].norm().item())

    held = load_file(trained_files(tmp_path / "c", "LoRA on an embedding"))
    change(trained_files(tmp_path / "d", "LoRA on an embedding"), **{EMBEDDING: held[EMBEDDING] + 1})
    report = diff_adapters(tmp_path / "c", tmp_path / "d")
    assert report.beside == [EMBEDDING] and not report.same
    with pytest.raises(AdapterError, match="the base's weight as in .*/c'"):
        combine_adapters([tmp_path / "c", tmp_path / "d"], tmp_path / "out", "cat")
    names = {".lora_embedding_A": ".lora_A.weight", ".lora_embedding_B": ".lora_B.weight"}
    renamed = {key.replace(end, names[end]): t for key, t in held.items() for end in names if key.endswith(end)}
    gone = {key: None for key in held if "lora_embedding" in key}
    change(tmp_path / "d" / "adapter_model.safetensors", **gone, **renamed)
    with pytest.raises(AdapterError, match="K, N of .* of an embedding as in"):
        diff_adapters(tmp_path / "c", tmp_path / "d")

    for name, tokens in (("e", [3, 4]), ("f", [3, 5])):
        trained(tmp_path / name, "aLoRA", target_modules=["q_proj"], alora_invocation_tokens=tokens)
    assert diff_adapters(tmp_path / "e", tmp_path / "f").config == {"alora_invocation_tokens": [[3, 4], [3, 5]]}
    assert not diff_adapters(tmp_path / "e", tmp_path / "f").same
    combine_adapters([tmp_path / "e", (tmp_path / "e", 0.5)], tmp_path / "g", "cat")
    assert peft.LoraConfig.from_pretrained(tmp_path / "g").alora_invocation_tokens == [3, 4]
    model("aLoRA").save_pretrained(tmp_path / "base")
    assert inspect_adapter(tmp_path / "e", tmp_path / "base").fits
    assert main(["inspect", str(tmp_path / "e")]) == 0
    assert "aLoRA: it acts from the tokens [3, 4] on" in capsys.readouterr().out


def trained_files(folder, kind):
    trained(folder, kind)
    return folder / "adapter_model.safetensors"


def test_shrink_carries_the_copies_along_and_peft_reads_them(tmp_path):
    wrapped = trained(tmp_path / "a", "LoRA on an embedding")
    shrink_adapter(tmp_path / "a", tmp_path / "out", 2, dtype=torch.bfloat16)
    held, old = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "a"))
    assert held.keys() == old.keys() and all(torch.equal(held[key], old[key]) for key in (EMBEDDING, HEAD))
    read = peft.PeftModel.from_pretrained(model("LoRA on an embedding"), tmp_path / "out")
    for path in ("model.embed_tokens", "lm_head"):
        delta = wrapped.base_model.model.get_submodule(path).get_delta_weight("default")
        U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
        found = read.base_model.model.get_submodule(path).get_delta_weight("default")
        assert_close(found.bfloat16(), U[:, :2] * S[:2] @ Vh[:2], terms=10_000)


@pytest.mark.parametrize("kind", ["DoRA", "LoRA on an embedding"])
def test_convert_of_a_state_dict(tmp_path, kind):
    """With the adapter's name in its keys and the names of wrappers, as torch.save of a model under FSDP leaves it."""
    wrapped = trained(tmp_path / "a", kind)
    held = load_file(tmp_path / "a" / "adapter_model.safetensors")
    tensors = {}
    for key, tensor in held.items():
        key = key.replace(".weight", ".default.weight") if ".lora_" in key else key
        key = f"{key}.default" if "lora_embedding" in key else key.replace("_vector", "_vector.default.weight")
        tensors[f"module._orig_mod.{key}"] = tensor
    save_file(tensors, tmp_path / "source.safetensors")
    convert_adapter(tmp_path / "source.safetensors", tmp_path / "out", lora_alpha=6.0)
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert found.keys() == held.keys() and all(torch.equal(found[key], held[key]) for key in held)
    tokens = torch.arange(10)[None]
    read = peft.PeftModel.from_pretrained(model(kind), tmp_path / "out")
    assert torch.equal(read(tokens).logits, wrapped.eval()(tokens).logits)
    convert_adapter(tmp_path / "a", tmp_path / "half", dtype=torch.bfloat16)
    assert diff_adapters(tmp_path / "a", tmp_path / "half").only_a == []


def lose(end):
    def damage(folder):
        held = load_file(folder / "adapter_model.safetensors")
        change(folder / "adapter_model.safetensors", **{next(key for key in held if key.endswith(end)): None})

    return damage


def full_weight(folder):
    key = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"
    change(folder / "adapter_model.safetensors", **{key: torch.zeros(2, 2)})


def other_copy(made):
    def damage(folder):
        held = load_file(folder / "adapter_model.safetensors")
        change(folder / "adapter_model.safetensors", **{EMBEDDING: made(held[EMBEDDING]).contiguous()})

    return damage


CALLS = {
    "combine": lambda a, out: combine_adapters([a, (a, 0.5)], out, "cat"),
    "shrink": lambda a, out: shrink_adapter(a, out, 2),
    "convert": lambda a, out: convert_adapter(a, out),
    "stack": lambda a, out: convert_adapter(a, out, stack_experts=True),
}


@pytest.mark.parametrize(
    "call, kind, damage, message",
    [
        ("combine", "DoRA", None, "use_dora: .* the magnitudes would be lost"),
        ("shrink", "DoRA", None, "use_dora: .* the magnitudes would be lost"),
        ("stack", "LoRA on an embedding", None, "linear layers alone with stack_experts"),
        ("convert", "DoRA", lose("magnitude_vector"), "a magnitude .* of each layer of DoRA, found none"),
        ("convert", "DoRA", full_weight, "an embedding or a head alone, found another layer's"),
        ("convert", "LoRA on an embedding", lose("embedding_B"), "a lora_B"),
        ("convert", "LoRA on an embedding", other_copy(torch.Tensor.int), "base_layer.weight: .* a floating dtype"),
        ("convert", "LoRA on an embedding", other_copy(torch.Tensor.t), "base_layer.weight: .* a base's weight"),
    ],
)
def test_what_is_refused(tmp_path, call, kind, damage, message):
    trained(tmp_path / "a", kind)
    if damage is not None:
        damage(tmp_path / "a")
    before = contents(tmp_path)
    with pytest.raises(AdapterError, match=message):
        CALLS[call](tmp_path / "a", tmp_path / "out")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("kind, end", [("DoRA", "magnitude_vector"), ("LoRA on an embedding", "base_layer.weight")])
def test_convert_writes_nothing_that_is_not_finite(tmp_path, kind, end):
    held = load_file(trained_files(tmp_path / "a", kind))
    key = next(key for key in held if key.endswith(end))
    change(tmp_path / "a" / "adapter_model.safetensors", **{key: held[key] * float("nan")})
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=f"{key}: expected finite numbers"):
        convert_adapter(tmp_path / "a", tmp_path / "out")
    assert contents(tmp_path) == before


def test_other_aloras_dora_of_embeddings_and_convolutions_are_refused(tmp_path):
    for name, tokens in (("a", [3]), ("b", [4]), ("c", None)):
        trained(tmp_path / name, "aLoRA", target_modules=["q_proj"], alora_invocation_tokens=tokens)
    for other in "bc":
        with pytest.raises(AdapterError, match=r"alora_invocation_tokens: expected the invocation of '.*/a', \[3\]"):
            combine_adapters([tmp_path / "a", tmp_path / other], tmp_path / "out", "cat")
    trained(tmp_path / "e", "DoRA", target_modules=["embed_tokens"])
    for call in (inspect_adapter, lambda folder: convert_adapter(folder, tmp_path / "out")):
        with pytest.raises(AdapterError, match="alone of an embedding, found DoRA|alone beside DoRA"):
            call(tmp_path / "e")
    trained(tmp_path / "d", "conv", of=nn.Sequential(nn.Conv2d(3, 8, 3)), target_modules=["0"])
    for call in (inspect_adapter, lambda folder: convert_adapter(folder, tmp_path / "out")):
        with pytest.raises(AdapterError, match=r"lora_A.weight: expected .*, found \[4, 3, 3, 3\]"):
            call(tmp_path / "d")
    assert not (tmp_path / "out").exists()


def test_ranks_and_alphas_of_experts(tmp_path):
    """By a pattern they follow from the number of experts, which is one for all, or from what gate_up_proj gives."""
    base = model("LoRA on experts")
    base.save_pretrained(tmp_path / "base")
    for name, pattern in (("a", "rank_pattern"), ("b", "alpha_pattern")):
        trained(tmp_path / name, "LoRA on experts", **{pattern: {r".*\.experts\.gate_up_proj": 2}})
    wanted = {
        "a": {"gate_up_proj": (2, 3.0), "down_proj": (4, 1.5)},
        "b": {"gate_up_proj": (4, 0.5), "down_proj": (4, 1.5)},
    }
    for name, ranks in wanted.items():
        report, alone = inspect_adapter(tmp_path / name, tmp_path / "base"), inspect_adapter(tmp_path / name)
        stacks = {layer["parameter"]: (layer["r"], layer["scaling"]) for layer in report.layers if layer["parameter"]}
        assert report.fits and stacks == {f"model.layers.0.mlp.experts.{n}": found for n, found in ranks.items()}
        assert alone.layers == [layer | {"parameter": None} for layer in report.layers]
        assert diff_adapters(tmp_path / name, tmp_path / name).same
    others = dict(target_parameters=["mlp.experts.w1", "mlp.experts.w2"], alpha_pattern={r".*\.w1": 2})
    change(tmp_path / "b" / "adapter_config.json", **others)
    for call in (inspect_adapter, lambda folder: diff_adapters(tmp_path / "a", folder)):
        with pytest.raises(AdapterError, match="a base's shapes tell more"):
            call(tmp_path / "b")
    for names, message in (([f"experts.p{i}" for i in range(9)], "9 and 2"), (BOTH[:1], "1 and 2")):
        change(tmp_path / "b" / "adapter_config.json", target_parameters=names)
        with pytest.raises(AdapterError, match=f"at most 5 parameters .* found {message}"):
            inspect_adapter(tmp_path / "b")


class Head(nn.Module):
    """A layer with LoRA, and what trains beside it."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.score = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x):
        return self.score(self.norm(self.a(x)))


@torch.no_grad()
def test_convert_takes_what_trains_beside_lora_along(tmp_path):
    """Biases and whole modules, in the dtype that is asked for; what counts stays an integer."""
    torch.manual_seed(shifted(7))
    base = Head()
    fields = dict(
        target_modules=["a"],
        bias="lora_only",
        lora_bias=True,
        modules_to_save=["orm", "score"],  # ends of names
        init_lora_weights=False,
    )
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**fields))
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter)).copy_(parameter.bfloat16())  # no bit is lost
    theirs.save_pretrained(tmp_path / "a")
    x = torch.randn(4, 8)
    expected = theirs.eval()(x)
    for dtype in (None, torch.bfloat16):
        out = tmp_path / str(dtype)
        convert_adapter(tmp_path / "a", out, dtype=dtype)
        with safe_open(out / "adapter_model.safetensors", "pt") as file:
            kinds = {key.partition("model.model.")[2]: file.get_tensor(key).dtype for key in file.keys()}
        assert kinds.pop("norm.num_batches_tracked") == torch.int64
        assert len(kinds) == 10 and set(kinds.values()) == {dtype or torch.float32}
        model = copy.deepcopy(base)
        fused_lora.load_adapter(model, out)
        for found in (peft.PeftModel.from_pretrained(copy.deepcopy(base), out), model):
            assert_close(found.eval()(x), expected, terms=100)


def test_convert_renames_what_trains_beside_lora_in_the_config_too(tmp_path):
    """A name there is an end of a path: it stays where it is one still."""
    torch.manual_seed(shifted(8))
    parts = nn.Embedding(9, 4), nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    model, renamed = (
        nn.Sequential(OrderedDict(zip(n, parts, strict=True))) for n in (("words", "deep"), ("emb", "net"))
    )
    fields = dict(
        target_modules=["deep.0"], modules_to_save=["deep.1", "deep.2"], trainable_token_indices={"words": [3]}
    )
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**fields, init_lora_weights=False))
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    theirs.save_pretrained(tmp_path / "a")
    convert_adapter(tmp_path / "a", tmp_path / "b", rename={"deep": "net", "words": "emb"})
    convert_adapter(tmp_path / "b", tmp_path / "c", rename={"": "m."})
    for folder, base in (("b", renamed), ("c", nn.Sequential(OrderedDict(m=renamed)))):
        found = copy.deepcopy(base)
        fused_lora.load_adapter(found, tmp_path / folder)
        for each in (found, peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / folder)):
            assert_close(each.eval()(torch.arange(9)), theirs.eval()(torch.arange(9)), terms=100)
    for rename, message in (({"m.emb": "m.words"}, "a module's whole path"), ({"m.net.2": "m.net.1"}, "no other")):
        with pytest.raises(AdapterError, match=message):
            convert_adapter(tmp_path / "c", tmp_path / "d", rename=rename)


def test_an_alpha_of_0_is_named(tmp_path):
    """The adapter has no effect. One of a single layer may be meant, and a scale may be set later."""
    config = dict(target_modules=["0", "1"], init_lora_weights=False)
    layers = [nn.Linear(8, 8) for _ in range(2)]
    plain = copy.deepcopy(layers)
    with pytest.warns(UserWarning, match="lora_alpha: it is 0 for all layers of 'default', so the adapter has no eff"):
        model = fused_lora.inject(nn.Sequential(*layers), fused_lora.LoraConfig(lora_alpha=0, **config))
    fused_lora.save_adapter(model, tmp_path / "none")
    with pytest.warns(UserWarning, match="source: the scaling of all layers is 0, so the adapter has no effect"):
        fused_lora.AdapterStore(nn.Sequential(*copy.deepcopy(plain))).load("none", tmp_path / "none")
    with pytest.raises(AdapterError, match="expected an alpha other than 0, with which the adapter has no effect"):
        convert_adapter(tmp_path / "none", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    one = fused_lora.LoraConfig(lora_alpha=0, alpha_pattern={"1": 4}, **config)
    fused_lora.save_adapter(fused_lora.inject(nn.Sequential(*layers), one), tmp_path / "one")
    assert convert_adapter(tmp_path / "one", tmp_path / "out").layers == {"0": [8, 0], "1": [8, 4]}
