"""Linear4bit of bitsandbytes as a base: its weight to the bit, its call, and which layers run around it."""

import copy
import itertools
import random

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fused_lora
from fused_lora import reference
from fused_lora.bases import base_of
from fused_lora.bases.bitsandbytes_4bit import Weight, compute_dtype, is_repacked
from fused_lora.ops.linear.op import draw_seeds
from fused_lora.testing.numeric import DRAWS, assert_close, assert_no_worse
from helpers.over_quantised import same
from helpers.quantised import linear4bit, repack, values_of
from helpers.seeds import shifted
from helpers.thorough import sampled
from helpers.twins import ExportedDropout

bnb = pytest.importorskip("bitsandbytes")
pytestmark = [pytest.mark.numeric, pytest.mark.filterwarnings("ignore:.*autograd kernel was not registered")]

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
N, K, M = 96, 128, 9


# ---- the weight


def test_the_weight_has_the_bits_of_bitsandbytes():
    """200 random shapes and settings; whole and in blocks of any number of rows."""
    for _ in range(200):
        blocksize = random.choice([64, 128, 256, 512, 1024, 2048, 4096])
        rows, columns = random.randint(1, 70), blocksize * random.randint(1, max(1, 1024 // blocksize))
        dtype = random.choice([F32, BF16, F16])
        storage = random.choice([torch.uint8, BF16, F16, F32])
        kind = {"quant_type": random.choice(["nf4", "fp4"]), "nested": random.random() < 0.5, "blocksize": blocksize}
        layer = linear4bit(rows, columns, dtype=dtype, storage=storage, **kind)
        with torch.compiler.set_stance("force_eager"):  # bitsandbytes compiles its path for long blocks
            theirs = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        weight = Weight(layer, dtype)
        step = random.randint(1, rows)
        parts = list(weight.blocks(step))
        assert [stop - start for start, stop, _ in parts[:-1]] == [step] * (len(parts) - 1)
        case = rows, columns, dtype, storage, kind
        assert torch.equal(theirs, values_of(layer).to(dtype)), case
        assert torch.equal(weight.to(dtype), theirs) and torch.equal(torch.cat([b for *_, b in parts]), theirs), case


def test_float64_has_the_values_of_fp32():
    """Asked for float64 itself, a CPU gives what was in memory."""
    layer = linear4bit(N, K)
    exact, x = values_of(layer).double(), torch.randn(M, K, dtype=F64)
    for step in (N, 7):
        assert torch.equal(torch.cat([block for *_, block in Weight(layer, F64).blocks(step)]), exact)
    wanted = x @ exact.t() + layer.bias.double()  # B is 0
    assert_close(fused_lora.LoraLinear(layer)(x), wanted, terms=K)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
def test_a_weight_that_was_repacked_for_the_cpu(nested, quant_type):
    """Its scales are bf16 from then on; the values stay where they were."""
    layer = linear4bit(N, K, nested=nested, quant_type=quant_type)
    values, scales = values_of(layer), Weight(layer, F32).scales()
    repack(layer)
    weight, rounded = Weight(layer, F32), scales.bfloat16().float()
    assert is_repacked(layer) and torch.equal(weight.scales(), rounded)
    exact = values / scales.repeat_interleave(64).view(N, K) * rounded.repeat_interleave(64).view(N, K)
    assert_close(weight.to(F32), exact, terms=2)
    assert torch.equal(torch.cat([block for *_, block in weight.blocks(33)]), weight.to(F32))


def test_the_weight_is_what_it_was_when_a_call_of_the_layer_repacks_it():
    layer = linear4bit(N, K)
    weight, before = Weight(layer, F32), values_of(layer)
    repack(layer)
    assert torch.equal(weight.to(F32), before)


# ---- the layer


def peft_layer(base, p=0.0, names=("default",), r=4):
    """PEFT's own layer around ``base``, random adapters."""
    peft = pytest.importorskip("peft")
    from peft.tuners.lora.bnb import Linear4bit

    config = peft.LoraConfig(r=r, lora_alpha=6, lora_dropout=p)
    layer = Linear4bit(base, names[0], config=config, r=r, lora_alpha=6)
    for name in names[1:]:
        layer.update_layer(name, r, lora_alpha=6, config=config)
    layer.set_adapter(list(names))
    for name in names:  # get_peft_model holds them in fp32
        layer.lora_A[name].float().weight.data.normal_(std=K**-0.5)
        layer.lora_B[name].float().weight.data.normal_()
    return layer.train()


def our_layer(theirs, p=0.0):
    """A LoraLinear with the base and the adapters of PEFT's layer."""
    names = list(theirs.lora_A)
    base = copy.deepcopy(theirs.base_layer)
    layer = fused_lora.LoraLinear(base, r=4, lora_alpha=6, adapter_name=names[0], lora_dropout=p).train()
    for name in names[1:]:
        layer.add_adapter(name, 4, 6, p)
    for name in names:
        layer.lora_A[name].weight.data.copy_(theirs.lora_A[name].weight.data)
        layer.lora_B[name].weight.data.copy_(theirs.lora_B[name].weight.data)
    layer.set_adapter(names)
    return layer


def run(layer, x, g, names):
    x = x.detach().requires_grad_()
    y = layer(x)
    wanted = [x]
    for name in names:
        wanted += [
            p for key, p in layer.named_parameters() if key.endswith((f"lora_A.{name}.weight", f"lora_B.{name}.weight"))
        ]
    return [y.detach(), *torch.autograd.grad(y, wanted, g.to(y.dtype))]


def exactly(weight, theirs, x, g, names, p, seeds):
    A, B = ([part[name].weight.detach() for name in names] for part in (theirs.lora_A, theirs.lora_B))
    scaling = [theirs.scaling[name] for name in names]
    data = A, B, scaling, [p] * len(names), seeds
    bias = theirs.base_layer.bias.detach()
    y, _ = reference.lora_linear(x, weight, bias, *data)
    dx, dA, dB, *_ = reference.lora_linear_backward(g, x, weight, *data)
    return [y, dx, *[part for pair in zip(dA, dB, strict=True) for part in pair]]


# dtype of the input, compute dtype, dtype that was quantised
DTYPES = [(F32, F32, F32), (BF16, BF16, BF16), (F16, F16, F16), (F32, BF16, BF16), (BF16, F32, BF16), (F32, F16, F16)]
SETTINGS = {
    "nf4 nested": {},
    "fp4": {"quant_type": "fp4", "nested": False},
    "bf16 storage, 128 values": {"storage": BF16, "blocksize": 128},
}


@pytest.mark.parametrize("settings, dtypes, native", sampled(itertools.product(SETTINGS, DTYPES, [False, True]), 5))
def test_as_exact_as_peft(settings, dtypes, native):
    x_dtype, compute, quantised = dtypes
    p, names, found = 0.3, ["default", "other"], ([], [], [])
    for i in range(DRAWS):
        base = linear4bit(N, K, dtype=quantised, compute_dtype=compute, **SETTINGS[settings])
        base.support_avx512bf16_for_cpu = native
        theirs = peft_layer(base, p, names)
        ours = our_layer(theirs, p)
        weight = values_of(base).to(compute).double()
        x, g = torch.randn(M, K).to(x_dtype), torch.randn(M, N).to(x_dtype)
        torch.manual_seed(shifted(i))
        seeds = draw_seeds(2, x.device)
        for name, seed in zip(names, seeds, strict=True):
            theirs.lora_dropout[name] = ExportedDropout(seed, p).train()
        found[1].append(run(theirs, x, g, names))
        torch.manual_seed(shifted(i))
        found[0].append(run(ours, x, g, names))
        found[2].append(exactly(weight, theirs, x, g, names, p, seeds))
        kind = base_of(ours.base_layer)
        around = kind.why_not_call(ours.base_layer, x, N)
        assert around == ("this CPU multiplies bf16 itself" if native and compute is BF16 else None)
        assert kind.why_not_fused(ours.base_layer) is None
    for k, name in enumerate(("y", "dx", "dA", "dB", "dA other", "dB other")):
        ours, theirs, exact = (torch.stack([draw[k] for draw in part]) for part in found)
        assert ours.dtype == theirs.dtype, name
        assert_no_worse(ours, theirs, exact, name=name, draws=True)


@pytest.mark.parametrize("autocast", [BF16, F16])
@pytest.mark.parametrize("x_dtype", [F32, BF16])
def test_autocast_is_as_exact_as_peft(x_dtype, autocast):
    found = [], [], []
    for _ in range(DRAWS):
        base = linear4bit(N, K, dtype=F32, compute_dtype=F32)
        theirs = peft_layer(base)
        ours, weight = our_layer(theirs), values_of(base).double()
        x, g = torch.randn(M, K).to(x_dtype), torch.randn(M, N)
        with torch.autocast("cpu", autocast):
            for part, layer in zip(found, (ours, theirs), strict=False):
                part.append(run(layer, x, g, ["default"]))
        assert found[0][-1][0].dtype == x_dtype
        found[2].append(exactly(weight, theirs, x, g.to(x_dtype), ["default"], 0.0, None))
    for k, name in enumerate(("y", "dx", "dA", "dB")):
        assert_no_worse(*(torch.stack([draw[k] for draw in part]) for part in found), name=name, draws=True)


def test_dora_under_autocast_does_not_round_gradients_to_16_bits_of_x():
    """Of bf16 x under fp16 autocast PEFT's adapters get the gradient in fp16, which has three bits more."""
    peft = pytest.importorskip("peft")
    found = [], [], []
    for _ in range(DRAWS):
        base = linear4bit(N, K, dtype=F32, compute_dtype=F32)
        dense = nn.Linear(K, N)
        dense.weight.data, dense.bias.data = values_of(base), base.bias.data
        config = peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=["0"])
        theirs, exact = (peft.get_peft_model(nn.Sequential(m), config) for m in (base, dense.double()))
        for name, part in theirs.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                part.data.normal_(std=K**-0.5)
            if "lora_" in name:
                exact.get_parameter(name).data = part.detach().double()
        ours = fused_lora.accelerate(copy.deepcopy(theirs))
        x, g = torch.randn(M, K).to(BF16), torch.randn(M, N).to(BF16)
        for part, model in zip(found, (ours, theirs, exact), strict=True):
            with torch.autocast("cpu", F16, enabled=model is not exact):
                y = model(x.to(F64) if model is exact else x)
            wanted = [p for name, p in model.named_parameters() if "lora_" in name]
            part.append([y.detach(), *torch.autograd.grad(y, wanted, g.to(y.dtype))])
    for k, name in enumerate(("y", "dA", "dB", "dm")):
        assert_no_worse(*(torch.stack([draw[k] for draw in part]) for part in found), name=name, draws=True)


def test_x_alone_is_kept():
    layer = our_layer(peft_layer(linear4bit(N, K), 0.3), 0.3)
    x, saved = torch.randn(50, K, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    sizes = {tuple(t.shape) for t in saved}
    assert sizes == {(50, K), (50, 4), (4, K), (N, 4), (1,)}


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_repeats_the_forward(use_reentrant):
    layer = our_layer(peft_layer(linear4bit(N, K), 0.5), 0.5)
    x, found = torch.randn(M, K, requires_grad=True), []
    for call in (layer, lambda x: checkpoint(layer, x, use_reentrant=use_reentrant)):
        torch.manual_seed(shifted(1))
        layer.zero_grad()
        x.grad = None
        y = call(x)
        y.square().sum().backward()
        found.append([y, x.grad, *(p.grad.clone() for p in layer.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_compute_dtype_is_set_as_by_the_layer_s_own_call():
    for own in (None, F32, BF16):
        for x_dtype in (F32, BF16, F16):
            theirs = linear4bit(N, K, compute_dtype=own, dtype=BF16)
            ours = fused_lora.LoraLinear(copy.deepcopy(theirs)).train()
            x = torch.randn(M, K).to(x_dtype)
            expected = compute_dtype(ours.base_layer, x)
            for _ in range(2):
                theirs(x)
                ours(x)
            base = ours.base_layer
            assert (base.compute_dtype, base.compute_type_is_set) == (theirs.compute_dtype, theirs.compute_type_is_set)
            assert expected == (theirs.compute_dtype or x_dtype)


def test_training_after_a_call_that_has_repacked_the_weight():
    """bitsandbytes' own call gives no gradient from then on."""
    for dtype in (F32, BF16):
        layer = our_layer(peft_layer(linear4bit(N, K, dtype=dtype, compute_dtype=dtype)))
        repack(layer.base_layer)
        weight = Weight(layer.base_layer, dtype).to(F64)
        x, g = torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype)
        ours = run(layer, x, g, ["default"])
        exact = exactly(weight, layer, x, g, ["default"], 0.0, None)
        for mine, right in zip(ours, exact, strict=True):
            assert_close(mine, right, terms=K + N)


def test_inference_is_the_layer_s_own_call():
    layer = our_layer(peft_layer(linear4bit(N, K))).eval()
    kind, x = base_of(layer.base_layer), torch.randn(M, K)
    with torch.no_grad():
        assert kind.why_not_call(layer.base_layer, x, N) == "inference over a 4-bit base"
        y = layer(x)
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert_close(y, layer.base_layer(x) + x @ A.t() @ B.t() * 1.5, terms=K + 4)
        assert kind.why_not_call(layer.base_layer.train(), x, N) is None  # as the forward of a checkpoint
    assert kind.why_not_call(layer.base_layer.eval(), x, N) is None


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_inference_of_few_rows_on_a_gpu_is_fused(dtype, device, kernels_on, monkeypatch):
    layer = our_layer(peft_layer(linear4bit(N, K, dtype=dtype, compute_dtype=dtype))).to(device).eval()
    base, weight = layer.base_layer, Weight(layer.base_layer, dtype).to(F64)
    base.support_avx512bf16_for_cpu = False  # a GPU never repacks
    kind, A, B = base_of(base), layer.lora_A["default"].weight, layer.lora_B["default"].weight
    monkeypatch.setattr(type(base), "forward", None)
    reason, other = "inference over a 4-bit base", F16 if dtype is F32 else F32
    with torch.no_grad():
        x = torch.randn(2, 3, K, device=device).to(dtype)
        exact = x.double() @ weight.t() + base.bias.double() + x.double() @ A.double().t() @ B.double().t() * 1.5
        y = layer(x)
        assert y.dtype is dtype
        assert (y.double() - exact).abs().max() <= max(2 * torch.finfo(dtype).eps, 4e-5) * exact.abs().max()
        for rows, of, expected in ((64, dtype, dtype is F32), (65, dtype, True), (3, other, True)):
            found = kind.why_not_call(base, torch.randn(rows, K, device=device).to(of), N)
            assert found == (reason if expected else None), (rows, of)


@pytest.mark.parametrize("names", [["a", "a", "b"], ["a", "b", "a"]], ids=["neighbours", "apart"])
@pytest.mark.parametrize("autocast", [BF16, F16], ids=str)
def test_a_mixed_batch_of_few_rows_under_autocast(autocast, names, monkeypatch):
    """The base gives x's dtype there, autocast's products another."""
    monkeypatch.setattr("fused_lora.bases.bitsandbytes_4bit._reads_4_bits", lambda module, x: True)  # as on a GPU
    theirs = peft_layer(linear4bit(N, K, dtype=F32, compute_dtype=F32), names=("a", "b")).eval()
    ours, x = our_layer(theirs).eval(), torch.randn(3, K)
    for layer in (ours, theirs):
        layer.base_layer.set_compute_type(x)
        layer.base_layer.compute_type_is_set = True
    with torch.no_grad(), torch.autocast("cpu", autocast):
        found = [layer(x, adapter_names=names) for layer in (ours, theirs)]
    assert found[0].dtype is found[1].dtype is F32
    assert_close(*found, terms=K)


def test_compiled_layers_call_the_base():
    layer = our_layer(peft_layer(linear4bit(N, K)))
    x, g = torch.randn(M, K), torch.randn(M, N)
    eager = run(layer, x, g, ["default"])
    for ours, other in zip(run(torch.compile(layer, backend="aot_eager"), x, g, ["default"]), eager, strict=True):
        assert_close(ours, other, terms=K + N)


# ---- what it does not know


class Subclass(bnb.nn.Linear4bit):
    pass


def state(**fields):
    def change(layer):
        for name, value in fields.items():
            setattr(layer.weight.quant_state, name, value)

    return change


def stored_as_int32(layer):
    layer.weight.data = layer.weight.data.view(-1).view(torch.int32)


CHANGES = {
    "a hook on the base layer": lambda m: m.register_forward_hook(lambda *_: None),
    "the base layer has its forward replaced": lambda m: setattr(m, "forward", lambda x: x),
    "a weight is a Parameter": lambda m: m._parameters.update(weight=nn.Parameter(torch.zeros(2, 2))),
    "weight.quant_state is missing: the weight is quantised when the layer is moved to its device": (
        lambda m: setattr(m.weight, "quant_state", None)
    ),
    "weight.quant_state.quant_type is 'int4', expected 'nf4' or 'fp4'": state(quant_type="int4"),
    "weight.quant_state.blocksize is 48": state(blocksize=48),
    "weight.quant_state.shape is None, expected (96, 128)": state(shape=None),
    "weight.quant_state.shape is torch.Size([128, 96]), expected (96, 128)": state(shape=torch.Size([128, 96])),
    "the weight has 6143 bytes, expected 6144 for (96, 128)": lambda m: setattr(m.weight, "data", m.weight.data[:-1]),
    "the weight is stored in torch.int32": lambda m: setattr(
        m.weight, "data", m.weight.data.view(-1).view(torch.int32)
    ),
    "in_features is no multiple of the blocksize": state(blocksize=256),
    "a bias is torch.int64": lambda m: m._parameters.update(bias=torch.zeros(N, dtype=torch.int64)),
}


@pytest.mark.parametrize("reason", CHANGES)
def test_layers_that_run_around_their_own_call(reason):
    layer = linear4bit(N, K)
    assert base_of(layer).why_not_fused(layer) is None
    CHANGES[reason](layer)
    assert base_of(layer).why_not_fused(layer).startswith(reason)


def test_a_subclass_is_another_kind():
    layer = Subclass(K, N).to("cpu")
    assert base_of(layer).why_not_fused(layer) == "the base layer is a Subclass"
    for kind in (bnb.nn.LinearNF4, bnb.nn.LinearFP4):
        layer = kind(K, N).to("cpu")
        assert base_of(layer).why_not_fused(layer) is None


def test_inputs_that_do_not_fit():
    layer = linear4bit(N, K)
    kind, x = base_of(layer), torch.randn(M, K)
    assert kind.why_not_call(layer, x, N) is None
    assert kind.why_not_call(layer, x[:, 1:], N) == kind.why_not_call(layer, x, N + 1) == "shapes differ"
    assert kind.why_not_call(layer, x.to("meta"), N) == "the base layer is on another device"
    with pytest.raises(RuntimeError):  # of the layer's own call
        fused_lora.LoraLinear(layer).train()(x[:, 1:])


def nan_scales(layer):
    state = layer.weight.quant_state
    (state.state2 if state.nested else state).absmax[0] = float("nan")


REFUSED = {
    "quant_state is missing": lambda m: setattr(m.weight, "quant_state", None),
    "quant_state.absmax has scales that are NaN or infinite": nan_scales,
    "quant_type is 'int4'": state(quant_type="int4"),
    "has 6143 bytes": lambda m: setattr(m.weight, "data", m.weight.data[:-1]),
    "is stored in torch.int32": stored_as_int32,
}


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("reason", REFUSED)
def test_inject_names_layer_and_field_and_changes_nothing(reason, nested):
    model = nn.Sequential(nn.Linear(K, K), linear4bit(N, K, nested=nested))
    REFUSED[reason](model[1])
    with pytest.raises(ValueError, match=rf"'1', a bitsandbytes.*Linear4bit.*{reason}"):
        fused_lora.inject(model, fused_lora.LoraConfig(target_modules=["0", "1"]))
    assert type(model[0]) is nn.Linear and type(model[1]) is bnb.nn.Linear4bit
    with pytest.raises(TypeError, match=rf"base_layer: .*{reason}"):
        fused_lora.LoraLinear(model[1])


def test_a_subclass_is_not_injected():
    """Its packed weight has another shape, and only it knows which."""
    for storage in (torch.uint8, BF16):
        model = nn.Sequential(Subclass(K, N, quant_storage=storage).to("cpu"))
        with pytest.raises(ValueError, match="its weight is a Params4bit"):
            fused_lora.inject(model, fused_lora.LoraConfig(target_modules=["0"]))


# ---- models


@pytest.mark.parametrize("compute", [None, F32, BF16])
@pytest.mark.parametrize("storage", [torch.uint8, BF16])
def test_inject_save_and_load(storage, compute, tmp_path):
    """Adapters have PEFT's dtype and draws; a reloaded model gives the same bits."""
    model = nn.Sequential(linear4bit(N, K, storage=storage, compute_dtype=compute))
    fresh, peft_model = copy.deepcopy(model), copy.deepcopy(model)
    torch.manual_seed(shifted(5))
    fused_lora.inject(model, fused_lora.LoraConfig(r=4, target_modules=["0"]), "default")
    peft = pytest.importorskip("peft")
    peft_model.is_loaded_in_4bit = True
    torch.manual_seed(shifted(5))
    theirs = peft.get_peft_model(peft_model, peft.LoraConfig(r=4, target_modules=["0"])).base_model.model[0]
    for part in ("lora_A", "lora_B"):
        mine, other = (getattr(layer, part)["default"].weight for layer in (model[0], theirs))
        assert mine.dtype == other.dtype == F32 and torch.equal(mine, other)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable == ["0.lora_A.default.weight", "0.lora_B.default.weight"]
    model[0].lora_B["default"].weight.data.normal_()
    fused_lora.save_adapter(model, tmp_path, "default")
    fused_lora.load_adapter(fresh, tmp_path, "default")
    x = torch.randn(M, K)
    assert torch.equal(fresh.train()(x), model.train()(x))


# ---- merging


def contents(layer):
    """Everything that a Linear4bit computes with, as bytes."""
    state = layer.weight.quant_state
    inner = [state.state2.absmax, state.offset] if state.nested else []
    return [t.contiguous().view(-1).view(torch.uint8).clone() for t in (layer.weight.data, state.absmax, *inner)]


MERGES = {
    **SETTINGS,
    "fp32 storage, double quantised": {"storage": F32},
    "fp16": {"dtype": F16},
    "bf16": {"dtype": BF16},
}


@pytest.mark.parametrize("settings", MERGES)
@pytest.mark.filterwarnings("ignore:Merge lora module")
def test_a_merge_has_the_bytes_of_peft_and_an_unmerge_those_of_before(settings):
    """200 cycles change nothing; PEFT's own unmerge changes the weight at once."""
    base = linear4bit(N, K, **MERGES[settings])
    theirs = peft_layer(base)
    theirs.lora_B["default"].weight.data.mul_(0.1)
    ours = our_layer(theirs)
    before, weight = contents(ours.base_layer), ours.base_layer.weight
    theirs.merge()
    x = torch.randn(M, K)
    for _ in range(200):
        ours.merge()
        assert same(contents(ours.base_layer), contents(theirs.base_layer))
        ours.unmerge()
        assert same(contents(ours.base_layer), before) and ours.base_layer.weight is weight
    ours.merge()
    assert_close(ours(x), theirs(x), terms=K)
    ours.lora_A["default"].weight.data.zero_()  # whatever happens to the adapter
    ours.unmerge()
    assert same(contents(ours.base_layer), before)


def test_what_a_merge_loses_is_said():
    model = nn.Sequential(linear4bit(N, K))
    fused_lora.inject(model, fused_lora.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False))
    layer = model[0]
    W = values_of(layer.base_layer)
    delta = layer.get_delta_weight("default")
    for size in (1e-3, 1.0):
        layer.lora_B["default"].weight.data.mul_(size)
        expected = layer.get_delta_weight("default")
        if size < 1:
            with pytest.warns(UserWarning, match="merge: 4-bit weights keep only"):
                fused_lora.merge(model)
        else:
            layer.lora_B["default"].weight.data.mul_(1e5)
            expected = layer.get_delta_weight("default")
            fused_lora.merge(model)
        lost = (values_of(layer.base_layer) - W - expected).norm() / expected.norm()
        assert fused_lora.delta_fidelity(model)["0"] == pytest.approx(lost.item(), rel=1e-4)
        fused_lora.unmerge(model)
    assert torch.equal(values_of(layer.base_layer), W) and delta.shape == W.shape


def test_two_adapters_are_quantised_once():
    theirs = peft_layer(linear4bit(N, K), names=("a", "b"))
    ours = our_layer(theirs)
    W, before = values_of(ours.base_layer), contents(ours.base_layer)
    delta = ours.get_delta_weight("a") + ours.get_delta_weight("b")
    ours.merge(adapter_names=["a"])
    with pytest.warns(UserWarning, match="additionally merging b"):
        ours.merge(adapter_names=["b"])
    layer = linear4bit(N, K)
    together = bnb.nn.Params4bit(W + delta, compress_statistics=True, quant_type="nf4").to("cpu")
    layer.weight = together
    assert same(contents(ours.base_layer), contents(layer))
    ours.unmerge()
    assert same(contents(ours.base_layer), before)


def test_a_merge_that_would_not_be_finite_changes_nothing():
    model = nn.Sequential(linear4bit(N, K), linear4bit(N, K))
    fused_lora.inject(model, fused_lora.LoraConfig(r=4, target_modules=["0", "1"], init_lora_weights=False))
    before = [contents(layer.base_layer) for layer in model]
    model[1].lora_A["default"].weight.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match="1: NaNs or infinities detected in the merged weights"):
        fused_lora.merge(model)
    assert all(same(contents(layer.base_layer), old) for layer, old in zip(model, before, strict=True))
    assert not any(layer.merged for layer in model)


def test_a_weight_that_was_replaced_while_merged():
    layer = our_layer(peft_layer(linear4bit(N, K)))
    layer.merge()
    layer.base_layer.weight = linear4bit(N, K).weight
    with pytest.raises(RuntimeError, match="weight: it was replaced or moved while merged; nothing was unmerged"):
        layer.unmerge()
    assert layer.merged


STEPS = {
    "evaluate": lambda layer, x: layer.eval()(x),
    "repack": lambda layer, x: is_repacked(layer.base_layer) or repack(layer.base_layer),
    "train": lambda layer, x: layer.merged or layer.train()(x.clone().requires_grad_()).sum().backward(),
    "merge": lambda layer, x: layer.merged or layer.merge(),
    "unmerge": lambda layer, x: layer.unmerge() if layer.merged else None,
    "cast": lambda layer, x: layer.to(BF16).to(F32),
    "copy": lambda layer, x: copy.deepcopy(layer),
    "save": lambda layer, x: layer.state_dict(),  # which takes the layout for CPUs back
}


@pytest.mark.slow
@pytest.mark.parametrize("first", sampled(STEPS, len(STEPS)))
def test_any_order_of_calls(first):
    """Three more calls after each: the layer computes W x + D x, whatever came before."""
    start = our_layer(peft_layer(linear4bit(64, 64)))
    for name in ("lora_A", "lora_B"):
        weight = getattr(start, name)["default"].weight
        weight.data.copy_(weight.bfloat16().float())
    start.base_layer.bias.data.copy_(start.base_layer.bias.bfloat16().float())
    W, x = values_of(start.base_layer), torch.randn(5, 64)
    D = start.get_delta_weight("default")
    exact = (x.double() @ (W + D).double().t() + start.base_layer.bias.double()).float()
    requantised = linear4bit(64, 64)
    requantised.weight = bnb.nn.Params4bit(W + D, compress_statistics=True, quant_type="nf4").to("cpu")
    merged = x @ values_of(requantised).t() + start.base_layer.bias
    for rest in itertools.product(STEPS, repeat=3):
        layer = copy.deepcopy(start)
        for step in (first, *rest):
            with torch.set_grad_enabled(step == "train"):
                found = STEPS[step](layer, x)
            layer = found if step == "copy" else layer
            y = layer.train()(x).detach()
            right = merged if layer.merged else exact
            # scales and x in bf16 once the weight is repacked, and a second quantisation of such scales
            assert (y - right).norm() < (0.05 if layer.merged else 0.02) * right.norm(), (first, *rest, step)
        if layer.merged:
            layer.unmerge()
        y = layer.train()(x).detach()
        assert (y - exact).norm() < 0.02 * exact.norm(), (first, *rest)


def test_a_store_over_a_quantised_model(tmp_path):
    model = nn.Sequential(linear4bit(N, K, dtype=BF16, compute_dtype=F32))
    plain = copy.deepcopy(model).eval()
    fused_lora.inject(model, fused_lora.LoraConfig(r=4, target_modules=["0"]))
    model[0].lora_B["default"].weight.data.normal_()
    fused_lora.save_adapter(model, tmp_path, "default")
    store = fused_lora.AdapterStore(plain, capacity_bytes=1 << 20)
    store.load("a", tmp_path)
    x = torch.randn(3, K)
    with torch.no_grad():
        base, adapted = plain(x), model.eval()(x)
        with store.batch(["a", None, "a"]):
            y = plain(x)
    assert_close(y[[0, 2]], adapted[[0, 2]], terms=K)
    assert torch.equal(y[1], base[1])
