"""When a layer of an accelerated model runs fused, and when it leaves the call to PEFT, with the same result."""

import copy
import itertools
import math
import pickle
import warnings
from contextlib import nullcontext
from functools import partial
from types import MethodType, SimpleNamespace

import numpy as np
import peft.helpers
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

import fused_lora
from fused_lora.bases.base import why_not_device
from fused_lora.integrations import peft as integration
from fused_lora.integrations import peft_linear
from fused_lora.ops import guard
from fused_lora.ops.linear.op import lora_linear
from fused_lora.testing.numeric import DRAWS, assert_close, assert_no_worse
from helpers.accelerated import K, N, layers, pair, quiet, wrap
from helpers.seeds import shifted

pytestmark = pytest.mark.numeric


def assert_like_peft(both, x, fused, draws=DRAWS):
    """Output and gradients as close to float64 as PEFT's; bit-equal where PEFT itself does the work."""
    ours, theirs, exact = {}, {}, {}
    for _ in range(draws):
        x, g = torch.randn_like(x), None
        for found, layer in zip((ours, theirs, exact), layers(both), strict=True):
            data = (x.double() if layer is layers(both)[2] else x.clone()).requires_grad_()
            with torch.autocast("cpu", enabled=False) if data.dtype == torch.float64 and fused else nullcontext():
                y = layer(data)
            g = torch.randn_like(y) if g is None else g
            wanted = {"x": data} | {n: p for n, p in layer.named_parameters() if p.requires_grad}
            y_, grads = y.detach(), torch.autograd.grad(y, list(wanted.values()), g.to(y.dtype), allow_unused=True)
            for name, tensor in {"y": y_, **dict(zip(wanted, grads, strict=True))}.items():
                found.setdefault(name, []).append(tensor)
    for name in ours:
        mine, other, right = (torch.stack(f[name]) for f in (ours, theirs, exact))
        assert mine.dtype == other.dtype, name
        if fused:
            assert_no_worse(mine, other, right, name=name, draws=True)
        else:
            assert torch.equal(mine, other), name


# ---- fused


