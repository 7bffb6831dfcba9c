"""PEFT's own features on an accelerated model, step by step beside the same model in PEFT's hands."""

import peft.helpers
import pytest
import torch
from torch import nn

import fused_lora
from fused_lora.integrations.peft_linear import AcceleratedLinear
from fused_lora.testing.numeric import assert_close
from helpers.accelerated import ALL, Net, SideBySide, quiet, wrap
from helpers.thorough import pairwise
from helpers.versions import since

DTYPES = [torch.float32, torch.bfloat16]
TWO = {"a": {}, "b": {"r": 3, "lora_alpha": 5}}


def pair(adapters=None, dtype=torch.float32, training=False, **fields):
    return SideBySide(wrap(Net(dtype), adapters, **fields).train(training))


def config(**fields):
    return peft.LoraConfig(target_modules=ALL, r=2, init_lora_weights=False, **fields)


def lora_layers(model):
    return [m for m in model.modules() if isinstance(m, peft.tuners.lora.Linear)]


# ---- the plain layer in all its settings


@pairwise(
    fields=[
        {},
        {"use_rslora": True},
        {"lora_bias": True, "target_modules": ["lin0", "conv1d", "head"]},
        {"rank_pattern": {"lin1": 7, "head": 1}, "alpha_pattern": {"^lin0": 3}},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"target_modules": "all-linear"},
        {"target_modules": r"lin\d"},
        {"target_modules": ["lin0", "emb"]},
        {"modules_to_save": ["head"], "target_modules": ["lin0", "lin1", "conv1d"]},
        {"exclude_modules": ["lin1"]},
    ],
    training=[False, True],
    dtype=DTYPES,
)
def test_one_adapter(fields, training, dtype):
    both = pair(dtype=dtype, training=training, **fields)
    both.assert_same_results()
    assert any(row.fused for row in fused_lora.integrations.peft.layer_report(both.ours))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_in_the_dtype_of_the_base(dtype):
    with quiet():
        theirs = peft.get_peft_model(Net(dtype), config(), autocast_adapter_dtype=False)
    both = SideBySide(theirs)
    assert {p.dtype for p in both.ours.parameters()} == {dtype}
    both.assert_same_results()


def test_float64_stays_float64():
    both = pair(dtype=torch.float64, lora_bias=True, target_modules=["lin0", "head"])
    ids = torch.arange(6).reshape(2, 3)
    for step in (lambda m: m.train(), lambda m: m.merge_adapter(), lambda m: m.unmerge_adapter()):
        both.do(lambda m, step=step: step(m))
        assert_close(both.ours(ids), both.theirs(ids), terms=1000)


def test_train_and_eval():
    both = pair(lora_dropout=0.5)
    both.do(lambda m: m.train())
    y = [both.ours(torch.zeros(1, 3, dtype=torch.long)) for _ in range(2)]
    assert not torch.equal(*y)
    both.do(lambda m: m.eval())
    both.assert_same_results()


def test_dropout_of_one_and_of_zero():
    for p in (0.0, 1.0):
        both = pair(lora_dropout=p, training=True)
        both.assert_same_results()


# ---- several adapters


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_active_adapters(dtype):
    both = pair(TWO, dtype)
    both.do(lambda m: m.base_model.set_adapter(["b", "a"]))
    both.assert_same_results()


def test_set_adapter():
    both = pair(TWO)
    for names in ("b", "a", ["a", "b"], []):
        both.do(lambda m, names=names: m.base_model.set_adapter(names))
        both.assert_same_results()
    both.do(lambda m: m.set_adapter("nobody"), raises=ValueError)


def test_an_adapter_that_some_layers_lack():
    both = pair({"a": {"target_modules": ["lin0", "head"]}, "b": {"target_modules": ["lin0", "lin1"]}})
    for names in (["a"], ["b"], ["a", "b"]):
        both.do(lambda m, names=names: m.base_model.set_adapter(names))
        both.assert_same_results()


def test_layers_that_a_second_adapter_adds_are_accelerated_too():
    both = pair(target_modules=["lin0"])
    both.do(lambda m: m.add_adapter("b", config()))
    both.do(lambda m: m.set_adapter("b"))
    both.assert_same_results()
    assert len(lora_layers(both.ours)) == 4
    assert all(row.fused for row in fused_lora.integrations.peft.layer_report(both.ours))


