"""Adapters as files: what they hold, how they differ, and new ones out of them, beside what PEFT makes."""

import copy
import errno
import json
import os

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import nn

from fused_lora import (
    combine_adapters,
    convert_adapter,
    diff_adapters,
    extract_adapter,
    inspect_adapter,
    merge_checkpoint,
    shrink_adapter,
)
from fused_lora.adapters import AdapterError, read_adapter, staging, tensorfile
from fused_lora.checkpoints import factors
from fused_lora.cli import main
from fused_lora.testing.numeric import assert_close
from helpers.checkpoint_files import K, N, change, contents, decoder, read_all, write_adapter, write_base
from helpers.seeds import shifted
from helpers.versions import svd_weights

Q, V = (f"model.layers.0.self_attn.{p}_proj" for p in "qv")
SHAPES = {Q: (K, N), V: (K, 16)}
METHODS = {
    "linear": {},
    "cat": {},
    "svd": dict(rank=3),
    "ties": dict(density=0.5),
    "ties_svd": dict(density=0.5, rank=3),
    "dare_linear": dict(density=0.6),
    "dare_ties_svd": dict(density=0.6, rank=5),
    "magnitude_prune": dict(density=0.3),
}


def agree(ours, theirs):
    """Products of what was stored in fp32, formed in any dtype; a decomposition rounds more often than a sum."""
    assert_close(ours.float(), theirs.float(), terms=10_000)


def deltas(folder):
    """{path: s B A in fp64} of an adapter."""
    held = read_adapter(folder)
    return {
        path: held.config.lora_alpha / held.config.r * t.lora_B.double() @ t.lora_A.double()
        for path, t in held.layers.items()
    }


LAYERS = {"linear": lambda: nn.Linear(K, N, bias=False), "embedding": lambda: nn.Embedding(30, 20)}


# PEFT draws for the delta of an embedding as it is stored, transposed
CASES = [(method, layer) for method in METHODS for layer in LAYERS if (method, layer) != ("dare_ties_svd", "embedding")]


@pytest.mark.parametrize("method, layer", CASES)
def test_combinations_are_those_of_peft(tmp_path, monkeypatch, method, layer):
    """One layer, so that the random numbers of DARE come in the same order; PEFT reads what is written."""
    weights = (0.7, -0.4)
    torch.manual_seed(shifted(0))
    folders = [tmp_path / "a", tmp_path / "b"]
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"])
    wrapped = peft.get_peft_model(nn.Sequential(LAYERS[layer]()), config, "a")
    wrapped.add_adapter("b", config)
    for parameter in wrapped.parameters():
        parameter.data.normal_()
    wrapped.save_pretrained(tmp_path)
    options = METHODS[method]
    names = {"rank": "svd_rank", "density": "density"}
    inject = wrapped.base_model.inject_adapter

    def seeded(*args, **kwargs):  # the new layer draws numbers, too
        inject(*args, **kwargs)
        torch.manual_seed(shifted(7))

    monkeypatch.setattr(wrapped.base_model, "inject_adapter", seeded)
    named = {names[key]: value for key, value in options.items()}
    wrapped.add_weighted_adapter(["a", "b"], svd_weights(method, weights, 1.5), "mixed", method, **named)
    mixed = wrapped.base_model.model[0]
    report = combine_adapters(list(zip(folders, weights, strict=True)), tmp_path / "out", method, seed=7, **options)
    assert report.layers[0]["r"] == mixed.r["mixed"]
    read = peft.PeftModel.from_pretrained(nn.Sequential(LAYERS[layer]()), tmp_path / "out").base_model.model[0]
    agree(read.get_delta_weight("default"), mixed.get_delta_weight("mixed"))