@pytest.mark.parametrize("shape", [(K,), (7, K), (2, 3, K), (2, 2, 3, K), (0, K), (2, 0, K)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_shape(shape, dtype, report):
    both = pair(dtype, {"a": {}, "b": {"r": 2}}, lora_bias=True)
    both.do(lambda m: m.base_model.set_adapter(["a", "b"]))
    assert_like_peft(both, torch.randn(shape).to(dtype), fused=True)
    assert report() == {"fused": DRAWS, "around": {}, "fallback": {}}


@pytest.mark.parametrize("x", [torch.randn(K, 5).t(), torch.randn(5, 2 * K)[:, ::2], torch.randn(1, K).expand(4, K)])
def test_strides(x, report):
    both = pair()
    assert_close(*(layer(x).detach() for layer in layers(both)[:2]), terms=64)
    assert report()["fused"] == 1


@pytest.mark.parametrize(
    "dtype, adapters",
    [(torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)],
)
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_autocast(dtype, base, adapters, report):
    both = pair(base, lora_bias=True)
    for layer in layers(both)[:2]:
        layer.lora_A.to(adapters), layer.lora_B.to(adapters)
    layers(both)[2].load_state_dict(layers(both)[1].state_dict())
    with torch.autocast("cpu", dtype):
        assert_like_peft(both, torch.randn(9, K), fused=True)
        assert layers(both)[0](torch.randn(3, K)).dtype == dtype
    assert report()["fallback"] == {}


def test_scalings_as_tensors(report):
    both = pair(torch.bfloat16, {"a": {}, "b": {"r": 2}}, lora_bias=True)
    both.do(lambda m: m.base_model.set_adapter(["a", "b"]))
    for layer in layers(both):
        layer.scaling = {name: torch.tensor(value) for name, value in layer.scaling.items()}
    assert_like_peft(both, torch.randn(9, K).to(torch.bfloat16), fused=True)
    assert report()["fallback"] == {}
    both.do(lambda m: m.merge_adapter())
    both.do(lambda m: m.unmerge_adapter())


@pytest.mark.filterwarnings("error:overflow")
def test_scalings_of_numpy(report):
    both = pair(torch.float32, {"a": {}, "b": {"r": 2}})
    both.do(lambda m: m.base_model.set_adapter(["a", "b"]))
    for layer in layers(both):
        layer.scaling = {"a": np.float16(0.5), "b": np.int64(2)}
    assert_like_peft(both, torch.randn(9, K), fused=True)
    assert report()["fallback"] == {}
    both.do(lambda m: m.merge_adapter())
    assert layers(both)[0].merge_state is not None


def test_the_result_may_be_changed_in_place(report):
    both = pair()
    x = torch.randn(2, 3, K)
    expected = layers(both)[1](x).relu()
    assert torch.equal(layers(both)[0](x).relu_() > 0, expected > 0)
    layers(both)[0](x).relu_().sum().backward()
    assert report()["fused"] == 2


def test_a_hook_on_the_layer_itself_does_not_stop_the_fusing(report):
    both, seen = pair(), []
    layers(both)[0].register_forward_hook(lambda module, args, y: seen.append(y) or y * 2)
    layers(both)[1].register_forward_hook(lambda module, args, y: y * 2)
    layers(both)[2].register_forward_hook(lambda module, args, y: y * 2)
    assert_like_peft(both, torch.randn(4, K), fused=True)
    assert len(seen) == DRAWS and report() == {"fused": DRAWS, "around": {}, "fallback": {}}


def test_hooks_of_accelerate_on_the_layer_follow_the_class(report):
    hooks = pytest.importorskip("accelerate.hooks")
    model = wrap(nn.Sequential(nn.Linear(K, N)), target_modules=["0"])
    layer, x = model.base_model.model[0], torch.randn(3, K)
    hooks.add_hook_to_module(layer, hooks.ModelHook())
    y = layer(x)
    for count in (1, 2):
        fused_lora.accelerate(model)
        assert_close(layer(x), y, terms=64)
        assert report() == {"fused": count, "around": {}, "fallback": {}}
        fused_lora.restore(model)
        assert torch.equal(layer(x), y) and report() == {"fused": count, "around": {}, "fallback": {}}
    fused_lora.accelerate(model)
    hooks.remove_hook_from_module(layer)
    layer(x)
    assert report()["fused"] == 3
    hooks.add_hook_to_module(layer.lora_A["default"], hooks.ModelHook())
    layer(x)
    assert report()["fallback"] == {"a part of the layer has its forward replaced": 1}


def test_hooks_of_diffusers_on_the_layer_follow_the_class(report):
    """As layerwise casting puts them on every layer of PEFT's: each keeps the forward that it found."""
    model = wrap(nn.Sequential(nn.Linear(K, N)), target_modules=["0"])
    layer, x = model.base_model.model[0], torch.randn(3, K)
    y = layer(x)
    one, two = (SimpleNamespace(forward=None, original_forward=None) for _ in range(2))
    one.forward = layer.forward
    two.original_forward, two.forward = one.forward, lambda *args: two.original_forward(*args)
    layer._diffusers_hook = SimpleNamespace(_fn_refs=[one, two])
    for count, (reference, name) in enumerate(((one, "forward"), (two, "forward")), start=1):
        layer.forward = lambda *args, reference=reference, name=name: getattr(reference, name)(*args)
        fused_lora.accelerate(model)
        assert_close(layer(x), y, terms=64)
        assert report() == {"fused": count, "around": {}, "fallback": {}}
        fused_lora.restore(model)
        assert torch.equal(layer(x), y) and report() == {"fused": count, "around": {}, "fallback": {}}


def test_methods_that_others_keep_on_the_layer_follow_the_class(report):
    """accelerate leaves the forward when it takes a hook away, ms-swift merge and unmerge after a sync."""
    hooks = pytest.importorskip("accelerate.hooks")
    model = wrap(nn.Sequential(nn.Linear(K, N)), target_modules=["0"])
    layer, x = model.base_model.model[0], torch.randn(3, K)
    hooks.add_hook_to_module(layer, hooks.ModelHook())
    hooks.remove_hook_from_module(layer)
    layer.merge, layer.before = layer.merge, layer.unmerge
    y, W = layer(x), layer.base_layer.weight.clone()
    for count in (1, 2):
        fused_lora.accelerate(model)
        assert_close(layer(x), y, terms=64)
        assert report() == {"fused": count, "around": {}, "fallback": {}}
        layer.merge()
        assert layer.merge_state is not None
        layer.before()
        assert torch.equal(layer.base_layer.weight, W)
        fused_lora.restore(model)
        layer.merge()
        layer.before()
        layer.base_layer.weight.data.copy_(W)
        assert torch.equal(layer(x), y) and report() == {"fused": count, "around": {}, "fallback": {}}


def keep_device_forward(self, *args, **kwargs):
    return self.forward_origin(*args, **kwargs)


keep_device_forward.__module__ = "swift.tuners.peft"


def test_parts_whose_forward_ms_swift_has_wrapped(report):
    """They run fused, the remembered call, too. A forward of another module is not one of them."""
    model = fused_lora.accelerate(wrap(nn.Sequential(nn.Linear(K, N)), target_modules=["0"]))
    layer, x = model.base_model.model[0], torch.randn(3, K)
    y = layer(x)
    for part in (layer.lora_A["default"], layer.lora_B["default"]):
        part.forward_origin = part.forward
        part.forward = MethodType(keep_device_forward, part)
    assert [row.fused for row in integration.layer_report(copy.deepcopy(model))] == [True]
    assert torch.equal(layer(x), y) and torch.equal(torch.compile(model, backend="eager", fullgraph=True)(x), y)
    assert layer._remembered_forward(x, ["default"]) is not None
    assert report() == {"fused": 2, "around": {}, "fallback": {}}
    other = copy.deepcopy(layer.lora_A["default"])
    layer.lora_A["default"].forward = other.forward
    layer(x)
    layer.lora_A["default"].forward = MethodType(keep_device_forward, layer.lora_A["default"])
    layer.lora_A["default"].forward_origin = lambda x: x[..., : other.out_features]
    layer(x)
    assert report()["fallback"] == {"a part of the layer has its forward replaced": 2}


@pytest.mark.parametrize("kind", ["accelerated", "injected"])
def test_a_layer_whose_own_forward_was_replaced_is_not_reported_as_fused(kind):
    model = nn.Sequential(nn.Linear(K, N))
    if kind == "injected":
        layer = fused_lora.lora_layers(fused_lora.inject(model, fused_lora.LoraConfig(target_modules=["0"])))["0"]
    else:
        model = fused_lora.accelerate(wrap(model, target_modules=["0"]))
        layer = model.base_model.model[0]
    assert [row.fused for row in integration.layer_report(model)] == [True]
    layer.forward = lambda x: x
    assert [row.why_not for row in integration.layer_report(model)] == ["the layer has its forward replaced"]
    layer._hf_hook = None  # accelerate's calls the layer's own
    assert [row.fused for row in integration.layer_report(model)] == [True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_second_derivatives(dtype, report):
    """A gradient penalty, whose own gradients pass through the backward."""
    both = pair(dtype, {"a": {}, "b": {"r": 2}}, lora_bias=True)
    both.do(lambda m: m.base_model.set_adapter(["a", "b"]))
    both.do(lambda m: [p.requires_grad_(True) for p in m.parameters()] and None)
    found = ({}, {}, {})
    for _ in range(DRAWS):
        x = torch.randn(9, K).to(dtype)
        for results, layer in zip(found, layers(both), strict=True):
            data = x.to(layer.base_layer.weight.dtype).requires_grad_()
            loss = layer(data).square().sum()
            wanted = {"x": data, **dict(layer.named_parameters())}
            first = torch.autograd.grad(loss, list(wanted.values()), create_graph=True)
            penalty = sum(t.square().sum() for t in first[1:]) + first[0].pow(3).sum()
            second = torch.autograd.grad(penalty, list(wanted.values()))
            for name, tensor in zip([*wanted, *(f"{name} again" for name in wanted)], first + second, strict=True):
                results.setdefault(name, []).append(tensor.detach())
    for name in found[0]:
        mine, theirs, exact = (torch.stack(results[name]) for results in found)
        assert mine.dtype == theirs.dtype, name
        assert_no_worse(mine, theirs, exact, name=name, draws=True)
    assert report() == {"fused": DRAWS, "around": {}, "fallback": {}}


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_second_derivatives_with_dropout(p):
    layer = fused_lora.LoraLinear(
        nn.Linear(4, 3), r=2, lora_dropout=p, init_lora_weights=False, lora_bias=True
    ).double()
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(5, 4, dtype=torch.double, requires_grad=True)

    def call(x, A, B, W):
        torch.manual_seed(shifted(2))
        return lora_linear(x, W, None, [A], [B], [1.5], [p])

    W = layer.base_layer.weight.requires_grad_()
    assert torch.autograd.gradgradcheck(call, (x, A, B, W))
    assert torch.autograd.gradgradcheck(call, (x, A, B.detach(), W.detach()))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("needs_x", [False, True])
def test_second_derivatives_with_a_frozen_A(needs_x, p):
    """x is not kept then; it is reached through S."""
    A, B, W = (torch.randn(s, dtype=torch.double) for s in ((2, 4), (3, 2), (3, 4)))
    x = torch.randn(5, 4, dtype=torch.double, requires_grad=needs_x)

    def call(x, B):
        torch.manual_seed(shifted(2))
        return lora_linear(x, W, None, [A], [B], [1.5], [p]).pow(2)

    assert torch.autograd.gradgradcheck(call, (x, B.requires_grad_()))


ORDERS = {
    "frozen-A": lambda layer, x: [x, layer.lora_B["default"].weight],
    "frozen-A-and-x": lambda layer, x: [layer.lora_B["default"].weight],
    "all": lambda layer, x: [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight],
}


@pytest.mark.parametrize("wanted", ORDERS.values(), ids=ORDERS)
def test_derivatives_of_any_order(wanted, report):
    both, found = pair(), ({}, {}, {})
    for _ in range(DRAWS):
        x = torch.randn(9, K)
        for results, layer in zip(found, layers(both), strict=True):
            data = x.to(layer.base_layer.weight.dtype)
            tensors = wanted(layer, data)
            layer.requires_grad_(False)
            for tensor in tensors:
                tensor.requires_grad_(True)
            value = layer(data).sin().sum()
            for order in range(3):
                gradients = torch.autograd.grad(value, tensors, create_graph=True)
                value = sum(t.sin().sum() for t in gradients)
                for i, tensor in enumerate(gradients):
                    results.setdefault((order, i), []).append(tensor.detach())
    for name in found[0]:
        mine, theirs, exact = (torch.stack(results[name]) for results in found)
        assert_no_worse(mine, theirs, exact, name=str(name), draws=True)
    assert report() == {"fused": DRAWS, "around": {}, "fallback": {}}


@pytest.mark.parametrize("way", ["is_grads_batched", "vmap"])
def test_batches_of_gradients(way, report):
    both, found = pair(), ({}, {}, {})
    for _ in range(DRAWS):
        x, g = torch.randn(9, K), torch.randn(3, 9, N)
        for results, layer in zip(found, layers(both), strict=True):
            data = x.to(layer.base_layer.weight.dtype).requires_grad_()
            tensors, y = [data, *(p for p in layer.parameters() if p.requires_grad)], layer(data)
            if way == "vmap":
                gradients = torch.func.vmap(partial(torch.autograd.grad, y, tensors))(g.to(y.dtype))
            else:
                gradients = torch.autograd.grad(y, tensors, g.to(y.dtype), is_grads_batched=True)
            for i, tensor in enumerate(gradients):
                results.setdefault(i, []).append(tensor)
    for i in found[0]:
        assert_no_worse(*(torch.stack(results[i]) for results in found), name=str(i), draws=True)
    assert report() == {"fused": DRAWS, "around": {}, "fallback": {}}


WATCHED = {
    "base weight": (lambda layer: layer.base_layer.weight, []),
    "lora_A": (lambda layer: layer.lora_A["default"].weight, []),
    "lora_B": (lambda layer: layer.lora_B["default"].weight, ["lora_A"]),
}


@pytest.mark.parametrize("watched, frozen", WATCHED.values(), ids=WATCHED)
def test_what_the_backward_does_not_read_may_change(watched, frozen, report):
    """In the first layer of a model, whose input needs no gradient: an optimizer's step, weights made for inference."""
    both, found = pair(), ([], [], [])
    for part in frozen:
        for layer in layers(both):
            getattr(layer, part).requires_grad_(False)
    for _ in range(DRAWS):
        x, g = torch.randn(9, K), torch.randn(9, N)
        for gradients, layer in zip(found, layers(both), strict=True):
            y = layer(x.to(layer.base_layer.weight.dtype))
            with torch.no_grad():
                watched(layer).neg_()
            B = layer.lora_B["default"].weight
            gradients.append(*torch.autograd.grad(y, [B], g.to(y.dtype)))
    assert_no_worse(*map(torch.stack, found), name="lora_B", draws=True)
    assert report() == {"fused": DRAWS, "around": {}, "fallback": {}}


def test_a_base_made_in_inference_mode(report):
    both, found = pair(), ([], [], [])
    for layer in layers(both):
        with torch.inference_mode():
            weight = layer.base_layer.weight.clone()
        layer.base_layer.weight = nn.Parameter(weight, requires_grad=False)
    for _ in range(DRAWS):
        x, g = torch.randn(9, K), torch.randn(9, N)
        for gradients, layer in zip(found, layers(both), strict=True):
            y = layer(x.to(layer.base_layer.weight.dtype))
            gradients.append(*torch.autograd.grad(y, [layer.lora_B["default"].weight], g.to(y.dtype)))
    assert_no_worse(*map(torch.stack, found), name="lora_B", draws=True)
    assert report() == {"fused": DRAWS, "around": {}, "fallback": {}}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("made", [("lora_A", "lora_B"), ("lora_A",), ("lora_B",)], ids="-".join)
@pytest.mark.parametrize("fields", [{}, {"lora_bias": True}, {"use_dora": True}], ids=str)
def test_adapters_made_in_inference_mode(fields, made, autocast, report):
    """Torch keeps none for a backward and gives them no gradient; what autocast makes of them has one."""
    both, outcomes = pair(**fields), {}
    for layer, watched in itertools.product(layers(both)[:2], (False, True)):
        for part in made:
            for name, parameter in layer._modules[part]["default"].named_parameters():
                with torch.inference_mode():
                    setattr(layer._modules[part]["default"], name, nn.Parameter(parameter.clone()))
        if watched:
            layer.base_layer.register_forward_hook(lambda *_: None)
        for wanted in (False, True):
            x, found = torch.ones(9, K, requires_grad=wanted), [None]
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.no_grad():
                layer(x), layer(x)  # which is remembered
            # anew, for autocast of older torch gives casts that it made without gradients
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                try:
                    y = layer(x)
                    leaves = [x, *layer.parameters()] if y.requires_grad else []
                    leaves = [t for t in leaves if t.requires_grad]
                    found = [y, *torch.autograd.grad(y.sum(), leaves, allow_unused=True)] if leaves else [y]
                except RuntimeError as error:
                    outcomes.setdefault((watched, wanted), []).append(str(error))
                    continue
            outcomes.setdefault((watched, wanted), []).append(found)
    for ours, theirs in outcomes.values():
        assert type(ours) is type(theirs)
        if isinstance(ours, str):
            assert ours == theirs and not autocast
            continue
        assert [t is None for t in ours] == [t is None for t in theirs]
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None)
    assert report()["fallback"] == {"inference tensors with gradients": 4}


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}], ids=str)
def test_frozen_adapters_made_in_inference_mode_run_fused(fields, report):
    """No backward keeps them, until the base trains."""
    both, x = pair(**fields), torch.ones(9, K)
    both.do(lambda m: m.requires_grad_(False))
    layer = layers(both)[0]
    for part in (layer.lora_A, layer.lora_B):
        with torch.inference_mode():
            part["default"].weight = nn.Parameter(part["default"].weight.clone(), requires_grad=False)
    for _ in range(2):
        assert_close(layer(x), layers(both)[1](x), terms=64)
    assert report() == {"fused": 2, "around": {}, "fallback": {}}
    layer.base_layer.bias.requires_grad_()
    (found,) = torch.autograd.grad(layer(x).sum(), layer.base_layer.bias)
    assert_close(found, torch.full((N,), 9.0), terms=9)
    assert report()["fallback"] == {"inference tensors with gradients": 1}