@since("peft", "0.21")
def test_adding_and_deleting_adapters():
    both = pair(TWO)
    both.do(lambda m: m.add_adapter("c", config(lora_dropout=0.1)))
    both.do(lambda m: m.add_adapter("c", config()), raises=ValueError)
    both.do(lambda m: m.delete_adapter("a"))  # the active one: another takes over, with a warning
    both.assert_same_results()
    both.do(lambda m: m.delete_adapter("nobody"), raises=ValueError)
    both.do(lambda m: m.delete_adapter("b"))
    both.assert_same_results()
    both.do(lambda m: m.base_model.delete_adapter("c"))  # the last one
    both.do(lambda m: m.base_model.model(torch.zeros(2, 3, dtype=torch.long)))


def test_scales():
    both = pair(TWO)
    both.do(lambda m: m.base_model.set_adapter(["a", "b"]))
    for step in (
        lambda layer: layer.set_scale("a", 0.5),
        lambda layer: layer.scale_layer(3.0),
        lambda layer: layer.unscale_layer(2),
        lambda layer: layer.unscale_layer(),
    ):
        both.do(lambda m, step=step: [step(layer) for layer in lora_layers(m)] and None)
        both.assert_same_results()

    def scaled(m):
        with peft.helpers.rescale_adapter_scale(m, 0.0):
            return y.append(m(ids))

    y, ids = [], torch.arange(6).reshape(2, 3)
    both.do(scaled)
    assert torch.equal(y[0], y[1])


def test_disable_adapter():
    both = pair(TWO)

    def base(m):
        with m.disable_adapter():
            y.append(m(ids))

    y, ids = [], torch.arange(6).reshape(2, 3)
    both.do(base)
    assert torch.equal(y[0], y[1])
    both.assert_same_results()
    both.do(lambda m: m.merge_adapter())
    both.do(base)  # unmerges
    both.assert_same_results()
    both.do(lambda m: m.base_model.disable_adapter_layers())
    both.assert_same_results()
    both.do(lambda m: m.base_model.enable_adapter_layers())
    both.assert_same_results()


def test_requires_grad():
    both = pair(TWO)
    both.do(lambda m: m.set_requires_grad("a", False))
    both.assert_same_results()
    both.do(lambda m: m.set_requires_grad(["a", "b"]))
    both.assert_same_results()
    both.do(lambda m: m.base_model.set_adapter(["a", "b"], inference_mode=True))
    both.assert_same_results()
    both.do(lambda m: [p.requires_grad_(True) for p in m.parameters()] and None)
    both.assert_same_results()  # a base that is trained as well


# ---- mixed batches


