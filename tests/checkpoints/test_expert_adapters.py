"""combine, shrink and convert of adapters of parameters, where each expert is a layer of its own; PEFT reads them."""

import copy
import functools
import itertools

import peft
import pytest
import torch
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from safetensors.torch import save_file
from torch import nn

import fused_lora
from fused_lora import combine_adapters, convert_adapter, diff_adapters, shrink_adapter
from fused_lora.adapters import AdapterError
from fused_lora.checkpoints.combine import METHODS
from fused_lora.cli import main
from fused_lora.testing.numeric import assert_close
from helpers.checkpoint_files import K, N, change, contents, read_all, save_trained, write_adapter, write_base
from helpers.experts import ROUTERS, routed
from helpers.seeds import shifted
from helpers.thorough import sampled
from helpers.versions import svd_weights

PLACE, PREFIX = "model.layers.0.mlp.experts", "base_model.model."
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
CONFIGS = {
    "all": dict(target_modules=["q_proj"], target_parameters=[*BOTH, "router.weight"]),
    "patterns": dict(
        target_modules=[], target_parameters=BOTH, use_rslora=True, rank_pattern={r".*\.gate_up_proj": 8},
        alpha_pattern={r".*\.down_proj": 3},
    ),
    "alphas": dict(target_modules=[], target_parameters=BOTH, alpha_pattern={r".*\.gate_up_proj": 3}),
    "down": dict(target_modules=["v_proj"], target_parameters=BOTH[1:]),
    "up": dict(target_modules=[], target_parameters=BOTH[:1]),
    "all-linear": dict(target_modules="all-linear"),
}  # fmt: skip
NAMES = ("qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "llama4_text")
base_of = functools.cache(routed)


def agree(ours, theirs):
    """Products of what was stored in fp32, formed in any dtype; a decomposition rounds more often than a sum."""
    assert ours.keys() == theirs.keys()
    for path, delta in ours.items():
        assert_close(delta.float(), theirs[path].float(), terms=10_000)


def by_expert(A, B, scaling, E):
    """s B A of each expert in fp64."""
    return scaling * B.double().view(len(B), -1, E).permute(2, 0, 1) @ A.double().view(E, -1, A.shape[1])


def trained(folder, name, seed, kind):
    """An adapter of PEFT's whose numbers are all drawn."""
    config = {"r": 4, "lora_alpha": 6, **CONFIGS[kind]}
    routers = {"router.weight": f"{ROUTERS[name][0]}.weight"}
    config["target_parameters"] = [routers.get(path, path) for path in config.get("target_parameters", ())]
    wrapped = peft.get_peft_model(copy.deepcopy(base_of(name)), peft.LoraConfig(**config))
    save_trained(wrapped, folder, seed)
    return folder


def layers_of(folder, name):
    """{parameter: (lora_A, lora_B, scaling, experts)} as PEFT reads a folder; this package reads the same bits."""
    model = copy.deepcopy(base_of(name))
    fused_lora.load_adapter(model, folder)
    ours = {
        path if isinstance(layer, fused_lora.modules.experts.LoraStack) else f"{path}.weight": layer
        for path, layer in fused_lora.lora_layers(model).items()
    }
    theirs = {}
    wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(base_of(name)), folder)
    for path, layer in wrapped.base_model.model.named_modules():
        if isinstance(layer, LoraLayer):
            E, last = (layer.num_experts, layer.parameter_name) if isinstance(layer, ParamWrapper) else (1, "weight")
            A, B = (part["default"].weight.detach() for part in (layer.lora_A, layer.lora_B))
            theirs[f"{path.replace('.base_layer', '')}.{last}"] = A, B, layer.scaling["default"], E
    assert ours.keys() == theirs.keys()
    for path, (A, B, scaling, _) in theirs.items():
        assert all(torch.equal(p["default"].weight, t) for p, t in ((ours[path].lora_A, A), (ours[path].lora_B, B)))
        assert ours[path].scaling["default"] == scaling
    return theirs