@pytest.mark.parametrize(
    "route, turned",
    [
        *(("eager", turned) for turned in ("x and g", "A", "B", "W")),
        pytest.param("kernels", "x and g", marks=pytest.mark.kernel),
    ],
)
def test_tensors_with_the_negative_bit(route, turned, request):
    """Their memory holds the numbers with the other sign, as that of the imaginary part of a lazy conjugate does."""
    device = torch.device("cpu")
    if route == "kernels":
        request.getfixturevalue("kernels_on")
        device = request.getfixturevalue("device")
    x, g = torch.randn(40, K, device=device), torch.randn(40, N, device=device)
    W, A, B = (torch.randn(s, device=device) for s in ((N, K), (4, K), (N, 4)))
    seeds, found = torch.tensor([3], device=device), []
    for turn in (lambda t: t, lambda t: torch._neg_view(-t)):
        given = {"x": x, "g": g, "A": A, "B": B, "W": W}
        given |= {name: turn(given[name]) for name in turned.split(" and ")}
        data, A_, B_ = (given[name].detach().requires_grad_() for name in "xAB")
        y = lora_linear(data, given["W"], None, [A_], [B_], [1.5], [0.4], seeds)
        found.append([y.detach(), *torch.autograd.grad(y, [data, A_, B_], given["g"])])
    assert turn(x).is_neg() and all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# ---- left to PEFT


class OtherLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


class Wrapped(torch.Tensor):
    pass


def other_linear(layer):
    old = layer.lora_A["default"]
    layer.lora_A["default"] = new = OtherLinear(K, old.out_features, bias=False).to(old.weight.dtype)
    new.weight = old.weight


def wrapped_weight(layer):
    layer.lora_A["default"].weight = nn.Parameter(layer.lora_A["default"].weight.data.as_subclass(Wrapped))


def biased_A(layer):
    layer.lora_A["default"].bias = nn.Parameter(torch.ones(4, dtype=layer.lora_A["default"].weight.dtype))


def of_layer(layer, *shape):
    return torch.ones(shape, dtype=layer.base_layer.weight.dtype)


def base_without_a_weight(layer):
    layer.base_layer, layer.lora_B["default"] = nn.Identity(), nn.Linear(4, K).to(layer.base_layer.weight.dtype)
    nn.init.eye_(layer.lora_B["default"].weight)
    nn.init.zeros_(layer.lora_B["default"].bias)


def a_product_for_dropout(layer):
    layer.lora_dropout["default"] = nn.Linear(K, K, bias=False).to(layer.base_layer.weight.dtype)
    nn.init.eye_(layer.lora_dropout["default"].weight)
    layer.lora_dropout["default"].weight.data *= 2


def turned_A(layer):
    old = layer.lora_A["default"].weight.data
    layer.lora_A["default"] = new = Conv1D(4, K).to(old.dtype)
    new.weight.data, new.bias.data = old.t().contiguous(), torch.zeros(4, dtype=old.dtype)


def bias_as_an_attribute(part):
    def change(layer):
        module = part(layer)
        del module.bias
        vars(module)["bias"] = of_layer(layer, N)

    return change


def bias_as_a_buffer(layer):
    bias = layer.base_layer.bias.data
    del layer.base_layer.bias
    layer.base_layer.register_buffer("bias", bias)


def wrapped_bias(layer):
    layer.base_layer.bias = nn.Parameter(layer.base_layer.bias.data.as_subclass(Wrapped), requires_grad=False)


