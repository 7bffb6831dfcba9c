"""unload(model, merge_adapters=True, dtype=...): 4-bit layers become nn.Linear with dequant(W) + D, rounded once."""

import copy
import warnings

import pytest
import torch
from torch import nn

import fused_lora
from fused_lora import LoraConfig
from fused_lora.bases import bitsandbytes_4bit
from fused_lora.testing.numeric import assert_close, assert_no_worse, ulp
from helpers import training
from helpers.quantised import linear4bit, repack, values_of

bnb = pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.numeric, pytest.mark.filterwarnings("ignore:.*autograd kernel was not registered")]

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
K, H, N, M = 128, 256, 384, 7  # multiples of the blocksizes
OTHERS = "ignore:unload. layers that were not quantised"


class Net(nn.Module):
    """Two 4-bit layers that take adapters, one that does not, and a dense head that does."""

    is_loaded_in_4bit = True

    def __init__(self, **settings):
        super().__init__()
        self.up, self.down = linear4bit(H, K, **settings), linear4bit(N, H, **settings)
        self.rest = linear4bit(K, N, bias=False, **settings)
        self.head = nn.Linear(K, 5)

    def forward(self, x):
        return self.head(torch.tanh(self.rest(torch.tanh(self.down(torch.tanh(self.up(x)))))))


def fields(**further):
    return {"r": 4, "lora_alpha": 6, "target_modules": ["up", "down", "head"], "init_lora_weights": False, **further}


def injected(names=("default",), config=None, **settings):
    model = Net(**settings)
    for name in names:
        fused_lora.inject(model, LoraConfig(**fields(**(config or {}))), name)
    fused_lora.set_adapter(model, list(names))
    return model.train()  # in eval() some CPUs round to bf16


def wrapped(**further):
    return peft.get_peft_model(Net(), peft.LoraConfig(**fields(**further))).train()


def state_of(model):
    """Everything that must be as it was: modules by path, their classes and attributes, and all numbers."""
    parts = [(path, module, type(module), dict(vars(module))) for path, module in model.named_modules()]
    return parts, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model, before):
    parts, tensors = before
    assert len(parts) == len(list(model.named_modules()))
    for (path, module, kind, attributes), (now, other) in zip(parts, model.named_modules(), strict=True):
        assert (path, id(module), kind) == (now, id(other), type(other))
        assert vars(other).keys() - {"merge_state"} == attributes.keys() - {"merge_state"}
        assert vars(other).get("merge_state") is attributes.get("merge_state")
    now = model.state_dict()
    assert now.keys() == tensors.keys() and all(torch.equal(now[name], tensors[name]) for name in now)


# ---- values

SETTINGS = {
    "nf4": {"nested": False},
    "nf4 nested": {},
    "fp4 nested, bf16 storage": {"quant_type": "fp4", "storage": BF16},
    "bf16, 128 values": {"dtype": BF16, "compute_dtype": BF16, "blocksize": 128},
}