def deltas(folder, name):
    return {path: by_expert(*held) for path, held in layers_of(folder, name).items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sampled(NAMES, 3))
def test_peft_reads_the_sums_of_other_targets_ranks_and_alphas(tmp_path, name):
    held = {kind: deltas(trained(tmp_path / kind, name, i, kind), name) for i, kind in enumerate(CONFIGS)}
    pairs = [("all", "patterns"), ("patterns", "alphas"), ("down", "up"), ("up", "all"), ("all-linear", "down", "all")]
    for kinds, (method, options) in zip(pairs, itertools.cycle((("cat", {}), ("svd", dict(rank=16))))):
        weighted = list(zip(kinds, (0.7, -0.4, 1.3), strict=False))
        paths = dict.fromkeys(path for kind in kinds for path in held[kind])
        wanted = {path: sum(w * held[kind][path] for kind, w in weighted if path in held[kind]) for path in paths}
        out = tmp_path / "-".join(kinds)
        report = combine_adapters([(tmp_path / kind, w) for kind, w in weighted], out, method, **options)
        agree(deltas(out, name), wanted)
        assert {row["path"].removesuffix(".weight") for row in report.layers} == {
            path.removesuffix(".weight") for path in wanted
        }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sampled(NAMES, 3))
@pytest.mark.parametrize("kind", ["all", "patterns", "all-linear"])
def test_shrink_and_convert(tmp_path, name, kind):
    """The nearest of a rank in each expert; a conversion has the bits, also of a state dict with other beginnings."""
    before = layers_of(trained(tmp_path / "a", name, 1, kind), name)
    report = shrink_adapter(tmp_path / "a", tmp_path / "small", 2)
    wanted, shares = {}, []
    for path, held in before.items():
        U, S, Vh = torch.linalg.svd(by_expert(*held), full_matrices=False)
        wanted[path] = U[..., :2] * S[..., None, :2] @ Vh[..., :2, :]
        shares.append((S[:, :2].square().sum() / S.square().sum()).item())
    agree(deltas(tmp_path / "small", name), wanted)
    assert sorted(layer["kept"] for layer in report.layers) == pytest.approx(sorted(shares))

    convert_adapter(tmp_path / "a", tmp_path / "half", dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in read_all(tmp_path / "half").values()} == {torch.bfloat16}
    tensors = {
        "module._orig_mod."
        + key.replace(".weight", ".default.weight").replace("model.model.model", "model.model.old"): t
        for key, t in read_all(tmp_path / "a").items()
    }
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    convert_adapter(tmp_path / "a", tmp_path / "new", rename={"old.": "model."})
    after = layers_of(tmp_path / "new", name)
    assert after.keys() == before.keys()
    for path, (A, B, *rest) in before.items():
        assert torch.equal(A, after[path][0]) and torch.equal(B, after[path][1]) and rest == list(after[path][2:])


def stacked(folder, adapted, E=3, r=4, seed=1, **config):
    """An adapter of the wrappers {path behind the experts': (K, N)}."""
    parameters = config.pop("target_parameters", BOTH[1:])
    shapes = {f"{PLACE}{path}": sizes for path, sizes in adapted.items()}
    write_adapter(folder, shapes, r=E * r, seed=seed, target_parameters=parameters)
    change(folder / "adapter_config.json", **{"r": r, "lora_alpha": 2 * r, **config})
    return folder


def factors(folder, E, wrapper=""):
    """lora_A [E, r, K] and lora_B [E, N, r] of one wrapper."""
    A, B = (read_all(folder)[f"{PREFIX}{PLACE}{wrapper}.lora_{side}.weight"] for side in "AB")
    return A.unflatten(0, (E, -1)), B.unflatten(1, (-1, E)).permute(2, 0, 1)