def base_bias(*shape):
    return lambda layer: setattr(layer.base_layer, "bias", nn.Parameter(of_layer(layer, *shape)))


def sparse_base(layer):
    layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.data.to_sparse_csr(), requires_grad=False)


def scaled_by(value):
    return lambda layer: layer.scaling.update({"default": value})


CHANGES = {
    "a part of the layer is a Identity": [lambda layer: layer.lora_B.update({"default": nn.Identity()})],
    "a part of the layer is a Conv1D": [turned_A],
    "a bias is not a parameter of its own": [bias_as_an_attribute(lambda layer: layer.lora_B["default"])],
    "the scaling is no number": [
        scaled_by(torch.arange(N)),
        scaled_by(torch.arange(5).unsqueeze(1)),
        scaled_by(torch.arange(4)),  # PEFT's error: not one number for each rank
        scaled_by(float("nan")),
        scaled_by(1e39),  # of which float32 makes inf
        scaled_by(torch.tensor(float("nan"))),
        scaled_by(None),
    ],
    "a hook on a part of the layer": [
        lambda layer: layer.lora_A["default"].register_forward_pre_hook(lambda m, args: (args[0] * 2,)),
        lambda layer: layer.lora_B["default"].register_forward_hook(lambda m, args, y: y * 3),
        lambda layer: layer.lora_dropout["default"].register_forward_hook(lambda m, args, y: y * 3),
        lambda layer: layer.lora_B["default"].register_full_backward_hook(lambda m, dx, dy: (dx[0] * 2,)),
        lambda layer: nn.utils.weight_norm(layer.lora_A["default"]),
    ],
    "a part of the layer has its forward replaced": [
        lambda layer: setattr(layer.lora_B["default"], "forward", lambda x: x.sum(-1, keepdim=True).expand(-1, N)),
    ],
    "a part of the layer is a OtherLinear": [other_linear],
    "a part of the layer is a ParametrizedLinear": [
        lambda layer: parametrize.register_parametrization(layer.lora_A["default"], "weight", Doubled()),
    ],
    "a part of the layer is a Dropout1d": [lambda layer: layer.lora_dropout.update({"default": nn.Dropout1d(0.0)})],
    "dropout works in place": [
        lambda layer: layer.lora_dropout.update({"default": nn.Dropout(0.0, inplace=True).eval()}),
    ],
    "lora_A has a bias": [biased_A],
    "lora_A and lora_B differ in dtype": [lambda layer: layer.lora_B.to(torch.float16)],
    "a weight is a Wrapped": [wrapped_weight],
    "adapters are disabled": [lambda layer: layer.enable_adapters(False)],
    "no active adapter in this layer": [lambda layer: layer.set_adapter("nobody")],
    "a part of the layer is a Linear": [a_product_for_dropout],
}


BASES = {
    "the base layer is a Identity": [base_without_a_weight],
    "a bias is not a parameter of its own": [
        bias_as_an_attribute(lambda layer: layer.base_layer),
        bias_as_a_buffer,
    ],
    "a bias is not a vector of out_features": [base_bias(1), base_bias(), base_bias(5, N)],
    "a bias is a Wrapped": [wrapped_bias],
    "a bias is torch.int64": [
        lambda layer: setattr(layer.base_layer, "bias", nn.Parameter(torch.ones(N, dtype=torch.int64), False))
    ],
    "a weight is torch.sparse_csr": [sparse_base],
}


@pytest.mark.parametrize("change, reason", [(change, reason) for reason, some in BASES.items() for change in some])
@pytest.mark.filterwarnings("ignore")
def test_unusual_base_layers_are_called_as_they_are(change, reason, report):
    both, outcomes = pair(), []
    for layer in layers(both):
        change(layer)
    [row] = integration.layer_report(both.ours)
    assert str(row) == f"fused around the base: {reason}"
    x = torch.randn(5, K)
    for layer in layers(both)[:2]:
        data = x.clone().requires_grad_()
        try:
            y = layer(data)
            outcomes.append([y, *torch.autograd.grad(y.sum(), [data])])
        except (RuntimeError, TypeError) as error:
            outcomes.append(f"{type(error)} {error}")
    assert not report()["fused"]
    if isinstance(outcomes[0], str):
        assert outcomes[0] == outcomes[1]
    else:
        for mine, other in zip(*outcomes, strict=True):
            assert type(mine) is type(other)
            assert_close(mine.as_subclass(torch.Tensor), other.as_subclass(torch.Tensor), terms=2 * K + N)


def test_where_no_kernel_draws_masks_peft_s_dropout_runs(monkeypatch):
    """On a GPU without Triton, or another device; a layer that drops nothing runs fused there."""
    assert guard.draws_masks(torch.device("cpu")) and not guard.draws_masks(torch.device("mps"))
    monkeypatch.setattr(guard, "HAS_TRITON", False)
    assert not guard.draws_masks(torch.device("cuda"))
    monkeypatch.setattr(peft_linear, "draws_masks", lambda device: False)
    both, x = pair(lora_dropout=0.5), torch.randn(5, K)
    outputs = []
    for layer in layers(both)[:2]:
        torch.manual_seed(shifted(3))
        outputs.append(layer.train()(x))
    assert torch.equal(*outputs)
    [row] = integration.layer_report(both.ours)
    assert row.why_not == "no kernel draws dropout masks on this device"
    layers(both)[0].eval()
    assert integration.layer_report(both.ours)[0].fused


def test_a_device_that_is_neither_a_cpu_nor_cuda_s_runs_peft_s_forward(monkeypatch):
    """Its merges are exact all the same; tests/ops/test_merge.py has them."""
    assert [why_not_device(torch.device(kind)) for kind in ("cpu", "cuda", "meta")] == [None] * 3
    assert why_not_device(torch.device("mps")) == "device mps"
    both, x = pair(), torch.randn(5, K)
    monkeypatch.setattr(peft_linear, "why_not_device", lambda device: "device xpu")
    assert torch.equal(*(layer(x) for layer in layers(both)[:2]))
    [row] = integration.layer_report(both.ours)
    assert row.why_not == "device xpu"


