"""One LoRA layer beside PEFT's: draws, outputs, gradients, dropout, state, merging, hooks, compile, autocast."""

import copy
import math
import warnings

import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import fused_lora
from fused_lora import LoraLinear
from fused_lora.modules.config import LayerTensors
from fused_lora.ops.linear.op import draw_seeds
from fused_lora.reference import dropout_threshold
from fused_lora.testing.numeric import DRAWS, assert_close, assert_no_worse
from helpers.seeds import shifted
from helpers.thorough import pairwise
from helpers.twins import ExportedDropout, run_layer, share_dropout, twin_layers

pytestmark = pytest.mark.numeric

DTYPES = [torch.float32, torch.bfloat16]
K, N = 24, 17


def linear(dtype=torch.float32, bias=True, training=True, K=K, N=N):
    return nn.Linear(K, N, bias=bias).to(dtype).train(training)


def conv1d(dtype=torch.float32, training=True):
    base = Conv1D(N, K)
    base.bias.data.normal_()
    return base.to(dtype).train(training)


def double(theirs):
    return copy.deepcopy(theirs).double()


def assert_like_peft(ours, theirs, x, names=("default",), seed=None):
    """Outputs and gradients as exact as PEFT's. One draw alone is luck."""
    results = ({}, {}, {})
    for draw in range(DRAWS):
        x = torch.randn(x.shape).to(x.dtype) if draw else x
        g = torch.randn(*x.shape[:-1], ours.out_features).to(x.dtype)
        layers = ((ours, x, g), (theirs, x, g), (double(theirs), x.double(), g.double()))
        for result, arguments in zip(results, layers, strict=True):
            with torch.random.fork_rng():
                if seed is not None:
                    torch.manual_seed(shifted(seed))
                for key, tensor in run_layer(*arguments, names).items():
                    result.setdefault(key, []).append(tensor)
    found, reference, exact = ({k: torch.stack(v) for k, v in result.items()} for result in results)
    assert found.keys() == reference.keys()
    for key in found:
        assert found[key].dtype == reference[key].dtype, key
        assert_no_worse(found[key], reference[key], exact[key], name=key, draws=True)


# ---- draws and keys


@pytest.mark.parametrize("dtype", DTYPES + [torch.float16])
@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal"])
@pytest.mark.parametrize("lora_bias", [False, True])
def test_same_seed_same_bits_as_peft(init, dtype, lora_bias):
    if init in ("gaussian", "orthogonal") and lora_bias:
        pytest.skip("PEFT refuses the combination")
    base = linear(dtype)
    holder = nn.Sequential()
    holder.add_module("lin", copy.deepcopy(base))
    torch.manual_seed(shifted(5))
    config = peft.LoraConfig(r=6, target_modules=["lin"], init_lora_weights=init, lora_bias=lora_bias)
    theirs = peft.get_peft_model(holder, config).base_model.model.lin
    after = torch.rand(3)
    torch.manual_seed(shifted(5))
    ours = LoraLinear(base, r=6, init_lora_weights=init, lora_bias=lora_bias)
    assert torch.equal(torch.rand(3), after)  # as many draws, too
    mine, other = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(other)
    for key in mine:
        assert mine[key].dtype == other[key].dtype and torch.equal(mine[key], other[key]), key
    if dtype != torch.float32:
        A = ours.lora_A["default"].weight
        assert A.dtype == torch.float32 and torch.equal(A, A.to(dtype).float())


def test_adapters_in_the_dtype_of_the_base_on_request():
    ours = LoraLinear(linear(torch.bfloat16), autocast_adapter_dtype=False)
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}


def test_state_dicts_load_into_each_other_strictly():
    ours, theirs = twin_layers(linear(), {"a": {}, "b": {"r": 3}}, lora_bias=True)
    fresh, other = twin_layers(linear(), {"a": {}, "b": {"r": 3}}, lora_bias=True)
    assert set(ours.state_dict()) == set(theirs.state_dict())
    fresh.load_state_dict(theirs.state_dict(), strict=True)
    other.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(5, K)
    assert torch.equal(fresh(x), ours(x)) and torch.equal(other(x), theirs(x))


@pytest.mark.parametrize(
    "arguments, error",
    [
        ({"r": 0}, ValueError),
        ({"r": -1}, ValueError),
        ({"r": 2.0}, TypeError),
        ({"r": True}, TypeError),
        ({"r": 10**12}, ValueError),
        ({"lora_alpha": float("nan")}, ValueError),
        ({"lora_alpha": 10**400}, ValueError),
        ({"lora_alpha": "8"}, TypeError),
        ({"lora_dropout": None}, TypeError),
        ({"lora_dropout": float("nan")}, ValueError),
        ({"lora_dropout": 1.5}, ValueError),
        ({"lora_dropout": -0.1}, ValueError),
        ({"adapter_name": 5}, TypeError),
        ({"adapter_name": "a.b"}, ValueError),
        ({"adapter_name": ""}, ValueError),
        ({"adapter_name": "train"}, ValueError),  # methods of the ModuleDict that holds the adapters
        ({"adapter_name": "keys"}, ValueError),
        ({"adapter_name": "__base__"}, ValueError),  # what a mixed batch calls the plain base
        ({"init_lora_weights": "pissa"}, ValueError),
        ({"init_lora_weights": "eva"}, ValueError),
        ({"init_lora_weights": "orthogonal", "r": 3}, ValueError),
        ({"use_rslora": "no"}, TypeError),
        ({"lora_bias": "no"}, TypeError),
        ({"autocast_adapter_dtype": None}, TypeError),
        ({"tensors": (torch.ones(8, 24), torch.ones(40, 8))}, TypeError),
        ({"tensors": LayerTensors(torch.ones(8, 1), torch.ones(1, 8))}, ValueError),
        ({"tensors": LayerTensors(torch.ones(8, K).int(), torch.ones(N, 8).int())}, TypeError),
    ],
)
def test_bad_arguments_are_named_and_leave_the_base_alone(arguments, error):
    base = linear()
    with pytest.raises(error, match=next(iter(arguments))):
        LoraLinear(base, **arguments)
    assert all(p.requires_grad for p in base.parameters())


def test_unsupported_bases_are_refused():
    for module in (nn.Conv1d(3, 4, 1), nn.Embedding(3, 4), nn.Identity(), LoraLinear(linear())):
        with pytest.raises(TypeError, match="base_layer"):
            LoraLinear(module)


