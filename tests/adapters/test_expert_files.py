"""LoRA on experts as other trainers save it: one delta written in every layout, read to the same adapter."""

import copy
import json
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import fused_lora
from fused_lora.adapters import AdapterError
from fused_lora.serving.store import AdapterStore
from fused_lora.testing.numeric import assert_close
from helpers.accelerated import TOKENS
from helpers.adapter_corpus import MIDDLE, K, mixtral
from helpers.experts import EXPERTS, HIDDEN, INTER, Block, moe
from helpers.seeds import shifted

P, R = "base_model.model.", 3
IDS = torch.arange(12).reshape(2, 6)


def write(folder, tensors, **config):
    folder.mkdir(parents=True)
    entries = {"peft_type": "LORA", "r": R, "lora_alpha": 6, "target_modules": [], **config}
    (folder / "adapter_config.json").write_text(json.dumps(entries))
    save_file(
        {key: tensor.clone().contiguous() for key, tensor in tensors.items()}, folder / "adapter_model.safetensors"
    )
    return folder


def factors(K=HIDDEN, N=2 * INTER, r=R, experts=EXPERTS, seed=0):
    """A [experts, r, K] and B [experts, N, r]."""
    draw = torch.Generator().manual_seed(shifted(seed))
    return torch.randn(experts, r, K, generator=draw) * 0.3, torch.randn(experts, N, r, generator=draw) * 0.3


def packed(A, B):
    """PEFT's: the expert slowest in A, fastest in B."""
    return {"lora_A.weight": A.flatten(0, 1), "lora_B.weight": B.permute(1, 2, 0).flatten(1)}


def under(path, tensors):
    return {f"{P}{path}.{end}": tensor for end, tensor in tensors.items()}


STACK = {"target_parameters": ["experts.down_proj"]}


def layouts(A, B):
    """One adapter of ``experts.down_proj`` in each layout: tensors and config."""
    turned = under("experts", packed(B.transpose(1, 2), A.transpose(1, 2)))
    grouped = {"lora_A.weight": A.flatten(0, 1), "lora_B.weight": B.transpose(0, 1).flatten(1)}
    one = {f"{P}experts.{e}.down_proj.lora_{s}.weight": t[e] for e in range(len(A)) for s, t in (("A", A), ("B", B))}
    last = {f"{P}experts.down_projs.{e}.lora_{s}.weight": t[e] for e in range(len(A)) for s, t in (("A", A), ("B", B))}
    return {
        "PEFT": (under("experts", packed(A, B)), STACK),
        "PEFT's, said": (under("experts", packed(A, B)), {**STACK, "lora_B_layout": "rank_major"}),
        "PEFT before 0.19.1": (turned, {**STACK, "peft_version": "0.18.1"}),
        "PEFT before 0.19.1, unsaid": (turned, STACK),
        "expert slowest": (under("experts", grouped), {**STACK, "lora_B_layout": "grouped_by_expert"}),
        "three dimensions": (under("experts", {"lora_A.weight": A, "lora_B.weight": B}), STACK),
        "one by one": (one, {"target_modules": ["down_proj"], "lora_dropout": 0.1}),
        "one by one, expert last": (last, {"target_modules": ["down_projs.0"]}),
        "by parameter": ({f"{P}experts.down_proj.lora_A": A, f"{P}experts.down_proj.lora_B": B}, {}),
        "by parameter, packed": (under("experts.down_proj", packed(A, B)), {}),
    }


