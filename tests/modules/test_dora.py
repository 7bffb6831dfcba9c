"""DoRA next to PEFT's: outputs, gradients, dropout, merges to the bit, files, what refuses it, memory."""

import copy
import functools

import peft.helpers
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrize, prune

import fused_lora
from fused_lora.bases import base_of
from fused_lora.modules import variants
from fused_lora.ops import guard
from fused_lora.ops.dora import op
from fused_lora.ops.linear import plan
from fused_lora.ops.term.op import lora_term
from fused_lora.reference import bits
from fused_lora.testing.numeric import DRAWS, assert_close, assert_no_worse
from helpers.accelerated import Net, SideBySide, layers, pair, wrap
from helpers.quantised import linear4bit
from helpers.seeds import shifted
from helpers.twins import share_dropout, twin_layers
from helpers.unchanged import assert_bits, parameter_bits
from helpers.versions import since

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SETS = [["v"], ["plain", "v"], ["v", "plain", "w"], ["w", "v"]]
ADAPTERS = {"v": {"use_dora": True}, "plain": {}, "w": {"use_dora": True, "r": 3, "use_rslora": True}}


@pytest.mark.numeric
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_and_gradients_are_no_worse_than_pefts(dtype):
    both = SideBySide(wrap(Net(dtype).eval(), ADAPTERS))
    assert all(row.fused for row in fused_lora.integrations.peft.layer_report(both.ours))
    for names in SETS:
        both.do(lambda m, names=names: m.base_model.set_adapter(names))
        both.assert_same_results(draws=17)


@pytest.mark.parametrize("way", ["is_grads_batched", "vmap"])
def test_batches_of_gradients_under_dropout(way):
    """Over a 16-bit base, whose weight is widened block by block."""
    for layer in layers(pair(torch.bfloat16, use_dora=True, lora_dropout=0.25))[:2]:
        x, g = torch.randn(9, 24).bfloat16().requires_grad_(), torch.randn(3, 9, 17).bfloat16()
        y = layer.train()(x)
        of = functools.partial(torch.autograd.grad, y, [x, *(p for p in layer.parameters() if p.requires_grad)])
        single = zip(*(of(one, retain_graph=True) for one in g), strict=True)
        found = torch.func.vmap(of)(g) if way == "vmap" else of(g, is_grads_batched=True)
        for batch, each in zip(found, single, strict=True):
            assert_close(batch.bfloat16(), torch.stack(each).bfloat16(), terms=100)


def test_wider_adapters_that_are_frozen_take_one_operator(monkeypatch):
    """Only for their gradients, or x's, is the output of a 16-bit base widened before it meets them."""
    layer, terms = layers(pair(torch.bfloat16, use_dora=True))[0], []
    monkeypatch.setattr(variants, "lora_term", lambda *args: terms.append(1) or lora_term(*args))
    for trained in (True, False):
        layer.requires_grad_(trained).base_layer.requires_grad_(False)
        for wanted in (False, True):
            layer(torch.randn(5, 24).bfloat16().requires_grad_(wanted))
            assert len(terms) == int(trained or wanted)
            terms.clear()


def test_a_single_row_becomes_a_matrix_as_in_peft():
    both, x = pair(use_dora=True), torch.randn(24)
    ours, theirs = (layer(x) for layer in layers(both)[:2])
    assert ours.shape == (1, 17) and torch.equal(ours, theirs)


@pytest.mark.numeric
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.25, 1.0])
def test_one_layer_trains_as_pefts(dtype, p):
    """Under dropout the base product of the dropped input is scaled, and that of the input itself is not.

    Gradients of fp32 adapters over a 16-bit base are not rounded to 16 bits.
    """
    both = pair(dtype, adapters={"v": {"use_dora": True}}, lora_dropout=p)
    found = {"ours": [], "theirs": [], "exact": []}
    for draw in range(DRAWS if p < 1 else 1):
        x, g = torch.randn(4, 24).to(dtype), torch.randn(4, 17).to(dtype)
        for (name, kept), model, layer in zip(found.items(), both.models, layers(both), strict=True):
            model.train()
            own = x.to(layer.base_layer.weight.dtype).requires_grad_()
            if name != "ours" and p:
                share_dropout(layer, ["v"], p, draw)
            torch.manual_seed(shifted(draw))
            y = layer(own)
            parts = [own, layer.lora_A["v"].weight, layer.lora_B["v"].weight, layer.lora_magnitude_vector["v"].weight]
            kept.append([y.detach(), *torch.autograd.grad(y, parts, g.to(y.dtype))])
    names = ["y", "dx", "dA", "dB", "dm"]
    for name, *tensors in zip(
        names, *(map(torch.stack, zip(*kept, strict=True)) for kept in found.values()), strict=True
    ):
        assert_no_worse(*tensors, name=name, draws=p < 1)