@pytest.mark.parametrize("E", [1, 3])
@pytest.mark.parametrize("method", METHODS)
def test_each_expert_is_combined_as_peft_combines_a_layer(tmp_path, monkeypatch, method, E):
    """PEFT's add_weighted_adapter takes no parameters, so it gets one linear layer for each expert, in their order."""
    weights = {"a": 0.7, "b": -0.4}
    options = {} if method in ("cat", "linear", "svd") else {"density": 0.6}
    options |= {"rank": 3} if method.endswith("svd") else {}
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=[str(e) for e in range(E)])
    theirs = nn.Sequential(*(nn.Linear(K, N, bias=False) for _ in range(E)))
    wrapped = peft.get_peft_model(theirs, config, "a")
    wrapped.add_adapter("b", config)
    for seed, name in enumerate(weights):
        held = factors(stacked(tmp_path / name, {"": (K, N)}, E, seed=seed), E)
        for layer, A, B in zip(wrapped.base_model.model, *held, strict=True):
            layer.lora_A[name].weight.data, layer.lora_B[name].weight.data = A.clone(), B.clone()
    inject = wrapped.base_model.inject_adapter

    def seeded(*args, **kwargs):  # the new layers draw numbers, too
        inject(*args, **kwargs)
        torch.manual_seed(shifted(7))

    monkeypatch.setattr(wrapped.base_model, "inject_adapter", seeded)
    named = {{"rank": "svd_rank"}.get(key, key): value for key, value in options.items()}
    wrapped.add_weighted_adapter([*weights], svd_weights(method, weights.values(), 2), "mixed", method, **named)
    pairs = [(tmp_path / name, weight) for name, weight in weights.items()]
    combine_adapters(pairs, tmp_path / "out", method, seed=shifted(7), **options)
    ours = torch.stack([B.double() @ A.double() for A, B in zip(*factors(tmp_path / "out", E), strict=True)])
    wanted = [layer.lora_B["mixed"].weight.double() @ layer.lora_A["mixed"].weight.double() for layer in theirs]
    agree({"": ours}, {"": torch.stack(wanted).detach()})


def test_a_router_is_one_layer_however_it_is_named(tmp_path):
    """It was a linear layer in files of transformers 4."""
    path = "model.layers.0.mlp.gate"
    a = write_adapter(tmp_path / "a", {path: (K, 4)}, target_modules=["gate"])
    b = write_adapter(tmp_path / "b", {path: (K, 4)}, seed=2, target_parameters=["gate.weight"])
    wanted = 0
    for folder in (a, b):
        A, B = (read_all(folder)[f"{PREFIX}{path}.lora_{side}.weight"].double() for side in "AB")
        wanted = wanted + 2 * B @ A
    for i, pair in enumerate(((a, b), (b, a))):
        report = combine_adapters(pair, tmp_path / f"{i}", "cat")
        A, B = (read_all(tmp_path / f"{i}")[f"{PREFIX}{path}.lora_{side}.weight"].double() for side in "AB")
        agree({"": B @ A}, {"": wanted})
        assert report.layers == [{"path": f"{path}.weight", "r": 8, "kept": None}]
        assert [row["path"] for row in diff_adapters(*pair).layers] == [f"{path}.weight"]
        entries = peft.LoraConfig.from_pretrained(tmp_path / f"{i}")
        assert entries.target_parameters == [f"{path}.weight"] and not entries.target_modules