@pytest.mark.filterwarnings("ignore:lora_dropout")
@pytest.mark.parametrize("layout", list(layouts(*factors(INTER, HIDDEN))))
def test_every_layout_is_the_same_adapter(tmp_path, layout):
    A, B = factors(INTER, HIDDEN)
    tensors, config = layouts(A, B)[layout]
    model = Block()
    fused_lora.load_adapter(model, write(tmp_path / "a", tensors, **config))
    held = fused_lora.lora_layers(model)
    assert list(held) == ["experts.down_proj"] and held["experts.down_proj"].r == {"default": R}
    delta = held["experts.down_proj"].get_delta_weight("default")
    assert_close(delta, B @ A * 2.0, terms=10)
    fused_lora.save_adapter(model, tmp_path / "b")  # as PEFT writes it
    saved = load_file(tmp_path / "b/adapter_model.safetensors")
    assert saved.keys() == under("experts", packed(A, B)).keys()
    assert all(torch.equal(saved[key], tensor) for key, tensor in under("experts", packed(A, B)).items())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = peft.PeftModel.from_pretrained(Block(), tmp_path / "b")
    assert_close(again.base_model.model.experts.get_delta_weight("default").detach(), B @ A * 2.0, terms=10)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_gate_and_up_become_one(tmp_path, name):
    """Ranks and alphas of their own, an expert without an adapter, rows that take turns in gpt-oss."""
    gate, up = factors(N=INTER, r=2), factors(N=INTER, r=4, seed=1)
    tensors = {}
    for leaf, (A, B) in (("gate_proj", gate), ("up_proj", up)):
        for e in range(EXPERTS):
            if (leaf, e) != ("up_proj", 2):
                tensors |= under(f"experts.{e}.{leaf}", {"lora_A.weight": A[e], "lora_B.weight": B[e]})
    patterns = dict(rank_pattern={"up_proj": 4}, alpha_pattern={"gate_proj": 5, "3.up_proj": 2})
    folder = write(tmp_path / "a", tensors, r=2, target_modules=["gate_proj", "up_proj"], **patterns)
    model = Block(name)
    config = fused_lora.load_adapter(model, folder)
    assert config.target_parameters == ["experts.gate_up_proj"] and config.target_modules == set()
    layer = fused_lora.lora_layers(model)["experts.gate_up_proj"]
    delta = layer.get_delta_weight("default")
    delta = delta.transpose(1, 2) if name == "gpt_oss" else delta
    of_gate, of_up = gate[1] @ gate[0] * 2.5, up[1] @ up[0] * 1.5
    of_up[2], of_up[3] = 0, of_up[3] / 3
    halves = (delta[:, 0::2], delta[:, 1::2]) if name == "gpt_oss" else delta.chunk(2, 1)
    for found, expected in zip(halves, (of_gate, of_up), strict=True):
        assert_close(found, expected, terms=10)


def test_an_alpha_of_0_silences_its_own_expert_alone(tmp_path):
    """The first of the file: what the others are scaled by must not come from it."""
    A, B = factors(INTER, HIDDEN)
    tensors, _ = layouts(A, B)["one by one"]
    model = Block()
    folder = write(tmp_path / "a", tensors, target_modules=["down_proj"], alpha_pattern={"0.down_proj": 0})
    fused_lora.load_adapter(model, folder)
    delta = fused_lora.lora_layers(model)["experts.down_proj"].get_delta_weight("default")
    assert not delta[0].any()
    assert_close(delta[1:], (B @ A * 2.0)[1:], terms=10)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_old_checkpoints_are_read_as_peft_reads_them(tmp_path, kind):
    """Adapters of transformers 4, where each expert was a module: beside PEFT's own conversion, and in the store."""
    torch.manual_seed(shifted(3))
    make, sizes, experts = (mixtral, (K, MIDDLE), 4) if kind == "mixtral" else (moe, (HIDDEN, 24), 4)
    leaves = {"w1": 0, "w3": 0, "w2": 1} if kind == "mixtral" else {"gate_proj": 0, "up_proj": 0, "down_proj": 1}
    place, tensors = "block_sparse_moe" if kind == "mixtral" else "mlp", {}
    for i in range(1 if kind == "mixtral" else 2):
        for seed, (leaf, back) in enumerate(leaves.items()):
            A, B = factors(sizes[back], sizes[1 - back], experts=experts, seed=10 * i + seed)
            for e in range(experts):
                path = f"model.layers.{i}.{place}.experts.{e}.{leaf}"
                tensors |= under(path, {"lora_A.weight": A[e], "lora_B.weight": B[e]})
    folder = write(tmp_path / "a", tensors, target_modules=list(leaves))
    model, ids = make(), IDS % TOKENS
    base = copy.deepcopy(model)
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()(ids).logits
        store = AdapterStore(copy.deepcopy(model))
        store.load("a", folder)
        with store.batch(["a", None]):
            mixed = store.model(ids).logits
        fused_lora.load_adapter(model, folder)
        assert_close(model(ids).logits, theirs, terms=3000)
        # no bits: the adapter moves its rows between the experts of the next layer, whose products have other heights
        assert_close(mixed[1:], base(ids).logits[1:], terms=3000)
    assert_close(mixed[:1], theirs[:1], terms=3000)
    fused_lora.save_adapter(model, tmp_path / "b")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "b").eval()
    with torch.no_grad():
        assert_close(again(ids).logits, theirs, terms=3000)