@pytest.mark.parametrize(
    "change, reason", [(change, reason) for reason, changes in CHANGES.items() for change in changes]
)
@pytest.mark.filterwarnings("ignore")
def test_unusual_layers_are_left_to_peft(change, reason, report):
    both = pair()
    for layer in layers(both):
        change(layer)
    ours, theirs, _ = layers(both)
    [row] = integration.layer_report(both.ours)
    assert not row.fused and row.why_not == reason
    x = torch.randn(5, K)
    outcomes = []
    for layer in (ours, theirs):
        data = x.clone().requires_grad_()
        try:
            y = layer(data)
            found = [y, *torch.autograd.grad(y.square().sum(), [data])]
        except (RuntimeError, TypeError) as error:
            found = f"{type(error)} {error}"
        outcomes.append(found)
    assert report() == {"fused": 0, "around": {}, "fallback": {reason: 1}}
    if isinstance(outcomes[0], str):
        assert outcomes[0] == outcomes[1]
    else:
        for mine, other in zip(*outcomes, strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=0, equal_nan=True)


def test_shapes_that_broadcast_are_left_to_peft(report):
    both = pair()
    for layer in layers(both):
        layer.lora_B["default"].weight = nn.Parameter(of_layer(layer, 1, 4))
    assert_like_peft(both, torch.randn(5, K), fused=False)
    assert report() == {"fused": 0, "around": {}, "fallback": {"shapes differ": DRAWS}}


def bias_of_B(layer):
    layer.lora_B["default"].bias = nn.Parameter(torch.ones(N, dtype=layer.lora_B["default"].weight.dtype))


PEFTS_WAYS = {
    "p is a tensor": ({}, lambda layer: set_p(layer.train(), torch.tensor(1.0))),
    "p is no probability": ({}, lambda layer: set_p(layer.train(), 1.5)),
    "dropout that trains in DoRA that does not": ({"use_dora": True}, lambda layer: set_p(layer.eval(), 0.9).train()),
    "the same under a hook": (
        {"use_dora": True},
        lambda layer: (set_p(layer.eval(), 0.9).train(), layer.lora_A.default.register_forward_hook(lambda *_: None)),
    ),
    "a bias that lora_B got later, under DoRA": ({"use_dora": True}, bias_of_B),
}


def set_p(layer, p):
    layer.lora_dropout["default"] = nn.Dropout()
    layer.lora_dropout["default"].p = p
    return layer.lora_dropout["default"].train(layer.training)


@pytest.mark.parametrize("fields, change", PEFTS_WAYS.values(), ids=PEFTS_WAYS)
def test_parts_that_were_changed_count_as_in_peft(fields, change):
    outcomes, x = [], torch.randn(5, K)
    for layer in layers(pair(**fields))[:2]:
        layer(x)
        change(layer)
        try:
            y = layer(x)
            outcomes.append([y, *torch.autograd.grad(y.sum(), [p for p in layer.parameters() if p.requires_grad])])
        except ValueError as error:
            outcomes.append(str(error))
    if isinstance(outcomes[1], str):
        assert outcomes[0] == outcomes[1]
    else:
        for ours, theirs in zip(*outcomes, strict=True):
            assert_close(ours, theirs, terms=64)


@pytest.mark.parametrize("x", [None, [1.0], np.ones((2, K))], ids=lambda x: type(x).__name__)
def test_an_input_that_is_no_tensor_raises_as_in_peft(x):
    pair().do(lambda m: m(x), raises=TypeError)


@pytest.mark.parametrize("fields, frozen", [({}, ["lora_A"]), ({"lora_dropout": 0.5}, [])])
def test_an_input_made_in_inference_mode(fields, frozen, report):
    """It cannot be kept for a backward; PEFT keeps S, or what dropout made of it."""
    with torch.inference_mode():
        x = torch.randn(65, K)
    for layer in layers(pair(**fields))[:2]:
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_("lora_" in name and not any(part in name for part in frozen))
        layer.train()(x).sum().backward()
        assert layer.lora_B["default"].weight.grad.isfinite().all()
    assert report() == {"fused": 0, "around": {}, "fallback": {"inference tensors with gradients": 1}}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64])
def test_an_input_of_another_dtype_raises_as_in_peft(dtype, report):
    both, x = pair(), torch.ones(2, K, dtype=dtype)
    for model in both.models[:2]:
        with pytest.raises(RuntimeError) as error:
            model(x)
        both.messages = (*getattr(both, "messages", ()), str(error.value))
    assert len(set(both.messages)) == 1 and report()["fused"] == 0


@pytest.mark.parametrize("shape", [(3, K + 1), (), (0,)])
def test_an_input_of_another_shape_raises_as_in_peft(shape, report):
    both = pair()
    both.do(lambda m: m(torch.ones(shape, dtype=next(m.parameters()).dtype)), raises=RuntimeError)
    assert report()["fused"] == 0


@pytest.mark.parametrize("arguments", [((1,), {}), ((), {"scale": 2.0})])
def test_further_arguments_go_to_the_base_layer(arguments, report):
    both, (args, kwargs) = pair(), arguments
    both.do(lambda m: m.base_model.model[0](torch.ones(2, K), *args, **kwargs), raises=TypeError)
    assert report() == {"fused": 0, "around": {}, "fallback": {}}  # the base layer raised


def test_arguments_that_are_none_run_fused(report):
    layers(pair())[0](torch.ones(2, K), adapter_names=None, alora_offsets=None)
    assert report() == {"fused": 1, "around": {}, "fallback": {}}


def test_casting_of_the_input_switched_off(report):
    both = pair(torch.bfloat16)
    with peft.helpers.disable_input_dtype_casting(both.ours), peft.helpers.disable_input_dtype_casting(both.theirs):
        for model in both.models[:2]:
            with pytest.raises(RuntimeError, match="dtype"):
                model(torch.ones(2, K, dtype=torch.bfloat16))
    assert report() == {"fused": 0, "around": {}, "fallback": {"casting of the input is switched off": 1}}
    both = pair()
    with peft.helpers.disable_input_dtype_casting(both.ours):
        assert_like_peft(both, torch.randn(3, K), fused=True)  # nothing to cast