def test_which_wrapper_is_whose(tmp_path):
    """Ranks tell, or sizes, or the order of transformers; an order that a file proves stays."""
    up, inner = dict(target_parameters=["experts.up_proj", *BOTH[1:]]), ".base_layer"
    plain = stacked(tmp_path / "plain", {"": (16, 8), inner: (8, 16)}, **up)
    wide = stacked(tmp_path / "wide", {"": (16, 8)}, r=6)
    combine_adapters([plain, wide], tmp_path / "out", "cat")
    assert [factors(tmp_path / "out", 3, end)[0].shape[1] for end in ("", inner)] == [10, 4]
    report = diff_adapters(
        tmp_path / "out", stacked(tmp_path / "up", {"": (8, 16)}, target_parameters=up["target_parameters"][:1])
    )
    assert [row["path"] for row in report.layers] == [f"{PLACE}.up_proj"] and report.only_a == [f"{PLACE}.down_proj"]
    # gate_up_proj outside, as in no model of transformers
    other = stacked(tmp_path / "other", {"": (8, 32), inner: (16, 8)}, target_parameters=BOTH)
    combine_adapters([other, wide], tmp_path / "kept", "cat")
    assert [factors(tmp_path / "kept", 3, end)[0].shape[1] for end in ("", inner)] == [4, 10]
    ranks = {"target_parameters": ["experts.w0", "experts.w1"], "rank_pattern": {r".*\.w0": 8}}
    named = write_adapter(tmp_path / "named", {PLACE: (8, 8), PLACE + inner: (8, 8)}, r=12, **ranks)
    change(named / "adapter_config.json", r=4)
    wider = {k: torch.cat([t, t], int("lora_B" in k)) for k, t in read_all(named).items() if inner in k}
    change(named / "adapter_model.safetensors", **wider)
    report = combine_adapters([named, named], tmp_path / "twice", "cat")
    assert {row["path"].rpartition(".")[2]: row["r"] for row in report.layers} == {"w0": 16, "w1": 8}
    assert [factors(tmp_path / "twice", 3, end)[0].shape[1] for end in ("", inner)] == [8, 16]


def test_a_base_tells_which_wrapper_is_whose(tmp_path, capsys):
    """By sizes, of parameters that transformers does not name, and of alphas that may be of either."""
    names, inner = ["experts.w0", "experts.w1"], ".base_layer"
    options = dict(target_parameters=names, alpha_pattern={r".*\.w1": 3})
    adapter = stacked(tmp_path / "a", {"": (8, 32), inner: (16, 8)}, **options)
    A, B = factors(adapter, 3, inner)
    tensors = {f"{PLACE}.w0": torch.ones(3, 32, 8), f"{PLACE}.w1": torch.ones(3, 8, 16)}
    base = write_base(tmp_path / "base", tensors)
    calls = {
        "combine": ([f"{adapter}:0.5", "--method", "cat"], 3 / 4 / 2),  # the scaling goes into A
        "shrink": ([str(adapter), "--rank", "4"], 3 / 4),
        "convert": ([str(adapter)], 1.0),  # it stays in the config
    }
    for command, (arguments, scale) in calls.items():
        call = [command, *arguments, "--out", str(tmp_path / command)]
        assert main(call) == 1 and "--base" in capsys.readouterr().err
        assert main([*call, "--base", str(base)]) == 0
        ours = torch.stack(
            [b.double() @ a.double() for a, b in zip(*factors(tmp_path / command, 3, inner), strict=True)]
        )
        agree({"w1": ours}, {"w1": scale * B.double() @ A.double()})
    config = peft.LoraConfig.from_pretrained(tmp_path / "convert")
    assert config.lora_alpha == 3 and list(config.alpha_pattern.values()) == [8]
    with pytest.raises(ValueError, match="out: expected a folder outside"):
        combine_adapters([adapter], base / "in", "cat", base=base)
    change(base / "model.safetensors", **{f"{PLACE}.w1": torch.ones(3, 16, 8)})
    with pytest.raises(AdapterError, match=r"\[experts \* r, in\]"):
        shrink_adapter(adapter, tmp_path / "out", 2, base=base)
    assert not (tmp_path / "out").exists()