@pytest.mark.filterwarnings(OTHERS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("settings", SETTINGS)
def test_each_weight_is_rounded_once(settings, dtype):
    """Against float64: half an ulp, and what fp32 loses in a sum of the adapters' rank."""
    names = ("a", "b")
    model = injected(names, {"lora_bias": True}, **SETTINGS[settings])
    bases = {path: layer.base_layer for path, layer in fused_lora.lora_layers(model).items() if path != "head"}
    exact, biases = {"rest": values_of(model.rest).double()}, {}
    for path, base in bases.items():
        layer = model.get_submodule(path)
        exact[path], biases[path] = values_of(base).double(), base.bias.detach().double()
        for name in names:
            layer.lora_B[name].bias.data.normal_()
            A, B = (part[name].weight.detach().double() for part in (layer.lora_A, layer.lora_B))
            exact[path] += layer.scaling[name] * (B @ A)
            biases[path] += layer.scaling[name] * layer.lora_B[name].bias.detach().double()
    assert fused_lora.unload(model, merge_adapters=True, dtype=dtype) is model
    for path, wanted in exact.items():
        layer = model.get_submodule(path)
        assert type(layer) is nn.Linear and type(layer.weight) is nn.Parameter and layer.weight.dtype is dtype
        assert not layer.weight.requires_grad and layer.training
        for found, right in ((layer.weight, wanted), (layer.bias, biases.get(path))):
            if right is not None:
                size = right.abs().max().item()
                bound = ulp(size, dtype) / 2 + 16 * ulp(size, F32)
                assert (found.double() - right).abs().max().item() <= bound, path
    assert model.head.weight.dtype is F32 and type(model.head) is nn.Linear
    assert model.rest.bias is None


def test_blocks_of_rows_have_the_bits_of_the_whole(monkeypatch):
    model = injected()
    other = copy.deepcopy(model)
    whole = fused_lora.unload(model, merge_adapters=True, dtype=F32).state_dict()
    monkeypatch.setattr(bitsandbytes_4bit, "BLOCK_VALUES", 5 * K)
    parts = fused_lora.unload(other, merge_adapters=True, dtype=F32).state_dict()
    assert whole.keys() == parts.keys()
    for name, tensor in whole.items():
        assert_close(parts[name], tensor, terms=8, name=name)


@pytest.mark.filterwarnings(OTHERS)
@pytest.mark.filterwarnings("ignore:merge. 4-bit weights keep only")
def test_autocast_changes_nothing():
    """Of a merge into 4 bits, and into a dense model."""
    found = []
    model = injected()
    for enabled in (False, True):
        merged, dense = copy.deepcopy(model), copy.deepcopy(model)
        with torch.autocast("cpu", BF16, enabled=enabled):
            fused_lora.merge(merged)
            fused_lora.unload(dense, merge_adapters=True, dtype=F32)
        found.append([values_of(merged.up.base_layer), dense.up.weight, dense.down.weight])
    assert all(map(torch.equal, *found))


def test_no_worse_than_pefts_dequantised_merge():
    """PEFT over the dequantised weight as a dense fp32 layer, which is what its users are told to merge."""
    from peft.tuners.lora.layer import Linear

    for _ in range(10):
        base = linear4bit(N, K)
        dense = nn.Linear(K, N)
        dense.weight.data, dense.bias.data = values_of(base), base.bias.detach().clone()
        theirs = Linear(dense, "default", config=peft.LoraConfig(r=4), r=4, lora_alpha=6)
        model = nn.Sequential(base)
        fused_lora.inject(model, LoraConfig(r=4, lora_alpha=6, target_modules=["0"], init_lora_weights=False))
        layer = model[0]
        exact = values_of(base).double()
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        theirs.lora_A["default"].weight.data.copy_(A)
        theirs.lora_B["default"].weight.data.copy_(B)
        exact += layer.scaling["default"] * (B.detach().double() @ A.detach().double())
        theirs.merge()
        fused_lora.unload(model, merge_adapters=True, dtype=F32)
        assert_no_worse(model[0].weight, theirs.base_layer.weight, exact)


@torch.no_grad()
def test_the_dense_model_predicts_as_the_unmerged_one():
    """A merge into 4 bits does not: it loses a small adapter."""
    model, x = injected(), torch.randn(M, K)
    for layer in fused_lora.lora_layers(model).values():
        layer.lora_B["default"].weight.mul_(0.02)
    base, y = copy.deepcopy(model), model(x)
    with fused_lora.disable_adapters(base):
        effect = (y - base(x)).norm()
    requantised = copy.deepcopy(model)
    with pytest.warns(UserWarning, match=r"keep only .* unload\(model, merge_adapters=True, dtype="):
        fused_lora.merge(requantised)
    dense = fused_lora.unload(model, merge_adapters=True, dtype=F32)
    assert_close(dense(x), y, terms=K + H + N + K)
    assert (requantised(x) - y).norm() > 0.1 * effect


def test_a_weight_that_was_repacked_for_the_cpu():
    model = injected()
    repack(model.up.base_layer)
    weight = bitsandbytes_4bit.Weight(model.up.base_layer, F32).to(F32)
    expected = weight + model.up.get_delta_weight("default")
    fused_lora.unload(model, merge_adapters=True, dtype=F32)
    assert_close(model.up.weight, expected, terms=8)


# ---- the model around it


@torch.no_grad()
def test_hooks_modes_and_further_places_stay():
    model, x = injected(), torch.randn(M, K)
    calls = []
    model.rest.register_forward_hook(lambda module, *_: calls.append(module))
    model.again = model.rest  # a layer without adapters may stand in two places
    y, rest = model(x), model.rest.eval()
    fused_lora.unload(model, merge_adapters=True, dtype=F32)
    assert model.rest is model.again is rest and not rest.training and model.up.training
    assert_close(model(x), y, terms=K + H + N + K)
    assert calls == [rest, rest]
    assert not vars(rest).keys() - vars(nn.Linear(1, 1)).keys()


def test_layers_that_were_not_quantised_keep_their_dtype():
    with pytest.warns(UserWarning, match=r"not quantised keep their dtype \('head.bias: torch.float32', 'head.weight"):
        model = fused_lora.unload(injected(), merge_adapters=True, dtype=BF16)
    assert model.head.weight.dtype is F32
    assert model.to(BF16)(torch.randn(M, K, dtype=BF16)).dtype is BF16


def test_without_an_active_adapter_the_base_is_dequantised():
    model = injected()
    W = values_of(model.up.base_layer)
    fused_lora.set_adapter(model, [])
    with pytest.warns(UserWarning, match="no adapters are active"):
        fused_lora.unload(model, merge_adapters=True, dtype=F32)
    assert torch.equal(model.up.weight, W)


def test_the_result_is_saved_and_loaded_as_a_dense_model(tmp_path):
    """From a checkpoint that transformers quantises on loading; nothing of the quantisation is left in the files."""
    transformers = pytest.importorskip("transformers")
    tiny = tmp_path / "tiny"
    training.llama(hidden_size=64, intermediate_size=128).save_pretrained(tiny)
    quantised = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    options = {"quantization_config": quantised, "device_map": "cpu", "dtype": F32}
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny, **options).train()
    plain = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    fused_lora.inject(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    ids = torch.arange(12)[None]
    with torch.no_grad():
        y = model(ids).logits
        fused_lora.unload(model, merge_adapters=True, dtype=F32)
        assert_close(model(ids).logits, y, terms=2000)
    state = model.state_dict()
    assert state.keys() == plain.state_dict().keys()
    assert all(type(tensor) is torch.Tensor and tensor.dtype is F32 for tensor in state.values())
    model.save_pretrained(tmp_path / "dense")
    assert "quantization" not in (tmp_path / "dense" / "config.json").read_text(encoding="utf-8")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    assert not any(isinstance(module, bnb.nn.Linear4bit) for module in again.modules())
    model.eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    fused_lora.inject(model.to(BF16), LoraConfig(target_modules="all-linear"))


# ---- models of PEFT


@torch.no_grad()
@pytest.mark.filterwarnings(OTHERS)
@pytest.mark.parametrize("targets", [["up", "down", "head"], ["up", "down"]])
def test_an_accelerated_model_of_pefts(targets):
    """Its 4-bit layers too, also where they are all that it adapts; PEFT merges the others."""
    theirs, x = wrapped(target_modules=targets), torch.randn(M, K)
    ours = fused_lora.accelerate(copy.deepcopy(theirs))
    W, D = values_of(ours.base_model.model.up.base_layer), theirs.base_model.model.up.get_delta_weight("default")
    plain = fused_lora.unload(ours, merge_adapters=True, dtype=F32)
    assert type(plain) is Net and all(type(m) is nn.Linear for m in (plain.up, plain.down, plain.rest, plain.head))
    assert_close(plain.up.weight, W + D, terms=8)
    assert_close(plain(x), theirs(x), terms=K + H + N + K)
    assert plain.state_dict().keys() == {f"{n}.{p}" for n in ("up", "down", "head") for p in ("weight", "bias")} | {
        "rest.weight"
    }
    assert not plain.is_loaded_in_4bit or "is_loaded_in_4bit" not in vars(plain)
    peft.get_peft_model(plain, peft.LoraConfig(target_modules=["up"]))


# ---- refusals


class Subclass(bnb.nn.Linear4bit):
    """Of which nobody knows what else it does."""


def unknown(model):
    model.further = Subclass(K, N).to("cpu")


def in_fp16(model):
    model.further = bnb.nn.Linear8bitLt(K, N, has_fp16_weights=True)


def replaced(model):
    model.rest.forward = lambda x: x


def broken(model):
    model.down.lora_A["default"].weight.data[0, 0] = float("inf")


def too_large(model):
    model.down.lora_B["default"].weight.data.fill_(1e7)


def in_two_places(model):
    model.again = model.up.base_layer


REFUSED = {
    "no dtype": (None, {"dtype": "bfloat16"}, TypeError, "dtype: expected a torch.dtype, got 'bfloat16'"),
    "int8": (None, {"dtype": torch.int8}, ValueError, r"dtype: expected one of .*, got torch.int8"),
    "float64": (None, {"dtype": F64}, ValueError, r"dtype: expected one of .*, got torch.float64"),
    "not merged": (
        None,
        {"merge_adapters": False},
        ValueError,
        "dtype: expected None without merge_adapters=True, got torch.float16",
    ),
    "unknown": (
        unknown,
        {},
        RuntimeError,
        "further: a Subclass with a Params4bit of torch.uint8 cannot be dequantised",
    ),
    "not quantised": (in_fp16, {}, RuntimeError, "further: the weight is stored in torch.float32, expected torch.int8"),
    "forward": (replaced, {}, RuntimeError, "rest: the base layer has its forward replaced"),
    "merged": (fused_lora.merge, {}, RuntimeError, r"up: adapters .*default.* are merged into 4 bits: call fused_lora"),
    "infinite": (broken, {}, ValueError, "down: the weight would hold NaN or infinity in torch.float16; nothing was"),
    "overflow": (
        too_large,
        {},
        ValueError,
        "down: the weight would hold NaN or infinity in torch.float16; nothing was",
    ),
    "two places": (in_two_places, {}, RuntimeError, "up: the layer stands in 2 places; a merge would change all"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_changes_nothing(name):
    change, arguments, kind, message = REFUSED[name]
    model = injected()
    if change is not None:
        change(model)
    before = state_of(model)
    with pytest.raises(kind, match=message):
        fused_lora.unload(model, **{"merge_adapters": True, "dtype": F16, **arguments})
    assert_unchanged(model, before)


def test_a_model_without_4_bit_layers():
    model = fused_lora.inject(nn.Sequential(nn.Linear(8, 8)), LoraConfig(target_modules=["0"]))
    before = state_of(model)
    with pytest.raises(ValueError, match="dtype: expected a model with quantised layers, found none: leave it out"):
        fused_lora.unload(model, merge_adapters=True, dtype=BF16)
    assert_unchanged(model, before)


def test_a_dense_layer_that_cannot_be_merged():
    model = injected()
    model.head.lora_A["default"].weight.data[0, 0] = float("nan")
    before = [model.state_dict()[name].clone() for name in ("up.base_layer.weight", "head.base_layer.weight")]
    with pytest.raises(ValueError, match="head: .*NaN"):
        fused_lora.unload(model, merge_adapters=True, dtype=F32)
    after = [model.state_dict()[name] for name in ("up.base_layer.weight", "head.base_layer.weight")]
    assert all(map(torch.equal, before, after)) and type(model.up.base_layer) is bnb.nn.Linear4bit


@pytest.mark.filterwarnings("error:unload")
@pytest.mark.parametrize("of_peft", [False, True])
def test_a_warning_that_is_an_error(of_peft):
    """The last thing that can go wrong."""
    model = fused_lora.accelerate(wrapped(target_modules=["up", "down"])) if of_peft else injected()
    before = state_of(model)
    with pytest.raises(UserWarning, match="keep their dtype"):
        fused_lora.unload(model, merge_adapters=True, dtype=BF16)
    assert_unchanged(model, before)


@pytest.mark.filterwarnings("ignore:accelerate. 0 of 3")
def test_models_of_pefts_that_only_peft_can_merge():
    for model, message in (
        (wrapped(), "up: a Linear4bit of PEFT's; call fused_lora.accelerate"),
        (fused_lora.accelerate(wrapped(use_dora=True)), "up: adapters .*default.* are DoRA or another variant"),
    ):
        before = state_of(model)
        with pytest.raises(RuntimeError, match=message):
            fused_lora.unload(model, merge_adapters=True, dtype=BF16)
        assert_unchanged(model, before)
    with pytest.raises(ValueError, match="dtype: expected None without merge_adapters=True"):
        fused_lora.unload(wrapped(), dtype=BF16)


def test_an_error_after_a_merge_by_peft_gives_the_dense_weights_back():
    """The warning about the dense layer's dtype comes when it is merged already."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = bnb.nn.Linear4bit(64, 48, compute_dtype=torch.float32).to("cpu")
            self.d = nn.Linear(64, 16)

    config = peft.LoraConfig(target_modules=["a", "d"], init_lora_weights=False)
    model = fused_lora.accelerate(peft.get_peft_model(Model(), config))
    layer = model.base_model.model.d
    before = layer.base_layer.weight.detach().clone()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="unload: layers that were not quantised")
        with pytest.raises(UserWarning, match="keep their dtype"):
            fused_lora.unload(model, merge_adapters=True, dtype=torch.bfloat16)
    assert model.base_model.model.d is layer and torch.equal(layer.base_layer.weight, before)
    assert layer.merged_adapters == [] and layer.merge_state is None


def test_a_forward_of_its_own_goes_with_the_class():
    model = nn.Sequential(bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32).to("cpu"))
    fused_lora.inject(model, fused_lora.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    base = model[0].base_layer
    base.forward = base.forward  # as accelerate's hooks leave it when they are taken off
    fused_lora.unload(model, merge_adapters=True, dtype=torch.float32)
    assert type(model[0]) is nn.Linear and model(torch.randn(2, 64)).shape == (2, 64)


def test_a_bias_beyond_the_dtype_is_refused():
    model = nn.Sequential(*(bnb.nn.Linear4bit(64, 64).to("cpu") for _ in range(2)))
    fused_lora.inject(model, fused_lora.LoraConfig(r=2, target_modules=["1"]))
    for base in (model[0], model[1].base_layer):
        base.bias.data[0] = 1e6
        with pytest.raises(ValueError, match="bias would not be finite"):
            fused_lora.unload(model, merge_adapters=True, dtype=torch.float16)
        base.bias.data[0] = 0


def test_a_model_that_is_merged_into_4_bits_can_be_copied():
    model = nn.Sequential(bnb.nn.Linear4bit(64, 64).to("cpu"))
    fused_lora.inject(model, fused_lora.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what four bits lose
        fused_lora.merge(model)
    again = copy.deepcopy(model)
    for one in (model, again):
        fused_lora.unmerge(one)
    assert torch.equal(model[0].base_layer.weight.data, again[0].base_layer.weight.data)
