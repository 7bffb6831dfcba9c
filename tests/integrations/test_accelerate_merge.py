"""Merging an accelerated model through PEFT's methods: PEFT's rules and messages, one rounding, the same bits back."""

import copy
import pickle
import warnings

import peft
import pytest
import torch
from torch import nn

import fused_lora
from fused_lora.ops.merge import op as merging
from fused_lora.testing.numeric import assert_close, assert_no_worse
from helpers.accelerated import ALL, Net, SideBySide, quiet, wrap
from helpers.seeds import shifted
from helpers.versions import since

pytestmark = pytest.mark.numeric

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TWO = {"a": {}, "b": {"r": 3, "lora_alpha": 5}}


def pair(adapters=None, dtype=torch.float32, **fields):
    return SideBySide(wrap(Net(dtype).eval(), adapters, **fields))


def lora_layers(model):
    return {path: m for path, m in model.named_modules() if isinstance(m, peft.tuners.lora.Linear)}


def base_bits(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" not in n}


def assert_bits(model, bits):
    found = base_bits(model)
    assert found.keys() == bits.keys()
    assert all(torch.equal(found[name], value) for name, value in bits.items())


def assert_weights_no_worse(both):
    """Every base weight and bias of ours as close to the float64 model's as PEFT's."""
    for (name, mine), theirs, exact in zip(
        both.ours.named_parameters(), both.theirs.parameters(), both.exact.parameters(), strict=True
    ):
        assert mine.dtype == theirs.dtype
        assert_no_worse(mine.data, theirs.data, exact.data, name=name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merge_rounds_once_and_unmerge_restores_the_bits(dtype, safe_merge):
    both = pair(TWO, dtype)
    both.do(lambda m: m.base_model.set_adapter(["a", "b"]))
    bits = base_bits(both.ours)
    both.do(lambda m: m.merge_adapter(safe_merge=safe_merge))
    assert not torch.equal(both.ours.base_model.model.lin0.weight, bits["base_model.model.lin0.base_layer.weight"])
    assert_weights_no_worse(both)
    both.assert_same_results(ulps=2)
    both.do(lambda m: m.unmerge_adapter())
    assert_bits(both.ours, bits)
    both.do(lambda m: m.unmerge_adapter())  # warns
    assert_bits(both.ours, bits)


def test_many_merge_cycles_restore_the_bits_of_a_model():
    model = fused_lora.accelerate(wrap(Net(torch.bfloat16), TWO))
    bits = base_bits(model)
    for cycle in range(60):
        model.merge_adapter(["a"] if cycle % 2 else ["a", "b"], safe_merge=bool(cycle % 3))
        model.unmerge_adapter()
    assert_bits(model, bits)


@since("peft", "0.20")
def test_names_to_merge():
    both = pair({**TWO, "lin": {"target_modules": ["lin0"]}})
    bits = base_bits(both.ours)
    both.do(lambda m: m.merge_adapter(["b"]))
    both.do(lambda m: m.merge_adapter(["b"]))  # warns: nothing to do
    both.do(lambda m: m.merge_adapter(["lin", "a", "b"]))  # warns: additionally merging
    assert_weights_no_worse(both)
    both.assert_same_results(ulps=2)
    both.do(lambda m: m.merge_adapter("a"), raises=TypeError)
    both.do(lambda m: m.merge_adapter(["nobody"]))
    both.do(lambda m: m.unmerge_adapter())
    assert_bits(both.ours, bits)
    both.do(lambda m: m.merge_adapter([]))
    both.do(lambda m: m.merge_adapter(["a", "a"]))  # PEFT adds it twice
    assert_weights_no_worse(both)
    both.do(lambda m: m.unmerge_adapter())
    assert_bits(both.ours, bits)
    both.assert_same_results(ulps=2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_lora_bias_goes_into_the_bias(dtype):
    both = pair({"a": {}, "b": {"r": 2}}, dtype, lora_bias=True, target_modules=["lin0", "conv1d", "head"])
    bits = base_bits(both.ours)
    for name in ("a", "b"):
        both.do(lambda m, name=name: m.merge_adapter([name]))
        assert_weights_no_worse(both)
    both.assert_same_results(ulps=2)
    both.do(lambda m: m.unmerge_adapter())
    assert_bits(both.ours, bits)


@pytest.mark.parametrize("safe_merge", [False, True])
def test_lora_bias_without_a_base_bias(safe_merge):
    both = pair(lora_bias=True, target_modules=["lin1"])
    bits = base_bits(both.ours)
    both.do(lambda m: m.merge_adapter(safe_merge=safe_merge), raises=RuntimeError)
    assert_bits(both.ours, bits)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_safe_merge_refuses_what_is_not_finite(value):
    both = pair(TWO)
    bits = base_bits(both.ours)
    for model in both.models:
        model.base_model.model.conv1d.lora_A["b"].weight.data[0, 0] = value
    both.do(lambda m: m.merge_adapter(["a", "b"], safe_merge=True), raises=ValueError)
    assert both.ours.base_model.model.conv1d.merged_adapters == ["a"]  # as PEFT leaves it
    assert_weights_no_worse(both)
    both.do(lambda m: m.unmerge_adapter())
    assert_bits(both.ours, bits)
    both.do(lambda m: m.merge_adapter(["b"], safe_merge=True), raises=ValueError)
    both.do(lambda m: m.base_model.model.conv1d.merge(True, ["a"]))
    both.do(lambda m: m.unmerge_adapter())
    assert_bits(both.ours, bits)


@pytest.mark.parametrize("target", ["lin0", "conv1d", "emb"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_safe_merge_refuses_a_base_weight_that_is_not_finite(value, target):
    both = pair(TWO, target_modules=[target])
    for model in both.models:
        getattr(model.base_model.model, target).get_base_layer().weight.data[2, 1] = value
    both.do(lambda m: m.merge_adapter(safe_merge=True), raises=ValueError)
    both.do(lambda m: m.merge_adapter(["another"], safe_merge=True))
    both.do(lambda m: m.merge_adapter())
    both.do(lambda m: m.merge_adapter(["b"], safe_merge=True), raises=ValueError)
    both.do(lambda m: m.unmerge_adapter())


def test_an_unsafe_merge_of_a_broken_adapter_is_pefts():
    both = pair(TWO)
    for model in both.models:
        model.base_model.model.lin0.lora_B["b"].weight.data[3] = float("nan")
    both.do(lambda m: m.merge_adapter(["a"]))
    both.do(lambda m: m.merge_adapter(["b"]))
    for name in ("lin0", "lin1"):
        mine, other = (getattr(m.base_model.model, name).weight for m in both.models[:2])
        assert_close(mine, other, terms=16)
    assert both.ours.base_model.model.lin0.weight.isnan().any()
    both.do(lambda m: m.unmerge_adapter())


@since("peft", "0.21")
def test_switching_and_deleting_while_merged():
    both = pair(TWO)
    bits = base_bits(both.ours)
    both.do(lambda m: m.merge_adapter())
    both.do(lambda m: m.delete_adapter("a"), raises=ValueError)
    both.do(lambda m: m.delete_adapter("b"))
    both.do(lambda m: m.add_adapter("c", peft.LoraConfig(target_modules=ALL, init_lora_weights=False)))
    both.assert_same_results(ulps=2)
    both.do(lambda m: m.set_adapter("c"))  # warns and unmerges
    assert_bits(both.ours, bits)
    both.assert_same_results(ulps=2)


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("names", [None, ["b"], ["a", "b"]])
def test_merge_and_unload(names, safe_merge, dtype):
    both = pair(TWO, dtype)
    both.do(lambda m: m.merge_and_unload(safe_merge=safe_merge, adapter_names=names))
    assert type(both.ours) is Net and type(both.ours.lin0) is nn.Linear
    assert_weights_no_worse(both)
    both.assert_same_results(ulps=2)


def test_unload():
    both = pair(TWO)
    bits = base_bits(both.ours)
    both.do(lambda m: m.unload())
    assert type(both.ours) is Net
    assert [v.tolist() for v in base_bits(both.ours).values()] == [v.tolist() for v in bits.values()]
    both.assert_same_results(ulps=2)


@pytest.mark.parametrize("combination_type", ["linear", "cat", "svd", "ties", "dare_linear", "magnitude_prune"])
def test_add_weighted_adapter(combination_type):
    both = pair({"a": {}, "b": {}})
    options = {} if combination_type in ("linear", "cat", "svd") else {"density": 0.5}

    def add(m):
        m.add_weighted_adapter(["a", "b"], [0.7, -0.4], "c", combination_type=combination_type, **options)
        m.set_adapter("c")

    with quiet():
        for model in both.models:
            torch.manual_seed(shifted(0))
            add(model)
    both.assert_same_state()
    both.assert_same_results(ulps=2)
    both.do(lambda m: m.merge_adapter())
    assert_weights_no_worse(both)


def test_delta_weights_are_pefts_to_the_bit():
    for dtype in DTYPES:
        both = pair(TWO, dtype)
        for mine, theirs in zip(lora_layers(both.ours).values(), lora_layers(both.theirs).values(), strict=True):
            for name in TWO:
                assert torch.equal(mine.get_delta_weight(name), theirs.get_delta_weight(name))


# ---- what PEFT's subtraction gets wrong


@pytest.mark.parametrize(
    "meanwhile",
    [
        lambda m: [p.data.normal_() for n, p in m.named_parameters() if "lora_" in n],
        lambda m: [layer.scale_layer(3) for layer in lora_layers(m).values()],
        lambda m: [layer.delete_adapter("default") for layer in lora_layers(m).values()],
    ],
    ids=["training", "scale", "layerwise-delete"],
)
def test_adapters_changed_while_merged_do_not_damage_the_base(meanwhile):
    model = fused_lora.accelerate(wrap(Net(torch.bfloat16)))
    bits = base_bits(model)
    model.merge_adapter()
    with quiet():
        meanwhile(model)
    model.unmerge_adapter()
    assert_bits(model, bits)


def test_a_weight_changed_while_merged_is_unmerged_by_subtraction():
    both = pair()
    for model in both.models:
        model.merge_adapter()
        model.base_model.model.lin0.weight.data *= 2
    with pytest.warns(UserWarning, match="PEFT's unmerge subtracts"):
        both.ours.unmerge_adapter()
    both.theirs.unmerge_adapter()
    both.exact.unmerge_adapter()
    for mine, exact in zip(both.ours.parameters(), both.exact.parameters(), strict=True):
        assert_close(mine, exact, terms=16)  # both round twice, and the first error is doubled
    both.do(lambda m: m.merge_adapter())
    both.do(lambda m: m.unmerge_adapter())


def test_an_unmerge_without_memory_subtracts_nothing(monkeypatch):
    """The weight is as it was, and a second try gives the bits back."""
    model = fused_lora.accelerate(wrap(Net(torch.bfloat16)))
    bits = base_bits(model)
    model.merge_adapter()

    def no_memory(*args):
        raise torch.OutOfMemoryError("no memory for the launch")

    with monkeypatch.context() as patch:
        patch.setattr(merging, "unmerge_", no_memory)
        with pytest.raises(torch.OutOfMemoryError):
            model.unmerge_adapter()
    model.unmerge_adapter()
    assert_bits(model, bits)


def test_a_model_cast_while_merged():
    both = pair()
    both.do(lambda m: m.merge_adapter())
    for model in both.models[:2]:
        model.to(torch.bfloat16)
    with pytest.warns(UserWarning, match="subtracts"):
        both.ours.unmerge_adapter()
    both.theirs.unmerge_adapter()
    for mine, theirs in zip(both.ours.parameters(), both.theirs.parameters(), strict=True):
        assert_close(mine, theirs, terms=16)  # both round twice: no bits to be had


def test_an_engine_that_restores_the_base_itself():
    """As verl does: layer by layer, weights copied back, a new list of merged adapters. Our layers merge again."""
    both = pair(TWO, torch.bfloat16)
    bits = base_bits(both.ours)

    def sync(model):
        held = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" not in n}
        for layer in lora_layers(model).values():
            layer.merge()
        merged = base_bits(model)
        for name, parameter in model.named_parameters():
            if name in held:
                parameter.data.copy_(held[name])
        for layer in lora_layers(model).values():
            layer.merged_adapters = []
        return merged

    sent = sync(both.ours)
    assert not all(torch.equal(sent[name], value) for name, value in bits.items())
    for _ in range(3):
        again = sync(both.ours)
        assert all(torch.equal(again[name], value) for name, value in sent.items())
        assert_bits(both.ours, bits)
        both.assert_same_results(ulps=2)


def test_a_list_of_merged_adapters_emptied_by_hand():
    both = pair()
    both.do(lambda m: m.merge_adapter())
    both.do(lambda m: [layer.merged_adapters.clear() for layer in lora_layers(m).values()] and None)
    bits = base_bits(both.ours)
    both.do(lambda m: m.unmerge_adapter())  # warns, does nothing
    both.do(lambda m: m.merge_adapter())
    assert_weights_no_worse(both)
    both.do(lambda m: m.unmerge_adapter())
    assert_bits(both.ours, bits)


def test_layers_that_share_one_weight():
    net = Net().eval()
    net.lin1 = nn.Linear(40, 24, bias=False)
    net.tied = nn.Linear(40, 24, bias=False)
    net.tied.weight = net.lin1.weight
    both = SideBySide(wrap(net, target_modules=["lin1", "tied"]))
    for model in both.models:
        model.merge_adapter()
    assert both.ours.base_model.model.lin1.weight is both.ours.base_model.model.tied.weight
    assert_weights_no_worse(both)
    for model in both.models:
        with quiet():
            model.unmerge_adapter()
    assert_close(both.ours.base_model.model.lin1.weight, both.theirs.base_model.model.lin1.weight, terms=16)


# ---- copies, pickles, restore


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_copy_of_a_merged_model_unmerges_to_the_same_bits(copied):
    model = fused_lora.accelerate(wrap(Net(torch.bfloat16)))
    bits = base_bits(model)
    model.merge_adapter()
    other = copied(model)
    model.unmerge_adapter()
    other.unmerge_adapter()
    assert_bits(model, bits)
    assert_bits(other, bits)


def test_restore_while_merged_leaves_the_unmerge_to_peft():
    both = pair()
    both.do(lambda m: m.merge_adapter())
    fused_lora.restore(both.ours)
    both.assert_same_results(ulps=2)
    both.do(lambda m: m.unmerge_adapter())
    for mine, theirs in zip(both.ours.parameters(), both.theirs.parameters(), strict=True):
        assert_close(mine, theirs, terms=16)
    assert not any("merge_state" in vars(m) for m in both.ours.modules())


def test_accelerate_while_merged_leaves_the_unmerge_to_peft():
    theirs = wrap(Net().eval(), TWO)
    theirs.merge_adapter()
    both = SideBySide(theirs)
    both.do(lambda m: m.merge_adapter(["b"]))
    both.assert_same_results(ulps=2)
    both.do(lambda m: m.unmerge_adapter())
    assert_weights_no_worse(both)
    bits = base_bits(both.ours)
    both.do(lambda m: m.merge_adapter())
    both.do(lambda m: m.unmerge_adapter())
    assert_bits(both.ours, bits)


def test_no_warning_of_ours_where_peft_has_none():
    model = fused_lora.accelerate(wrap(Net(), TWO))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.merge_adapter()
        model.unmerge_adapter()
        model.base_model.set_adapter(["a", "b"])
        model.merge_adapter(safe_merge=True)
        model.unmerge_adapter()


# ---- what has no exact merge is PEFT's


def tiny(lora_bias=False):
    """A PEFT model of one layer [24, 16] and its accelerated copy."""
    with quiet():
        theirs = wrap(nn.Sequential(nn.Linear(16, 24)), target_modules=["0"], lora_bias=lora_bias)
    return fused_lora.accelerate(copy.deepcopy(theirs)), theirs


def set_weight(part):
    def change(make):
        return lambda layer: setattr(part(layer), "weight", nn.Parameter(make(part(layer).weight.data), False))

    return change


set_base, set_A, set_B = (
    set_weight(part)
    for part in (lambda l: l.base_layer, lambda l: l.lora_A["default"], lambda l: l.lora_B["default"])  # noqa: E741
)


class NoBias(nn.Module):
    """A base layer of its own kind, without an attribute ``bias``."""

    def __init__(self, old):
        super().__init__()
        self.weight = old.weight

    def forward(self, x):
        return x @ self.weight.t()


def bias_as_a_buffer(layer):
    bias = layer.base_layer.bias.data
    del layer.base_layer.bias
    layer.base_layer.register_buffer("bias", bias)


def bias_of_B(layer, base_bias=True):
    layer.lora_B["default"].bias = nn.Parameter(torch.ones(16))
    layer.base_layer.bias = layer.base_layer.bias if base_bias else None


ODD = {
    "sparse A": (set_A(lambda w: w.to_sparse()), {}),
    "sparse base": (set_base(lambda w: w.to_sparse_csr()), {}),
    "one row of B": (set_B(lambda w: w[:1]), {}),
    "one column of A": (set_A(lambda w: w[:, :1]), {}),
    "expanded base": (set_base(lambda w: w[:1].expand(24, 16)), {}),
    "expanded base, safe": (set_base(lambda w: w[:1].expand(24, 16)), {"safe_merge": True}),
    "overlapping base, safe": (set_base(lambda w: w.reshape(-1).as_strided((24, 16), (2, 3))), {"safe_merge": True}),
    "a number for each column": (lambda layer: layer.scaling.update(default=torch.arange(16.0)), {"safe_merge": True}),
    "a complex scaling": (lambda layer: layer.scaling.update(default=1j), {}),
    "no attribute bias": (lambda layer: setattr(layer, "base_layer", NoBias(layer.base_layer)), {}),
    "a bias that is a buffer": (bias_as_a_buffer, {}),
    "a bias of one number, safe": (
        lambda layer: setattr(layer.base_layer, "bias", nn.Parameter(torch.ones(1))),
        {"safe_merge": True},
    ),
    "an iterator of names": (lambda layer: None, {"adapter_names": ["default"]}),
    "a bias that lora_B got later": (bias_of_B, {}),
    "a bias that lora_B got later, and none below": (lambda layer: bias_of_B(layer, False), {}),
    "a bias that lora_B lost": (lambda layer: setattr(layer.lora_B["default"], "bias", None), {}),
}


def copy_of_bias(layer):
    bias = getattr(layer.base_layer, "bias", None)
    return None if bias is None else bias.detach().clone()


@pytest.mark.parametrize("lora_bias", [False, True])
@pytest.mark.parametrize("change, arguments", ODD.values(), ids=ODD)
def test_what_has_no_exact_merge_is_merged_by_peft(change, arguments, lora_bias):
    outcomes = []
    for model in tiny(lora_bias):
        layer = model.base_model.model[0]
        change(layer)
        given = {key: iter(value) if key == "adapter_names" else value for key, value in arguments.items()}
        try:
            layer.merge(**given)
            merged = layer.base_layer.weight.data.clone(), list(layer.merged_adapters), copy_of_bias(layer)
            layer.unmerge()
            outcomes.append([*merged, layer.base_layer.weight.data, copy_of_bias(layer)])
        except (RuntimeError, TypeError) as error:
            outcomes.append((type(error), str(error)))
    mine, other = outcomes
    if isinstance(other, tuple):
        assert mine == other
    else:
        assert mine[1] == other[1]
        # the same numbers up to a rounding, for PEFT has two where we have one
        for ours, theirs in zip(mine[:1] + mine[2:], other[:1] + other[2:], strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                assert_close(ours, theirs, terms=16)


@pytest.mark.parametrize("shape", [(8, 8), (256, 256), (600, 600)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inside", [False, True])
def test_a_base_made_in_inference_mode_is_merged_exactly(inside, dtype, shape):
    with torch.inference_mode():
        base = nn.Sequential(nn.Linear(*shape)).to(dtype)
    both = SideBySide(wrap(base, target_modules=["0"]))
    bits = base_bits(both.ours)
    with torch.inference_mode(inside):
        both.do(lambda m: m.merge_adapter())
        assert both.ours.base_model.model[0].merge_state is not None
        assert_weights_no_worse(both)
        both.do(lambda m: m.unmerge_adapter())
    assert_bits(both.ours, bits)


def test_merging_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    for model in tiny():
        with FakeTensorMode(allow_non_fake_inputs=True):
            model.merge_adapter()
            assert model.base_model.model[0].merged_adapters == ["default"]