@pytest.mark.parametrize("layout", list(layouts(*factors(INTER, HIDDEN))))
@pytest.mark.filterwarnings("ignore:lora_dropout")
def test_every_layout_of_llama_4(tmp_path, layout):
    """It multiplies with W^T of PEFT's W: the lora_A of other trainers meets its input, PEFT's its output."""
    A, B = factors(INTER, HIDDEN)
    tensors, config = layouts(A, B)[layout]
    if layout.startswith("PEFT") or layout == "expert slowest":  # of W [N, K] as PEFT takes it
        tensors, config = layouts(B.transpose(1, 2), A.transpose(1, 2))[layout]
    model = Block("llama4")
    fused_lora.load_adapter(model, write(tmp_path / "a", tensors, **config))
    layer = fused_lora.lora_layers(model)["experts.down_proj"]
    assert_close(layer.get_delta_weight("default"), (B @ A * 2.0).transpose(1, 2), terms=10)
    fused_lora.save_adapter(model, tmp_path / "b")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = peft.PeftModel.from_pretrained(Block("llama4"), tmp_path / "b")
    found = again.base_model.model.experts.get_delta_weight("default").detach()
    assert_close(found, layer.get_delta_weight("default"), terms=10)


def test_gate_and_up_of_llama_4_become_one(tmp_path):
    gate, up = factors(N=INTER, r=2), factors(N=INTER, r=4, seed=1)
    tensors = {}
    for leaf, (A, B) in (("gate_proj", gate), ("up_proj", up)):
        for e in range(EXPERTS):
            tensors |= under(f"experts.{e}.{leaf}", {"lora_A.weight": A[e], "lora_B.weight": B[e]})
    folder = write(tmp_path / "a", tensors, r=2, target_modules=["gate_proj", "up_proj"], rank_pattern={"up_proj": 4})
    fused_lora.load_adapter(model := Block("llama4"), folder)
    delta = fused_lora.lora_layers(model)["experts.gate_up_proj"].get_delta_weight("default")
    for found, (A, B), scale in zip(delta.chunk(2, 2), (gate, up), (3.0, 1.5), strict=True):
        assert_close(found, (B @ A * scale).transpose(1, 2), terms=10)