def test_dropout_by_the_kernels(device, kernels_on):
    """No mask is drawn by torch: that takes a hundred passes over x."""
    layer = fused_lora.LoraLinear(nn.Linear(48, 32), r=4, use_dora=True, lora_dropout=0.25, init_lora_weights=False)
    layer = layer.to(device)
    x = torch.randn(5, 48, device=device, requires_grad=True)

    def run():
        torch.manual_seed(shifted(2))
        y = layer(x)
        return [
            y.detach(),
            *torch.autograd.grad(y.square().sum(), [x, *(p for p in layer.parameters() if p.requires_grad)]),
        ]

    found = run()
    assert {key[0] for key in guard.verdicts()} >= {"row_norms", "dropped"} and all(guard.verdicts().values())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guard, "usable", lambda _: False)
        plan.forget()
        for ours, eager in zip(found, run(), strict=True):
            assert_close(ours, eager, terms=1000)


@pytest.mark.parametrize("turned", range(3))
def test_norms_of_lazily_negated_tensors(turned, device, kernels_on):
    """A kernel would not see the sign."""
    tensors = [torch.randn(size, device=device) for size in ((9, 12), (3, 12), (9, 3))]
    expected = op.row_norms(*tensors, 0.5)
    tensors[turned] = torch._neg_view(-tensors[turned])
    assert torch.equal(op.row_norms(*tensors, 0.5), expected)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