OTHERS = dict(target_parameters=["experts.w0", "experts.w1"])
REFUSED = {
    "names": (dict(adapted={"": (8, 8), ".base_layer": (8, 8)}, **OTHERS), None, "lora_A.weight: expected a rank of"),
    "one of two": (dict(adapted={"": (16, 8)}, target_parameters=BOTH), None, "lora_A.weight: expected a rank of"),
    "union": (
        dict(adapted={"": (8, 8)}, target_parameters=["experts.w0"]),
        dict(adapted={"": (8, 8)}, target_parameters=["experts.w1"]),
        "parameters of 'model.layers.0.mlp.experts' in one order",
    ),
    "experts": (dict(adapted={"": (16, 8)}), dict(adapted={"": (16, 8)}, E=2), r"K, N of \[3, 16, 8\] as in"),
    "turned": (dict(adapted={"": (16, 8)}), dict(adapted={"": (8, 16)}), r"K, N of \[3, 16, 8\] as in"),
    "older": (
        dict(adapted={"": (8, 8)}, peft_version="0.18.1"),
        dict(adapted={"": (8, 8)}, peft_version="0.21.0"),
        "from before PEFT 0.19.1 or from later alone",
    ),
    "single": (
        dict(adapted={"": (16, 8)}),
        dict(adapted={".0.w2": (16, 8)}, target_parameters=None, E=1),
        "0.w2: expected experts of .* stacked in all adapters",
    ),
    "rank": (dict(adapted={"": (16, 8)}, rank_pattern={r".*\.down_proj": 5}), None, "one rank and alpha"),
    "alphas": (
        dict(
            adapted={"": (8, 8), ".base_layer": (8, 8)},
            target_parameters=["experts.up_proj", *BOTH[1:]],
            alpha_pattern={r".*\.up_proj": 3},
        ),
        None,
        "a base's shapes tell more",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(tmp_path, case):
    one, two, message = REFUSED[case]
    pair = [stacked(tmp_path / name, **held) for name, held in (("a", one), ("b", two)) if held]
    before = contents(tmp_path)
    alone = (lambda folder, out: shrink_adapter(folder, out, 1), convert_adapter) if two is None else ()
    for call in (lambda _, out: combine_adapters(pair, out, "cat"), *alone):
        with pytest.raises(AdapterError, match=message):
            call(pair[0], tmp_path / "out")
    assert contents(tmp_path) == before


def test_what_convert_refuses(tmp_path, capsys):
    """Stacks of other sizes than the base's, of which nothing says what they are, and in what holds no stacks."""
    out = tmp_path / "out"
    adapter = stacked(tmp_path / "a", {"": (16, 8), ".base_layer": (8, 32)}, target_parameters=BOTH)
    shapes = {"gate_up_proj": (3, 32, 8), "down_proj": (3, 8, 16)}
    base = write_base(tmp_path / "base", {f"{PLACE}.{name}": torch.ones(shape) for name, shape in shapes.items()})
    assert main(["convert", str(adapter), "--base", str(base), "--out", str(tmp_path / "fits")]) == 0
    assert "2 layers" in capsys.readouterr().out
    change(base / "model.safetensors", **{f"{PLACE}.down_proj": torch.ones(4, 8, 16)})
    before = contents(tmp_path)
    for options, message in (
        ({"base": base}, rf"sizes of '{PLACE}.down_proj' as in the base, \[4, 8, 16\], found \[3, 8, 16\]"),
        ({"stack_experts": True}, f"{PLACE}.gate_up_proj: expected LoRA on linear layers alone with stack_experts"),
        ({"rename": {f"{PLACE}.gate_up_proj": "x", f"{PLACE}.down_proj": "x"}}, "no other layer gets by rename"),
    ):
        with pytest.raises(AdapterError, match=message):
            convert_adapter(adapter, out, **options)
    assert contents(tmp_path) == before
    change(adapter / "adapter_config.json", lora_B_layout="rank_major")
    convert_adapter(adapter, tmp_path / "as PEFT has it")
    change(adapter / "adapter_config.json", lora_B_layout="grouped_by_expert")
    with pytest.raises(AdapterError, match="lora_B_layout: expected rank_major"):
        convert_adapter(adapter, out)
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(AdapterError, match=f"target_parameters name the parameters of '{PLACE}"):
        convert_adapter(adapter, out)
    assert not out.exists()


def test_convert_reads_patterns_by_the_names_before_rename(tmp_path):
    path = "old.layers.0.self_attn.q_proj"
    adapter = write_adapter(tmp_path / "a", {path: (K, N)}, alpha_pattern={"^" + path.replace(".", r"\."): 3})
    report = convert_adapter(adapter, tmp_path / "out", rename={"old.": "model."})
    assert report.layers == {"model.layers.0.self_attn.q_proj": [4, 3.0]}