def test_square_stacks_go_by_the_version(tmp_path):
    """Where in and out are equal, only the version of PEFT tells which is which; a saved adapter has none."""

    class Square(Block):
        def __init__(self):
            super().__init__()
            weight = torch.randn(EXPERTS, HIDDEN, HIDDEN)
            self.experts.down_proj = torch.nn.Parameter(weight)

    A, B = factors(HIDDEN, HIDDEN)
    tensors = under("experts", packed(A, B))
    for version, expected in (("0.18.0", (B @ A).transpose(1, 2)), ("0.21.2", B @ A), ("0.19.1", B @ A)):
        model = Square()
        fused_lora.load_adapter(model, write(tmp_path / version, tensors, **STACK, peft_version=version))
        delta = fused_lora.lora_layers(model)["experts.down_proj"].get_delta_weight("default")
        assert_close(delta, expected * 2.0, terms=10)
        fused_lora.save_adapter(model, tmp_path / f"again {version}")
        again = Square()
        fused_lora.load_adapter(again, tmp_path / f"again {version}")
        found = fused_lora.lora_layers(again)["experts.down_proj"].get_delta_weight("default")
        assert torch.equal(found, delta)


def test_what_does_not_fit_is_refused_by_name(tmp_path):
    A, B = factors(INTER, HIDDEN)
    one, config = layouts(A, B)["one by one"]
    key = f"{P}experts.1.down_proj.lora_B.weight"
    more = {f"{P}experts.{EXPERTS}.down_proj.lora_{s}.weight": t[0] for s, t in (("A", A), ("B", B))}
    cases = {
        "expert": (
            {**one, **more},
            config,
            rf"expected experts below {EXPERTS} of 'experts.down_proj', found {EXPERTS}",
        ),
        "half": ({k: t for k, t in one.items() if k != key}, config, "a lora_B beside it"),
        "shape": ({**one, key: B[1][1:]}, config, rf"a shape \[{HIDDEN}, 3\] for 'experts.down_proj'"),
        "vector": ({**one, key.replace("lora_B", "lora_A"): A[1, 0]}, config, rf"lora_A.weight: .* found \[{INTER}\]"),
        "two layouts": (
            {**one, **layouts(A, B)["PEFT"][0]},
            {"target_modules": ["down_proj"], **STACK},
            "experts.lora_A.weight: expected experts of 'experts.down_proj' in one layout, found .*0.down_proj.lora_A",
        ),
        "twice": ({**one, key.replace("down_proj", "w2"): B[1]}, config, "one lora_B of it"),
        "DoRA": (
            {**one, f"{P}experts.1.down_proj.lora_magnitude_vector": B[1, :, 0]},
            {**config, "use_dora": True},
            "use_dora: expected False with target_parameters",
        ),
        "layout": (
            layouts(A, B)["PEFT"][0],
            {**STACK, "lora_B_layout": "other"},
            "lora_B_layout: expected one of rank_major",
        ),
    }
    for name, (tensors, entries, text) in cases.items():
        model = Block()
        folder = write(tmp_path / name, tensors, **entries)
        with pytest.raises(AdapterError, match=text), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fused_lora.load_adapter(model, folder)
        assert not fused_lora.lora_layers(model), name
    tensors, entries = layouts(A, B)["expert slowest"]
    with pytest.raises(AdapterError, match="target_parameters|lora_B_layout"):
        fused_lora.checkpoints.inspect_adapter(write(tmp_path / "inspected", tensors, **entries))
    fused_lora.load_adapter(model := Block(), write(tmp_path / "dropout", one, **config))
    assert model.experts.down_proj.lora_dropout["default"].p == 0.1


@pytest.mark.parametrize(
    "change, text",
    [
        (lambda A, B: (A.to(torch.complex64), B), "expected a floating dtype, found torch.complex64"),
        (lambda A, B: (A, B.bool()), "expected a floating dtype, found torch.bool"),
        (lambda A, B: (A[:, 1:], B), r"a/adapter_model.safetensors.*down_proj.*a shape"),
        (None, "expected at least one layer"),
    ],
)
def test_convert_refuses_by_the_name_of_the_source(tmp_path, change, text):
    tensors = {}
    for e in range(2) if change else ():
        A, B = (t[0] for t in factors(MIDDLE, K, experts=1, seed=e))
        A, B = change(A, B) if e else (A, B)
        tensors |= under(f"mlp.experts.{e}.down_proj", {"lora_A.weight": A.contiguous(), "lora_B.weight": B})
    folder = write(tmp_path / "a", tensors, target_modules=["down_proj"])
    with pytest.raises(AdapterError, match=text):
        fused_lora.checkpoints.convert_adapter(folder, tmp_path / "b", stack_experts=True)
    assert not (tmp_path / "b").exists()