CHANGES = {
    "parametrized": lambda part: parametrize.register_parametrization(part, "weight", Doubled()),
    "weight norm": nn.utils.weight_norm,
    "pruned": lambda part: prune.l1_unstructured(part, "weight", 0.4),
    "hook": lambda part: part.register_forward_hook(lambda module, args, y: 3 * y),
    "forward": lambda part: setattr(part, "forward", lambda x: 2 * nn.functional.linear(x, part.weight)),
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("part", ["lora_A", "lora_B", "base_layer"])
@pytest.mark.parametrize("change", CHANGES)
def test_parts_that_others_have_changed(change, part, training):
    """The norm is of what a call of lora_A and lora_B makes, and of a weight that is computed."""
    ours, theirs = twin_layers(nn.Linear(12, 9).train(training), r=3, use_dora=True)
    x, found = torch.randn(5, 12), []
    for layer in (ours, theirs):
        CHANGES[change](getattr(layer, part) if part == "base_layer" else getattr(layer, part)["default"])
        own = x.clone().requires_grad_()
        y = layer(own)
        found.append([y, *torch.autograd.grad(y.square().sum(), [own, layer.lora_magnitude_vector["default"].weight])])
        if part != "base_layer":
            layer.merge()
            found[-1].append(layer.base_layer.weight.clone())
            layer.unmerge()
    for mine, other in zip(*found, strict=True):
        assert_close(mine, other, terms=100)


def test_second_derivatives_and_compilation():
    for p in (0.0, 0.5):
        layer = fused_lora.LoraLinear(nn.Linear(6, 5), r=2, use_dora=True, lora_dropout=p, init_lora_weights=False)
        layer = layer.double()
        parts = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        parts += (layer.lora_magnitude_vector["default"].weight,)
        x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
        c = [t.detach() for t in (op.row_norms(layer.weight, *parts[:2], layer.scaling["default"]),)]
        layer._row_norms = lambda name, norms=c[0]: norms  # the norm has no gradient: differences must not see it move

        def call(x, *parts, layer=layer):
            torch.manual_seed(shifted(7))
            return layer(x)

        torch.autograd.gradcheck(call, (x, *parts))
        torch.autograd.gradgradcheck(call, (x, *parts))
    layer = fused_lora.LoraLinear(nn.Linear(6, 5), r=2, use_dora=True, lora_dropout=0.5, init_lora_weights=False)
    x = torch.randn(3, 6)
    for _ in range(2):
        expected = layer(x) if not layer.training else None
        compiled = torch.compile(layer, backend="eager", fullgraph=True)(x)
        assert expected is None or torch.equal(expected, compiled)
        layer.eval()
    assert_close(torch.export.export(layer, (x,)).module()(x), expected, terms=100)
    stacked = {name: torch.stack([p, -p]) for name, p in layer.named_parameters() if "lora_A" in name}
    ours = torch.func.vmap(lambda parts: torch.func.functional_call(layer, parts, (x,)))(stacked)
    assert_close(ours[0], expected, terms=100)
    torch.library.opcheck(torch.ops.fused_lora.dropped.default, (x, torch.tensor([3]), 0.5))
    torch.library.opcheck(
        torch.ops.fused_lora.row_norms.default, (torch.randn(5, 6), torch.randn(2, 6), torch.randn(5, 2), 2.0)
    )


@pytest.mark.numeric
def test_ours_is_pefts():
    """Seeds, magnitudes and results of LoraLinear over nn.Linear and Conv1D, hooks on lora_A, other bases, autocast."""
    ours, theirs = twin_layers(nn.Linear(24, 17), {"a": {"use_dora": True}, "b": {}}, active=["a", "b"])
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = torch.randn(DRAWS, 4, 24)
    exact = copy.deepcopy(theirs).double()

    def compare(factor_of=lambda layer: layer, x=x):
        found = [
            torch.stack([factor_of(m)(part) for part in x.to(m.base_layer.weight.dtype)]) for m in (ours, theirs, exact)
        ]
        assert_no_worse(*found, draws=True)

    compare()
    handles = [layer.lora_A["a"].register_forward_hook(lambda *_: None) for layer in (ours, theirs, exact)]
    compare()
    for handle in handles:
        handle.remove()
    for layer in (ours, theirs, exact):
        layer.base_layer.register_forward_hook(lambda module, args, y: y * 2)
    compare()
    with pytest.raises(ValueError, match="DoRA is enabled"):
        ours.eval()(x[0], adapter_names=["a"] * 4)
    torch.manual_seed(shifted(3))
    drawn = fused_lora.LoraLinear(nn.Linear(9, 8).bfloat16(), use_dora=True, init_lora_weights=True)
    torch.manual_seed(shifted(3))
    net = nn.Sequential(nn.Linear(9, 8).bfloat16())
    peft_layer = peft.get_peft_model(net, peft.LoraConfig(target_modules=["0"], use_dora=True)).base_model.model[0]
    mine, own = drawn.lora_magnitude_vector["default"].weight, peft_layer.lora_magnitude_vector["default"].weight
    assert mine.dtype == own.dtype and torch.equal(drawn.lora_A["default"].weight, peft_layer.lora_A["default"].weight)
    assert_close(mine, own, terms=1000)


@since("peft", "0.19")
def test_autocast_and_cached_norms():
    both = pair(adapters={"v": {"use_dora": True}})
    ours, theirs, _ = (layer.eval() for layer in layers(both))
    x = torch.randn(4, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ours(x).dtype == theirs(x).dtype == torch.bfloat16
        assert_close(ours(x), theirs(x), terms=1000)
    with peft.helpers.DoraCaching(), torch.no_grad():
        before = ours(x)
        ours.lora_magnitude_vector["v"]._cache_get("weight-norm-v", None).mul_(2)
        assert not torch.allclose(ours(x), before)  # it is the kept one that is read
    assert_close(ours(x), before, terms=1000)


@since("peft", "0.21")
@pytest.mark.experiment("A1", full=500, quick=5)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dora_comes_back(dtype, count):
    """Merge and unmerge of DoRA adapters, alone and beside others: PEFT's results, and every bit is back."""
    both = SideBySide(wrap(Net(dtype).eval(), ADAPTERS))
    before = parameter_bits(both.ours)
    for names in SETS:
        both.do(lambda m, names=names: m.base_model.set_adapter(names))
        both.do(lambda m: m.merge_adapter())
        both.assert_same_results(ulps=2, draws=17)
        both.do(lambda m: m.unmerge_adapter())
        assert_bits(both.ours, before)
    for _ in range(count):
        both.ours.merge_adapter()
        both.ours.unmerge_adapter()
    assert_bits(both.ours, before)
    both.do(lambda m: m.base_model.set_adapter("plain"))
    both.do(lambda m: m.merge_adapter())
    both.do(lambda m: m.merge_adapter(["v"]))
    both.assert_same_results(ulps=2, draws=17)
    fused_lora.restore(both.ours)  # PEFT's own unmerge finds the norms that it needs
    both.ours.unmerge_adapter()
    assert not any(getattr(m, "merged_adapters", []) for m in both.ours.modules())


def test_magnitudes_of_zero_and_records(tmp_path):
    layer = fused_lora.LoraLinear(nn.Linear(64, 48), use_dora=True, init_lora_weights=False)
    layer.lora_magnitude_vector["default"].weight.data[3] = 0.0
    before = layer.weight.detach().clone()
    layer.eval().merge()
    assert not layer.weight[3].any()
    layer.unmerge()
    assert torch.equal(bits(layer.weight), bits(before))
    layer.lora_magnitude_vector["default"].weight.data[3] = float("nan")
    with pytest.raises(ValueError, match="row_scale: expected 48 finite numbers"):
        layer.merge()
    assert torch.equal(bits(layer.weight), bits(before)) and not layer.merged


def test_files_both_ways(tmp_path):
    torch.manual_seed(shifted(0))
    theirs = wrap(Net().eval(), use_dora=True, target_modules=["lin0", "conv1d"])
    theirs.save_pretrained(tmp_path / "theirs")
    ours = copy.deepcopy(theirs).unload()
    fused_lora.load_adapter(ours, tmp_path / "theirs")
    ids = torch.arange(6)[None]
    assert_close(ours(ids), theirs(ids), terms=1000)
    fused_lora.save_adapter(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(theirs).unload(), tmp_path / "ours")
    for name, parameter in theirs.named_parameters():
        assert torch.equal(parameter, dict(again.named_parameters())[name]), name
    store = fused_lora.AdapterStore(Net().eval(), capacity_bytes=1 << 20)
    for source in (str(tmp_path / "ours"), theirs):
        with pytest.raises(ValueError, match="use_dora=True"):
            store.load("dora", source)
    fused_lora.set_adapter(ours, "default")
    fused_lora.merge(ours)
    assert_close(ours(ids), theirs(ids), terms=1000)
    fused_lora.unmerge(ours)
    plain = fused_lora.unload(ours, merge_adapters=True)
    assert_close(plain(ids), theirs(ids), terms=1000)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_a_quantised_base(p):
    layer = fused_lora.LoraLinear(linear4bit(32, 64), use_dora=True, lora_dropout=p, init_lora_weights=False)
    dense = nn.Linear(64, 32).requires_grad_(False)
    dense.weight.data = torch.cat([block for _, _, block in base_of(layer.base_layer).blocks(layer.base_layer)])
    dense.bias.data = layer.base_layer.bias.detach().float() if layer.base_layer.bias is not None else torch.zeros(32)
    twin = fused_lora.LoraLinear(dense, use_dora=True, lora_dropout=p)
    twin.load_state_dict({n: t for n, t in layer.state_dict().items() if "lora_" in n}, strict=False)
    x = torch.randn(5, 64)
    torch.manual_seed(shifted(1))
    found = layer(x)
    torch.manual_seed(shifted(1))
    assert_close(found, twin(x), terms=1000)
    with pytest.raises(RuntimeError, match="DoRA of .'default'. cannot be merged into 4 bits"):
        layer.merge()


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="use_dora"):
        fused_lora.LoraConfig(target_modules=["lin0"], use_dora=True, lora_bias=True)
    layer = fused_lora.LoraLinear(nn.Linear(8, 8), adapter_name="a", init_lora_weights=False)
    layer.merge()
    with pytest.raises(RuntimeError, match="are merged: unmerge before DoRA is added"):
        layer.add_adapter("b", use_dora=True)
    layer.unmerge()
    with pytest.raises(ValueError, match="use_dora: expected False with lora_bias"):
        layer.add_adapter("b", use_dora=True, lora_bias=True)


def test_the_adapted_weight_is_never_whole():
    """Norms allocate less than a tenth of the weight."""
    N = K = 2048
    W, A, B = torch.randn(N, K), torch.randn(16, K), torch.randn(N, 16)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        op.row_norms(W, A, B, 1.0)
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert 0 < peak <= 0.1 * W.nbytes


@pytest.mark.parametrize(
    "adapter, autocast, wanted",
    [
        (torch.float32, False, torch.float32),
        (torch.bfloat16, False, torch.bfloat16),
        (torch.float32, True, torch.bfloat16),
    ],
)
def test_on_a_gpu_dropped_rows_meet_the_base_in_pefts_dtype(adapter, autocast, wanted, monkeypatch):
    """Rounded to a 16-bit base's they gave the magnitude a gradient a thousand times less exact than PEFT's."""
    monkeypatch.setattr(torch.Tensor, "is_cpu", False, raising=False)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        rows = variants._rows_to_drop(torch.ones(2, 3, dtype=torch.bfloat16), torch.ones(1, 3, dtype=adapter))
    assert rows.dtype is wanted


@pytest.mark.parametrize("autocast", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_columns_are_scaled_under_autocast_to_the_other_16_bit_dtype(dtype, autocast, monkeypatch):
    """On a GPU, whose autocast refuses addcmul of both dtypes; tensors without numbers have its rules."""
    with FakeTensorMode(), monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
        y, bias, scale = (torch.empty(4, device="cuda", dtype=own) for own in (autocast, dtype, torch.float32))
        with torch.autocast("cuda", autocast):
            assert op.scale_columns(y, scale, bias).dtype is torch.float32