def test_float64_under_autocast(report):
    both = pair(torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert_like_peft(both, torch.randn(3, K, dtype=torch.float64), fused=False, draws=1)
    assert report() == {"fused": 0, "around": {}, "fallback": {"float64 under autocast": 1}}


def test_a_hook_on_all_modules_sees_the_parts(report):
    both, seen = pair(), []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda m, args, y: seen.append(type(m).__name__))
    try:
        for model in both.models[:2]:
            model(torch.ones(2, K))
            both.seen, seen = getattr(both, "seen", []) + [list(seen)], seen
            seen.clear()
        assert "do not: a hook on all modules" in str(fused_lora.explain(both.ours))
    finally:
        handle.remove()
    assert all(row.fused for row in integration.layer_report(both.ours))
    assert both.seen[0] == both.seen[1] and len(both.seen[0]) >= 6
    assert report()["fallback"] == {"a hook on all modules": 1}


def test_a_hook_on_all_modules_sees_the_parts_of_a_mixed_batch(report):
    both, seen, found = pair(adapters={"a": {}, "b": {}}), [], []
    both.do(lambda m: m.eval())
    handle = torch.nn.modules.module.register_module_forward_hook(lambda m, args, y: seen.append(type(m).__name__))
    try:
        for model in both.models[:2]:
            seen.clear()
            with torch.no_grad():
                model(torch.ones(2, K), adapter_names=["a", "b"])
            found.append([*seen])
    finally:
        handle.remove()
    assert found[0] == found[1] and found[0].count("Linear") == 6  # the layer, its base, two of A and B
    assert report()["fallback"] == {"a batch of several adapters": 1}


def test_transforms_tracing_and_export(report):
    both, x = pair(), torch.randn(3, K)
    ours, theirs, _ = layers(both)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = [
            (
                torch.func.vmap(layer)(torch.stack([x, x])),
                torch.func.grad(lambda x, layer=layer: layer(x).sum())(x),
                torch.func.jacrev(layer)(x[0]),
                torch.func.jvp(layer, (x,), (x,))[1],
                torch.jit.trace(layer, x, check_trace=False)(x),
                torch.export.export(layer, (x,)).module()(x),
                torch.export.export(layer, (x,), strict=True).module()(x),
            )
            for layer in (ours, theirs)
        ]
    for mine, other in zip(*results, strict=True):
        assert_close(mine, other, terms=64)
    assert report()["fused"] == 0
    exported = torch.export.export(ours, (x,))
    assert "fused_lora" not in str(exported.graph)  # other programs can open the file


def test_forward_mode_differentiation(report):
    both, x = pair(), torch.randn(3, K)
    tangents = []
    for layer in layers(both)[:2]:
        with torch.autograd.forward_ad.dual_level():
            y = layer(torch.autograd.forward_ad.make_dual(x, x))
            tangents.append(torch.autograd.forward_ad.unpack_dual(y).tangent)
    assert torch.equal(*tangents) and report()["fallback"] == {"forward-mode differentiation": 1}


def test_inputs_that_are_no_plain_tensors(report):
    both = pair()
    ours, theirs, _ = layers(both)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nested = torch.nested.nested_tensor([torch.ones(2, K), torch.ones(3, K)])
        assert all(torch.equal(a, b) for a, b in zip(ours(nested).unbind(), theirs(nested).unbind(), strict=True))
    assert ours(torch.ones(2, K).as_subclass(Wrapped)).shape == (2, N)
    meta = copy.deepcopy(ours).to("meta")
    assert meta(torch.ones(2, K, device="meta")).is_meta
    assert sum(report()["fallback"].values()) == 3 and report()["fused"] == 0


@pytest.mark.parametrize("shape", [(1, K), (3, K), (2, 32, K), (65, K)])
def test_rows_of_a_decode_step(shape, report):
    both, found = pair(), ([], [], [])
    with torch.no_grad():
        for _ in range(DRAWS):
            x = torch.randn(shape)
            for results, layer in zip(found, layers(both), strict=True):
                results.append(layer(x.to(layer.base_layer.weight.dtype)))
    assert_no_worse(*map(torch.stack, found), name="y", draws=True)
    assert report() == {"fused": DRAWS, "around": {}, "fallback": {}}


# ---- what a layer remembers of its last calls


def _other_strides(layer):
    weight = layer.lora_A["default"].weight
    weight.data = weight.detach().t().contiguous().t()


BETWEEN_CALLS = {
    "nothing": lambda layer: None,
    "values": lambda layer: layer.lora_B["default"].weight.data.fill_(0.25),
    "load_state_dict": lambda layer: layer.load_state_dict({k: v + 1 for k, v in layer.state_dict().items()}),
    "other parameters": lambda layer: setattr(layer.base_layer, "weight", nn.Parameter(torch.ones(N, K))),
    "data with other strides": _other_strides,
    "no bias": lambda layer: setattr(layer.base_layer, "bias", None),
    "another base layer": lambda layer: setattr(layer, "base_layer", nn.Linear(K, N).requires_grad_(False)),
    "a wider dtype": lambda layer: layer.lora_A.double() and layer.lora_B.double(),
    "the scaling": lambda layer: layer.set_scale("default", 3.0),
    "a scaling by hand": lambda layer: layer.scaling.update(default=5),
    "no gradients": lambda layer: layer.requires_grad_(False),
    "a hook": lambda layer: layer.lora_A["default"].register_forward_hook(lambda module, args, y: y * 2),
    "a hook on the base": lambda layer: layer.base_layer.register_forward_pre_hook(lambda module, args: args[0] + 1),
    "a forward": lambda layer: setattr(layer.lora_B["default"], "forward", lambda x: x.sum() * torch.ones(N)),
    "a parametrization": lambda layer: parametrize.register_parametrization(layer.base_layer, "weight", _Doubled()),
    "a merge": lambda layer: layer.merge(),
    "no adapter": lambda layer: layer.enable_adapters(False),
    "another adapter": lambda layer: layer.set_adapter("b"),
    "two adapters": lambda layer: layer.set_adapter(["default", "b"]),
    "a deleted adapter": lambda layer: layer.delete_adapter("default"),
    "all is dropped": lambda layer: setattr(layer.lora_dropout["default"].train(), "p", 1.0),
}


