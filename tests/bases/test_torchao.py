"""Weight-only quantised tensors of torchao as a base: fused training, merges, dense merges, files, refusals."""

import copy
import itertools
import pickle
import warnings

import pytest
import torch
from torch import nn

import fused_lora
from fused_lora import LoraConfig
from fused_lora.bases import Adapters, base_of, dense
from fused_lora.bases.requantised import FLOATS_OF_8_BITS, values_of_codes
from fused_lora.bases.torchao import Torchao, Weight, parts
from fused_lora.integrations.peft import layer_report
from fused_lora.testing.numeric import DRAWS, assert_close, assert_no_worse, ulp
from helpers.over_quantised import assert_no_worse_than_peft, layers, results, same, three_models
from helpers.quantised import torchao_linear

pytest.importorskip("torchao")
peft = pytest.importorskip("peft")
import torchao.quantization as ao  # noqa: E402
from torchao.quantization.granularity import PerGroup, PerRow, PerTensor  # noqa: E402

pytestmark = [pytest.mark.numeric, pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated without")]

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
N, K, M = 96, 128, 9
MERGEABLE = {
    "int8": ao.Int8WeightOnlyConfig(),
    "int8 groups": ao.Int8WeightOnlyConfig(granularity=PerGroup(32)),
    "int8 tensor": ao.Int8WeightOnlyConfig(granularity=PerTensor()),
    "float8": ao.Float8WeightOnlyConfig(),
    "float8 tensor": ao.Float8WeightOnlyConfig(granularity=PerTensor()),
    "e5m2 groups": ao.Float8WeightOnlyConfig(weight_dtype=torch.float8_e5m2, granularity=PerGroup(32)),
}
INT4 = ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
KINDS = {**MERGEABLE, "int4": INT4}


@pytest.fixture
def no_native_bf16(monkeypatch):
    """As on a CPU that does not multiply bf16."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)


class Net(nn.Module):
    """Two quantised layers; ``hf_quantizer`` is where PEFT looks for the configuration, as transformers leaves it."""

    def __init__(self, kind="int8", **settings):
        super().__init__()
        self.up = torchao_linear(N, K, KINDS[kind], **settings)
        self.down = torchao_linear(K, N, KINDS[kind], bias=False, **settings)
        self.hf_quantizer = Quantizer(kind)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


class Quantizer:
    def __init__(self, kind):
        self.kind, self.quantization_config = kind, self

    def get_apply_tensor_subclass(self):
        return KINDS[self.kind]


def pair(names=("first",), kind="int8", fields=(), **settings):
    return three_models(Net(kind, **settings), names, target_modules=["up", "down"], **dict(fields))


def contents(layer):
    return [t.clone() for t in parts(layer.weight).values()]


CASES = [
    *(("int8", dtype) for dtype in (F32, BF16, F16)),
    *((kind, dtype) for kind in ("float8", "int4") for dtype in (F32, BF16)),
    ("int8 groups", F16),
    ("e5m2 groups", BF16),
]


@pytest.mark.parametrize("kind, dtype", CASES)
def test_a_layer_is_no_less_exact_than_peft_over_torchao(kind, dtype, no_native_bf16):
    """Against float64 over ``weight.dequantize()``: outputs and all gradients of two adapters."""
    names, draws = ("first", "second"), []
    for _ in range(DRAWS):
        models = pair(names, kind, dtype=dtype)
        x, g = torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype)
        base = layers(models[-1])[0].base_layer
        W = base.weight.dequantize().double()
        draws.append(results(models, x, g, names, nn.functional.linear(x.double(), W, base.bias.double()), W))
    assert_no_worse_than_peft(draws)


@pytest.mark.parametrize("dtype", FLOATS_OF_8_BITS, ids=str)
def test_every_number_of_8_bits_is_what_torch_converts_it_to(dtype):
    codes = torch.arange(256, dtype=torch.uint8).view(dtype).view(16, 16).t()
    assert torch.equal(values_of_codes(codes).nan_to_num(0.3), codes.float().nan_to_num(0.3))


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_have_the_bits_of_dequantize(kind):
    """Random shapes and steps, also where zero points are not zero."""
    for _ in range(20):
        rows, columns, step = (int(n) for n in torch.randint(1, 40, (3,)))
        for dtype in (F32, BF16, F16):
            weight = torchao_linear(rows, 32 * (columns % 5 + 1), KINDS[kind], dtype=dtype).weight
            if columns % 2 and getattr(weight, "zero_point", None) is not None:
                weight.zero_point[...] = columns % 7
            found = torch.cat([block for _, _, block in Weight(weight).blocks(step)])
            assert found.dtype is dtype and torch.equal(found, weight.dequantize())


def test_an_int8_layer_is_no_less_exact_than_torchao_over_code_times_scale(no_native_bf16):
    """torchao's call rounds the scale and the product, ours the weight: against neither."""
    draws = []
    for _ in range(DRAWS):
        layer, x = torchao_linear(N, K, MERGEABLE["int8"], dtype=BF16), torch.randn(M, K).to(BF16)
        A, B = torch.zeros(4, K), torch.zeros(N, 4)
        ours = base_of(layer).forward(layer, x, Adapters([A], [B], [1.0], [0.0]))
        W = layer.weight.qdata.double() * layer.weight.scale.double()
        draws.append((ours, layer(x), nn.functional.linear(x.double(), W, layer.bias.double())))
    assert_no_worse(*(torch.stack(results) for results in zip(*draws, strict=True)), draws=True)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_the_weight_is_kept_for_the_backward(kind):
    layer = pair(kind=kind)[1].up
    kept = []
    x = torch.randn(M, K, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        layer(x)
    assert sorted(kept)[-1] == M * K < N * K


def test_what_runs_how_is_said():
    ours, injected, theirs = pair()
    for model in (ours, injected):
        assert [str(row) for row in layer_report(model)] == ["fused"] * 2
    assert list(ours.state_dict()) == list(theirs.state_dict()) and repr(ours) == repr(theirs)
    for layer in layers(ours):
        assert type(copy.deepcopy(layer)) is type(layer)
    bare = pair(kind="int8")[0].base_model.model.up
    bare.base_layer.__dict__.pop("extra_repr")  # torchao's, which cannot be pickled
    bare.get_apply_tensor_subclass = None
    assert type(pickle.loads(pickle.dumps(bare))) is type(bare)
    fused_lora.restore(ours)
    assert [type(layer) for layer in layers(ours)] == [type(layer) for layer in layers(theirs)]


def linear(settings=None):
    return torchao_linear(N, K, settings or KINDS["int8"])


def test_what_is_called():
    """A call that quantises its input, hooks, autocast, another dtype, inference, and kinds that nobody knows."""
    x, kind = torch.randn(M, K), base_of(linear())
    assert isinstance(kind, Torchao) and kind.why_not_fused(linear()) is None
    dynamic = linear(ao.Int8DynamicActivationInt8WeightConfig())
    assert base_of(dynamic).why_not_fused(dynamic) == "its call quantises or scales the input, too"
    hooked = linear()
    hooked.register_forward_hook(lambda *_: None)
    assert kind.why_not_fused(hooked) == "a hook on the base layer"
    assert kind.why_not_call(linear(), x, N) is None
    other = "the input has another dtype than the base layer computes in"
    assert kind.why_not_call(linear(), x.half(), N) == other
    with torch.autocast("cpu", BF16):
        assert kind.why_not_call(linear(), x, N) == other
    assert kind.why_not_call(linear(), torch.randn(M, K + 1), N) == "shapes differ"
    with torch.no_grad():
        assert kind.why_not_call(linear().eval(), x, N) == "inference over a quantised base"
    assert isinstance(base_of(nn.Linear(2, 2)), dense.Dense)


def test_a_cpu_that_multiplies_bf16_is_left_to_it(monkeypatch):
    layer, x = torchao_linear(N, K, KINDS["int8"], dtype=BF16), torch.randn(M, K).to(BF16)
    for native, reason in ((True, "this CPU multiplies bf16 itself"), (False, None)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda native=native: native)
        assert base_of(layer).why_not_call(layer, x, N) == reason


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_and_inference_give_peft_results(kind, training):
    """Dtypes and numbers of calls around the base: the base's call is torchao's."""
    models, x = pair(kind=kind), torch.randn(M, K)
    with torch.set_grad_enabled(training), torch.autocast("cpu", BF16):
        *ours, theirs = (layers(model.train(training))[0](x) for model in models)
    for y in ours:
        assert y.dtype is theirs.dtype
        assert (y - theirs).abs().max() <= 4 * ulp(theirs.abs().max().item(), BF16)  # rounded at other places


def test_an_int8_layer_whose_call_quantises_the_input():
    """Around the base, and its merge keeps what it says of the input."""
    layer = linear(ao.Int8DynamicActivationInt8WeightConfig())
    mine = fused_lora.LoraLinear(copy.deepcopy(layer), r=4, init_lora_weights=False)
    x = torch.randn(M, K)
    A, B = mine.lora_A["default"].weight, mine.lora_B["default"].weight
    assert_close(mine(x).detach(), layer(x) + (2 * x @ A.t() @ B.t()).detach(), terms=4 + K)
    mine.merge()
    assert mine.base_layer.weight.act_quant_kwargs == layer.weight.act_quant_kwargs
    mine.unmerge()
    assert same(contents(mine.base_layer), contents(layer))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("kind", MERGEABLE)
def test_a_merge_has_the_numbers_of_peft_and_an_unmerge_those_of_before(kind, dtype):
    ours, injected, theirs = pair(kind=kind, dtype=dtype)
    x = torch.randn(M, K).to(dtype)
    before = [contents(layer.base_layer) for layer in layers(ours)]
    theirs.merge_adapter()
    for model in (ours, injected):
        for _ in range(20):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                fused_lora.merge(model)
            for mine, other in zip(layers(model), layers(theirs), strict=True):
                assert same(contents(mine.base_layer), contents(other.base_layer))
                assert type(mine.base_layer.weight) is type(other.base_layer.weight)
                assert mine.base_layer.weight.dtype is dtype
            assert torch.equal(model(x), theirs(x))
            fused_lora.unmerge(model)
            for layer, held in zip(layers(model), before, strict=True):
                assert same(contents(layer.base_layer), held)


def test_without_a_configuration_ours_merge_where_peft_refuses():
    ours, _, theirs = pair()
    for model in (ours, theirs):
        for layer in layers(model):
            layer.get_apply_tensor_subclass = None
    with pytest.raises(ValueError, match="instantiated without `get_apply_tensor_subclass`"):
        theirs.merge_adapter()
    ours.merge_adapter()
    assert all(layer.merged for layer in layers(ours))


def test_several_adapters_are_quantised_once():
    _, model, _ = pair(("first", "second"))
    layer = model.up
    wanted = layer.base_layer.weight.dequantize()
    wanted += layer.get_delta_weight("first") + layer.get_delta_weight("second")
    layer.merge(adapter_names=["first"])
    with pytest.warns(UserWarning, match="additionally merging second"):
        layer.merge(adapter_names=["second"])
    other = ao.Int8Tensor.from_hp(wanted, granularity=PerRow())
    moved = (layer.base_layer.weight.qdata.int() - other.qdata.int()).abs()
    assert moved.max() <= 1 and moved.float().mean() < 0.01  # fp32 sums in another order


def test_what_a_merge_loses_is_said():
    _, model, _ = pair()
    values = [layer.base_layer.weight.dequantize().double() for layer in layers(model)]
    for layer in layers(model):
        layer.lora_B["first"].weight.data.mul_(1e-3)
    with pytest.warns(UserWarning, match=r"merge: 8-bit weights keep only .* unload\(model, merge_adapters=True"):
        fused_lora.merge(model)
    lost = fused_lora.delta_fidelity(model)
    for (path, layer), W in zip(fused_lora.lora_layers(model).items(), values, strict=True):
        delta = layer.get_delta_weight("first").double()
        expected = (layer.base_layer.weight.dequantize().double() - W - delta).norm() / delta.norm()
        assert lost[path] == pytest.approx(expected.item(), rel=1e-3)


STEPS = {
    "evaluate": lambda layer, x: layer.eval()(x),
    "train": lambda layer, x: layer.merged or layer.train()(x.clone().requires_grad_()).sum().backward(),
    "merge": lambda layer, x: layer.merged or layer.merge(),
    "unmerge": lambda layer, x: layer.unmerge() if layer.merged else None,
    "copy": lambda layer, x: copy.deepcopy(layer),
    "save": lambda layer, x: layer.load_state_dict(layer.state_dict()) and None,
}


@pytest.mark.parametrize("first", STEPS)
def test_any_order_of_calls(first):
    """Two more calls after each: the layer computes what it computed merged, or unmerged."""
    start, x = pair()[1].up, torch.randn(5, K)
    merged = copy.deepcopy(start)
    merged.merge()
    right = {layer.merged: layer(x).detach() for layer in (start, merged)}
    for rest in itertools.product(STEPS, repeat=2):
        layer = copy.deepcopy(start)
        for step in (first, *rest):
            with torch.set_grad_enabled(step == "train"):
                found = STEPS[step](layer, x)
            layer = found if step == "copy" else layer
            assert_close(layer(x).detach(), right[layer.merged], terms=K)
        STEPS["unmerge"](layer, x)
        assert_close(layer(x).detach(), right[False], terms=K)


def test_another_base_is_not_loaded_over_a_merge():
    first, other = pair()[1].up, pair()[1].up
    first.merge()
    with pytest.raises(RuntimeError, match="are merged into it; unmerge before load_state_dict"):
        first.load_state_dict(other.state_dict())


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_dense_merge_is_rounded_once(kind, dtype):
    for model in pair(kind=kind)[:2]:
        exact = []
        for layer in layers(model):
            A, B = (part["first"].weight.detach().double() for part in (layer.lora_A, layer.lora_B))
            exact.append(layer.base_layer.weight.dequantize().double() + 1.5 * B @ A)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            plain = fused_lora.unload(model, merge_adapters=True, dtype=dtype)
        for layer, right in zip((plain.up, plain.down), exact, strict=True):
            assert type(layer) is nn.Linear and layer.weight.dtype is dtype and "Int8" not in repr(layer)
            size = right.abs().max().item()
            assert (layer.weight.double() - right).abs().max().item() <= ulp(size, dtype) / 2 + 16 * ulp(size, F32)
            assert not vars(layer).keys() - vars(nn.Linear(1, 1)).keys()
        assert plain(torch.randn(M, K).to(dtype)).dtype is dtype


def test_files(tmp_path):
    """The adapter's files, in PEFT and in ours, and a state dict of the whole model."""
    ours, injected, theirs = pair()
    x = torch.randn(M, K)
    fused_lora.save_adapter(injected, tmp_path, "first")
    fresh = Net()
    for layer, other in zip((fresh.up, fresh.down), layers(theirs), strict=True):
        layer.weight, layer.bias = copy.deepcopy(other.base_layer.weight), other.base_layer.bias
    again = peft.PeftModel.from_pretrained(copy.deepcopy(fresh), tmp_path)
    fused_lora.load_adapter(fresh, tmp_path, "first")
    with torch.no_grad():
        wanted = injected.eval()(x)
        assert torch.equal(fresh.eval()(x), wanted)
        assert_close(again.eval()(x), wanted, terms=K + N)
    other = pair()[1]
    other.load_state_dict(injected.state_dict())
    with torch.no_grad():
        assert torch.equal(other.eval()(x), injected.eval()(x))


def test_compiled_layers_call_the_base():
    _, model, _ = pair()
    layer, x = model.up, torch.randn(M, K, requires_grad=True)
    eager = torch.autograd.grad(layer(x).sum(), x)[0]
    found = torch.autograd.grad(torch.compile(layer, backend="aot_eager")(x).sum(), x)[0]
    assert_close(found, eager, terms=K + N)


def nan_scale(layer):
    layer.weight.scale[0] = float("nan")


REFUSED = {
    "weight.scale has values that are NaN or infinite": nan_scale,
    "weight.qdata is torch.int8": lambda layer: setattr(layer.weight, "qdata", layer.weight.qdata[:-1]),
    r"weight.block_size is \[3, 128\]": lambda layer: setattr(layer.weight, "block_size", [3, K]),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_inject_names_layer_and_field_and_changes_nothing(reason):
    model = Net()
    REFUSED[reason](model.up)
    with pytest.raises(ValueError, match=rf"'up', a torch.nn.*Linear.*{reason}"):
        fused_lora.inject(model, LoraConfig(target_modules=["up", "down"]))
    assert type(model.up) is type(model.down) is nn.Linear


def zero_points(layer):
    layer.weight.zero_point[0] = 1


UNMERGED = {
    "weight.zero_point is not zero": ("int8", zero_points),
    "a IntxUnpackedToInt8Tensor does not say how its scales were chosen": ("int4", lambda layer: None),
}


@pytest.mark.parametrize("reason", UNMERGED)
def test_a_merge_that_cannot_be_quantised_alike_is_refused_and_a_dense_one_is_not(reason):
    kind, change = UNMERGED[reason]
    _, model, _ = pair(kind=kind)
    change(model.up.base_layer)
    wanted = model.up.base_layer.weight.dequantize() + model.up.get_delta_weight("first").detach()
    with pytest.raises(RuntimeError, match=f"up: base_layer: {reason}; .*nothing was merged"):
        fused_lora.merge(model)
    plain = fused_lora.unload(model, merge_adapters=True, dtype=F32)
    assert_close(plain.up.weight, wanted, terms=8)


def test_peft_merges_what_ours_cannot():
    """PEFT knows the configuration; the accelerated layer leaves the merge and the unmerge to it."""
    ours, _, theirs = pair(kind="int4")
    for call in ("merge_adapter", "unmerge_adapter"):
        for model in (ours, theirs):
            getattr(model, call)()
        for mine, other in zip(layers(ours), layers(theirs), strict=True):
            assert same(contents(mine.base_layer), contents(other.base_layer))


def int4_of_gpus():
    """As torchao packs it for GPUs. The kernels are another package's, which need one."""
    layer = nn.Linear(K, N).requires_grad_(False)
    parts = torch.zeros(N, K // 2, dtype=torch.int8), torch.ones(K // 32, N), torch.zeros(K // 32, N)
    weight = ao.Int4Tensor(*parts, [1, 32], torch.Size((N, K)))
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def test_a_tensor_of_another_kind_runs_around_the_base_and_is_named():
    model = nn.Sequential(int4_of_gpus(), torchao_linear(K, N, KINDS["int8"]))
    fused_lora.inject(model, LoraConfig(target_modules=["0", "1"]))
    row = layer_report(model)[0]
    assert str(row) == "fused around the base: a weight is a Int4Tensor"
    with pytest.raises(RuntimeError, match="0: base_layer: a weight is a Int4Tensor; .*nothing was merged"):
        fused_lora.merge(model)
    with pytest.raises(RuntimeError, match="0: a Linear with a Int4Tensor of .* cannot be dequantised here"):
        fused_lora.unload(model, merge_adapters=True, dtype=F32)
    with pytest.raises(TypeError, match="only supports int8 weights for now"):
        peft.get_peft_model(nn.Sequential(int4_of_gpus()), peft.LoraConfig(target_modules=["0"]))


def test_a_merge_that_would_not_be_finite_changes_nothing():
    _, model, _ = pair(dtype=F16)
    for value in (float("inf"), 1e7):
        model.down.lora_B["first"].weight.data.fill_(value)
        before = [contents(layer.base_layer) for layer in layers(model)]
        with pytest.raises(ValueError, match="down: the weight would hold NaN or infinity in torch.float16"):
            fused_lora.merge(model)
        assert all(same(contents(m.base_layer), held) for m, held in zip(layers(model), before, strict=True))
        assert not any(layer.merged for layer in layers(model))


def test_a_weight_that_was_replaced_while_merged():
    _, model, _ = pair()
    fused_lora.merge(model)
    model.up.base_layer.weight = linear().weight
    with pytest.raises(RuntimeError, match="up: weight: it was replaced or moved while merged"):
        fused_lora.unmerge(model)
    assert model.up.merged