def test_torchs_default_device_and_dtype_change_nothing(tmp_path):
    write_base(tmp_path / "base", {f"{path}.weight": torch.randn(n, k) for path, (k, n) in SHAPES.items()})
    for name in "ab":
        write_adapter(tmp_path / name, SHAPES, seed=ord(name))
    before, found = torch.get_default_dtype(), []
    for device, dtype in (("cpu", before), ("meta", torch.bfloat16)):
        out = tmp_path / device
        out.mkdir()
        with torch.device(device):
            torch.set_default_dtype(dtype)
            try:
                for method in ("ties", "dare_linear", "svd"):
                    options = METHODS[method]
                    combine_adapters([(tmp_path / "a", 0.3), (tmp_path / "b", 0.7)], out / method, method, **options)
                convert_adapter(tmp_path / "a", out / "converted")
                merge_checkpoint(tmp_path / "base", tmp_path / "a", out / "merged")
                assert diff_adapters(tmp_path / "a", out / "converted")
            finally:
                torch.set_default_dtype(before)
        found.append({p.relative_to(out): p.read_bytes() for p in sorted(out.rglob("*.safetensors"))})
    assert len(found[0]) == 5 and found[0] == found[1]


def test_several_layers_ranks_and_an_interrupted_write(tmp_path, monkeypatch):
    """A layer that one adapter lacks keeps the other's delta; ranks differ by layer, and PEFT reads them."""
    a = write_adapter(tmp_path / "a", SHAPES, r=4)
    b = write_adapter(tmp_path / "b", {Q: SHAPES[Q]}, r=2, seed=2, use_rslora=True)
    combine_adapters([a, (b, 0.5)], tmp_path / "out", "cat")
    held = read_adapter(tmp_path / "out")
    assert {path: len(t.lora_A) for path, t in held.layers.items()} == {Q: 6, V: 4}
    t, first, second = held.layers[Q], deltas(a), read_adapter(b).layers[Q]
    wanted = first[Q] + 0.5 * 4 / 2**0.5 * second.lora_B.double() @ second.lora_A.double()
    agree(t.lora_B.double() @ t.lora_A.double(), wanted)
    change(a / "adapter_model.safetensors", **{f"base_model.model.{V}.lora_B.weight": torch.full((16, 4), 3e38)})
    with pytest.raises(ValueError, match="expected finite numbers"):
        combine_adapters([(a, 100.0), b], tmp_path / "new", "cat", dtype=torch.float16)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "out"]


@pytest.mark.parametrize("command", ["combine", "shrink", "extract", "convert"])
def test_output_that_holds_something_or_lies_in_an_input_is_refused(tmp_path, capsys, command):
    """Whatever is written; an empty folder is taken."""
    a, base = write_adapter(tmp_path / "a", SHAPES), write_base(tmp_path / "base", decoder(), shards=2)
    tuned = write_base(tmp_path / "tuned", decoder(seed=1))
    (tmp_path / "link").symlink_to(a)
    (tmp_path / "empty").mkdir()
    call = {
        "combine": ["combine", str(a), f"{a}:0.5"],
        "shrink": ["shrink", str(a), "--rank", "2"],
        "extract": ["extract", "--base", str(base), "--tuned", str(tuned), "--rank", "2"],
        "convert": ["convert", str(a), "--base", str(base)],
    }[command]
    outer = (base if command == "extract" else a) / "new"
    before = contents(tmp_path)
    for out in (a, base, tuned, tmp_path / "link", a / "adapter_config.json", outer):
        assert main([*call, "--out", str(out)]) == 1
        said = capsys.readouterr().err
        assert "out: expected a" in said and str(out.resolve()) in said
    assert contents(tmp_path) == before
    assert main([*call, "--out", str(tmp_path / "empty")]) == 0
    assert "adapter_model.safetensors" in contents(tmp_path / "empty")