class _Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


@pytest.mark.parametrize("change", BETWEEN_CALLS.values(), ids=BETWEEN_CALLS)
def test_changes_between_calls_are_seen(change):
    both = pair(adapters={"default": {"lora_dropout": 0.5}, "b": {"r": 2}})
    x = torch.randn(5, K, requires_grad=True)
    for layer in layers(both)[:2]:
        layer.eval().set_adapter("default")
        for _ in range(3):
            layer(x)
        torch.manual_seed(shifted(5))
        change(layer)
    for _ in range(2):
        ours, theirs = (layer(x) for layer in layers(both)[:2])
        assert_close(ours, theirs, terms=64)
        assert ours.dtype == theirs.dtype and ours.requires_grad == theirs.requires_grad


WHOLE_CALLS = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": partial(torch.autocast, "cpu", torch.bfloat16),
}


@pytest.mark.parametrize("name", WHOLE_CALLS)
def test_modes_between_calls_are_seen(name):
    both, x = pair(), torch.randn(2, 5, K)
    for mode in (nullcontext, WHOLE_CALLS[name]) * 2:
        with mode():
            ours, theirs = (layer(x) for layer in layers(both)[:2])
            assert_close(ours, theirs, terms=64)
            assert ours.dtype == theirs.dtype and ours.requires_grad == theirs.requires_grad
            assert ours.is_inference() == theirs.is_inference()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("shape", [(5, K), (2, 5, K)])
def test_a_call_like_the_last_one_asks_nothing(shape, p, bias, report, monkeypatch):
    both = pair(base=nn.Linear(K, N, bias=bias), lora_dropout=p)
    layer, own = layers(both)[0].train(), fused_lora.LoraLinear(nn.Linear(K, N, bias=bias), lora_dropout=p)
    for each in (layer, own):
        each(torch.randn(shape, requires_grad=True))

    def asked(*args):
        raise AssertionError("asked again")

    for module in ("fused_lora.integrations.peft_linear", "fused_lora.modules.mixin"):
        monkeypatch.setattr(f"{module}.why_not_plain", asked)
    monkeypatch.setattr("fused_lora.ops.linear.op.lora_linear", asked)
    for rows in (1, 7):
        for each in (layer, own):
            each(torch.randn(rows, *shape[1:], requires_grad=True)).sum().backward()
    assert report()["fused"] == 3


def test_a_scaling_of_its_own_for_each_call_asks_nothing(report, monkeypatch):
    """As of a schedule, or the ``scale`` of diffusers."""
    both, x = pair(), torch.randn(5, K)
    ours, theirs = layers(both)[:2]
    ours(x)

    def asked(*args):
        raise AssertionError("asked again")

    with monkeypatch.context() as patch:
        patch.setattr("fused_lora.integrations.peft_linear.why_not_plain", asked)
        for scale in (*np.linspace(0, 1, 20), -3.0, 0.25):
            for layer in (ours, theirs):
                layer.set_scale("default", scale)
            assert_close(ours(x), theirs(x), terms=64)
    assert report()["fused"] == 23
    for scale in (math.nan, 1e300):  # which no operator takes
        ours.scaling["default"] = scale
        ours(x)
    assert report() == {"fused": 23, "around": {}, "fallback": {"the scaling is no number": 2}}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_remember_nothing(copied):
    layer, x = layers(pair())[0], torch.randn(5, K)
    y = layer(x)
    assert layer.__dict__["_memory"] is not None
    twin = copied(layer)
    assert twin.__dict__["_memory"] is None
    assert torch.equal(twin(x), y) and torch.equal(twin(x), y)


# ---- the report


def test_layer_report_names_what_to_do():
    with quiet():
        model = peft.get_peft_model(
            nn.Sequential(nn.Embedding(4, K), nn.Linear(K, N)), peft.LoraConfig(target_modules=["0", "1"])
        )
    rows = integration.layer_report(model)
    assert [(row.path, row.kind, row.why_not) for row in rows] == [
        ("base_model.model.0", "peft lora.Embedding", "not accelerated: call fused_lora.accelerate(model)"),
        ("base_model.model.1", "peft lora.Linear", "not accelerated: call fused_lora.accelerate(model)"),
    ]
    fused_lora.accelerate(model)
    assert [row.fused for row in integration.layer_report(model)] == [True, True]
    model.merge_adapter()
    assert integration.layer_report(model)[1].why_not == "merged: the base layer alone"
    assert integration.layer_report(nn.Linear(2, 2)) == []
    with pytest.raises(TypeError, match="model"):
        integration.layer_report("model")


def test_layer_report_of_an_injected_model():
    net = nn.Sequential(nn.Linear(K, K), nn.Linear(K, K), nn.Linear(K, K), nn.Linear(K, N))
    fused_lora.inject(net, fused_lora.LoraConfig(target_modules=["0", "1", "2", "3"]))
    net[0].lora_A["default"].register_forward_hook(lambda *_: None)
    net[1].merge()
    net[2].set_adapter([])
    assert [row.why_not for row in integration.layer_report(net)] == [
        "a hook on a part of the layer", "merged: the base layer alone", "no active adapter in this layer", None
    ]  # fmt: skip
    net[3].disable_adapters = True
    assert integration.layer_report(net)[3].why_not == "adapters are disabled"


def test_two_nested_layers(report):
    """A LoRA layer whose base is another PEFT layer: the inner one fused, the outer one around it."""
    both = pair()
    outer = [copy.deepcopy(layer) for layer in layers(both)[:2]]
    for layer, inner in zip(outer, layers(both), strict=False):
        layer.base_layer = inner
    x = torch.randn(2, K)
    assert_close(outer[0](x), outer[1](x), terms=64)
    assert report() == {"fused": 1, "around": {"the base layer is a Linear": 1}, "fallback": {}}