# ---- forward and gradients


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(K,), (1, K), (7, K), (2, 3, K), (2, 2, 3, K), (0, K), (2, 0, K)])
def test_any_shape_of_x(shape, training, dtype):
    ours, theirs = twin_layers(linear(dtype, training=training), r=4, lora_alpha=8)
    assert ours.training == theirs.training == training
    assert_like_peft(ours, theirs, torch.randn(shape).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["transposed", "strided", "expanded", "sliced"])
def test_non_contiguous_x(kind, dtype):
    ours, theirs = twin_layers(linear(dtype), r=4)
    x = {
        "transposed": torch.randn(K, 9).to(dtype).t(),
        "strided": torch.randn(9, 2 * K).to(dtype)[:, ::2],
        "expanded": torch.randn(1, K).to(dtype).expand(9, K),
        "sliced": torch.randn(3, 5, K).to(dtype)[:, 1:4],
    }[kind]
    assert not x.is_contiguous()
    assert_like_peft(ours, theirs, x)
    assert_close(ours(x), ours(x.contiguous()), terms=64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M, K, N, r", [(1, 1, 1, 1), (17, 129, 1, 3), (129, 17, 100, 24), (5, 1000, 33, 100)])
@pytest.mark.parametrize("bias", [True, False])
def test_awkward_sizes(M, K, N, r, bias, dtype):
    ours, theirs = twin_layers(linear(dtype, bias, K=K, N=N), r=r, lora_alpha=r + 1)
    assert_like_peft(ours, theirs, torch.randn(M, K).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [linear, conv1d])
@pytest.mark.parametrize("fields", [{"use_rslora": True}, {"lora_bias": True}, {"init_lora_weights": "gaussian"}])
def test_variants_of_the_config(fields, make, dtype):
    ours, theirs = twin_layers(make(dtype), r=5, lora_alpha=7, **fields)
    assert ours.scaling == theirs.scaling and ours.fan_in_fan_out == theirs.fan_in_fan_out
    assert_like_peft(ours, theirs, torch.randn(6, K).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_active_adapters(dtype):
    adapters = {"a": {"r": 3}, "b": {"r": 8, "lora_alpha": 3}, "c": {"r": 1, "lora_bias": True}}
    ours, theirs = twin_layers(linear(dtype), adapters, active=["c", "missing", "a"])
    assert_like_peft(ours, theirs, torch.randn(6, K).to(dtype), names=("c", "a"))


def test_adapters_in_bf16_beside_adapters_in_fp32():
    ours, theirs = twin_layers(linear(torch.bfloat16), {"a": {}, "b": {}}, active=["a", "b"])
    for layer in (ours, theirs):
        for part in (layer.lora_A, layer.lora_B):
            part["a"].to(torch.bfloat16)
    assert_like_peft(ours, theirs, torch.randn(6, K).bfloat16(), names=("a", "b"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_unfrozen_base_gets_its_gradients(dtype):
    ours, theirs = twin_layers(linear(dtype), r=4)
    x, g = torch.randn(DRAWS, 9, K).to(dtype), torch.randn(DRAWS, 9, N).to(dtype)
    grads = []
    for layer, convert in ((ours, dtype), (theirs, dtype), (double(theirs), torch.float64)):
        layer.base_layer.requires_grad_(True)
        parameters = [layer.base_layer.weight, layer.base_layer.bias, layer.lora_A["default"].weight]
        draws = [
            torch.autograd.grad(layer(a.to(convert)), parameters, b.to(convert)) for a, b in zip(x, g, strict=True)
        ]
        grads.append([torch.stack(tensors) for tensors in zip(*draws, strict=True)])
    for mine, other, exact in zip(*grads, strict=True):
        assert mine.dtype == other.dtype
        assert_no_worse(mine, other, exact, draws=True)


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B", "x"])
def test_gradients_of_what_is_left_when_a_part_is_frozen(frozen):
    ours, theirs = twin_layers(linear(), r=4, lora_dropout=0.5)
    share_dropout(theirs, ["default"], 0.5, seed=3)
    x, grads = torch.randn(9, K), []
    for layer in (ours, theirs):
        torch.manual_seed(shifted(3))
        inputs = {"lora_A": layer.lora_A["default"].weight, "lora_B": layer.lora_B["default"].weight}
        inputs["x"] = x.clone().requires_grad_()
        inputs.pop(frozen).requires_grad_(False)
        y = layer(inputs.get("x", x))
        grads.append(torch.autograd.grad(y.square().sum(), list(inputs.values())))
    for mine, other in zip(*grads, strict=True):
        assert_close(mine, other, terms=64)


def test_wrong_inputs_are_refused():
    ours, _ = twin_layers(linear())
    for x in (torch.randn(3, K + 1), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="x: expected"):
            ours(x)
    with pytest.raises(TypeError, match="dtype"):
        ours(torch.randn(3, K).bfloat16())


def test_identity_at_p_0_and_dropout_above():
    ours, theirs = twin_layers(linear(), {"a": {}, "b": {"lora_dropout": 0.25}})
    for name in ("a", "b"):
        assert type(ours.lora_dropout[name]) is type(theirs.lora_dropout[name])
    assert ours.lora_dropout["b"].p == 0.25
    state = torch.get_rng_state()
    ours(torch.randn(3, K, generator=torch.Generator()))
    ours.eval()
    ours.set_adapter("b")
    ours(torch.randn(3, K, generator=torch.Generator()))
    assert torch.equal(torch.get_rng_state(), state)  # p = 0 and eval draw nothing


@pytest.mark.parametrize("shape", [(5, K), (2, 5, K), (K,)])
def test_the_output_may_be_changed_in_place(shape):
    ours, theirs = twin_layers(linear())
    x, grads = torch.randn(shape), []
    for layer in (ours, theirs):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.add_(1)
        y[..., 0] = 0
        nn.functional.relu(y, inplace=True)
        grads.append(torch.autograd.grad(y.sum(), leaf)[0])
    assert_close(grads[0], grads[1], terms=64)


def test_inputs_changed_before_the_backward_are_noticed():
    ours, _ = twin_layers(linear())
    x = torch.randn(3, K, requires_grad=True)
    for tensor in (x, ours.lora_A["default"].weight, ours.lora_B["default"].weight):
        y = ours(x)
        with torch.no_grad():
            tensor.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_layers_run_in_inference_mode_and_train_afterwards():
    ours, theirs = twin_layers(linear(), lora_dropout=0.5)
    x = torch.randn(3, K)
    with torch.inference_mode():
        ours(x)
        assert_close(ours.eval()(x), theirs.eval()(x), terms=64)
    ours.train()(x).sum().backward()
    assert ours.lora_B["default"].weight.grad.abs().max() > 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_broken_rows_stay_rows(p, value):
    ours, theirs = twin_layers(linear(), lora_dropout=p)
    x = torch.randn(4, K)
    x[2, 5] = value
    found = torch.isfinite(ours(x))
    assert torch.equal(found.all(1), torch.tensor([True, True, False, True]))
    assert torch.equal(found.all(1), torch.isfinite(theirs(x)).all(1))


# ---- dropout


@pairwise(p=[0.0, 0.1, 0.5, 0.9, 1.0], shape=[(33, K), (2, 5, K), (K,)], dtype=DTYPES)
def test_dropout_with_the_exported_mask(p, shape, dtype):
    ours, theirs = twin_layers(linear(dtype), r=4, lora_dropout=p)
    share_dropout(theirs, ["default"], p, seed=11)
    assert_like_peft(ours, theirs, torch.randn(shape).to(dtype), seed=11)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_of_several_adapters_is_independent(dtype):
    ours, theirs = twin_layers(linear(dtype), {"a": {}, "b": {"r": 2}}, active=["a", "b"], lora_dropout=0.5)
    share_dropout(theirs, ["a", "b"], 0.5, seed=4)
    x = torch.randn(20, K).to(dtype)
    assert_like_peft(ours, theirs, x, names=("a", "b"), seed=4)
    one, two = (d.seed for d in (theirs.lora_dropout["a"], theirs.lora_dropout["b"]))
    assert not torch.equal(fused_lora.dropout_mask(one, x.shape, 0.5), fused_lora.dropout_mask(two, x.shape, 0.5))


class _Reader:
    """A layer with A = I and B = I over a zero base: its output is D(x), so the mask can be seen from outside."""

    def __init__(self, size, p):
        self.layer = LoraLinear(nn.Linear(size, size, bias=False), r=size, lora_alpha=size, lora_dropout=p)
        self.layer.base_layer.weight.data.zero_()
        self.layer.lora_A["default"].weight.data.copy_(torch.eye(size))
        self.layer.lora_B["default"].weight.data.copy_(torch.eye(size))
        self.size = size

    def mask(self, rows):
        with torch.no_grad():
            return self.layer(torch.ones(rows, self.size)) != 0


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_keep_rates_of_rows_columns_modules_and_steps(p):
    rows, size, steps = 400, 64, 6
    readers = [_Reader(size, p) for _ in range(3)]
    masks = torch.stack([torch.stack([r.mask(rows) for r in readers]) for _ in range(steps)]).double()
    exact = 1 - dropout_threshold(p) / 65536
    for dims in ((2, 3), (0, 2, 3), (1, 2, 3), (0, 1, 2), (0, 1, 3), (0, 1, 2, 3)):
        rate = masks.mean(dims)
        count = masks.numel() // rate.numel()
        # 5 sigma of the largest of up to 400 rates
        assert (rate - exact).abs().max() < 5 * (p * (1 - p) / count) ** 0.5, dims
    flat = masks.reshape(steps * 3, -1)
    centred = (flat - exact) / (p * (1 - p)) ** 0.5
    correlation = centred @ centred.T / flat.shape[1] - torch.eye(len(flat))
    assert correlation.abs().fill_diagonal_(0).max() < 5 / flat.shape[1] ** 0.5
    # neighbours within a mask are independent as well
    grid = centred.reshape(-1, rows, size)
    for near, far in ((grid[:, 1:], grid[:, :-1]), (grid[:, :, 1:], grid[:, :, :-1])):
        assert (near * far).mean().abs() < 5 / near.numel() ** 0.5


def test_the_seed_reproduces_a_run_and_the_kept_values_are_scaled():
    reader = _Reader(32, 0.3)
    torch.manual_seed(shifted(1))
    first, second = reader.mask(50), reader.mask(50)
    assert not torch.equal(first, second)
    torch.manual_seed(shifted(1))
    assert torch.equal(reader.mask(50), first) and torch.equal(reader.mask(50), second)
    torch.manual_seed(shifted(1))
    seed = draw_seeds(1, torch.device("cpu"))[0]
    assert torch.equal(fused_lora.dropout_mask(seed, (50, 32), 0.3), first)
    kept = reader.layer(torch.ones(50, 32)).detach().unique()
    expected = 65536 / (65536 - dropout_threshold(0.3))
    assert len(kept) == 2 and kept[0] == 0 and kept[1].item() == pytest.approx(expected, rel=1e-6)


def test_eval_uses_no_dropout():
    ours, theirs = twin_layers(linear(training=False), r=4, lora_dropout=0.9)
    x = torch.randn(8, K)
    assert_close(ours(x), theirs(x), terms=64)
    assert torch.equal(ours(x), ours(x))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_sees_the_same_mask(use_reentrant):
    ours, _ = twin_layers(linear(), r=4, lora_dropout=0.5)
    second, _ = twin_layers(linear(K=N, N=N), r=4, lora_dropout=0.5)
    x = torch.randn(30, K, requires_grad=True)
    parameters = [x, *(p for layer in (ours, second) for p in layer.parameters() if p.requires_grad)]

    def block(x):
        return second(torch.tanh(ours(x)))

    torch.manual_seed(shifted(7))
    plain = torch.autograd.grad(block(x).square().sum(), parameters)
    torch.manual_seed(shifted(7))
    checkpoint(block, x, use_reentrant=use_reentrant).square().sum().backward()
    for parameter, expected in zip(parameters, plain, strict=True):
        assert torch.equal(parameter.grad, expected)


# ---- state: active, disabled, scaled, added, deleted


def trainable(layer):
    return {name for name, p in layer.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("names", ["b", ["b"], ["a", "b"], ["b", "a"], [], ["missing"], ("a",)])
@pytest.mark.parametrize("inference_mode", [False, True])
def test_set_adapter(names, inference_mode):
    ours, theirs = twin_layers(linear(), {"a": {}, "b": {"r": 3}})
    for layer in (ours, theirs):
        layer.set_adapter(names, inference_mode=inference_mode)
    assert trainable(ours) == trainable(theirs)
    assert list(ours.active_adapters) == list(theirs.active_adapters)
    x = torch.randn(4, K)
    assert_close(ours(x), theirs(x), terms=64)
    if names in ([], ["missing"]):
        assert torch.equal(ours(x), ours.base_layer(x))


def test_a_further_adapter_waits_frozen():
    ours, theirs = twin_layers(linear(), {"a": {}, "b": {}})
    assert trainable(ours) == trainable(theirs) == {"lora_A.a.weight", "lora_B.a.weight"}
    ours.add_adapter("c", r=2)
    assert ours.active_adapters == ["a"] and "lora_A.c.weight" not in trainable(ours)
    with pytest.raises(ValueError, match="adapter_name: 'c' already exists"):
        ours.add_adapter("c")


def test_scaling_methods():
    ours, theirs = twin_layers(linear(), {"a": {"r": 3}, "b": {"use_rslora": True}, "c": {}}, active=["a", "b"])
    steps = [
        lambda m: m.set_scale("a", 0.5),
        lambda m: m.set_scale("missing", 3),
        lambda m: m.scale_layer(1.7),
        lambda m: m.scale_layer(1),
        lambda m: m.unscale_layer(0.3),
        lambda m: m.set_scale("c", 2),
        lambda m: m.unscale_layer(),
        lambda m: m.set_scale("b", -1.5),
    ]
    x = torch.randn(4, K)
    for step in steps:
        step(ours), step(theirs)
        assert ours.scaling == theirs.scaling
        assert_close(ours(x), theirs(x), terms=64)


@pytest.mark.parametrize("active", [["b"], ["a", "b"], ["c", "b", "a"], ["a"]])
def test_delete_adapter(active):
    ours, theirs = twin_layers(linear(), {"c": {}, "a": {}, "b": {}}, active=active)
    messages = []
    for layer in (ours, theirs):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            layer.delete_adapter("b")
        messages.append([str(w.message) for w in caught])
    assert messages[0] == messages[1] and len(messages[0]) == (active == ["b"])
    assert list(ours.active_adapters) == list(theirs.active_adapters)
    assert trainable(ours) == trainable(theirs)
    assert set(ours.state_dict()) == set(theirs.state_dict())
    for entries in (ours.r, ours.lora_alpha, ours.scaling, ours.use_rslora, ours.lora_dropout):
        assert "b" not in entries


def test_delete_the_last_adapter_leaves_the_base():
    ours, theirs = twin_layers(linear(), {"a": {}})
    for layer in (ours, theirs):
        layer.delete_adapter("a")
    x = torch.randn(4, K)
    assert list(ours.active_adapters) == list(theirs.active_adapters) == []
    assert torch.equal(ours(x), ours.base_layer(x))


def test_a_merged_adapter_is_not_deleted():
    ours, _ = twin_layers(linear(), {"a": {}, "b": {}})
    ours.merge()
    with pytest.raises(ValueError, match="while they are merged"):
        ours.delete_adapter("a")
    ours.delete_adapter("b")
    assert list(ours.lora_A) == ["a"] and ours.merged_adapters == ["a"]


def test_disabled_layers_compute_the_base_and_unmerge():
    ours, theirs = twin_layers(linear())
    x, before = torch.randn(4, K), ours.base_layer.weight.clone()
    ours.merge(), theirs.merge()
    ours.disable_adapters = True
    theirs.enable_adapters(False)
    assert torch.equal(ours(x), nn.functional.linear(x, before, ours.base_layer.bias))
    theirs(x)
    assert not ours.merged and not theirs.merged and torch.equal(ours.base_layer.weight, before)
    ours.disable_adapters = False
    assert not torch.equal(ours(x), ours.base_layer(x))


# ---- merge and unmerge


@pytest.mark.parametrize("dtype", DTYPES + [torch.float16])
@pytest.mark.parametrize("make", [linear, conv1d])
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merge_is_pefts_default_merge(safe_merge, make, dtype):
    """PEFT's default merge adds an fp32 delta and rounds once, as ours always does."""
    ours, theirs = twin_layers(make(dtype), r=4, lora_alpha=8)
    before = ours.base_layer.weight.clone()
    storage = ours.base_layer.weight.data_ptr()
    exact = (before.double() + double(theirs).get_delta_weight("default")).detach()
    ours.merge(safe_merge=safe_merge), theirs.merge()
    assert ours.merged_adapters == theirs.merged_adapters == ["default"]
    assert ours.base_layer.weight.data_ptr() == storage
    assert_no_worse(ours.base_layer.weight, theirs.base_layer.weight, exact, factor=1.0)
    if dtype != torch.float32:
        assert torch.equal(ours.base_layer.weight, theirs.base_layer.weight)
    x = torch.randn(5, K).to(dtype)
    assert torch.equal(ours(x), ours.base_layer(x))
    ours.unmerge()
    assert torch.equal(ours.base_layer.weight, before) and ours.merged_adapters == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_of_several_adapters_rounds_once_whatever_the_order(dtype):
    ours, theirs = twin_layers(linear(dtype), {"a": {}, "b": {"r": 3}}, active=["a", "b"])
    before = ours.base_layer.weight.clone()
    deltas = [double(theirs).get_delta_weight(name) for name in ("a", "b")]
    exact = before.double() + deltas[0] + deltas[1]
    ours.merge(), theirs.merge()
    assert_no_worse(ours.base_layer.weight, theirs.base_layer.weight, exact)
    at_once = ours.base_layer.weight.clone()
    ours.unmerge()
    ours.merge(adapter_names=["a"])
    with pytest.warns(UserWarning, match="additionally merging b"):
        ours.merge(adapter_names=["b"])
    assert torch.equal(ours.base_layer.weight, at_once)
    ours.unmerge()
    assert torch.equal(ours.base_layer.weight, before)


def test_merge_warnings_are_pefts():
    ours, theirs = twin_layers(linear(), {"a": {}, "b": {}, "c": {}}, active=["a"])
    steps = [
        lambda m: m.unmerge(),
        lambda m: m.merge(),
        lambda m: m.merge(),
        lambda m: m.merge(adapter_names=["a", "b"]),
        lambda m: m.merge(adapter_names=["missing"]),
        lambda m: m.merge(adapter_names=["b", "c"]),
        lambda m: m.merge(adapter_names=[]),
        lambda m: m.unmerge(),
    ]
    for i, step in enumerate(steps):
        messages = []
        for layer in (ours, theirs):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                step(layer)
            messages.append([str(w.message) for w in caught])
        assert messages[0] == messages[1], i
        assert ours.merged_adapters == theirs.merged_adapters, i


def test_merge_of_a_str_is_a_type_error():
    ours, theirs = twin_layers(linear())
    for layer in (ours, theirs):
        with pytest.raises(TypeError, match="list of strings"):
            layer.merge(adapter_names="default")
    assert not ours.merged


@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_with_lora_bias(dtype):
    ours, theirs = twin_layers(linear(dtype), lora_bias=True, r=4)
    weight, bias = ours.base_layer.weight.clone(), ours.base_layer.bias.clone()
    x = torch.randn(6, K).to(dtype)
    ours.merge(), theirs.merge()
    assert torch.equal(ours.base_layer.bias, theirs.base_layer.bias)
    assert_close(ours(x), theirs(x), terms=64)
    ours.unmerge()
    assert torch.equal(ours.base_layer.weight, weight) and torch.equal(ours.base_layer.bias, bias)


@pytest.mark.filterwarnings("ignore:Already following")
def test_lora_biases_merged_one_after_another_are_rounded_once():
    layers = [LoraLinear(linear(torch.bfloat16, N=500), r=2, adapter_name="a", lora_bias=True) for _ in range(2)]
    for layer in layers:
        layer.add_adapter("b", r=2, lora_bias=True)
    layers[0].lora_B["a"].bias.data.normal_(), layers[0].lora_B["b"].bias.data.normal_()
    layers[1].load_state_dict(layers[0].state_dict())
    before = layers[0].base_layer.bias.clone()
    layers[0].merge(adapter_names=["a"]), layers[0].merge(adapter_names=["b"])
    layers[1].merge(adapter_names=["a", "b"])
    assert torch.equal(layers[0].base_layer.bias, layers[1].base_layer.bias)
    with pytest.raises(ValueError, match="merged bias"):
        layers[0].add_adapter("c", r=2, lora_bias=True)
        layers[0].lora_B["c"].bias.data.fill_(math.inf)
        layers[0].merge(adapter_names=["c"])
    assert torch.equal(layers[0].base_layer.bias, layers[1].base_layer.bias)
    layers[0].unmerge()
    assert torch.equal(layers[0].base_layer.bias, before)


def test_a_bias_that_changes_while_merged_is_named():
    ours, _ = twin_layers(linear(), {"a": {}, "b": {}}, lora_bias=True)
    ours.merge(adapter_names=["a"])
    changed = ours.base_layer.bias.data.add_(1).clone()
    for call in (ours.unmerge, lambda: ours.merge(adapter_names=["b"])):
        with pytest.raises(RuntimeError, match="bias was changed while merged"):
            call()
        assert ours.merged_adapters == ["a"] and torch.equal(ours.base_layer.bias, changed)


def test_lora_bias_needs_a_base_bias_to_merge():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, theirs = twin_layers(linear(bias=False), lora_bias=True)
    before = ours.base_layer.weight.clone()
    x = torch.randn(4, K)
    assert_close(ours(x), theirs(x), terms=64)
    for layer in (ours, theirs):
        with pytest.raises(RuntimeError, match="lora_bias"):
            layer.merge(safe_merge=True)
    assert not ours.merged and torch.equal(ours.base_layer.weight, before)


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
def test_a_broken_adapter_is_not_merged(value, safe_merge):
    ours, _ = twin_layers(linear(torch.float16), {"good": {}, "bad": {}})
    before = ours.base_layer.weight.clone()
    ours.lora_B["bad"].weight.data[2, 3] = value
    with pytest.raises(ValueError, match="bad"):
        ours.merge(safe_merge, ["bad"])
    assert not ours.merged and torch.equal(ours.base_layer.weight, before)
    ours.merge(safe_merge, ["good"])
    merged = ours.base_layer.weight.clone()
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="bad"):
        ours.merge(safe_merge, ["bad"])
    assert ours.merged_adapters == ["good"] and torch.equal(ours.base_layer.weight, merged)
    ours.unmerge()
    assert torch.equal(ours.base_layer.weight, before)


@pytest.mark.parametrize("change", ["scaling", "lora_A", "delete others"])
def test_unmerge_takes_away_what_was_merged_whatever_changed_since(change):
    ours, _ = twin_layers(linear(torch.bfloat16), {"a": {}, "b": {}})
    before = ours.base_layer.weight.clone()
    ours.merge()
    if change == "scaling":
        ours.set_scale("a", 3)
    elif change == "lora_A":
        ours.lora_A["a"].weight.data.normal_()
    else:
        ours.delete_adapter("b")
    ours.unmerge()
    assert torch.equal(ours.base_layer.weight, before)


def test_a_weight_changed_while_merged_is_not_unmerged():
    ours, _ = twin_layers(linear())
    ours.merge()
    ours.base_layer.weight.data[0] += 1
    changed = ours.base_layer.weight.clone()
    with pytest.raises(RuntimeError, match="changed"):
        ours.unmerge()
    assert ours.merged and torch.equal(ours.base_layer.weight, changed)


@pytest.mark.parametrize("merged", [False, True])
def test_train_and_eval_never_merge(merged):
    ours, _ = twin_layers(linear())
    if merged:
        ours.merge()
    before = ours.base_layer.weight.clone()
    for mode in (ours.eval, ours.train, ours.train, ours.eval, ours.eval):
        mode()
        ours(torch.randn(2, K))
        assert torch.equal(ours.base_layer.weight, before) and ours.merged == merged


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [linear, conv1d])
def test_get_delta_weight(make, dtype):
    ours, theirs = twin_layers(make(dtype), r=4, lora_alpha=3)
    mine, other = ours.get_delta_weight("default"), theirs.get_delta_weight("default")
    assert mine.dtype == other.dtype and torch.equal(mine, other)


def test_delta_fidelity_needs_a_merge():
    ours, _ = twin_layers(linear(torch.bfloat16))
    with pytest.raises(RuntimeError, match="merged"):
        ours.delta_fidelity()
    before = ours.base_layer.weight.double()
    delta = ours.get_delta_weight("default").double()
    ours.merge()
    lost = (ours.base_layer.weight.double() - before - delta).norm() / delta.norm()
    assert ours.delta_fidelity() == pytest.approx(lost.item(), rel=1e-3)


# ---- hooks, subclasses, parametrisations: the composed path


def count_hook(counts, key):
    def hook(*_):
        counts[key] = counts.get(key, 0) + 1

    return hook


@pytest.mark.parametrize("part", ["lora_A", "lora_B", "base_layer", "lora_dropout"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_fire_and_change_nothing(part, kind):
    ours, theirs = twin_layers(linear(), r=4)
    counts = {}
    for key, layer in (("ours", ours), ("theirs", theirs)):
        module = layer.base_layer if part == "base_layer" else getattr(layer, part)["default"]
        getattr(module, f"register_{kind}_hook")(count_hook(counts, key))
    assert_like_peft(ours, theirs, torch.randn(5, K))
    assert counts["ours"] == DRAWS  # once for each draw


def test_a_hook_may_change_the_output():
    ours, theirs = twin_layers(linear(), r=4)
    for layer in (ours, theirs):
        layer.lora_A["default"].register_forward_hook(lambda module, inputs, output: output * 3)
    assert_like_peft(ours, theirs, torch.randn(5, K))


def test_a_replaced_forward_is_called():
    ours, theirs = twin_layers(linear(), r=4)
    for layer in (ours, theirs):
        layer.base_layer.forward = lambda x: x.sum(-1, keepdim=True).expand(-1, N) * 2
    x = torch.randn(5, K)
    assert_close(ours(x), theirs(x), terms=64)


class Louder(nn.Dropout):
    def forward(self, x):
        return 5 * x


class Shifted(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


@pytest.mark.parametrize("part", ["base_layer", "lora_A", "lora_dropout"])
def test_forwards_of_subclasses_are_called(part):
    base = Shifted(K, N) if part == "base_layer" else linear()
    ours, theirs = twin_layers(base, r=4)
    for layer in (ours, theirs):
        if part == "lora_dropout":
            layer.lora_dropout["default"] = Louder(0.5)
        elif part == "lora_A":
            shifted = Shifted(K, 4, bias=False)
            shifted.weight = layer.lora_A["default"].weight
            layer.lora_A["default"] = shifted
    assert_like_peft(ours, theirs, torch.randn(5, K))


def test_a_bias_of_lora_A_is_added():
    ours, theirs = twin_layers(linear(), r=4)
    for layer in (ours, theirs):
        layer.lora_A["default"].bias = nn.Parameter(torch.arange(4.0))
    x = torch.randn(5, K)
    assert_close(ours(x), theirs(x), terms=K)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize("part", ["base_layer", "lora_A", "lora_B"])
def test_parametrized_weights(part):
    ours, theirs = twin_layers(linear(), r=4)
    x = torch.randn(5, K)
    for layer in (ours, theirs):
        module = layer.base_layer if part == "base_layer" else getattr(layer, part)["default"]
        nn.utils.parametrize.register_parametrization(module, "weight", Doubled())
    assert_close(ours(x), theirs(x), terms=64)


def test_a_computed_base_weight_is_not_merged():
    ours, _ = twin_layers(linear(), r=4)
    nn.utils.parametrize.register_parametrization(ours.base_layer, "weight", Doubled())
    with pytest.raises(RuntimeError, match="base_layer: a weight is not a parameter of its own"):
        ours.merge()
    assert not ours.merged


# ---- mixed batches


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [linear, conv1d])
@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("biased, grad", [(True, True), (True, False), (False, False)])
def test_mixed_batch(biased, grad, rank, make, dtype):
    kinds = {"a": {"r": 3}, "b": {"lora_bias": True} if biased else {"lora_alpha": 5}, "c": {}}
    ours, theirs = twin_layers(make(dtype, training=False), kinds)
    with torch.set_grad_enabled(grad):
        check_mixed_batch(ours, theirs, rank, dtype)


def check_mixed_batch(ours, theirs, rank, dtype):
    names = ["b", "__base__", "a", "b", "missing", "c", "__base__"] * 8
    x = torch.randn(len(names), *([5] if rank == 3 else []), K).to(dtype)
    mine, other = ours(x, adapter_names=names), theirs(x, adapter_names=names)
    exact = double(theirs)(x.double(), adapter_names=names)
    adapted = [i for i, name in enumerate(names) if name in ("a", "b", "c")]
    assert_no_worse(mine[adapted], other[adapted], exact[adapted], draws=True)
    base = ours.base_layer(x)
    for i in (1, 4, 6):
        assert torch.equal(mine[i], base[i])
    assert torch.equal(ours(x, adapter_names=[None if n == "__base__" else n for n in names]), mine)


def test_mixed_batch_errors_are_pefts():
    ours, theirs = twin_layers(linear(training=False), {"a": {}})
    x = torch.randn(3, K)
    for layer in (ours, theirs):
        with pytest.raises(ValueError, match="Length of `adapter_names` should be the same as the number of inputs"):
            layer(x, adapter_names=["a", "a"])
        layer.merge()
        with pytest.raises(ValueError, match="Cannot pass `adapter_names` when there are merged adapters"):
            layer(x, adapter_names=["a", "a", "a"])


def test_mixed_batch_of_no_names_is_a_value_error():
    ours, _ = twin_layers(linear(training=False))
    with pytest.raises(ValueError, match="adapter_names"):
        ours(torch.randn(3, K), adapter_names=[])


def test_mixed_batch_of_a_str_is_a_type_error():
    ours, _ = twin_layers(linear(training=False), {"one": {}})
    with pytest.raises(TypeError, match="adapter_names"):
        ours(torch.randn(3, K), adapter_names="one")


def test_mixed_batch_passes_gradients_to_x():
    ours, theirs = twin_layers(linear(training=False), {"a": {}, "b": {}})
    names, x = ["b", "__base__", "a"], torch.randn(3, K, requires_grad=True)
    mine, other = (torch.autograd.grad(m(x, adapter_names=names).square().sum(), x)[0] for m in (ours, theirs))
    assert_close(mine, other, terms=64)


@pytest.mark.parametrize("names", [["a", "a", "b"], ["a", "b", "a"]], ids=["neighbours", "apart"])
@pytest.mark.parametrize("change", ["after the call", "by a hook", "by the layer"])
def test_mixed_batch_whose_input_is_changed_in_place(change, names):
    """As in PEFT each adapter has a copy of its rows."""
    layers, x, found = twin_layers(linear(N=K, training=False), {"a": {}, "b": {}}), torch.randn(3, K), []
    for layer in layers:
        layer.lora_A["a"].weight.requires_grad_()
        own = x.clone()
        if change == "by a hook":
            layer.lora_A["a"].register_forward_pre_hook(lambda module, args: (args[0].mul_(2),))
        elif change == "by the layer":
            layer.base_layer.register_forward_hook(lambda module, args, y: args[0])
        y = layer(own, adapter_names=names)
        assert torch.equal(own, x) == (change != "by the layer")
        if change == "after the call":
            own.zero_()
        found.append((y, *torch.autograd.grad(y.square().sum(), layer.lora_A["a"].weight)))
    for mine, other in zip(*found, strict=True):
        assert_close(mine, other, terms=64)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("names", [["a", "b", "__base__"], ["a", "a", "b"], ["a", "b", "a"]], ids="-".join)
def test_mixed_batch_over_an_expanded_output(names, grad):
    """Rows of one memory, each with a term of its own."""
    layer, _ = twin_layers(linear(training=False), {"a": {}, "b": {}})
    x, y = torch.randn(3, K), torch.randn(1, N)
    layer.base_layer.register_forward_hook(lambda module, args, _: y.clone().expand(len(args[0]), N))
    with torch.set_grad_enabled(grad):
        mixed = layer(x, adapter_names=names)
        alone = [layer(x[i : i + 1], adapter_names=[name]) for i, name in enumerate(names)]
    assert_close(mixed, torch.cat(alone), terms=64)


# ---- memory, compile, autocast, copies


def saved_sizes(layer, x):
    seen = {}

    def pack(t):
        if isinstance(t, torch.Tensor):
            seen[t.untyped_storage().data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x)
    return y, seen


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_x_of_its_size_is_saved(dtype):
    M = 50
    ours, theirs = twin_layers(linear(dtype), r=4, lora_dropout=0.5)
    x = torch.randn(M, K).to(dtype).requires_grad_()
    (y, mine), (z, other) = saved_sizes(ours, x), saved_sizes(theirs, x)
    large = [pointer for pointer, size in mine.items() if size >= M * min(K, N)]
    assert large == [x.untyped_storage().data_ptr()]
    assert sum(size >= M * K for size in other.values()) >= 2
    assert y.requires_grad and z.requires_grad


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_neighbours_share_one_x(p):
    x = torch.randn(50, K, requires_grad=True)
    layers = [twin_layers(linear(), r=4, lora_dropout=p)[0] for _ in range(3)]
    seen = {}
    for layer in layers:
        seen |= saved_sizes(layer, x)[1]
    assert sum(size >= 50 * min(K, N) for size in seen.values()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_compile_in_one_graph(dtype):
    ours, _ = twin_layers(linear(dtype), {"a": {}, "b": {"lora_bias": True}}, active=["a", "b"])
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    x, g = torch.randn(6, K).to(dtype), torch.randn(6, N).to(dtype)
    for training in (True, False):
        ours.train(training)
        found, expected = [], []
        for layer, into in ((compiled, found), (ours, expected)):
            inputs = [x.clone().requires_grad_(), *(p for p in ours.parameters() if p.requires_grad)]
            y = layer(inputs[0])
            into += [y, *torch.autograd.grad(y, inputs, g)]
        for mine, other in zip(found, expected, strict=True):
            assert_close(mine, other, terms=64)


def test_compile_with_dropout_draws_the_eager_seed():
    ours, _ = twin_layers(linear(), r=4, lora_dropout=0.5)
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    x = torch.randn(6, K)
    torch.manual_seed(shifted(2))
    expected = ours(x)
    torch.manual_seed(shifted(2))
    assert torch.equal(compiled(x), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_autocast(p, dtype):
    ours, theirs = twin_layers(linear(dtype), r=4, lora_dropout=p)
    if p:
        share_dropout(theirs, ["default"], p, seed=6)
    results = ({}, {}, {})
    reference = double(theirs)
    reference.base_layer.weight.data = theirs.base_layer.weight.data.bfloat16().double()
    for _ in range(DRAWS):
        x, g = torch.randn(9, K).to(dtype), torch.randn(9, N).bfloat16()
        with torch.random.fork_rng():
            for result, layer in zip(results, (ours, theirs), strict=False):
                torch.manual_seed(shifted(6))
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    found = run_layer(layer, x, g)
                assert found["y"].dtype == torch.bfloat16 and found["dx"].dtype == dtype
                assert found["dA default"].dtype == found["dB default"].dtype == torch.float32
                for key, tensor in found.items():
                    result.setdefault(key, []).append(tensor)
            # autocast rounds x and W, so that much is given
            for key, tensor in run_layer(reference, x.bfloat16().double(), g.double()).items():
                results[2].setdefault(key, []).append(tensor)
    for key in results[0]:
        assert_no_worse(*(torch.stack(result[key]) for result in results), name=key, draws=True)


@pytest.mark.parametrize("use_dora", [False, True])
def test_float64_adapters_under_autocast_compute_in_float64(use_dora):
    """As in PEFT: autocast leaves float64 as it is."""
    ours, theirs = twin_layers(linear(), r=4, use_dora=use_dora)
    for layer in (ours, theirs):
        for part in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
            part.double()
    x, g = torch.randn(9, K), torch.randn(9, N).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = [run_layer(layer, x, g) for layer in (ours, theirs)]
    for key in ("dA default", "dB default"):
        assert found[0][key].dtype is torch.float64
        assert torch.equal(found[0][key].float(), found[1][key].float()), key


def test_autocast_off_inside_autocast():
    ours, theirs = twin_layers(linear(), r=4)
    x = torch.randn(5, K)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert ours(x).dtype == torch.float32


@pytest.mark.parametrize("merged", [False, True])
def test_deepcopy_is_a_layer_of_its_own(merged):
    ours, _ = twin_layers(linear(torch.bfloat16), lora_bias=True)
    x, before = torch.randn(4, K).bfloat16(), ours.base_layer.weight.clone()
    if merged:
        ours.merge()
    other = copy.deepcopy(ours)
    assert torch.equal(other(x), ours(x))
    if merged:
        other.unmerge()
        assert ours.merged and torch.equal(other.base_layer.weight, before)
    other.lora_B["default"].weight.data.zero_()
    assert ours.lora_B["default"].weight.abs().max() > 0


def test_no_parameter_or_buffer_beyond_pefts():
    ours, theirs = twin_layers(linear(), lora_dropout=0.1)
    ours(torch.randn(3, K)).sum().backward()
    ours.merge()
    assert {n for n, _ in ours.named_parameters()} == {n for n, _ in theirs.named_parameters()}
    assert not list(ours.named_buffers())
    assert "Linear" in type(ours).__name__ and isinstance(theirs, BaseTunerLayer)


def test_the_masked_twin_really_drops():
    x = torch.ones(100, 100)
    dropped = ExportedDropout(torch.tensor(3), 0.5)(x)
    assert 0.4 < (dropped == 0).double().mean() < 0.6 and dropped.max() == 2


def test_names_for_the_numbers_of_a_single_row_are_an_error():
    with pytest.raises(ValueError, match="adapter_names"):
        LoraLinear(linear()).eval()(torch.ones(K), adapter_names=["default"] * K)


@pytest.mark.parametrize("x", [None, 5, [[1.0] * K]], ids=lambda x: type(x).__name__)
def test_an_input_that_is_no_tensor_is_named(x):
    with pytest.raises(TypeError, match="x: expected a tensor, got"):
        LoraLinear(linear())(x)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("rows, tokens", [(4, 3), (0, 3), (4, 0)])
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (K, N)], ids=str)
def test_mixed_batches_without_numbers(shape, rows, tokens):
    ours, theirs = twin_layers(nn.Linear(*shape).eval(), r=4)
    x, names = torch.randn(rows, tokens, shape[0]), ["default", "__base__"] * (rows // 2)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert_close(ours(x, adapter_names=names), theirs(x, adapter_names=names), terms=64)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("shape", [(0, 5), (5, 0)], ids=str)
def test_dora_in_training_without_numbers(shape):
    ours, theirs = twin_layers(nn.Linear(*shape).train(), r=4, use_dora=True, lora_dropout=0.5)
    found = [layer(torch.randn(4, shape[0])) for layer in (ours, theirs)]
    assert found[0].shape == found[1].shape and torch.equal(*[y.isnan() for y in found])


@pytest.mark.parametrize("kind", [{}, {"lora_dropout": 0.3}, {"use_dora": True}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("odd", ["sparse", "inference", "adapters of inference"])
def test_tensors_that_only_peft_s_own_calls_take(odd, dtype, kind):
    ours, theirs = twin_layers(linear(dtype).eval(), r=4, **kind)
    with torch.inference_mode(odd == "inference"):
        x = torch.randn(5, K).to(dtype)
    for part in [p["default"] for t in (ours, theirs) for p in (t.lora_A, t.lora_B) if odd.startswith("adapters")]:
        with torch.inference_mode():
            part.weight = nn.Parameter(part.weight.clone())
    x = x.to_sparse() if odd == "sparse" else x
    outcomes = []
    for layer in (ours, theirs):
        try:
            with torch.autocast("cpu", torch.bfloat16, enabled=odd.startswith("adapters")):
                y = layer(x)
            outcomes.append(
                [y, *torch.autograd.grad(y.square().sum(), [p for p in layer.parameters() if p.requires_grad])]
            )
        except RuntimeError as error:
            outcomes.append(str(error))
    assert type(outcomes[0]) is type(outcomes[1])
    if isinstance(outcomes[0], str):
        assert outcomes[0] == outcomes[1]
    else:
        for mine, other in zip(*outcomes, strict=True):
            rounded = torch.bfloat16 if odd.startswith("adapters") else mine.dtype
            assert_close(mine.to(rounded), other.to(rounded), terms=100)


@pytest.mark.parametrize("training", [False, True])
def test_shapes_without_numbers(training):
    """A meta model says what comes out and what gets gradients; there is nothing to merge into."""
    layer = LoraLinear(linear().to("meta"), r=2, lora_dropout=0.5).train(training)
    x = torch.ones(3, K, device="meta", requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == (3, N) and y.is_meta and x.grad.shape == x.shape
    assert layer.lora_A["default"].weight.grad.shape == (2, K)
    with pytest.raises(RuntimeError, match="meta device"):
        layer.merge()
    assert not layer.merged


@pytest.mark.parametrize("train", [False, True])
def test_transforms_of_torch_func_give_what_peft_gives(train):
    ours, theirs = twin_layers(linear(torch.float64).train(train))
    x = torch.randn(3, K, dtype=torch.float64)
    results = []
    for layer in (ours, theirs):
        names = [name for name, parameter in layer.named_parameters() if parameter.requires_grad]
        parameters = {name: layer.get_parameter(name).detach() for name in names}

        def loss(parameters, x, layer=layer):
            return torch.func.functional_call(layer, parameters, (x,)).square().sum()

        stacked = {name: torch.stack([p, 2 * p]) for name, p in parameters.items()}
        results.append(
            (
                torch.func.vmap(layer)(torch.stack([x, 2 * x])),
                torch.func.vmap(loss, (0, None))(stacked, x),
                *torch.func.grad(loss)(parameters, x).values(),
                *torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x).values(),  # of each sample
                torch.func.jacrev(layer)(x[0]),
                torch.func.jacfwd(layer)(x[0]),
                torch.func.jvp(layer, (x,), (x,))[1],
            )
        )
    for mine, other in zip(*results, strict=True):
        assert_close(mine, other, terms=500)


NO_SCALINGS = [10**400, 1e39, math.nan, "x", torch.tensor(math.nan), torch.tensor(1e39, dtype=torch.float64)]


@pytest.mark.parametrize("kind", [{}, {"lora_bias": True}, {"use_dora": True}], ids=str)
@pytest.mark.parametrize("scaling", NO_SCALINGS, ids=lambda s: f"{s!r:.15}")
def test_a_scaling_that_float32_cannot_hold_is_named(scaling, kind):
    layer, x = LoraLinear(linear(), r=2, **kind), torch.randn(2, K)
    layer.scaling["default"] = scaling
    calls = [lambda: layer(x)]
    if "use_dora" in kind:
        calls.append(layer.merge)
    else:
        calls += [lambda: layer(x, adapter_names=["default", None])]
        calls += [torch.no_grad()(calls[-1])]
        calls += [layer.merge, lambda: layer.get_delta_weight("default")] if isinstance(scaling, (int, str)) else []
    for call in calls:
        with pytest.raises((ValueError, TypeError), match="scaling: expected (numbers|a number)"):
            call()
    assert not layer.merged