def test_what_the_system_refuses_names_the_folder_asked_for(tmp_path, capsys, monkeypatch):
    """Not the temporary one beside it; a full disk names nothing at all."""
    call = ["shrink", str(write_adapter(tmp_path / "a", SHAPES)), "--rank", "2", "--out", str(tmp_path / "new")]

    def full(file, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def denied(folder, *mode):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), folder)

    for owner, name, refuse, said in (
        (tensorfile, "write_all", full, "No space left on device"),
        (staging.os, "mkdir", denied, "Permission denied"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, refuse)
            assert main(call) == 1
        assert capsys.readouterr().err == f"fused-lora shrink: error: {said}: '{tmp_path / 'new'}'\n"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_shrink_is_the_nearest_of_its_rank(tmp_path):
    adapter = write_adapter(tmp_path / "a", SHAPES, r=6)
    report = shrink_adapter(adapter, tmp_path / "out", 2)
    for path, delta in deltas(adapter).items():
        U, S, Vh = torch.linalg.svd(delta)
        nearest = U[:, :2] * S[:2] @ Vh[:2]
        agree(deltas(tmp_path / "out")[path], nearest)
        kept = next(layer["kept"] for layer in report.layers if layer["path"] == path)
        assert kept == pytest.approx((S[:2].square().sum() / S.square().sum()).item())


@pytest.mark.parametrize("exact", [True, False])
def test_extract_finds_the_adapter_again(tmp_path, monkeypatch, exact):
    """Out of a merge in fp32, exactly and by random projection; what an adapter cannot hold is named."""
    monkeypatch.setattr(factors, "_EXACT", 1024 if exact else 1)
    monkeypatch.setattr(factors, "_FURTHER", 4)
    base = write_base(tmp_path / "base", decoder(dtype=torch.float32), shards=2)
    adapter = write_adapter(tmp_path / "adapter", SHAPES, r=3)
    merge_checkpoint(base, adapter, tmp_path / "tuned")
    for file in (tmp_path / "tuned").glob("*.safetensors"):
        if "model.norm.weight" in load_file(file):
            change(file, **{"model.norm.weight": torch.ones(K)})
    report = extract_adapter(base, tmp_path / "tuned", tmp_path / "out", 3)
    assert report.left_out == ["model.norm.weight"]
    assert {layer["path"] for layer in report.layers} == {Q, V}
    assert min(layer["kept"] for layer in report.layers) > 0.9999
    for path, delta in deltas(adapter).items():
        agree(deltas(tmp_path / "out")[path], delta)
    with pytest.raises(AdapterError, match="weights that differ"):
        extract_adapter(base, base, tmp_path / "no", 3)


def test_extract_of_transposed_weights_gives_what_peft_reads(tmp_path):
    """GPT-2's Conv1D is [in, out]; the first of the two is square."""
    torch.manual_seed(shifted(2))
    sizes = dict(n_layer=1, n_embd=16, n_head=2, vocab_size=50, n_positions=32, bos_token_id=0, eos_token_id=0)
    model = tf.GPT2LMHeadModel(tf.GPT2Config(**sizes)).eval()
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        tuned.transformer.wpe.weight.add_(1)  # no linear layer either
        for layer in (tuned.transformer.h[0].attn.c_proj, tuned.transformer.h[0].mlp.c_fc):
            K, N = layer.weight.shape
            layer.weight.add_(torch.randn(K, 2) @ torch.randn(2, N))
    model.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    report = extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", 2)
    assert report.left_out == ["transformer.wpe.weight"]
    with torch.no_grad():
        tuned.transformer.wpe.weight.copy_(model.transformer.wpe.weight)
    theirs, tokens = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval(), torch.arange(20)[None]
    with torch.no_grad():
        assert_close(theirs(tokens).logits, tuned(tokens).logits, terms=5000)
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", verify=True)
    with torch.no_grad():
        merged = tf.GPT2LMHeadModel.from_pretrained(tmp_path / "out").eval()
        assert_close(merged(tokens).logits, tuned(tokens).logits, terms=5000)


def test_inspect_and_diff(tmp_path, capsys):
    a, b = write_adapter(tmp_path / "a", SHAPES), write_adapter(tmp_path / "b", SHAPES, r=4, lora_alpha=4)
    base = write_base(tmp_path / "base", decoder())
    change(b / "adapter_model.safetensors", **{f"base_model.model.{V}.lora_B.weight": torch.zeros(16, 4)})
    report = inspect_adapter(b, base)
    layers = {layer["path"]: layer for layer in report.layers}
    S = torch.linalg.svdvals(deltas(b)[Q])[:4]
    shares = S / S.sum()
    assert layers[Q]["norm"] == pytest.approx(deltas(b)[Q].norm().item())
    assert layers[Q]["effective_rank"] == pytest.approx(torch.exp(-(shares * shares.log()).sum()).item())
    assert report.fits and report.ranks == {4: 2} and report.targets == {"q_proj": 1, "v_proj": 1}
    assert len(report.oddities) == 1 and "1 of 2 layers add nothing" in report.oddities[0]

    found = diff_adapters(a, b)
    one, two = deltas(a), deltas(b)
    by_path = {layer["path"]: layer for layer in found.layers}
    assert by_path[Q]["apart"] == pytest.approx((one[Q] - two[Q]).norm().item())
    assert by_path[Q]["cosine"] == pytest.approx(1) and by_path[V]["cosine"] is None
    assert found.config == {"lora_alpha": [8, 4]} and not found.same

    write_adapter(tmp_path / "other", {"model.blocks.0.q": (K, N)})
    assert main(["inspect", str(tmp_path / "other"), "--base", str(base), "--json"]) == 1
    assert "likely rename" not in json.loads(capsys.readouterr().out)["oddities"]
    assert main(["inspect", str(a)]) == 0 and "2 of rank 4" in capsys.readouterr().out
    assert main(["diff", str(a), str(a)]) == 0 and main(["diff", str(a), str(b)]) == 1
    assert main(["diff", str(a), str(base)]) == 2
    assert main(["shrink", str(a), "--rank", "2", "--out", str(tmp_path / "s"), "--dtype", "bfloat16"]) == 0
    assert {t.dtype for t in read_all(tmp_path / "s").values()} == {torch.bfloat16}
    assert main(["combine", f"{a}:0.5", str(b), "--method", "nothing", "--out", str(tmp_path / "c")]) == 1
    assert "expected one of linear" in capsys.readouterr().err


def test_diff_judges_what_is_added(tmp_path, capsys):
    """Another base, alpha beside other factors: the same. Tensors beside LoRA and the rows they are for count."""
    a = write_adapter(tmp_path / "a", SHAPES)
    change(write_adapter(tmp_path / "b", SHAPES) / "adapter_config.json", base_model_name_or_path="other", lora_alpha=4)
    held = read_all(tmp_path / "b")
    change(tmp_path / "b" / "adapter_model.safetensors", **{k: t * 2 for k, t in held.items() if "lora_B" in k})
    assert main(["diff", str(a), str(tmp_path / "b")]) == 0
    said = capsys.readouterr().out
    assert "base_model_name_or_path: None / 'other'" in said and "they add the same" in said
    names = ["q_proj", "v_proj", *(f"model.layers.{i}.self_attn.k_proj" for i in range(100))]
    change(tmp_path / "b" / "adapter_config.json", target_modules=names)
    assert main(["diff", str(a), str(tmp_path / "b")]) == 0
    said = capsys.readouterr().out
    assert "--json has all" in said and max(map(len, said.splitlines())) < 400
    key = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    for name, value, rows in (("c", 0.0, [3]), ("d", 1.0, [3]), ("e", 0.0, [5])):
        held = write_adapter(tmp_path / name, SHAPES)
        change(held / "adapter_model.safetensors", **{key: torch.full((1, K), value)})
        change(held / "adapter_config.json", trainable_token_indices=rows)
    assert diff_adapters(tmp_path / "c", tmp_path / "c").same
    assert diff_adapters(a, tmp_path / "c").beside == diff_adapters(tmp_path / "c", tmp_path / "d").beside == [key]
    for other in "ade":
        assert main(["diff", str(tmp_path / "c"), str(tmp_path / other)]) == 1
        assert "they do not add the same" in capsys.readouterr().out


KINDS = {
    "kohya": (lambda path: f"lora_unet_{path.replace('.', '_')}", "lora_down.weight", "lora_up.weight"),
    "diffusers": (lambda path: path, "lora_A.weight", "lora_B.weight"),
    "older diffusers": (lambda path: path, "lora.down.weight", "lora.up.weight"),
    "state dict": (lambda path: f"base_model.model.{path}", "lora_A.default.weight", "lora_B.default.weight"),
    "wrapped": (
        lambda path: f"module._orig_mod.base_model.model.{path.replace('.self', '._fsdp_wrapped_module.self')}",
        "lora_A.weight",
        "lora_B.weight",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_convert(tmp_path, kind):
    adapter, base = write_adapter(tmp_path / "a", SHAPES), write_base(tmp_path / "base", decoder())
    named, down, up = KINDS[kind]
    held, tensors = read_all(adapter), {}
    for path in SHAPES:
        for end, part in ((down, "A"), (up, "B")):
            tensors[f"{named(path)}.{end}"] = held[f"base_model.model.{path}.lora_{part}.weight"]
        if kind == "kohya":
            tensors[f"{named(path)}.alpha"] = torch.tensor(8.0)
    source = tmp_path / "source.safetensors"
    save_file(tensors, source)
    convert_adapter(source, tmp_path / "out", base=base if kind == "kohya" else None, lora_alpha=8.0)
    found, wanted = deltas(tmp_path / "out"), deltas(adapter)
    assert found.keys() == wanted.keys() and all(torch.equal(found[path], wanted[path]) for path in wanted)
    merge_checkpoint(base, tmp_path / "out", tmp_path / "merged", dry_run=True)
    if kind == "kohya":
        with pytest.raises(AdapterError, match="names with dots"):
            convert_adapter(source, tmp_path / "no")
    save_file({**tensors, "something.else": torch.zeros(2)}, source)
    with pytest.raises(AdapterError, match="something.else"):
        convert_adapter(source, tmp_path / "no", base=base)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("in_file, in_base", [(4, 4), (2, 4), (4, 2), (4, None)])
def test_convert_writes_1x1_convolutions_as_peft_has_them(tmp_path, in_file, in_base):
    """Those of Stable Diffusion 1, as kohya trains them; in later models the same layers are linear."""
    torch.manual_seed(shifted(0))
    model = nn.ModuleDict({"proj_in": nn.Linear(K, N) if in_base == 2 else nn.Conv2d(K, N, 1)})
    base = None
    if in_base:
        (base := tmp_path / "base").mkdir()
        save_file(model.state_dict(), base / "diffusion_pytorch_model.safetensors")
    A, B = torch.randn(4, K), torch.randn(N, 4)
    named = "lora_unet_proj_in" if base else "proj_in"
    pair = {"down": A, "up": B} if in_file == 2 else {"down": A[..., None, None], "up": B[..., None, None]}
    tensors = {f"{named}.lora_{part}.weight": tensor.contiguous() for part, tensor in pair.items()}
    save_file({**tensors, f"{named}.alpha": torch.tensor(2.0)}, tmp_path / "lora.safetensors")
    convert_adapter(tmp_path / "lora.safetensors", tmp_path / "out", base=base)
    tuned = peft.PeftModel.from_pretrained(model, tmp_path / "out")
    delta = tuned.base_model.model["proj_in"].get_delta_weight("default")
    assert_close(delta.flatten(1), 0.5 * B @ A, terms=4)


def test_convert_reads_the_config_beside_the_file(tmp_path):
    adapter = write_adapter(tmp_path / "a", SHAPES)
    assert not convert_adapter(adapter / "adapter_model.safetensors", tmp_path / "out").assumed
    found, wanted = deltas(tmp_path / "out"), deltas(adapter)
    assert all(torch.equal(found[path], wanted[path]) for path in wanted)
    (adapter / "adapter_config.json").unlink()
    assert convert_adapter(adapter, tmp_path / "new").assumed


def test_convert_reads_the_configs_in_a_header_of_diffusers(tmp_path):
    """Of a model, and of a pipeline with two."""
    held, source = read_all(write_adapter(tmp_path / "a", SHAPES)), tmp_path / "source.safetensors"
    tensors = {key.removeprefix("base_model.model."): tensor for key, tensor in held.items()}
    first, r = next(iter(SHAPES)), 4
    config = {"peft_type": "LORA", "r": r, "lora_alpha": 6, "alpha_pattern": {first: 3}, "target_modules": ["x"]}

    def save(tensors, noted):
        save_file(tensors, source, metadata={"lora_adapter_metadata": noted})

    def alphas(name, **kwargs):
        done = convert_adapter(source, tmp_path / name, **kwargs)
        assert not done.assumed
        return {path: alpha for path, (_, alpha) in done.layers.items()}

    save(tensors, json.dumps(config))
    wanted = {path: 3 if path == first else 6 for path in SHAPES}
    assert alphas("one") == alphas("given", lora_alpha=5.0) == wanted
    save(tensors, json.dumps({**config, "use_rslora": True}))
    ranks = {path: tensors[f"{path}.lora_A.weight"].shape[0] for path in SHAPES}
    assert alphas("rs") == pytest.approx({path: wanted[path] * ranks[path] ** 0.5 for path in SHAPES})
    both = {"unet": config, "text_encoder": {**config, "alpha_pattern": {}}}
    save(
        {f"{part}.{key}": tensor.clone() for part in both for key, tensor in tensors.items()},
        json.dumps({f"{part}.{key}": value for part in both for key, value in both[part].items()}),
    )
    assert alphas("two") == {
        **{f"unet.{path}": alpha for path, alpha in wanted.items()},
        **dict.fromkeys((f"text_encoder.{path}" for path in SHAPES), 6),
    }
    wrong = json.dumps({**config, "r": -1})
    for noted, match in (("[1]", "expected a JSON object"), ("{", "expected a JSON object"), (wrong, ": r: ")):
        save(tensors, noted)
        with pytest.raises(AdapterError, match="lora_adapter_metadata.*" + match):
            convert_adapter(source, tmp_path / "no")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("key", ["(", "(?:a+)+b(?!c)"])  # no expression; one on which re may spend exponential time
@pytest.mark.parametrize("noted", [False, True])
def test_convert_runs_no_expression_of_a_file(tmp_path, key, noted):
    """The keys of alpha_pattern are as little trusted as when an adapter is loaded."""
    adapter = write_adapter(tmp_path / "a", SHAPES)
    path = adapter / "adapter_config.json"
    config = {**json.loads(path.read_text()), "alpha_pattern": {key: 2}}
    path.write_text(json.dumps(config))
    if noted:
        tensors, adapter = read_all(adapter), tmp_path / "source.safetensors"
        save_file(tensors, adapter, metadata={"lora_adapter_metadata": json.dumps(config)})
    place = "source.safetensors: lora_adapter_metadata" if noted else "adapter_config.json"
    with pytest.raises(AdapterError, match=f"{place}: alpha_pattern: expected keys of module names"):
        convert_adapter(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_convert_cannot_do_names_the_argument(tmp_path):
    adapter = write_adapter(tmp_path / "a", SHAPES)
    for rename, kind in ((["x"], TypeError), ({"nowhere": "x"}, ValueError)):
        with pytest.raises(kind, match="rename: "):
            convert_adapter(adapter, tmp_path / "out", rename=rename)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="/file'"):
        convert_adapter(adapter, tmp_path / "file" / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"alpha": torch.ones(3)}, "x.q.alpha: expected one real number, found torch.float32 \\[3\\]"),
        ({"alpha": torch.ones(0)}, "x.q.alpha: expected one real number"),
        ({"alpha": torch.tensor(1 + 2j)}, "x.q.alpha: expected one real number, found torch.complex64"),
        ({"alpha": torch.tensor(torch.nan)}, "x.q.alpha: expected a finite alpha of at most 1048576"),
        ({"alpha": torch.tensor(1e30)}, "x.q.alpha: expected a finite alpha"),
        ({"lora_down.weight": torch.zeros(0, K)}, "x.q.lora_down.weight: expected a matrix with numbers"),
        ({"lora_up.weight": torch.zeros(N, 0)}, "x.q.lora_up.weight: expected a matrix with numbers"),
    ],
)
def test_convert_names_what_no_layer_can_have(tmp_path, changed, message):
    held = {"lora_down.weight": torch.ones(4, K), "lora_up.weight": torch.ones(N, 4), "alpha": torch.tensor(4)}
    save_file({f"x.q.{end}": t for end, t in {**held, **changed}.items()}, tmp_path / "file.safetensors")
    with pytest.raises(AdapterError, match=message):
        convert_adapter(tmp_path / "file.safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("quantised", [False, True])
def test_convert_compares_sizes_with_the_base(tmp_path, quantised):
    """Codes have another shape than the weight, and say nothing."""
    adapter, tensors = write_adapter(tmp_path / "a", SHAPES), decoder()
    tensors[f"{Q}.weight"] = torch.zeros(N, K // 2, dtype=torch.uint8 if quantised else torch.float32)
    base = write_base(tmp_path / "base", tensors)
    if quantised:
        assert convert_adapter(adapter, tmp_path / "out", base=base).layers
        return
    with pytest.raises(AdapterError, match=f"sizes of '{Q}' as in the base, \\[40, 12\\], found \\[40, 24\\]"):
        convert_adapter(adapter, tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()


def test_what_is_no_adapter_is_refused_in_plain_words(tmp_path, capsys):
    base, pickled = write_base(tmp_path / "base", decoder()), tmp_path / "lora.pt"
    torch.save({"a": torch.zeros(2)}, pickled)
    (tmp_path / "older.pt").write_bytes(b"\x80\x02}q\x00" + b"x" * 20)
    (tmp_path / "empty").mkdir()
    a, out = write_adapter(tmp_path / "a", SHAPES), ["--out", str(tmp_path / "out")]
    for call, message in [
        (["convert", pickled, *out], "found a pickle, which is not read"),
        (["convert", tmp_path / "older.pt", *out], "found a pickle, which is not read"),
        (["convert", tmp_path / "none.safetensors", *out], "expected a readable regular file, found No such file"),
        (["convert", tmp_path / "empty", *out], "found No such file"),
        (["convert", a, "--alpha", "0", *out], "error: --alpha: expected another number than 0"),
        (["inspect", base], "an adapter's folder, with adapter_config.json, found a model's folder"),
        (["inspect", tmp_path / "empty"], "an adapter's folder, with adapter_config.json, found none"),
    ]:
        assert main([str(word) for word in call]) == 1
        said = capsys.readouterr().err
        assert message in said and "Errno" not in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "method, options, message",
    [
        ("svd", dict(density=0.5), "density"),
        ("ties", {}, "density"),
        ("ties", dict(density=1.5), "density"),
        ("cat", dict(rank=2), "rank"),
        ("svd", dict(rank=0), "rank"),
        ("linear", {}, "equal ranks"),
        ("svd", dict(dtype=torch.int8), "dtype"),
        ("dare_linear", dict(density=0.5, seed=1 << 64), "seed: expected at most"),
        ("dare_linear", dict(density=torch.nan), "density"),
    ],
)
def test_combinations_that_are_refused(tmp_path, method, options, message):
    a, b = write_adapter(tmp_path / "a", SHAPES), write_adapter(tmp_path / "b", SHAPES, r=2)
    with pytest.raises(ValueError, match=message):
        combine_adapters([a, b], tmp_path / "out", method, **options)
    write_adapter(tmp_path / "c", {Q: (K, N + 1)})
    with pytest.raises(AdapterError, match="K, N of"):
        combine_adapters([a, tmp_path / "c"], tmp_path / "out", "cat")
    assert not (tmp_path / "out").exists()


def test_numbers_that_leave_nothing_or_no_numbers_are_named(tmp_path, capsys):
    a, out = write_adapter(tmp_path / "a", SHAPES), tmp_path / "out"
    for weights in ((0, 0), (0.0,)):
        with pytest.raises(ValueError, match="adapters: expected one that has an effect"):
            combine_adapters([(a, weight) for weight in weights], out, "cat")
    for weight in (1e300, -1e7, 10**400):
        with pytest.raises(ValueError, match="adapters: expected a finite weight of at most 1048576 in size"):
            combine_adapters([(a, weight)], out)
    with pytest.raises(TypeError, match="density must be a number, got '0.5'"):
        combine_adapters([a], out, "ties", density="0.5")
    tensors = decoder()
    base = write_base(tmp_path / "base", tensors)
    tuned = write_base(tmp_path / "tuned", {**tensors, f"{Q}.weight": tensors[f"{Q}.weight"] * torch.nan})
    with pytest.raises(AdapterError, match=f"{Q}.weight: expected weights with a finite difference"):
        extract_adapter(base, tuned, out, 2)
    call = ["convert", str(a), "--out", str(out), "--rename", "model.=x.", "--rename", "model.=y."]
    with pytest.raises(SystemExit):
        main(call)
    assert "--rename: expected one name for 'model.', got 'x.' and 'y.'" in capsys.readouterr().err
    assert not out.exists()
    assert main(call[:-1] + ["model.=x."]) == 0 and all(key.startswith("base_model.model.x.") for key in read_all(out))
