"""LoRA on embeddings by inject, next to PEFT: draws, outputs, gradients, several adapters, merges, files, refusals."""

import copy
import math

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

import fused_lora
from fused_lora.adapters.errors import AdapterError
from fused_lora.reference import bits
from fused_lora.testing.numeric import assert_close, assert_no_worse
from helpers.accelerated import TOKENS, quiet
from helpers.seeds import shifted
from helpers.twins import twin_models
from helpers.unchanged import assert_bits, parameter_bits

DIM = 16
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ADAPTERS = {"a": {}, "b": {"r": 3, "use_rslora": True}}


class Net(nn.Module):
    """Tokens through an embedding with a padding token and a linear layer."""

    def __init__(self, dtype=torch.float32, **kwargs):
        super().__init__()
        self.emb, self.lin = nn.Embedding(TOKENS, DIM, **{"padding_idx": 0, **kwargs}), nn.Linear(DIM, 7)
        self.to(dtype)

    def forward(self, ids):
        return self.lin(torch.tanh(self.emb(ids)))


def twins(base=None, adapters=None, **fields):
    """Ours and PEFT's, with the same random adapters."""
    fields = {"r": 4, "lora_alpha": 6, "target_modules": ["emb", "lin"], **fields}
    found = {name: {**fields, **own} for name, own in (adapters or {"default": {}}).items()}
    ours, theirs = twin_models((base or Net()).eval(), found, randomize=False)
    randomize(ours, theirs)
    return ours, theirs


def randomize(ours, theirs):
    held = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.2)
            held[f"base_model.model.{name}"].data.copy_(parameter.data)


def run(model, ids, g):
    y = model(ids)
    model.zero_grad()
    y.backward(g.to(y.dtype))
    grads = {n.removeprefix("base_model.model."): p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), **grads}


@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_draws_are_pefts(init):
    fields = {"r": 4, "target_modules": ["emb"], "init_lora_weights": init}
    ours, theirs = twin_models(Net(torch.bfloat16), {"a": fields}, randomize=False)
    held = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        other = held[f"base_model.model.{name}"]
        assert parameter.dtype == other.dtype and parameter.requires_grad == other.requires_grad
        assert torch.equal(bits(parameter.detach()), bits(other.detach())), name
    assert set(ours.state_dict()) == {n.removeprefix("base_model.model.") for n in theirs.state_dict()}


@pytest.mark.numeric
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_and_gradients_are_no_worse_than_pefts(dtype):
    found = {"ours": {}, "theirs": {}, "exact": {}}
    for draw in range(17):
        torch.manual_seed(shifted(draw))
        ours, theirs = twins(Net(dtype), ADAPTERS)
        fused_lora.set_adapter(ours, ["a", "b"])
        theirs.base_model.set_adapter(["a", "b"])
        ids, g = torch.randint(0, TOKENS, (4, 5)), torch.randn(4, 5, 7)
        models = (ours, theirs, copy.deepcopy(theirs).double())
        for kept, model in zip(found.values(), models, strict=True):
            for name, tensor in run(model, ids, g).items():
                kept.setdefault(name, []).append(tensor)
    assert found["ours"].keys() == found["theirs"].keys() and len(found["ours"]) == 9
    for name in found["ours"]:
        assert_no_worse(*(torch.stack(kept[name]) for kept in found.values()), name=name, draws=True)


def test_a_scaled_embedding_scales_the_terms(tmp_path):
    """Gemma multiplies its rows by the root of the width; PEFT's files hold a copy of the weight."""
    config = Gemma3TextConfig(
        vocab_size=TOKENS, hidden_size=DIM, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        head_dim=8, num_key_value_heads=1, tie_word_embeddings=False,
    )  # fmt: skip
    ours, theirs = twins(Gemma3ForCausalLM(config), target_modules=["embed_tokens", "q_proj"])
    ids = torch.randint(1, TOKENS, (2, 5))
    with torch.no_grad():
        assert_close(ours(ids).logits, theirs(ids).logits, terms=300)
        theirs.save_pretrained(tmp_path / "peft")
        assert any(key.endswith("base_layer.weight") for key in load_file(tmp_path / "peft/adapter_model.safetensors"))
        fresh = fused_lora.unload(copy.deepcopy(ours))
        fused_lora.load_adapter(fresh, tmp_path / "peft")
        assert torch.equal(fresh(ids).logits, ours(ids).logits)
        before = ours(ids).logits
        fused_lora.merge(ours)
        assert_close(ours(ids).logits, before, terms=300)