def test_a_number_that_no_model_has_is_no_expert(tmp_path):
    """Else a small file asks for the memory of all experts before it."""
    A, B = (t[0] for t in factors(MIDDLE, K, experts=1))
    place = "mlp.experts.999999999.down_proj"
    folder = write(tmp_path / "a", under(place, {"lora_A.weight": A, "lora_B.weight": B}), target_modules=["down_proj"])
    report = fused_lora.checkpoints.convert_adapter(folder, tmp_path / "b", stack_experts=True)
    assert report.stacked == [] and list(report.layers) == [place]


@pytest.mark.parametrize("leaves", ["w1 w3 w2", "gate_proj up_proj down_proj", "up_proj down_proj"])
def test_convert_stacks_experts(tmp_path, leaves):
    """Without a model: the file alone says how many experts there are, and which halves."""
    leaves, tensors, deltas = leaves.split(), {}, {}
    place = "model.layers.0.block_sparse_moe" if leaves[0] == "w1" else "model.layers.0.mlp"
    for seed, leaf in enumerate(leaves):
        back = leaf in ("w2", "down_proj")
        A, B = factors(MIDDLE if back else K, K if back else MIDDLE, experts=4, seed=seed)
        deltas[leaf] = B @ A * 2.0
        for e in range(4):
            tensors |= under(f"{place}.experts.{e}.{leaf}", {"lora_A.weight": A[e], "lora_B.weight": B[e]})
    tensors |= under(
        "model.layers.0.self_attn.q_proj", {"lora_A.weight": torch.ones(R, K), "lora_B.weight": torch.ones(K, R)}
    )
    folder = write(tmp_path / "a", tensors, target_modules=[*leaves, "q_proj"])
    report = fused_lora.checkpoints.convert_adapter(folder, tmp_path / "b", stack_experts=True)
    first = "up_proj" if len(leaves) == 2 else "gate_up_proj"
    assert report.stacked == [f"model.layers.0.mlp.experts.{name}" for name in ("down_proj", first)]
    config = json.loads((tmp_path / "b/adapter_config.json").read_text())
    assert config["target_parameters"] == report.stacked and config["target_modules"] == [
        "model.layers.0.self_attn.q_proj"
    ]
    if len(leaves) == 3:  # the model has gate_up_proj
        model = mixtral()
        fused_lora.load_adapter(model, tmp_path / "b")
        layers = fused_lora.lora_layers(model)
        both = torch.cat([deltas[leaves[0]], deltas[leaves[1]]], 1)
        for name, expected in (("gate_up_proj", both), ("down_proj", deltas[leaves[2]])):
            found = layers[f"model.layers.0.mlp.experts.{name}"].get_delta_weight("default")
            assert_close(found, expected, terms=10)
    else:
        saved = load_file(tmp_path / "b/adapter_model.safetensors")
        assert f"{P}model.layers.0.mlp.experts.base_layer.lora_A.weight" in saved  # the first of two parameters
    for options, kind, text in (
        ({"stack_experts": "no"}, TypeError, "stack_experts"),
        ({"lora_alpha": float("nan")}, ValueError, "lora_alpha"),
    ):
        with pytest.raises(kind, match=text):
            fused_lora.checkpoints.convert_adapter(folder, tmp_path / "d", **options)
    plain = fused_lora.checkpoints.convert_adapter(folder, tmp_path / "c")
    assert plain.stacked == [] and load_file(tmp_path / "c/adapter_model.safetensors").keys() == tensors.keys()