@pytest.mark.parametrize(
    "names",
    [["a", "b", "__base__", "a"], ["a"] * 4, ["b"] * 4, ["__base__"] * 4, ["__base__", "b", "b", "b"]],
    ids="-".join,
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_mixed_batches(names, dtype):
    both = pair(TWO, dtype)
    both.assert_same_results(adapter_names=names)


def test_a_batch_of_one_adapter_runs_fused():
    model = fused_lora.accelerate(wrap(Net(), {"a": {}, "b": {"target_modules": ["lin0"]}}).eval())
    report = fused_lora.integrations.peft.install()
    try:
        model(torch.zeros(2, 3, dtype=torch.long), adapter_names=["b", "b"])
        assert report() == {"fused": 1, "around": {"a batch of several adapters": 3}, "fallback": {}}
    finally:
        fused_lora.integrations.peft.uninstall()


def test_errors_of_mixed_batches():
    both, ids = pair(TWO), torch.zeros(2, 3, dtype=torch.long)
    both.do(lambda m: m(ids, adapter_names=["a"]), raises=ValueError)
    for module in both.models:  # PEFT leaves its hooks behind when a call fails
        for m in module.modules():
            m._forward_pre_hooks.clear()
    both.do(lambda m: m(ids, adapter_names=["a", "nobody"]), raises=ValueError)
    both.do(lambda m: m.train())
    both.do(lambda m: m(ids, adapter_names=["a", "b"]), raises=ValueError)
    both.do(lambda m: m.eval())
    both.do(lambda m: m.merge_adapter())
    both.do(lambda m: m(ids, adapter_names=["a", "b"]), raises=ValueError)


def test_mixed_batches_of_dora_are_refused():
    both = pair({"a": {"use_dora": True}, "b": {}})
    both.do(lambda m: m(torch.zeros(2, 3, dtype=torch.long), adapter_names=["a", "b"]), raises=ValueError)


# ---- what stays in PEFT's hands, per layer


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, 8, 8) * 0.1)

    def forward(self, x):
        return x @ self.experts.sum(0)


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.conv = nn.Embedding(20, 8), nn.Conv1d(8, 8, 3, padding=1)
        self.lin, self.attn = nn.Linear(8, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.moe = Experts()

    def forward(self, ids):
        hidden = self.conv(self.emb(ids).transpose(1, 2)).transpose(1, 2)
        hidden = hidden + self.attn(hidden, hidden, hidden)[0]
        return self.moe(self.lin(hidden))


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["emb", "lin"]},
        {"target_modules": ["conv", "lin"]},
        {"target_modules": ["attn", "lin"]},
        pytest.param({"target_modules": ["lin"], "target_parameters": ["moe.experts"]}, marks=since("peft", "0.19")),
        {"target_modules": ["lin"], "trainable_token_indices": {"emb": [1, 2]}},
    ],
    ids=lambda f: "-".join(str(v) for v in f.values()),
)
def test_other_layers_stay_with_peft(fields):
    both = SideBySide(wrap(Convolutions().eval(), r=2, **fields))
    both.assert_same_results()
    rows = {row.path.rpartition(".")[2]: row for row in fused_lora.integrations.peft.layer_report(both.ours)}
    assert rows.pop("lin").fused and [name for name in rows if rows[name].why_not is None and name != "emb"] == []
    both.do(lambda m: m.merge_adapter())
    both.assert_same_results(ulps=2)
    both.do(lambda m: m.unmerge_adapter())
    both.do(lambda m: m.merge_and_unload())


@since("peft", "0.20")
@pytest.mark.parametrize(
    "fields, variant",
    [({"init_lora_weights": "mica"}, "MiCALinearVariant")],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_variants_stay_with_peft(fields, variant):
    both = SideBySide(wrap(Net().eval(), {"v": {**fields, "target_modules": ["lin0", "lin1"]}, "plain": {}}))
    both.assert_same_results()
    rows = fused_lora.integrations.peft.layer_report(both.ours)
    assert {row.why_not for row in rows} == {variant, "no active adapter in this layer"}
    both.do(lambda m: m.base_model.set_adapter(["plain"]))
    both.assert_same_results()
    assert all(row.fused for row in fused_lora.integrations.peft.layer_report(both.ours))


class _Packed(nn.Linear):
    """Stands for a quantised linear: int8 weight, its own arithmetic."""

    def __init__(self):
        super().__init__(24, 40)
        self.weight = nn.Parameter(torch.randint(-9, 9, (40, 24), dtype=torch.int8), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) / 50, self.bias)


def test_a_quantised_base_keeps_its_own_arithmetic():
    net = Net().eval()
    net.lin0 = _Packed()
    both = SideBySide(wrap(net))
    both.assert_same_results()
    rows = {row.path.rpartition(".")[2]: str(row) for row in fused_lora.integrations.peft.layer_report(both.ours)}
    packed = "fused around the base: the base layer is a _Packed"
    assert rows == {"lin0": packed, "lin1": "fused", "conv1d": "fused", "head": "fused"}


def test_forwards_set_on_an_instance_are_kept():
    both = pair()
    for model in both.models:
        layer = model.base_model.model.lin0
        layer.forward = lambda x, layer=layer: layer.base_layer(x) * 2
    both.assert_same_results()


def test_the_class_goes_by_pefts_name():
    model, plain = (wrap(Net(), target_modules=["lin0", "conv1d", "emb"]) for _ in range(2))
    fused_lora.accelerate(model)
    for a, b in zip(model.modules(), plain.modules(), strict=True):
        assert str(type(a)) == str(type(b)) and isinstance(a, type(b))
        assert isinstance(a, AcceleratedLinear) is hasattr(b, "base_layer")