def test_files_both_ways(tmp_path):
    ours, theirs = twins()
    base = fused_lora.unload(copy.deepcopy(ours))
    ids = torch.randint(0, TOKENS, (4, 5))
    fused_lora.save_adapter(ours, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    mine, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert mine.keys() == other.keys() and all(torch.equal(mine[key], other[key]) for key in mine)
    back = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    fresh = copy.deepcopy(base)
    fused_lora.load_adapter(fresh, tmp_path / "theirs")
    assert torch.equal(fresh(ids), ours(ids))
    assert_close(back(ids), ours(ids), terms=100)
    linear = nn.Module()
    linear.emb, linear.lin = nn.Linear(TOKENS, DIM), nn.Linear(DIM, 7)
    with pytest.raises(AdapterError, match="lora_A and lora_B for Linear, found lora_embedding_A"):
        fused_lora.load_adapter(linear, tmp_path / "ours")
    assert not fused_lora.lora_layers(copy.deepcopy(base))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merges_come_back(dtype):
    ours, theirs = twins(Net(dtype), ADAPTERS)
    before = parameter_bits(ours)
    for _ in range(5):
        fused_lora.merge(ours, ["a"])
        fused_lora.unmerge(ours)
    fused_lora.merge(ours, ["a", "b"])
    if dtype is torch.float32:
        theirs.base_model.set_adapter(["a", "b"])
        theirs.merge_adapter()
        assert_close(ours.emb.weight, theirs.base_model.model.emb.base_layer.weight, terms=100)
        assert set(fused_lora.delta_fidelity(ours)) == {"emb", "lin"}
        with pytest.raises(RuntimeError, match=r"emb\.base_layer\.weight: \['a', 'b'\] are merged into it"):
            ours.load_state_dict({n: torch.zeros_like(p) for n, p in ours.state_dict().items()})
    fused_lora.unmerge(ours)
    assert_bits(ours, before)


def test_a_broken_adapter_merges_nowhere():
    ours, _ = twins()
    ours.emb.lora_embedding_B["default"].data[0, 0] = float("inf")
    before = parameter_bits(ours)
    with pytest.raises(ValueError, match="emb: .*nothing was merged"):
        fused_lora.merge(ours)
    assert_bits(ours, before)
    assert not ours.emb.merged and not ours.lin.merged


def test_a_batch_of_several_adapters():
    ours, theirs = twins(adapters=ADAPTERS)
    ids, names = torch.randint(0, TOKENS, (5, 3)), ["a", None, "b", "a", None]
    with torch.no_grad():
        with fused_lora.disable_adapters(ours):
            base = ours(ids)
        with fused_lora.adapter_batch(ours, names):
            mixed = ours(ids)
        assert_close(mixed, theirs(ids, adapter_names=[name or "__base__" for name in names]), terms=100)
        rows = ours.emb(ids, adapter_names=names)
        assert torch.equal(bits(rows[[1, 4]]), bits(ours.emb.base_layer(ids)[[1, 4]]))
    assert torch.equal(bits(mixed[[1, 4]]), bits(base[[1, 4]]))


@pytest.mark.parametrize("names", [["a", "a", None], ["a", None, "a"]], ids=["neighbours", "apart"])
def test_tokens_of_a_mixed_batch_may_be_changed_before_the_backward(names):
    ours, _ = twins(adapters=ADAPTERS)
    A, ids, found = ours.emb.lora_embedding_A["a"].requires_grad_(), torch.arange(6).reshape(3, 2) % (TOKENS - 1), []
    for step in (0, 1):
        y = ours.emb(own := ids.clone(), adapter_names=names)
        own += step
        found += torch.autograd.grad(y.square().sum(), A)
    assert torch.equal(*found) and found[0].any()


def test_torchs_default_device_and_dtype_change_nothing():
    """Of the rows of a batch, and of the scale of an embedding whose class has it as a number."""
    ours, _ = twins(adapters=ADAPTERS)
    ours.emb.base_layer.embed_scale = 1.1
    ids, names, before = torch.randint(0, TOKENS, (5, 3)), ["a", None, "b", "a", None], torch.get_default_dtype()
    found = []
    for device, dtype in (("cpu", before), ("meta", torch.bfloat16)):
        with torch.no_grad(), torch.device(device):
            torch.set_default_dtype(dtype)
            try:
                with fused_lora.adapter_batch(ours, names):
                    found.append(ours(ids))
            finally:
                torch.set_default_dtype(before)
    assert torch.equal(*found)


def test_adapters_come_and_go():
    ours, _ = twins(adapters=ADAPTERS)
    ids = torch.randint(0, TOKENS, (2, 3))
    fused_lora.set_adapter(ours, "b")
    only_b = ours(ids)
    fused_lora.delete_adapter(ours, "a")
    assert torch.equal(ours(ids), only_b) and list(ours.emb.lora_embedding_A) == ["b"]
    rows = fused_lora.integrations.peft.layer_report(ours)
    assert [(row.kind, row.fused) for row in rows] == [("LoraEmbedding", True), ("LoraLinear", True)]
    plain = fused_lora.unload(ours)
    assert type(plain.emb) is nn.Embedding and not any("lora" in name for name in plain.state_dict())


@pytest.mark.parametrize("scaling", [math.nan, 1e39, 10**400, torch.tensor(math.nan)])
def test_a_scaling_that_float32_cannot_hold_is_named(scaling):
    ours, _ = twins()
    layer = next(iter(fused_lora.lora_layers(ours).values()))
    layer.scaling["default"] = scaling
    with pytest.raises(ValueError, match="^scaling: expected numbers that float32 can hold"):
        layer(torch.zeros(1, dtype=torch.long))


def test_what_is_refused():
    def config(**fields):
        return fused_lora.LoraConfig(target_modules=["emb"], **fields)

    for fields, text in (({"use_dora": True}, "use_dora"), ({"lora_bias": True}, "lora_bias")):
        net = Net()
        before = net.state_dict().keys()
        with pytest.raises(ValueError, match=f"{text}: expected False for an embedding, 'emb'"):
            fused_lora.inject(net, config(**fields))
        assert net.state_dict().keys() == before
    with pytest.raises(ValueError, match="'emb', a torch.nn.modules.sparse.Embedding, .*: max_norm changes rows"):
        fused_lora.inject(Net(max_norm=1.0), config())
    with pytest.raises(TypeError, match="expected an nn.Embedding, got Linear"):
        fused_lora.modules.embedding.LoraEmbedding(nn.Linear(3, 3))
    tied = Net()
    tied.lin = nn.Linear(DIM, TOKENS, bias=False)
    tied.lin.weight = tied.emb.weight
    with quiet():
        fused_lora.inject(tied, config(init_lora_weights=False))
    with pytest.raises(RuntimeError, match="emb: the weight is shared by .*'lin.weight'.*"):
        fused_lora.merge(tied)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_an_embedding_made_in_inference_mode_is_merged(dtype, inside):
    """Plain torch merges float64, and lets nobody write to a tensor of inference mode outside of it."""
    with torch.inference_mode():
        net = Net(dtype)
    before = net.emb.weight.clone()
    fused_lora.inject(net, fused_lora.LoraConfig(target_modules=["emb"], init_lora_weights=False))
    with torch.inference_mode(inside):
        fused_lora.merge(net)
        exact = before + net.emb.get_delta_weight("default").to(dtype)
        assert_close(net.emb.weight, exact, terms=100)
        fused_lora.unmerge(net)
    assert torch.equal(bits(net.emb.weight), bits(before))
